"""What torch can do with a module it can do with every block and network here: copy it, save it, transform it.

The layers of the family have theirs in test_family_laws.py.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from helpers import diy12, landscape, oblong, random, randomise, seeded, tiny
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from blocks import ConvPINNBlock, PixelUnshuffleBlock, solved_once
from models import PINN, SPNN
from networks import networks_in


@dataclass(frozen=True)
class Row:
    """One module under test, and whether it is small enough for a whole Jacobian."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    small: bool = False
    slow: bool = False


def block(*args, **kwargs) -> Callable[[], nn.Module]:
    return lambda: ConvPINNBlock(*args, **kwargs)


ROWS = {
    "unshuffle": Row(lambda: PixelUnshuffleBlock((2, 3)), (2, 4, 3), small=True),
    "any size": Row(block(5, 3, 6), (5, 3, 2), small=True),
    "any size, householder": Row(block(5, 3, 6, mix_type="householder"), (5, 3, 2), small=True),
    "even": Row(block(6, 2, 4, feat_size=(2, 4)), (6, 2, 4), small=True),
    "one pixel": Row(block(9, 4, 5, feat_size=1), (9, 1, 1), small=True),
    "tiny": Row(tiny, (3, 4, 4), small=True),
    "tiny, householder": Row(lambda: tiny(mix_type="householder"), (3, 4, 4), small=True),
    "map": Row(landscape, (3, 6, 8)),
    "oblong chain": Row(oblong, (3, 6, 10)),
    "12x12, both mixings": Row(diy12, (3, 12, 12)),
    "SPNN 32": Row(lambda: SPNN(hidden=8, img_size=32), (3, 32, 32), slow=True),
    "SPNN 32, householder": Row(lambda: SPNN(hidden=8, img_size=32, mix_type="householder"), (3, 32, 32), slow=True),
    "SPNN 64, householder": Row(lambda: SPNN(hidden=8, img_size=64, mix_type="householder"), (3, 64, 64), slow=True),
    "SPNN 64": Row(lambda: SPNN(hidden=8, img_size=64), (3, 64, 64), slow=True),
    "SPNN 256": Row(lambda: SPNN(hidden=8, img_size=256), (3, 256, 256), slow=True),
    "SPNN 256, householder": Row(
        lambda: SPNN(hidden=8, img_size=256, mix_type="householder"), (3, 256, 256), slow=True
    ),
}
REPEATED = ("tiny, householder", "oblong chain", "12x12, both mixings", "map")
every_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=[pytest.mark.slow] if row.slow else []) for name, row in ROWS.items()]
)
# where a pass costs seconds: one chain, whose blocks are of all kinds, stands for the others
every_distinct_row = pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=[pytest.mark.slow] if row.slow or name in REPEATED else [])
    for name, row in ROWS.items()
])  # fmt: skip
every_small_row = pytest.mark.parametrize("row", [pytest.param(row, id=n) for n, row in ROWS.items() if row.small])


