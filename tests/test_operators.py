"""The operator interface: its laws for a network and for a matrix, and the case in which the two are one."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import landscape, randomise, seeded, tiny
from PIL import Image

import diagnostics
import operators
from diagnostics import IDENTITIES, SYMMETRY, penrose
from operators import LinearOperator, as_operator, make_operator
from utils import InputError


def mask_file(folder, height: int = 4, width: int = 8):
    """Half of it known, in no order."""
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(3)) > 0.5
    Image.fromarray(mask.byte().mul(255).numpy()).save(folder / "mask.png")
    return folder / "mask.png"


SPECS = ["sr2", "sr4", "grey", "inpaint:MASK", "grey*sr2", "sr2*grey", "inpaint:MASK*grey", "grey*inpaint:MASK"]


@pytest.fixture(params=[tiny, landscape, "sr2", "inpaint:MASK*grey"], ids=["tiny", "landscape", "sr2", "mask"])
def operator(request, tmp_path):
    """Of logits, of a map, and linear ones."""
    if callable(request.param):
        return as_operator(randomise(request.param().double(), seeded(0)).eval())
    return make_operator(request.param.replace("MASK", str(mask_file(tmp_path))), (3, 4, 8))


def points(operator, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        for shape in (operator.in_shape, operator.out_shape)
    )


@torch.no_grad()
def test_the_pseudo_inverse_is_one_and_back_projection_reaches_y_and_strength_0_stays(operator):
    x, y = points(operator)
    assert operator.pinv(y).shape[1:] == operator.in_shape
    torch.testing.assert_close(operator.A(operator.pinv(y)), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(operator.A(operator.back_project(x, y)), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(operator.back_project(x, y, 0.0), x, rtol=1e-9, atol=1e-9)
    by_image = operator.back_project(x, y, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    for i, strength in enumerate((0.0, 0.5, 1.0)):
        torch.testing.assert_close(by_image[i], operator.back_project(x, y, strength)[i], rtol=1e-9, atol=1e-9)
    move = operator.towards(y)(x)
    torch.testing.assert_close(move.y, operator.A(x))
    torch.testing.assert_close(move(0.7, torch.tensor([2])), operator.back_project(x, y, 0.7)[2:])


def test_distance_and_loss_are_per_image_zero_or_least_on_the_target(operator):
    x, y = points(operator)
    assert (operator.distance(y, y) == 0).all() and operator.distance(y, y + 1).shape == (3,)
    assert (operator.distance(y, y + 1) > 0).all()
    x.requires_grad_()
    loss = operator.loss(operator.A(x), y)
    assert loss.shape == (3,) and (loss > operator.loss(y, y)).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert operator.loss(operator.A(x - 0.01 * grad), y).sum() < loss.sum()


@torch.no_grad()
def test_float32_reaches_the_target_to_rounding_whatever_surrounds_it(operator):
    operator = operator if isinstance(operator, LinearOperator) else as_operator(operator.model.float())
    x, y = (part.float() for part in points(operator))
    with torch.autocast("cpu", torch.bfloat16):
        moved = operator.back_project(x, y)
    assert moved.dtype == torch.float32
    tolerance = 4e-6 if isinstance(operator, LinearOperator) else 1e-4
    torch.testing.assert_close(operator.A(moved), y, rtol=tolerance, atol=tolerance)


def test_a_folder_called_as_an_operator_is_does_not_take_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sr4").mkdir()
    linear = make_operator("sr4", (3, 8, 8))
    assert as_operator(linear) is linear and isinstance(linear, LinearOperator)


# --- Linear operators ------------------------------------------------------------------------------------------------


def as_matrix(function, shape) -> torch.Tensor:
    """A linear function of images of this shape as a matrix."""
    n = torch.Size(shape).numel()
    return function(torch.eye(n, dtype=torch.float64).view(n, *shape)).flatten(1).T


@pytest.fixture(params=SPECS)
def linear(request, tmp_path):
    return make_operator(request.param.replace("MASK", str(mask_file(tmp_path))), (3, 4, 8))


@torch.no_grad()
def test_the_four_penrose_identities(linear):
    """By A and A+ as matrices, which also are `torch.linalg.pinv` of each other; and all singular values are one."""
    a, a_plus = as_matrix(linear.A, linear.in_shape), as_matrix(linear.pinv, linear.out_shape)
    tight = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(a @ a_plus @ a, a, **tight)
    torch.testing.assert_close(a_plus @ a @ a_plus, a_plus, **tight)
    torch.testing.assert_close((a @ a_plus).T, a @ a_plus, **tight)
    torch.testing.assert_close((a_plus @ a).T, a_plus @ a, **tight)
    torch.testing.assert_close(a_plus, torch.linalg.pinv(a), **tight)
    torch.testing.assert_close(a @ a.T, linear.gain**2 * torch.eye(len(a), dtype=a.dtype), **tight)


@torch.no_grad()
def test_nlbp_of_a_linear_chain_is_ddnms_update(linear):
    """The closed form of an SPNN, over the chain's own completion, and ``x + A+(y - A x)``: DDNM, equation 13."""
    x, y = points(linear)
    expected = x + linear.pinv(y - linear.A(x))
    torch.testing.assert_close(linear.chain.back_project(x, y), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(linear.back_project(x, y), expected, rtol=0, atol=1e-13)


class Skewed(operators.Weights):
    """A right inverse that is not the Moore-Penrose one: it puts back what is not orthogonal to what is kept."""

    def natural_latent(self, y):
        return super().natural_latent(y) + y.mean(1, keepdim=True)


def test_the_report_tells_a_right_inverse_that_is_not_moores_and_penroses():
    linear = operators.LinearChain([(Skewed, {"rows": [operators.GREY]})], (3, 4, 8))
    found = penrose(linear.chain, points(linear)[0], precision="float64")
    assert all(found[name]["relative_max"] < 1e-13 for name in IDENTITIES)
    assert found["symmetric"]["relative_max"] > 1e-2
    assert SYMMETRY.keys().isdisjoint(penrose(tiny(), torch.zeros(2, 3, 4, 4)))  # there is nothing like it


def test_the_diagnostics_command_takes_a_word(tmp_path, capsys):
    for i in range(3):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    mask = mask_file(tmp_path, 8, 16)
    where = ["--dataset_path", str(tmp_path), "--device", "cpu", "--json", str(tmp_path / "said.json")]
    words = ["--operator", "sr2*grey", "--img_size", "16", "--samples", "2"]
    assert diagnostics.main([*where, *words]) == 0
    assert "(A+ A)^T = A+ A" in capsys.readouterr().out
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["settings"]["operator"] == "sr2*grey" and said["penrose"]["float64"]["images"] == 2
    for precision, most in {"float64": 1e-13, "float32": 2e-6}.items():
        found = said["penrose"][precision]
        assert all(found[name]["relative_max"] < most for name in IDENTITIES | SYMMETRY) and found["lost"] > 0.1
    for flags, message in (
        (f"--operator inpaint:{mask} --img_size 16", r"mask is \(8, 16\), the images it would cover are \(16, 16\)"),
        ("", "give --checkpoint or --operator"),
        ("--operator sr2 --checkpoint g.pth", "one of them"),
    ):
        with pytest.raises(InputError, match=message):
            diagnostics.main([*where, *flags.split()])


@torch.no_grad()
def test_what_the_words_measure(tmp_path):
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = mask_file(tmp_path)
    known = torch.from_numpy(np.array(Image.open(mask))) > 0
    grey = (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).view(3, 1, 1)).sum(1, keepdim=True)
    expected = {
        "sr2": torch.nn.functional.avg_pool2d(x, 2),
        "sr4": torch.nn.functional.avg_pool2d(x, 4),
        "grey": grey,
        "grey*sr2": torch.nn.functional.avg_pool2d(grey, 2),
        f"inpaint:{mask}": x[:, :, known][..., None],
        f"inpaint:{mask}*grey": grey[:, :, known][..., None],
    }
    for spec, y in expected.items():
        torch.testing.assert_close(make_operator(spec, (3, 4, 8)).A(x), y, rtol=0, atol=1e-14)
    filled = make_operator(f"inpaint:{mask}", (3, 4, 8)).pinv(expected[f"inpaint:{mask}"])
    torch.testing.assert_close(filled, x * known)


