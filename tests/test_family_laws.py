"""What holds for every block, layer and chain beyond the laws of test_laws.py: modes, types, transforms, copies.

A new layer is a new row of rows.py, and is under test here by that.
"""

import copy
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import random
from rows import ROWS, jacobian, jacobian_log_det, parts, whole
from runs import forks
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution, constraints
from torch.func import functional_call, jvp, stack_module_state, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bijections as bi
from blocks import ConvPINNBlock
from density import Density, as_transform
from models import PINN
from networks import conv, down, networks_in

# other sizes of what is here
ALIKE = "block (.*(1x1|size 2|class|dropped|channels|bound)|householder [^a])|unshuffle [12]$|one unshuffle|one class"
ALIKE += "|16x16|SPNN of (sr2|grey)"
ROWS = {row.name: row for row in ROWS if not re.search(ALIKE, row.name)}
FAST = [name for name, row in ROWS.items() if not row.slow and math.prod(row.shape) < 1000]
SMALL = [name for name in FAST if math.prod(ROWS[name].shape) <= 16]
# other dimensions and settings of a class whose code is the same: in the long run where copies and compilers are tried
ALIKE_IN_CODE = "1-D|3-D|, vectors|per entry|svd,|orthogonal, c|pca|coupling (additive|mask$|affine$)|board additive"
ALIKE_IN_CODE += "|inverted coupling|residual, narrower|residual 2-D$|block cayley any"
ALIKE_IN_CODE = [name for name in ROWS if re.search(ALIKE_IN_CODE, name)]
NETWORKS = re.compile("coupling|chain|block|tiny|SPNN|12x12")  # have networks, which compute in their weights' type


def named(names: Iterable[str], slow: Iterable[str] = ()) -> pytest.MarkDecorator:
    """A case for each name, those that are not fast, or are called ``slow``, for the long run."""
    marked = [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST or n in slow)) for n in names]
    return pytest.mark.parametrize("name", marked)


# where a pass costs seconds: one chain of blocks of all kinds stands for the others
REPEATED = ["tiny householder", "chain, oblong", "12x12, both mixings", "tiny map", "chain of bijections"]
REPEATED += ["spline coupling"]
every_row, every_fast = named(ROWS), named(FAST, slow=REPEATED)
every_class = named(ROWS, slow=ALIKE_IN_CODE)
bf16_and_long_fp16 = pytest.mark.parametrize(
    "half", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


class Part(nn.Module):
    """One method of a module, as a module's forward pass."""

    def __init__(self, g: nn.Module, method: str):
        super().__init__()
        self.g, self.method = g, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(whole(self.g) if self.method == "log_abs_det" else self.g, self.method)(x)


class BothWays(nn.Module):
    """g and g' as one pass, which is exported, compiled or traced once."""

    def __init__(self, g: nn.Module):
        super().__init__()
        self.g = g

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.g(x), self.g.pinv(y)


def calls(name: str, g: nn.Module, dtype: torch.dtype = torch.float64, batch: int = 3) -> list[tuple[Part, Tensor]]:
    """g, g' and log |det|, each with what it is called with."""
    x, y = ROWS[name].x(dtype, batch), ROWS[name].y(g, dtype, batch)
    return [(Part(g, method), at) for method, at in (("forward", x), ("pinv", y), ("log_abs_det", x))]


# --- Modes -----------------------------------------------------------------------------------------------------------

STATISTICS = {
    "actnorm": ([lambda: bi.ActNorm(3)], (3, 2, 4)),
    "batch norm": ([lambda: bi.BatchNorm(3)], (3, 2, 4)),
    "power, vectors": ([lambda: bi.ResidualFC(4, hidden=5, norm="power")], (4,)),
    "power, maps": ([lambda: bi.ResidualConv2d(2, hidden=4, norm="power")], (2, 3, 2)),
    "before a network with dropout": ([lambda: bi.BatchNorm(5)], (5,)),
    "chain": ([lambda: bi.ActNorm(3), lambda: bi.Conv1x1(3), lambda: bi.BatchNorm(3)], (3, 2, 2)),
}


def training(name: str, backwards: bool = False, fitted: bool = False) -> PINN:
    """Layers with statistics in training mode."""
    builds, shape = STATISTICS[name]
    torch.manual_seed(0)
    g = PINN([build() for build in builds], shape).double().train()
    if fitted:
        g(3 * random((8, *shape), 9) + 1)
    return PINN([block.inverted() for block in reversed(g.blocks)], shape) if backwards else g


every_statistic = pytest.mark.parametrize("name", STATISTICS)


@every_statistic
def test_in_training_mode_the_inverse_and_the_log_determinant_are_those_of_the_pass_that_was_made(name):
    g = training(name)
    for seed in range(3):
        x = 5 * random((8, *g.in_shape), seed) + 2
        y, _, log_det = g.forward_log_det(x)
        torch.testing.assert_close(g.pinv(y), x, rtol=0, atol=1e-9)
        with bi.statistics_held():
            torch.testing.assert_close(g(x), y)
            torch.testing.assert_close(jacobian_log_det(g, x), log_det)
        with torch.no_grad():  # as a step does
            for parameter in g.parameters():
                parameter.add_(0.1 * random(parameter.shape, seed))


@every_statistic
@pytest.mark.parametrize("fitted", [False, True])
def test_an_inverted_layer_in_training_mode_is_one_map(name, fitted):
    """Its passes are no data of the layer's: statistics stay, whatever comes."""
    g = training(name, backwards=True, fitted=fitted)
    state = copy.deepcopy(g.state_dict())
    x = 5 * random((3, *g.in_shape), 1) + 2
    y, _, log_det = g.forward_log_det(x)
    torch.testing.assert_close((g.pinv(y), g(x), jacobian_log_det(g, x)), (x, y, log_det))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), g.state_dict().values(), strict=True))


