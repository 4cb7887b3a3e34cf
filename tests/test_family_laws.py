"""What holds for every layer of the family beyond the laws of test_laws.py: modes, types, transforms, ways to copy it.

A new layer is a new row of `test_laws.bijection_rows`, and is under test here by that.
"""

import copy
import io
import math
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import random, randomise, seeded
from test_laws import Row, bijection_rows, jacobian_log_det
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution, constraints
from torch.func import functional_call, jvp, stack_module_state, vjp, vmap

import bijections as bi
from blocks import ConvPINNBlock
from density import Density, as_transform
from models import PINN
from networks import conv, down

ROWS = {row.name: row for row in bijection_rows()}
SMALL = [name for name, row in ROWS.items() if math.prod(row.shape) <= 16]
every_layer = pytest.mark.parametrize("name", ROWS)
STATISTICS = {
    "actnorm": (lambda: bi.ActNorm(3), (3, 2, 4)),
    "batch norm": (lambda: bi.BatchNorm(3), (3, 2, 4)),
    "power, vectors": (lambda: bi.ResidualFC(4, hidden=5, norm="power"), (4,)),
    "power, maps": (lambda: bi.ResidualConv2d(2, hidden=4, norm="power"), (2, 3, 2)),
    "before a network with dropout": (lambda: bi.BatchNorm(5), (5,)),
    "chain": (lambda: PINN([bi.ActNorm(3), bi.Conv1x1(3), bi.BatchNorm(3)], (3, 2, 2)), (3, 2, 2)),
}