def test_operators_are_copied_pickled_and_transformed(operator):
    x, y = points(operator, 2)
    with torch.no_grad():
        expected = operator.back_project(x, y)
        for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
            assert torch.equal(other.back_project(x, y), expected)
        alone = torch.vmap(lambda x, y: operator.back_project(x[None], y[None])[0])(x, y)
        torch.testing.assert_close(alone, expected)
        half = operator.back_project(x.bfloat16(), y.bfloat16(), torch.tensor([1.0, 0.5], dtype=torch.float64))
        assert half.isfinite().all() and half.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("spec, said", [
    ("sr3", "sr3: .*3.* must divide the size, got 4x8"), ("sr2*inpaint:MASK", "must divide the size"),
    ("gray", "no such operator, did you mean 'grey'"), ("inpaint:nowhere.png", "No such file"),
    ("grey*grey", r"takes images of shape \(3, H, W\), got \(1, 4, 8\)"), ("inpaint:PLAIN", "32 of 32"),
    ("inpaint:MASK*sr2", r"mask is \(4, 8\), the images it would cover are \(2, 4\)"),
])  # fmt: skip
def test_words_that_do_not_fit_are_refused_with_both_shapes(spec, said, tmp_path):
    Image.new("L", (8, 4), 255).save(tmp_path / "plain.png")
    files = {"MASK": str(mask_file(tmp_path)), "PLAIN": str(tmp_path / "plain.png")}
    with pytest.raises(InputError, match=said):
        make_operator(re.sub("MASK|PLAIN", lambda name: files[name[0]], spec), (3, 4, 8))