@every_statistic
@pytest.mark.parametrize("backwards", [False, True])
def test_a_distribution_over_layers_in_training_mode_is_one_law(name, backwards):
    g = training(name, fitted=True)
    transform = as_transform(g, g.in_shape)
    transform = transform.inv if backwards else transform
    base = Independent(Normal(torch.zeros(g.in_shape).double(), 1.0), len(g.in_shape))
    law = TransformedDistribution(base, [transform])
    x = law.sample((5,))
    before = law.log_prob(x)
    law.sample((7,))
    law.log_prob(x[:2] + 3)
    torch.testing.assert_close(law.log_prob(x), before, rtol=0, atol=0)
    noise = transform.inv(x)
    with bi.statistics_held():
        log_det = jacobian_log_det(g, x if backwards else noise)
    torch.testing.assert_close(before, base.log_prob(noise) + (log_det if backwards else -log_det))


@every_statistic
def test_recomputed_activations_leave_weights_buffers_and_gradients_as_they_are(name):
    found = []
    for recompute in (False, True):
        g = training(name)
        dropping = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))  # draws anew in every pass
        moving = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)), nn.BatchNorm1d(3))
        hooked = nn.utils.spectral_norm(nn.Linear(2, 3))
        extra = [bi.Coupling(5, dims=0, s=dropping, t=t) for t in (nn.Linear(2, 3), moving, hooked)]
        extra = extra if g.in_shape == (5,) else []
        chain = PINN([g, *extra], g.in_shape).double().train()
        chain.checkpoint_activations = recompute
        loss = 0.0
        for seed in range(2):  # the second pass moves what the first one has used
            y = chain(3 * random((8, *g.in_shape), seed) + 1)
            loss = loss + y.square().mean() + (0.0 if extra else chain.pinv(y + 1).square().mean())
        loss.backward()
        found.append([p.grad for p in chain.parameters()] + [b.double() for b in chain.buffers()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@torch.no_grad()
def test_a_batch_in_inference_mode_serves_later_passes():
    norm, x = bi.BatchNorm(3).train(), random((8, 3), 1, torch.float32)
    with torch.inference_mode():
        norm(x)
    with torch.enable_grad():
        norm.pinv(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def statistics_of(x: Tensor) -> list[Tensor]:
    """What layers in training mode learn of x, what they make of it, and its gradient."""
    found = []
    for g in (bi.ActNorm(3), bi.BatchNorm(3)):
        g, x = g.double().train(), x.detach().requires_grad_()
        y = g(x)
        (y**3).sum().backward()
        found += [*g.state_dict().values(), y.detach(), x.grad]
    return found + list(bi.Whitening(3).double().fit(x.detach()).state_dict().values())


def in_a_process(rank: int, file: str, results) -> None:
    """One of two: its part of the data, 2 images and 4."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = 4 * random((6, 3, 2), 1) + 2
    results.put((rank, [t.double().tolist() for t in statistics_of(x[2:] if rank else x[:2])]))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_several_processes_have_the_statistics_of_all_data(tmp_path):
    """Equal ones, and those of one process that has all the data, if the parts are not equal too; gradients as well."""
    context = forks()
    queue = context.SimpleQueue()
    starts = [(rank, str(tmp_path / "store"), queue) for rank in range(2)]
    processes = [context.Process(target=in_a_process, args=arguments) for arguments in starts]
    for process in processes:
        process.start()
    by_rank = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for i, value in enumerate(statistics_of(4 * random((6, 3, 2), 1) + 2)):
        first, second = (torch.tensor(by_rank[rank][i], dtype=torch.float64) for rank in range(2))
        by_image = value.shape[:1] == (6,)
        assert by_image or torch.equal(first, second)
        found = torch.cat([first, second]) if by_image else first
        torch.testing.assert_close(found, value.double(), rtol=1e-9, atol=1e-9)


# --- Types and precision ---------------------------------------------------------------------------------------------


@every_row
@bf16_and_long_fp16
@torch.no_grad()
def test_weights_and_numbers_of_half_precision_keep_the_laws_of_float32(name, half):
    row = ROWS[name]
    g, image = whole(row.ready(torch.float32)).to(half), row.x(torch.float32)
    precise = copy.deepcopy(g).double()  # the same rounded weights
    for x in (image.double(), image, image.to(half)):
        y, z, log_det = g.forward_log_det(x)
        kind = torch.promote_types(x.dtype, torch.float32)
        assert log_det.dtype in (kind, torch.float32) and (
            y.dtype == kind or torch.equal(y.double(), precise(x.double()))
        )
        torch.testing.assert_close(g.pinv(y, z).to(kind), x.to(kind), rtol=1e-4, atol=max(2e-5, row.float32))
        torch.testing.assert_close(precise(x).double(), precise(x.double()), rtol=1e-4, atol=1e-4)
        if not NETWORKS.search(name):
            torch.testing.assert_close(y.double(), precise(x.double()), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(log_det.double(), precise.log_abs_det(x.double()), rtol=1e-3, atol=1e-3)
    y, z = y.to(half), [None if part is None else part.to(half) for part in (z if isinstance(z, list) else [z])]
    wide = [None if part is None else part.float() for part in z]  # numbers of half precision, computed with in float32
    found, expected = (g.pinv(a, b if isinstance(g, PINN) else b[0]) for a, b in ((y, z), (y.float(), wide)))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
    natural = g.natural_latents(y) if isinstance(g, PINN) else g.natural_latent(y)
    torch.testing.assert_close(g.pinv(y, natural), g.pinv(y), rtol=1e-5, atol=1e-5)


@bf16_and_long_fp16
@every_fast
def test_weights_of_half_precision_have_gradients(name, half):
    g, x, found = whole(ROWS[name].ready(torch.float32)).to(half), ROWS[name].x(torch.float32), []
    for part, at in ((g, x), (copy.deepcopy(g).double(), x.double())):
        y, z, log_det = part.forward_log_det(at)
        loss = log_det.sum() + sum((out * random(tuple(out.shape), i)).sum() for i, out in enumerate(parts(y, z)))
        if loss.requires_grad:
            found.append(torch.autograd.grad(loss, tuple(part.parameters()), allow_unused=True))
    for coarse, fine in zip(*found, strict=True) if found else ():
        assert (coarse is None) == (fine is None)
        if fine is not None:
            assert coarse.dtype == half and coarse.isfinite().all()
            if not NETWORKS.search(name):
                torch.testing.assert_close(coarse.double(), fine, rtol=0.05, atol=0.05 * largest(fine))


@every_row
@torch.no_grad()
def test_autocast_changes_no_law(name):
    """Only the networks are coarse, and coarse in the same way both ways if the latents are kept.

    Without, g(g'(y)) reads its latents out of an image: a coarse network may round them to the next of its 256 steps.
    """
    row = ROWS[name]
    x, g = row.x(torch.float32), row.ready(torch.float32)
    expected, y = whole(g).forward_log_det(x), row.y(g, torch.float32)
    g = row.ready(torch.float32)  # with nothing kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, z, log_det = whole(g).forward_log_det(x)
        assert log_det.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts(found, z))
        torch.testing.assert_close(whole(g).pinv(found, z), x, rtol=1e-4, atol=2e-5)
        assert largest(g(g.pinv(y)) - y) <= 5e-2 * largest(y)
    if not NETWORKS.search(name):
        torch.testing.assert_close((found, log_det), (expected[0], expected[2]))


@pytest.mark.parametrize("factor", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5)), 20])
@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith(("chain", "inverted"))])
def test_at_extreme_parameters_an_inverse_is_off_by_rounding(name, factor):
    """In float32, by no more than 32 times what rounding x and y once costs: eps (|x| + |y| / least singular value)."""
    row, eps = ROWS[name], torch.finfo(torch.float32).eps
    for seed in range(3):
        g = row.ready(seed=seed)
        with torch.no_grad():
            for parameter in g.parameters():
                parameter.mul_(factor)
        rounded = g.float()
        g = copy.deepcopy(rounded).double()
        for x in (scale * row.x(torch.float32, batch=2, seed=seed) for scale in (0.1, 1.0, 10.0)):
            with torch.no_grad():
                y, z = rounded(x, True)
                error = (rounded.pinv(y, z) - x).flatten(1).norm(dim=1)
            size = torch.cat([part.flatten(1) for part in parts(y, z)], 1).norm(dim=1)
            for i, image in enumerate(x.double()):
                least = torch.linalg.svdvals(jacobian(g, image)).min().clamp_min(1e-30)
                assert error[i] <= 32 * eps * (x[i].norm() + size[i] / least), (seed, i)


@pytest.mark.parametrize("size", [1e30, math.nan])
@every_fast
def test_weights_of_a_diverging_step_give_values_or_one_line_that_says_so(name, size):
    g, x = ROWS[name].ready(torch.float32), ROWS[name].x(torch.float32).requires_grad_()
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.copy_(parameter.sign() * size)
    try:
        y, z, log_det = whole(g).forward_log_det(x)
        (y.sum() + log_det.sum()).backward()
        whole(g).pinv(y, z)
    except ValueError as error:
        assert "Residual" in str(error) and "weights are infinite or NaN" in str(error)


# --- Derivatives -----------------------------------------------------------------------------------------------------


def adjoint(f: Callable, primals: tuple, tangents: tuple) -> None:
    """<v, J t> = <J^T v, t>: by forward and by reverse mode."""
    out, push = jvp(f, primals, tangents)
    v = random(tuple(out.shape), 1)
    pulled = sum((a * b).sum() for a, b in zip(*map(tree_leaves, (vjp(f, *primals)[1](v), tangents)), strict=True))
    assert abs((v * push).sum() - pulled) <= 1e-9 * (1 + pulled.abs())


@every_fast
def test_forward_mode_derivatives_are_those_of_reverse_mode(name):
    """By the input, and by input and parameters together: of g, of g' and of log |det|."""
    for part, at in calls(name, ROWS[name].ready(), batch=2):
        primals = {key: value.detach() for key, value in part.named_parameters()}
        tangents = {key: random(tuple(value.shape), i) for i, (key, value) in enumerate(primals.items(), 3)}
        t = random(tuple(at.shape), 2)
        adjoint(part, (at,), (t,))
        adjoint(lambda at, weights, part=part: functional_call(part, weights, (at,)), (at, primals), (t, tangents))


@pytest.mark.parametrize(
    "name", [name for name in SMALL if not re.match("chain|inverted|residual .*-D|.*narrower", name)]
)
def test_second_derivatives_are_right(name):
    """By the input and by every parameter, in one random direction."""
    for part, at in calls(name, ROWS[name].ready(), batch=2):
        inputs = (at.requires_grad_(), *part.parameters())
        if part(at).requires_grad:
            assert torch.autograd.gradgradcheck(lambda at, *_, part=part: part(at), inputs, fast_mode=True), part.method


@pytest.mark.parametrize("name", SMALL)
def test_derivatives_at_zero_are_no_exception(name):
    """Where kinks are, and where a grey image without biases lies."""
    g, x = ROWS[name].ready(), torch.zeros(1, *ROWS[name].shape, dtype=torch.float64)
    with torch.no_grad():
        for key, parameter in g.named_parameters():
            parameter.mul_("bias" not in key)
    torch.testing.assert_close(whole(g).log_abs_det(x), jacobian_log_det(g, x))
    if name in ("sigmoid", "tanh", "baird", "baird, one per entry"):
        for f, at in ((g, x), (g.log_abs_det, x), (g.pinv, g(x).detach())):
            assert torch.autograd.gradgradcheck(f, at.requires_grad_(), fast_mode=True)


@every_fast
@torch.no_grad()
def test_any_batch(name):
    """One of vmap's, one in any memory format, and an empty one, gradients included."""
    row, g = ROWS[name], whole(ROWS[name].ready())
    for part, at in calls(name, g, batch=4):
        expected = part(at)
        for strided in (at.transpose(1, -1).contiguous().transpose(1, -1), at.repeat_interleave(2, 0)[::2]):
            torch.testing.assert_close(part(strided), expected)
        if part.method != "log_abs_det":
            torch.testing.assert_close(vmap(part)(at.unflatten(0, (2, 2))).flatten(0, 1), expected)
    if isinstance(g, bi.Activation) and g.codomain is not constraints.real:  # which refuses some values
        assert vmap(g.pinv)(torch.full((2, 2, *row.shape), -3.0)).isnan().all()
    with torch.enable_grad():
        x = row.x(batch=0).requires_grad_()
        y, _, log_det = g.forward_log_det(x)
        assert y.shape == (0, *g(row.x()).shape[1:]) and log_det.shape == (0,)
        assert g.pinv(y).shape == (0, *row.shape)
        (g.pinv(y).sum() + log_det.sum()).backward()


@every_class
@torch.no_grad()
def test_an_ensemble_is_its_members(name):
    """`torch.func.stack_module_state` and vmap, over parameters and buffers."""
    members = [ROWS[name].ready(seed=seed) for seed in range(2)]
    for part, at in calls(name, members[0])[: 2 if ROWS[name].slow else 3]:
        each = [Part(g, part.method) for g in members]
        state, shell = stack_module_state(each), copy.deepcopy(part).to("meta")
        if any(state):
            found = vmap(lambda p, b, shell=shell, at=at: functional_call(shell, (p, b), (at,)))(*state)
            torch.testing.assert_close(found, torch.stack([part(at) for part in each]))


@every_fast
@torch.no_grad()
def test_inference_mode_changes_nothing(name):
    """Nor what a layer does afterwards, gradients included."""
    row = ROWS[name]
    expected = whole(row.ready()).forward_log_det(row.x())
    with torch.inference_mode():
        g = whole(row.ready())
        y, z, log_det = g.forward_log_det(row.x())
        back = g.pinv(y, z)
    assert torch.equal(y, expected[0]) and torch.equal(log_det, expected[2])
    torch.testing.assert_close(back.clone(), row.x())
    for trains in (True, False):
        g, x = whole(row.ready()).requires_grad_(trains), row.x().requires_grad_()
        with torch.inference_mode():
            g.pinv(g(x))
            g.log_abs_det(x)
        with torch.enable_grad():
            (g.pinv(g(x)).sum() + g.log_abs_det(x).sum()).backward()
        assert x.grad.isfinite().all()


# --- Copies, compilers, threads --------------------------------------------------------------------------------------


def saved(g: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_class
@torch.no_grad()
def test_a_copy_is_a_module_of_its_own(name):
    g = ROWS[name].ready(torch.float32)
    whole(g).checkpoint_activations = True  # travels along
    (g_of, x), (pinv_of, y), _ = calls(name, g, torch.float32)
    size = len(pickle.dumps(g))
    expected, state = (g_of(x), pinv_of(y)), copy.deepcopy(g.state_dict())
    assert len(pickle.dumps(g)) < size + 100  # what is kept stays behind
    others = [copy.deepcopy(g), pickle.loads(pickle.dumps(g)), saved(g)]
    for other in others:
        assert torch.equal(other(x), expected[0]) and torch.equal(other.pinv(y), expected[1])
        assert whole(other).checkpoint_activations
    for parameter in g.parameters():
        parameter.mul_(0.5).add_(0.1)
    trains = any(True for _ in g.parameters())
    assert not trains or not (torch.equal(g(x), expected[0]) and torch.equal(g.pinv(y), expected[1]))
    assert all(torch.equal(other(x), expected[0]) for other in others)
    g.load_state_dict(state)
    assert torch.equal(g(x), expected[0]) and torch.equal(g.pinv(y), expected[1])


@every_class
@torch.no_grad()
def test_builds_on_the_meta_device_and_takes_weights(name):
    if name in ("weights", "SPNN of a mask"):
        return  # no checkpoint holds them
    row = ROWS[name]
    g = row.ready(torch.float32)
    with torch.device("meta"):
        frame = row.build().eval()
        y, z = frame(torch.empty(2, *row.shape), True)
        assert frame.pinv(y, z).shape == (2, *row.shape) and frame.pinv(y).is_meta
    assert all(tensor.is_meta for tensor in frame.state_dict().values())
    frame.load_state_dict(g.state_dict(), assign=True)
    (_, x), (_, y), _ = calls(name, g, torch.float32)
    assert torch.equal(frame(x), g(x)) and torch.equal(frame.pinv(y), g.pinv(y))


def alike(found, expected) -> None:
    """Outputs that a compiler may round differently."""
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * largest(b))


@named(ROWS, slow=[*REPEATED, "tiny cayley", *ALIKE_IN_CODE])
@torch.no_grad()
def test_exports_and_stays_as_it_was(name):
    g = ROWS[name].ready(torch.float32)
    (forward, x), (pinv, y), _ = calls(name, g, torch.float32)
    module, at = BothWays(g), (x, y)
    if any(isinstance(m, bi.Residual) for m in g.modules()):  # the other way takes as many steps as the data need
        module, at = (pinv, (y,)) if isinstance(g, bi.Inverted) else (forward, (x,))
    expected, sizes = module(*at), tuple({0: batch} for batch in [torch.export.Dim("batch", min=1)] * len(at))
    # not strictly: the front end of torch.compile before version 2.6 knows no context managers
    exported = torch.export.export(module, at, dynamic_shapes=sizes, strict=False).module()
    alike(exported(*at), expected)
    longer = exported(*(torch.cat([part, 2 * part[:1]]) for part in at))  # of any number
    assert all(len(part) == 4 for part in tree_leaves(longer))
    alike([part[:3] for part in tree_leaves(longer)], expected)
    torch.testing.assert_close(module(*at), expected, rtol=0, atol=0)


COMPILED = [name for name in ROWS if re.match("block|unshuffle 3|tiny [^w]|12x12|SPNN [^o]", name)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
@named(COMPILED, slow=[*REPEATED, *ALIKE_IN_CODE, "block cayley feat_size 1"])  # is in "tiny cayley"
def test_compiles_without_a_break(name, grad, backend):
    """By the front end alone: what it hands to a backend is one graph."""
    torch.compiler.reset()
    g = ROWS[name].ready(torch.float32)
    module, at = BothWays(g), [at for _, at in calls(name, g, torch.float32)[:2]]
    with torch.set_grad_enabled(grad):
        expected = module(*at)
        alike(torch.compile(module, fullgraph=True, backend=backend)(*at), expected)
        torch.testing.assert_close(module(*at), expected, rtol=0, atol=0)


class Waits(TorchDispatchMode):
    """Counts how often the host reads a value, for which it waits until a GPU has come there."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in FAST if not re.search("residual|bijections", name)])
def test_no_value_is_read_on_the_way(name):
    """But that of an iteration, and whether all values are in an activation's range."""
    g = ROWS[name].ready(torch.float32)
    refuses = isinstance(g, bi.Activation) and g.codomain is not constraints.real
    for mode in (g.eval, g.train):
        for part, at in calls(name, mode(), torch.float32):
            part(at)  # the first pass may set statistics
            with Waits() as waits:
                part(at)
            assert waits.count == (refuses and part.method == "pinv"), part.method


def test_traces_to_the_same_values():
    g = ROWS["tiny cayley"].ready(torch.float32)
    module, at = BothWays(g), tuple(at for _, at in calls("tiny cayley", g, torch.float32)[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, but for the batch's
        traced = torch.jit.trace(module, at)
    for images in (at, [part[:1] for part in at], [torch.cat([part] * 3) for part in at]):
        torch.testing.assert_close(traced(*images), module(*images))


@every_class
def test_four_threads_share_a_module(name):
    """Each with the modes of its own, the process's switches as they were."""
    switches = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)  # noqa: E731
    before = switches()
    expected = []
    for trains in (False, True):  # which may round differently
        with torch.set_grad_enabled(trains):
            expected += [[part(at) for part, at in calls(name, ROWS[name].ready(torch.float32), torch.float32)[:2]]]
    g = ROWS[name].ready(torch.float32)  # with nothing kept

    def work(index: int) -> bool:
        precision = networks_in("bf16" if index == 3 else "float32", torch.device("cpu"))
        with torch.set_grad_enabled(bool(index % 2)), precision:
            found = [part(at) for part, at in calls(name, g, torch.float32)[:2]]
        return index == 3 or all(torch.equal(a, b) for a, b in zip(found, expected[index % 2], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert switches() == before


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [[bi.PixelUnshuffle(2)], [bi.PixelUnshuffle(2), ConvPINNBlock(8, 3)]], ids=len)
def test_a_density_of_half_precision_is_computed_in_float32(blocks, dtype):
    density, x = Density(PINN(blocks, (2, 4, 4)), natural=True), random((3, 2, 4, 4), 1, dtype)
    log_p = density.log_prob(x)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), density.log_prob(x.double()))
    assert Density(PINN([bi.Whitening(3).double()], (3,))).sample(4).dtype == torch.float64  # that of its buffers


class Drops(nn.Module):
    """By the function, which leaves no trace among the modules."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


def test_networks_of_ones_own_may_work_in_place_but_not_at_random():
    x = random((4, 5), 1)
    spectral = [norm(nn.Linear(2, 2)) for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm)]
    for first in (nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Dropout(0.5, inplace=True), Drops(), *spectral):
        g = bi.Coupling(5, dims=0, s=nn.Linear(2, 3), t=nn.Sequential(first, nn.Linear(2, 3))).double()
        given = x.clone()
        y = g(given)
        assert torch.equal(given, x)
        if not isinstance(first, nn.ReLU) and getattr(first, "p", 1):
            with pytest.raises(ValueError, match=r"Coupling\(5\): .*changes from pass to pass"):
                g.pinv(y)
            y = g.eval()(x)
        torch.testing.assert_close(g.pinv(y), x)


def test_a_layer_with_statistics_stands_in_one_place_and_a_chain_may_hold_chains():
    norm, tied = bi.BatchNorm(3), bi.Conv1x1(3)
    with pytest.raises(ValueError, match="block 1: BatchNorm is there twice"):
        PINN([norm, norm], (3,))
    nested, x = PINN([PINN([tied, norm], (3,)), tied], (3,)).double(), random((4, 3), 1)
    y, z = nested(x, True)
    torch.testing.assert_close(y, tied(norm(tied(x))))
    torch.testing.assert_close(nested.pinv(y, z), x)


def broadcasts() -> Iterator[tuple[Callable, str]]:
    """Calls whose shapes would broadcast into other numbers, or do not fit, and what their one line says."""
    vectors, maps, net = torch.zeros(4, 5), torch.zeros(2, 6, 2, 2), nn.Linear(2, 3)
    view = as_transform(bi.View((4, 3), (12,)), (4, 3))
    yield partial(view, torch.zeros(2, 6)), r"expected events of shape \(4, 3\), got \(2, 6\)"  # twelve numbers too
    yield partial(view.inv, torch.zeros(4, 3)), r"expected events of shape \(12,\), got"
    yield partial(bi.Bias(3), torch.ones(2, 3, dtype=torch.complex64)), "real numbers"
    yield partial(bi.Concat(3, 2), vectors[:, :3], e=torch.zeros(4, 1)), r"Concat\(3 \+ 2\): expected 5 channels.*got 4"
    yield partial(bi.ResidualConv2d(3, size=4).pinv, torch.zeros(1, 3, 8, 8)), r"size is \(4, 4\), .* is \(8, 8\)"
    for other in (nn.Linear(2, 1), nn.Sequential(net, nn.Unflatten(1, (1, 3)))):
        for s, t in ((net, other), (other, net)):
            g = bi.Coupling(5, dims=0, s=s, t=t)
            for call in (g.log_abs_det, g.pinv):
                yield partial(call, vectors), r"Coupling\(5\): a network must give \(4, 3\) here, it gives \(4, 1"
    for layers in ([(conv, 3, 4), (conv, 4, 1)], [(conv, 3, 4), (down, 4, 3)]):
        g = ConvPINNBlock(6, 3, st=layers)
        for call, at in ((g.log_abs_det, maps), (g.pinv, maps[:, :3])):
            yield partial(call, at), r"ConvPINNBlock\(6->3\): s must give \(2, 3, 2, 2\) here, got \(2, "
    one = partial(ConvPINNBlock(6, 3).pinv, maps[:1, :3, :1, :1], maps[:, :3])
    yield one, r"s must give \(1, 3, 1, 1\) here, got \(2, 3, 2, 2\)"


@pytest.mark.parametrize("call, message", list(broadcasts()))
def test_shapes_that_would_broadcast_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