def layer(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(ROWS[name].build().to(dtype), seeded(seed)).eval()


def inputs(row: Row, batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return random((batch, *row.shape), seed, dtype)


def completed(g: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y, z = g(x, True)
    return (y, *[part for part in (z if isinstance(z, list) else [z]) if part is not None])


def inverse(g: nn.Module, y: Tensor, z: tuple[Tensor, ...]) -> Tensor:
    return g.pinv(y, z[0]) if z else g.pinv(y)


def jacobian(g: nn.Module, image: Tensor) -> Tensor:
    """That of the completion, at one image."""

    def flat(image: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in completed(g, image[None])])

    return torch.autograd.functional.jacobian(flat, image).flatten(1)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


# --- Modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATISTICS)
def test_in_training_mode_the_inverse_and_the_log_determinant_are_those_of_the_pass_that_was_made(name):
    build, shape = STATISTICS[name]
    torch.manual_seed(0)
    g = build().double().train()
    for seed in range(3):
        x = 5 * random((8, *shape), seed) + 2
        y, _, log_det = g.forward_log_det(x)
        torch.testing.assert_close(g.pinv(y), x, rtol=0, atol=1e-9)
        with bi.statistics_held():
            torch.testing.assert_close(g(x), y)
            torch.testing.assert_close(jacobian_log_det(g, x), log_det)
        with torch.no_grad():  # as a step does
            for parameter in g.parameters():
                parameter.add_(0.1 * random(parameter.shape, seed))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("fitted", [False, True])
def test_an_inverted_layer_in_training_mode_is_one_map(name, fitted):
    """Its passes are no data of the layer's: statistics stay, whatever comes."""
    build, shape = STATISTICS[name]
    torch.manual_seed(0)
    g = build()
    if isinstance(g, PINN):
        g = PINN([block.inverted() for block in reversed(g.blocks)], shape)
    else:
        g = g.inverted()
    g = g.double().train()
    if fitted:
        parts = g.blocks if isinstance(g, PINN) else [g]
        for part in parts:
            part.block(3 * random((8, *shape), 9) + 1)
    state = copy.deepcopy(g.state_dict())
    x = 5 * random((8, *shape), 1) + 2
    y, _, log_det = g.forward_log_det(x)
    torch.testing.assert_close(g.pinv(y), x)
    torch.testing.assert_close(g(x), y)
    torch.testing.assert_close(jacobian_log_det(g, x), log_det)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), g.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_distribution_over_layers_in_training_mode_is_one_law(name, backwards):
    build, shape = STATISTICS[name]
    torch.manual_seed(0)
    g = build().double().train()
    g(3 * random((8, *shape), 9) + 1)
    transform = as_transform(g, shape)
    transform = transform.inv if backwards else transform
    base = Independent(Normal(torch.zeros(shape).double(), 1.0), len(shape))
    law = TransformedDistribution(base, [transform])
    x = law.sample((5,))
    before = law.log_prob(x)
    law.sample((7,))
    law.log_prob(x[:2] + 3)
    torch.testing.assert_close(law.log_prob(x), before, rtol=0, atol=0)
    noise = transform.inv(x)
    with bi.statistics_held():
        log_det = jacobian_log_det(g, x if backwards else noise)
    expected = base.log_prob(noise) + (log_det if backwards else -log_det)
    torch.testing.assert_close(before, expected)


@pytest.mark.parametrize("name", STATISTICS)
def test_recomputed_activations_leave_weights_buffers_and_gradients_as_they_are(name):
    build, shape = STATISTICS[name]
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        g = build()
        dropping = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))  # draws anew in every pass
        moving = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)), nn.BatchNorm1d(3))
        extra = [bi.Coupling(5, dims=0, s=dropping, t=t) for t in (nn.Linear(2, 3), moving)] if shape == (5,) else []
        chain = PINN([*(g.blocks if isinstance(g, PINN) else [g]), *extra], shape).double().train()
        chain.checkpoint_activations = recompute
        loss = 0.0
        for seed in range(2):  # the second pass moves what the first one has used
            x = 3 * random((8, *shape), seed) + 1
            y = chain(x)
            loss = loss + y.square().mean() + (0.0 if extra else chain.pinv(y + 1).square().mean())
        loss.backward()
        found.append([p.grad for p in chain.parameters()] + [b.double() for b in chain.buffers()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@torch.no_grad()
def test_statistics_set_in_inference_mode_serve_later_passes():
    x = random((8, 3, 2), 1, torch.float32)
    for g in (bi.ActNorm(3), bi.BatchNorm(3), bi.ResidualConv1d(3, norm="power")):
        with torch.inference_mode():
            g.train()(x)
        with torch.enable_grad():
            y = g.pinv(x.requires_grad_())
            y.sum().backward()
        assert x.grad.isfinite().all()
        x = x.detach()


@torch.no_grad()
def test_the_last_batch_moves_along_to_another_type():
    norm = bi.BatchNorm(3).train()
    x = random((8, 3), 1)
    norm(x.float())
    norm.double()
    torch.testing.assert_close(norm.pinv(norm(x)), x)
    assert norm.pinv(x).dtype == torch.float64


def gathered(rank: int, file: str, results) -> None:
    """One of two processes: its half of the data, and the statistics it ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = (4 * random((6, 3, 2), 1) + 2)[:2] if rank == 0 else (4 * random((6, 3, 2), 1) + 2)[2:]  # 2 images and 4
    found = []
    for g in (bi.ActNorm(3), bi.BatchNorm(3)):
        g = g.double().train()
        x.requires_grad_()
        y = g(x)
        (gradient,) = torch.autograd.grad((y**3).sum(), x)
        found += [*(t.detach() for t in g.state_dict().values()), y.detach(), gradient]
    found += bi.Whitening(3).double().fit(x.detach()).state_dict().values()
    results.put((rank, [t.double().tolist() for t in found]))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_several_processes_have_the_statistics_of_all_data(tmp_path):
    """Equal ones, and those of one process that has all the data, also where the parts are not equal; gradients too."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=gathered, args=(rank, str(tmp_path / "store"), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    by_rank = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    x = (4 * random((6, 3, 2), 1) + 2).requires_grad_()
    expected = []
    for g in (bi.ActNorm(3), bi.BatchNorm(3)):
        g = g.double().train()
        y = g(x)
        (gradient,) = torch.autograd.grad((y**3).sum(), x)
        expected += [*(t.detach() for t in g.state_dict().values()), y.detach(), gradient]
    expected += bi.Whitening(3).double().fit(x.detach()).state_dict().values()
    for i, value in enumerate(expected):
        parts = [torch.tensor(by_rank[rank][i], dtype=torch.float64) for rank in range(2)]
        whole = torch.cat(parts) if value.shape[:1] == (6,) else parts[0]
        torch.testing.assert_close(whole, value.double(), rtol=1e-9, atol=1e-9)
        if value.shape[:1] != (6,):
            assert torch.equal(*parts)


# --- Types and precision ---------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_of_half_precision_keep_the_laws_of_float32(name, weights):
    row = ROWS[name]
    g = layer(name, torch.float32).to(weights)
    for x in (inputs(row, dtype=torch.float32), inputs(row, dtype=torch.float32).to(weights)):
        y, _, log_det = g.forward_log_det(x)
        z = completed(g, x)[1:]
        assert log_det.dtype == torch.float32
        assert y.dtype == torch.float32 or torch.equal(inverse(g, y, z), x)  # a rearrangement
        torch.testing.assert_close(inverse(g, y, z).float(), x.float(), rtol=1e-4, atol=2e-5)
        precise = copy.deepcopy(g).double()  # the same rounded weights
        if "coupling" not in name and "chain" not in name:  # whose networks compute in their own type
            torch.testing.assert_close(y.double(), precise(x.double()), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(log_det.double(), precise.log_abs_det(x.double()), rtol=1e-3, atol=1e-3)


@every_layer
@torch.no_grad()
def test_autocast_changes_no_law(name):
    row, g = ROWS[name], layer(name, torch.float32)
    x = inputs(row, dtype=torch.float32)
    plain = g.forward_log_det(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _, log_det = g.forward_log_det(x)
        z = completed(g, x)[1:]
        assert y.dtype == log_det.dtype == torch.float32
        torch.testing.assert_close(inverse(g, y, z), x, rtol=1e-4, atol=2e-5)
        outputs = row.outputs(random((2, *y.shape[1:]), 2, torch.float32))
        assert largest(g(g.pinv(outputs)) - outputs) <= 2e-2 * largest(outputs)
    if "coupling" not in name and "chain" not in name:
        torch.testing.assert_close(y, plain[0])
        torch.testing.assert_close(log_det, plain[2])


@pytest.mark.parametrize("factor", [1, 5, 20])
@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("chain")])
def test_at_extreme_parameters_an_inverse_is_off_by_rounding(name, factor):
    """In float32, by no more than 32 times what rounding x and y once costs: eps (|x| + |y| / least singular value)."""
    row, eps = ROWS[name], torch.finfo(torch.float32).eps
    for seed in range(3):
        g = randomise(row.build().double(), seeded(seed)).eval()
        with torch.no_grad():
            for parameter in g.parameters():
                parameter.mul_(factor)
        rounded = g.float()
        g = copy.deepcopy(rounded).double()
        for x in (scale * inputs(row, batch=2, dtype=torch.float32, seed=seed) for scale in (0.1, 1.0, 10.0)):
            with torch.no_grad():
                y = completed(rounded, x)
                error = (inverse(rounded, y[0], y[1:]) - x).flatten(1).norm(dim=1)
            size = torch.cat([part.flatten(1) for part in y], 1).norm(dim=1)
            for i, image in enumerate(x.double()):
                least = torch.linalg.svdvals(jacobian(g, image)).min().clamp_min(1e-30)
                assert error[i] <= 32 * eps * (x[i].norm() + size[i] / least), (seed, i)


@every_layer
def test_weights_of_a_diverging_step_give_values_or_one_line_that_says_so(name):
    for size in (1e30, math.nan):
        g, x = layer(name, torch.float32), inputs(ROWS[name], dtype=torch.float32).requires_grad_()
        with torch.no_grad():
            for parameter in g.parameters():
                parameter.copy_(parameter.sign() * size)
        try:
            y, _, log_det = g.forward_log_det(x)
            (y.sum() + log_det.sum()).backward()
            inverse(g, y, completed(g, x)[1:])
        except ValueError as error:
            assert "Residual" in str(error) and "weights are infinite or NaN" in str(error)


@pytest.mark.parametrize("bins", [2, 8, 64])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e5])
def test_a_spline_of_any_parameters_is_invertible_in_float32(scale, bins):
    """Both ways round, to a thousandth of its bound, and nothing leaves its range."""
    bound, n = 3.0, 5000
    parameters = random((n, 3 * bins - 1), 1, torch.float32, scale)
    x = 1.05 * bound * (2 * torch.rand(n, generator=seeded(2)) - 1)
    for backwards in (False, True):
        y, log_slope = bi.rational_quadratic(x, parameters, bound, backwards)
        again, log_slope_back = bi.rational_quadratic(y, parameters, bound, not backwards)
        assert largest(again - x) < 1e-3 * bound and y.isfinite().all() and log_slope.isfinite().all()
        assert largest(y[x.abs() < bound]) <= bound
        assert (log_slope.abs() < math.log(1e4)).all()


