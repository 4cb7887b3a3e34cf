"""The operator interface: its laws for a network and for a matrix, and the case in which the two are one."""

import pytest
import torch

from models import SPNN
from operators import LinearOperator, SPNNOperator, as_operator

CHAIN = [
    ("PixelUnshuffleBlock", {"r": 4}),
    ("ConvPINNBlock", {"in_ch": 48, "out_ch": 6, "hidden": 8, "feat_size": 2}),
    ("PixelUnshuffleBlock", {"r": 2}),
    ("ConvPINNBlock", {"in_ch": 24, "out_ch": 5, "hidden": 8, "feat_size": 1}),
]


def spnn(scale: float = 0.5) -> SPNN:
    """3x8x8 -> 5, float64; at scale 0 the coupling networks are zero, and g is linear."""
    model, generator = SPNN(num_classes=5, img_size=8, layer_channels=CHAIN).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = 0.3 if "mix" in name else scale / max(p[0].numel(), 1) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * size)
    return model.eval()


def matrix(model: SPNN) -> torch.Tensor:
    """g as a matrix, (5, 192), where it is linear."""
    return model(torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)).T


def mean_of_blocks() -> LinearOperator:
    """Super-resolution: A takes the mean of 2x2 pixels, A+ repeats it."""
    return LinearOperator(
        lambda x: torch.nn.functional.avg_pool2d(x, 2),
        lambda y: y.repeat_interleave(2, -1).repeat_interleave(2, -2),
        (3, 8, 8),
        (3, 4, 4),
    )


OPERATORS = {"spnn": lambda: SPNNOperator(spnn()), "linear": mean_of_blocks}


def points(operator, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        for shape in (operator.in_shape, operator.out_shape)
    )


@pytest.fixture(params=OPERATORS)
def operator(request):
    return OPERATORS[request.param]()


@torch.no_grad()
def test_the_pseudo_inverse_is_one(operator):
    _, y = points(operator)
    assert operator.pinv(y).shape[1:] == operator.in_shape
    torch.testing.assert_close(operator.A(operator.pinv(y)), y, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_back_projection_reaches_y_and_strength_0_stays(operator):
    x, y = points(operator)
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
def test_with_zero_coupling_networks_nlbp_is_the_linear_back_projection():
    """The non-linear rule is a generalisation: the same move as ``x + lambda A+(y - A x)`` with g's own matrix."""
    model = spnn(scale=0.0)
    a = matrix(model)
    a_plus = torch.linalg.pinv(a)
    linear = LinearOperator(lambda x: x.flatten(1) @ a.T, lambda y: (y @ a_plus.T).view(-1, 3, 8, 8), (3, 8, 8), (5,))
    network = as_operator(model)
    x, y = points(network)
    assert (network.in_shape, network.out_shape) == (linear.in_shape, linear.out_shape)
    for strength in (0.3, 1.0):
        torch.testing.assert_close(
            network.back_project(x, y, strength), linear.back_project(x, y, strength), rtol=1e-9, atol=1e-9
        )
    bent = as_operator(spnn())
    assert (bent.back_project(x, y) - linear.back_project(x, y)).abs().max() > 1e-2


@torch.no_grad()
def test_measurements_may_be_maps():
    chain = [("PixelUnshuffleBlock", {"r": 4}), ("ConvPINNBlock", {"in_ch": 48, "out_ch": 5, "hidden": 8})]
    operator = as_operator(SPNN(3, 5, img_size=8, layer_channels=chain).double().eval())
    x, y = points(operator)
    assert operator.out_shape == (5, 2, 2)
    assert operator.distance(operator.A(x), y).shape == operator.loss(operator.A(x), y).shape == (3,)
    torch.testing.assert_close(operator.A(operator.back_project(x, y)), y, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_target_is_reached_in_full_precision_whatever_surrounds_it():
    operator = as_operator(spnn().float())
    x, y = (part.float() for part in points(operator))
    with torch.autocast("cpu", torch.bfloat16):
        moved = operator.back_project(x, y)
    torch.testing.assert_close(operator.A(moved), y, rtol=1e-4, atol=1e-4)


def test_an_operator_stays_what_it_is():
    linear = mean_of_blocks()
    assert as_operator(linear) is linear and isinstance(as_operator(spnn()), SPNNOperator)