def built(row: Row, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomise(row.build().to(dtype), seeded(seed)).eval()


def inputs(row: Row, g: nn.Module, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images, and outputs that are none of theirs."""
    x = random((batch, *row.shape), 1, dtype)
    with torch.no_grad():
        return x, random(tuple(g(x).shape), 2, dtype)


class Inverse(nn.Module):
    """g' as a forward pass, for what takes modules."""

    def __init__(self, g: nn.Module):
        super().__init__()
        self.g = g

    def forward(self, y: Tensor) -> Tensor:
        return self.g.pinv(y)


def same(g: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> None:
    """Both give the same bits, and still do when the weights of ``g`` have changed and come back."""
    with torch.no_grad():
        expected = g(x), g.pinv(y)
        assert torch.equal(other(x), expected[0]) and torch.equal(other.pinv(y), expected[1])
        state = copy.deepcopy(g.state_dict())
        for parameter in g.parameters():
            parameter.mul_(0.5)
        assert not len(state) or not torch.equal(g(x), expected[0])
        assert torch.equal(other(x), expected[0])
        g.load_state_dict(state)
        assert torch.equal(g(x), expected[0]) and torch.equal(g.pinv(y), expected[1])


def saved(g: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda g: pickle.loads(pickle.dumps(g)), "torch.save": saved}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@every_row
def test_a_copy_is_a_network_of_its_own(row, copied):
    g = built(row)
    x, y = inputs(row, g)
    if isinstance(g, (PINN, SPNN)):
        (g.pinn if isinstance(g, SPNN) else g).checkpoint_activations = True  # travels along
    other = copied(g)
    same(g, other, x, y)
    if isinstance(g, (PINN, SPNN)):
        assert (other.pinn if isinstance(g, SPNN) else other).checkpoint_activations


@every_distinct_row
def test_exports_and_stays_as_it_was(row):
    g = built(row)
    x, y = inputs(row, g)
    with torch.no_grad():
        expected = g(x), g.pinv(y)
    for module, argument, result in ((g, x, expected[0]), (Inverse(g), y, expected[1])):
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        exported = torch.export.export(module, (argument,), dynamic_shapes=sizes).module()
        torch.testing.assert_close(exported(argument), result, rtol=1e-4, atol=1e-4 * result.abs().max().item())
        more = torch.cat([argument, 2 * argument[:1]])  # of any number
        assert exported(more).shape == (3, *result.shape[1:])
    same(g, copy.deepcopy(g), x, y)


@pytest.mark.parametrize("grad", [False, True])
@every_distinct_row
def test_compiles_without_a_break(row, grad):
    """By the front end alone: what it hands to a backend is one graph."""
    torch.compiler.reset()
    g = built(row)
    x, y = inputs(row, g)
    with torch.set_grad_enabled(grad):
        for function, argument in ((g, x), (g.pinv, y)):
            compiled = torch.compile(function, fullgraph=True, backend="eager")
            result = function(argument)
            torch.testing.assert_close(compiled(argument), result, rtol=1e-4, atol=1e-4 * result.abs().max().item())
    same(g, copy.deepcopy(g), x, y)


@pytest.mark.slow
@every_small_row
def test_compiles_with_the_usual_backend(row):
    torch.compiler.reset()
    g = built(row)
    x, y = inputs(row, g)
    for function, argument in ((g, x), (g.pinv, y)):
        result = function(argument)
        compiled = torch.compile(function, fullgraph=True)(argument)
        torch.testing.assert_close(compiled, result, rtol=1e-4, atol=1e-4 * result.abs().max().item())


@every_row
def test_maps_over_stacked_weights(row):
    """An ensemble in one pass gives what its members do one by one."""
    members = [built(row, seed) for seed in range(2)]
    x, y = inputs(row, members[0])
    for wrap, argument in ((lambda g: g, x), (Inverse, y)):
        wrapped = [wrap(g) for g in members]
        weights, buffers = stack_module_state(wrapped)
        shell = copy.deepcopy(wrapped[0]).to("meta")

        def call(weights, buffers, argument, shell=shell):
            return functional_call(shell, (weights, buffers), (argument,))

        together = vmap(call, in_dims=(0, 0, None), randomness="error")(weights, buffers, argument) if weights else None
        with torch.no_grad():
            one_by_one = torch.stack([g(argument) for g in wrapped])
        if weights:
            torch.testing.assert_close(together, one_by_one, rtol=1e-3, atol=1e-4 * one_by_one.abs().max().item())
    for g in members:
        same(g, copy.deepcopy(g), x, y)


@every_small_row
def test_jacobians_forwards_and_backwards_are_the_same(row):
    g = built(row, dtype=torch.float64)
    x, y = inputs(row, g, torch.float64, batch=1)
    for function, argument in ((g, x), (g.pinv, y)):
        torch.testing.assert_close(jacfwd(function)(argument), jacrev(function)(argument), rtol=1e-9, atol=1e-9)
    same(g, copy.deepcopy(g), x, y)


@every_small_row
def test_forward_mode_by_every_parameter_is_the_adjoint_of_backward_mode(row):
    """<c, J v> = <J^T c, v>; parameter by parameter, so that none hides behind the others."""
    g = built(row, dtype=torch.float64)
    x, y = inputs(row, g, torch.float64)
    for module, argument in ((g, x), (Inverse(g), y)):
        for name, weight in module.named_parameters():
            if isinstance(g, SPNN) and "mix" not in name and not name.endswith("net.0.weight"):
                continue  # the networks' are of two kinds, which blocks by themselves show
            weight = weight.detach()

            def call(w, name=name, module=module, argument=argument):
                return functional_call(module, {name: w}, (argument,))

            v = random(tuple(weight.shape), 3)
            value, forwards = jvp(call, (weight,), (v,))
            c = random(tuple(value.shape), 4)
            (backwards,) = vjp(call, weight)[1](c)
            torch.testing.assert_close((c * forwards).sum(), (backwards * v).sum(), rtol=1e-8, atol=1e-10)
            if "A_unconstrained" in name or name.endswith("mix.V"):
                assert forwards.abs().max() > 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every_row
def test_takes_any_floating_type(row, dtype):
    """Weights, and images, of a type; blocks compute in float32 at least, so that the round trip stays."""
    g = built(row).to(dtype)
    x = random((2, *row.shape), 1, dtype)
    with torch.no_grad():
        y, z = g(x, True)
        again = g.pinv(y, z)
    lossy = getattr(g, "lossy", True) and not isinstance(g, PixelUnshuffleBlock)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32 if lossy else dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(again.double(), x.double(), rtol=0, atol=tolerance * x.abs().max().item())


@every_row
def test_four_threads_at_once(row):
    """Each with the modes of its own, the process's switches as they were."""
    switches = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)  # noqa: E731
    g = built(row)
    x, y = inputs(row, g)
    before = switches()
    with torch.no_grad():
        expected = g(x), g.pinv(y)
    g.eval()  # nothing kept

    def work(index: int) -> bool:
        with torch.set_grad_enabled(bool(index % 2)), solved_once():
            with networks_in("bf16" if index == 3 else "float32", x.device):
                results = g(x), g.pinv(y)
        return index == 3 or all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert switches() == before


@every_row
def test_builds_and_runs_on_the_meta_device(row):
    with torch.device("meta"):
        g = row.build()
        y, z = g(torch.empty(2, *row.shape), True)
        assert g.pinv(y, z).shape == (2, *row.shape) and g.pinv(y).is_meta
    real = row.build()
    g.load_state_dict(real.state_dict(), assign=True)
    x = random((1, *row.shape), 1, torch.float32)
    with torch.no_grad():
        assert torch.equal(g(x), real(x))


def test_traces_to_the_same_values():
    g = built(ROWS["tiny"])
    x, y = inputs(ROWS["tiny"], g)
    for function, argument in ((g, x), (Inverse(g), y)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes become constants, but for the batch's
            traced = torch.jit.trace(function, (argument,))
        for images in (argument, argument[:1], argument.repeat(3, *[1] * (argument.dim() - 1))):
            torch.testing.assert_close(traced(images), function(images))


def test_second_derivatives_by_mixing_weights_are_right():
    g = built(ROWS["any size"], dtype=torch.float64)
    x, y = inputs(ROWS["any size"], g, torch.float64)
    weight = g.mix.A_unconstrained
    assert torch.autograd.gradgradcheck(lambda w: g.mix(x), (weight,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w: g.pinv(y), (weight,), fast_mode=True)