@torch.no_grad()
def test_bairds_activation_takes_any_c():
    """Where sinh would overflow too: g(g'(y)) = y, and known values."""
    for c in (1e3, 1e8, 1e10, 1e20, 1e38):
        for sign in (-1, 1):
            g = bi.BairdActivation(1)
            g.c.fill_(sign * c)
            y = torch.linspace(-100, 100, 2001)[:, None]
            error = (g(g.pinv(y)) - y).abs()
            # x is rounded, and there g stretches by cosh(x) / cosh(y)
            x = g.pinv(y).double()
            assert (error <= 1e-5 + 5e-6 * x.abs() * (1 + torch.exp(bi.log_cosh(x) - bi.log_cosh(y.double())))).all()
            torch.testing.assert_close(g(torch.zeros(1, 1)).item(), sign * math.asinh(c), rtol=1e-6, atol=0)


# --- Derivatives -----------------------------------------------------------------------------------------------------


def check_modes(f, primals: dict[str, Tensor]) -> None:
    """<v, J t> by forward mode is <J^T v, t> by reverse mode, for a tangent in each argument by itself."""
    for name, value in primals.items():
        rest = {key: other for key, other in primals.items() if key != name}
        one = lambda value, name=name, rest=rest: f({name: value, **rest})  # noqa: E731
        t = random(value.shape, 3, value.dtype)
        out, push = jvp(one, (value,), (t,))
        v = random(out.shape, 4, out.dtype)
        (pull,) = vjp(one, value)[1](v)
        assert abs((v * push).sum() - (pull * t).sum()) <= 1e-9 * (1 + (v * push).sum().abs()), name


@pytest.mark.parametrize("name", SMALL)
def test_forward_mode_derivatives_are_those_of_reverse_mode(name):
    """By the input and by every parameter: of g, of g' and of log |det|."""
    row, g = ROWS[name], layer(name)
    x = inputs(row, batch=2)
    y = row.outputs(random((2, *g(x).shape[1:]), 2))

    for method, at in (("forward", x), ("pinv", y), ("log_abs_det", x)):
        part = Part(g, method)
        weights = {key: value.detach() for key, value in part.named_parameters()}
        of = lambda primals, part=part: functional_call(  # noqa: E731
            part, {key: value for key, value in primals.items() if key != "input"}, (primals["input"],)
        )
        check_modes(of, {"input": at.detach(), **weights})


@pytest.mark.parametrize("name", SMALL)
def test_derivatives_at_zero_are_no_exception(name):
    """Where kinks are, and where a grey image without biases lies."""
    g, x = layer(name), torch.zeros(1, *ROWS[name].shape, dtype=torch.float64)
    with torch.no_grad():
        for key, parameter in g.named_parameters():
            parameter.mul_("bias" not in key)
    torch.testing.assert_close(g.log_abs_det(x), jacobian_log_det(g, x))
    if name in ("sigmoid", "tanh", "baird", "baird, one an entry"):
        assert torch.autograd.gradgradcheck(g, x.requires_grad_(), fast_mode=True)
        assert torch.autograd.gradgradcheck(g.log_abs_det, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(g.pinv, g(x).detach().requires_grad_(), fast_mode=True)


@every_layer
@torch.no_grad()
def test_vmap_is_a_batch(name):
    row, g = ROWS[name], layer(name)
    x = inputs(row, batch=4).unflatten(0, (2, 2))
    torch.testing.assert_close(vmap(g)(x).flatten(0, 1), g(x.flatten(0, 1)))
    y = row.outputs(random((2, 2, *g(x[0]).shape[1:]), 2))
    torch.testing.assert_close(vmap(g.pinv)(y).flatten(0, 1), g.pinv(y.flatten(0, 1)))
    if isinstance(g, bi.Activation) and g.codomain is not constraints.real:  # which refuses some values
        assert vmap(g.pinv)(torch.full_like(y, -3.0)).isnan().all()


@every_layer
@torch.no_grad()
def test_inference_mode_changes_nothing(name):
    """Nor what a layer does afterwards, gradients included."""
    row = ROWS[name]
    expected = layer(name).forward_log_det(inputs(row))
    with torch.inference_mode():
        g = layer(name)
        y, _, log_det = g.forward_log_det(inputs(row))
        back = inverse(g, y, completed(g, inputs(row))[1:])
    assert torch.equal(y, expected[0]) and torch.equal(log_det, expected[2])
    torch.testing.assert_close(back.clone(), inputs(row))
    with torch.enable_grad():
        g, x = layer(name), inputs(row).requires_grad_()
        with torch.inference_mode():
            g.pinv(g(x))
            g.log_abs_det(x)
        (g.pinv(g(x)).sum() + g.log_abs_det(x).sum()).backward()
        assert x.grad.isfinite().all()


class Part(nn.Module):
    """One method of a layer, as a module's forward pass."""

    def __init__(self, g: nn.Module, method: str):
        super().__init__()
        self.g, self.method = g, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.g, self.method)(x)


@every_layer
@torch.no_grad()
def test_an_ensemble_is_its_layers(name):
    """`torch.func.stack_module_state` and vmap, over parameters and buffers."""
    row, layers = ROWS[name], [layer(name, seed=seed) for seed in range(3)]
    x = inputs(row)
    y = row.outputs(random((3, *layers[0](x).shape[1:]), 2))
    for method, at in (("forward", x), ("log_abs_det", x), ("pinv", y)):
        parts = [Part(g, method) for g in layers]
        state = stack_module_state(parts)
        if any(state):
            found = vmap(lambda p, b, part=parts[0], at=at: functional_call(part, (p, b), (at,)))(*state)
            torch.testing.assert_close(found, torch.stack([part(at) for part in parts]))


# --- Copies ----------------------------------------------------------------------------------------------------------


def saved(g: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(g, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_layer
@torch.no_grad()
def test_a_copy_is_the_layer(name):
    row, g = ROWS[name], layer(name)
    x = inputs(row)
    y = completed(g, x)
    for copied in (copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), saved):
        other = copied(g)
        assert all(torch.equal(a, b) for a, b in zip(completed(other, x), y, strict=True))
        assert torch.equal(inverse(other, y[0], y[1:]), inverse(g, y[0], y[1:]))


@every_layer
@torch.no_grad()
def test_a_layer_builds_on_the_meta_device_and_takes_weights(name):
    row = ROWS[name]
    if "whitening" in name or "batch norm" in name:  # their rows fit them to data
        build = (lambda: bi.BatchNorm(3)) if "batch" in name else lambda: bi.Whitening(*row.shape[:1], kind=name[-3:])
    else:
        build = row.build
    g = randomise(build(), seeded(0)).eval()
    with torch.device("meta"):
        frame = build().eval()
    assert all(tensor.is_meta for tensor in frame.state_dict().values())
    frame.load_state_dict(g.state_dict(), assign=True)
    x = inputs(row, dtype=torch.float32)
    y = completed(g, x)
    assert all(torch.equal(a, b) for a, b in zip(completed(frame, x), y, strict=True))
    assert torch.equal(inverse(frame, y[0], y[1:]), inverse(g, y[0], y[1:]))


@every_layer
@torch.no_grad()
def test_a_layer_exports(name):
    if name == "inverted residual":
        pytest.skip("its forward pass is an iteration, whose number of steps depends on the data")
    row, g = ROWS[name], layer(name, torch.float32)
    x = inputs(row, dtype=torch.float32)
    y = row.outputs(random((3, *g(x).shape[1:]), 2, torch.float32))
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    for part, at in ((Part(g, "forward"), x), (Part(g, "pinv"), y)):
        if part.method == "pinv" and any(isinstance(m, bi.Residual) for m in g.modules()):
            continue  # an iteration, as above
        expected = part(at)
        # not strictly: the front end of torch.compile before version 2.6 knows no context managers
        exported = torch.export.export(part, (at,), dynamic_shapes=sizes, strict=False).module()
        torch.testing.assert_close(exported(at), expected)
        assert len(exported(torch.cat([at, at[:1]]))) == 4  # of any number
        torch.testing.assert_close(part(at), expected, rtol=0, atol=0)  # and is as it was


@every_layer
@torch.no_grad()
def test_four_threads_share_a_layer(name):
    row, g = ROWS[name], layer(name, torch.float32)
    x = [inputs(row, dtype=torch.float32, seed=seed) for seed in range(4)]
    expected = [g(part) for part in x]
    back = [inverse(g, *(lambda c: (c[0], c[1:]))(completed(g, part))) for part in x]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                y = completed(g, x[i])
                if not (torch.equal(y[0], expected[i]) and torch.equal(inverse(g, y[0], y[1:]), back[i])):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- Shapes ----------------------------------------------------------------------------------------------------------


@every_layer
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_batch(name):
    row, g = ROWS[name], layer(name)
    shape = g(inputs(row)).shape[1:]
    y, _, log_det = g.forward_log_det(inputs(row, batch=0))
    assert y.shape == (0, *shape) and log_det.shape == (0,)
    assert g.pinv(y).shape == (0, *row.shape)
    with torch.enable_grad():
        x = inputs(row, batch=0).requires_grad_()
        (g.pinv(g(x)).sum() + g.log_abs_det(x).sum()).backward()


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if len(row.shape) == 3])
@torch.no_grad()
def test_a_layer_takes_any_memory_format(name):
    row, g = ROWS[name], layer(name)
    x = inputs(row)
    y = g(x)
    for strided in (lambda x: x.transpose(1, -1).contiguous().transpose(1, -1), lambda x: x.repeat(2, 1, 1, 1)[::2]):
        torch.testing.assert_close(g(strided(x)), g(strided(x).contiguous()))
        torch.testing.assert_close(g.log_abs_det(strided(x)), g.log_abs_det(strided(x).contiguous()))
    y = y.transpose(1, -1).contiguous().transpose(1, -1)
    torch.testing.assert_close(g.pinv(y), g.pinv(y.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [[bi.PixelUnshuffle(2)], [bi.PixelUnshuffle(2), ConvPINNBlock(8, 3)]], ids=len)
def test_a_density_of_half_precision_is_computed_in_float32(blocks, dtype):
    density, x = Density(PINN(blocks, (2, 4, 4)), natural=True), random((3, 2, 4, 4), 1, dtype)
    log_p = density.log_prob(x)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), density.log_prob(x.double()))


def test_networks_of_ones_own_may_work_in_place_but_not_at_random():
    x = random((4, 5), 1)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
    for first in (nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), spectral):
        g = bi.Coupling(5, dims=0, s=nn.Linear(2, 3), t=nn.Sequential(first, nn.Linear(2, 3))).double()
        given = x.clone()
        y = g(given)
        assert torch.equal(given, x)
        if not isinstance(first, nn.ReLU):
            with pytest.raises(ValueError, match=r"Coupling\(5\): (Dropout|_Spectral).*changes from pass to pass"):
                g.pinv(y)
            y = g.eval()(x)
        torch.testing.assert_close(g.pinv(y), x)


@pytest.mark.parametrize("layers", [[(conv, 3, 4), (conv, 4, 1)], [(conv, 3, 4), (down, 4, 3)]])
def test_layers_of_a_block_whose_shape_would_broadcast_are_refused(layers):
    block = ConvPINNBlock(6, 3, st=layers)
    for call in (block.log_abs_det, lambda x: block.pinv(x[:, :3])):
        with pytest.raises(ValueError, match=r"ConvPINNBlock\(6->3\): s must give \(2, 3, 2, 2\) here, got \(2, "):
            call(torch.zeros(2, 6, 2, 2))
    with pytest.raises(ValueError, match=r"s must give \(1, 3, 1, 1\) here, got \(2, 3, 2, 2\)"):
        ConvPINNBlock(6, 3).pinv(torch.zeros(1, 3, 1, 1), torch.zeros(2, 3, 2, 2))


def test_a_layer_with_statistics_stands_in_one_place_and_a_chain_may_hold_chains():
    norm, tied = bi.BatchNorm(3), bi.Conv1x1(3)
    with pytest.raises(ValueError, match="block 1: BatchNorm is there twice"):
        PINN([norm, norm], (3,))
    nested, x = PINN([PINN([tied, norm], (3,)), tied], (3,)).double(), random((4, 3), 1)
    y, z = nested(x, True)
    torch.testing.assert_close(y, tied(norm(tied(x))))
    torch.testing.assert_close(nested.pinv(y, z), x)


def test_complex_numbers_are_refused():
    with pytest.raises(ValueError, match="real numbers"):
        bi.Bias(3)(torch.ones(2, 3, dtype=torch.complex64))


def test_networks_whose_shape_would_broadcast_are_refused():
    x = random((4, 5), 1)
    for net in (nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (1, 3)))):
        for part in ("s", "t"):
            nets = {"s": nn.Linear(2, 3), "t": nn.Linear(2, 3), part: net}
            g = bi.Coupling(5, dims=0, **nets).double()
            with pytest.raises(ValueError, match=r"Coupling\(5\): a network must give \(4, 3\) here, it gives \(4, 1"):
                g.log_abs_det(x)
            with pytest.raises(ValueError, match="it gives"):
                g.pinv(x)


def test_extra_channels_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"Concat\(3 \+ 2\): expected 5 channels.*got 4"):
        bi.Concat(3, 2)(torch.zeros(2, 3), e=torch.zeros(2, 1))


def test_events_of_another_shape_are_refused():
    transform = as_transform(bi.View((4, 3), (12,)), (4, 3))
    with pytest.raises(ValueError, match=r"expected events of shape \(4, 3\), got \(2, 6\)"):
        transform(torch.zeros(2, 6))  # twelve numbers too
    with pytest.raises(ValueError, match=r"expected events of shape \(12,\), got"):
        transform.inv(torch.zeros(4, 3))
    number = as_transform(bi.Tanh(), ())
    x = torch.randn(2, 3, generator=seeded(0))
    torch.testing.assert_close(number.log_abs_det_jacobian(x, number(x)), (1 - x.tanh() ** 2).log())


def test_a_residual_block_inverts_maps_of_its_own_size():
    with pytest.raises(ValueError, match=r"size is \(4, 4\), but the map that arrives is \(8, 8\)"):
        bi.ResidualConv2d(3, size=4).pinv(torch.zeros(1, 3, 8, 8))


@torch.no_grad()
def test_samples_have_the_type_of_a_chain_without_parameters():
    whitening = bi.Whitening(3).double().fit(random((50, 3), 1))
    assert Density(PINN([whitening], (3,))).sample(4).dtype == torch.float64
