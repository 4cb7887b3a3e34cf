"""The bijections beyond the laws that every row of rows.py is held to: known values, refusals, estimates, densities."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import randomise, seeded
from torch import nn
from torch.distributions import (
    Bernoulli,
    Independent,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
)
from torch.func import jacfwd, jacrev, vmap
from torch.testing import assert_close

import bijections as bi
from blocks import BLOCKS, ConvPINNBlock, PixelUnshuffleBlock
from density import Density, as_transform
from models import PINN, SPNN

STANDARD = Normal(0.0, 1.0)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def ready(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, in evaluation mode, with random weights."""
    return randomise(module.double(), seeded(seed)).eval()


# --- Activations -----------------------------------------------------------------------------------------------------


TORCHS = [
    *((bi.Sigmoid(), nn.Sigmoid()), (bi.Tanh(), nn.Tanh()), (bi.LeakyReLU(0.2), nn.LeakyReLU(0.2))),
    *((bi.PReLU(4, slope=0.3).double(), nn.PReLU(4, 0.3).double()), (bi.ELU(0.7), nn.ELU(0.7)), (bi.SELU(), nn.SELU())),
    *((bi.PixelUnshuffle(2), nn.PixelUnshuffle(2)), (bi.PixelShuffle(2), nn.PixelShuffle(2))),
    (PixelUnshuffleBlock(2), nn.PixelUnshuffle(2)),
]


@pytest.mark.parametrize("layer, torchs", TORCHS, ids=lambda layer: type(layer).__name__)
def test_a_layer_is_torchs(layer, torchs):
    x = randn(2, 4, 4, 6, scale=5)
    assert_close(layer(x), torchs(x))


SATURATING = [bi.Sigmoid(), bi.Tanh(), bi.SELU(), *(bi.ELU(a, b) for a in (1.0, 0.3, 1.7) for b in (1.0, 0.7, 3.1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", SATURATING, ids=lambda layer: layer.name)
def test_an_activation_is_stable_at_the_ends_of_its_range(layer, dtype):
    """Forward, inverse, log-derivative and all gradients stay finite, and the inverse stays monotone."""
    x = torch.tensor([-1e4, -800, -200, -90, -40, -10, -1, 0, 1, 10, 40, 90, 200, 800, 1e4], dtype=dtype)[None]
    x.requires_grad_()
    y, _, log_det = layer.forward_log_det(x)
    again = layer.pinv(y)
    assert again.isfinite().all() and (again.diff() >= 0).all() and log_det.isfinite().all()
    (gradient,) = torch.autograd.grad(log_det.sum() + again.sum(), x)
    assert gradient.isfinite().all()
    assert y[0, 0] == y[0, 1], "the range's end was not reached"


def test_an_inverse_is_accurate_until_rounding_hides_x():
    """Within what the last bit of y leaves of x: half its size over f'(x)."""
    for layer, low, high in ((bi.Sigmoid(), -80, 10), (bi.Tanh(), -7, 7), (bi.ELU(), -10, 80), (bi.SELU(), -10, 80)):
        x = torch.linspace(low, high, 91)[:, None]
        y, _, log_derivative = layer.forward_log_det(x)
        hidden = 2 * torch.finfo(x.dtype).eps * y.abs().squeeze(1) / log_derivative.exp()
        error = (layer.pinv(y) - x).abs().squeeze(1)
        assert (error <= hidden + 1e-6 * x.abs().squeeze(1) + 1e-6).all(), layer.name


OUTSIDE = [(bi.Sigmoid(), 1.001), (bi.Sigmoid(), -0.001), (bi.Tanh(), -1.001), (bi.ELU(), -1.001),
           (bi.ELU(0.5, 2.0), -1.001), (bi.SELU(), -1.76), (bi.Tanh(), math.nan)]  # fmt: skip


@pytest.mark.parametrize("layer, value", OUTSIDE)
def test_values_outside_the_range_are_refused_by_name(layer, value):
    y = torch.zeros(2, 3)
    layer.pinv(y + 0.5)
    y[1, 1] = value
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}.*{value}"):
        layer.pinv(y)


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 1e4), (torch.float64, 1e5)])
def test_baird_is_its_formula_and_stable_for_large_inputs(dtype, largest):
    """Where sinh overflows the map is the identity to rounding, and its own inverse with -c."""
    layer = bi.BairdActivation(3).to(dtype)
    with torch.no_grad():
        layer.c.copy_(torch.tensor([0.4, -30.0, 7.0]))
    size = torch.logspace(-2, math.log10(largest), 60, dtype=dtype)
    x = torch.cat([-size, size])[:, None].repeat(1, 3).requires_grad_()
    y, _, log_det = layer.forward_log_det(x)
    near, far = x.abs()[:, 0] < 40, x.abs()[:, 0] > 30
    expected = torch.asinh(torch.sinh(x[near].double()) + layer.c.double())
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(y[near].double(), expected, rtol=tight, atol=tight)
    assert_close(y[far], x[far])
    assert_close(log_det[far], torch.zeros(int(far.sum()), dtype=dtype))
    (gradient,) = torch.autograd.grad(y.sum() + log_det.sum(), x)
    assert gradient.isfinite().all()
    assert_close(layer.pinv(y), x, rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 1e-10)


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
            assert_close(g(torch.zeros(1, 1)).item(), sign * math.asinh(c), rtol=1e-6, atol=0)


# --- Linear layers and rearrangements --------------------------------------------------------------------------------


def matrix(layer: nn.Module, channels: int) -> torch.Tensor:
    """The matrix of a linear layer without bias."""
    return layer(torch.eye(channels, dtype=torch.float64)).T


@torch.no_grad()
def test_linear_layers_are_the_matrices_they_say():
    svd = ready(bi.SVDLinear(5, bias=False))
    right, diagonal, left = svd.layers
    u, v = matrix(left, 5), matrix(right, 5)
    expected = u @ torch.diag(diagonal.log_scale.exp()) @ v
    assert_close(matrix(svd, 5), expected)
    assert_close(torch.linalg.svdvals(expected).sort().values, diagonal.log_scale.exp().sort().values)

    conv = ready(bi.Conv1x1(6))
    w = matrix(conv, 6)
    x = randn(2, 6, 3, 2)
    assert_close(conv(x), F.conv2d(x, w[..., None, None]))


def test_rearrangements_take_the_order_they_are_given():
    line = torch.arange(6.0).view(1, 1, 6)
    assert bi.PixelUnshuffle(3, dims=1)(line).tolist() == [[[0, 3], [1, 4], [2, 5]]]
    assert bi.Shuffle(3, order=[2, 0, 1])(torch.tensor([[10.0, 20.0, 30.0]])).tolist() == [[30, 10, 20]]
    orders = [bi.Shuffle(50, seed=seed).order.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


# --- Normalisation ---------------------------------------------------------------------------------------------------


def test_actnorm_is_set_by_its_first_batch_in_training_mode():
    layer = bi.ActNorm(3).double()
    x = randn(16, 3, 4, scale=5) + torch.tensor([1.0, -7.0, 30.0])[:, None]
    assert torch.equal(layer.eval()(x), x) and not layer.initialised, "evaluation mode set it"
    y = layer.train()(x)
    assert_close(y.mean((0, 2)), zeros(3), rtol=0, atol=1e-10)
    assert_close(y.std((0, 2), correction=0), torch.ones(3, dtype=torch.float64))
    assert_close(layer(x + 9), y + 9 * layer.log_scale.exp()[:, None])  # the second batch leaves it

    loaded = bi.ActNorm(3).double()
    loaded.load_state_dict(layer.state_dict())
    assert_close(loaded.train()(3 * x), layer(3 * x))
    loaded.load_state_dict(bi.ActNorm(3).state_dict())
    assert_close(loaded(3 * x), y)  # set anew


def test_actnorm_takes_a_constant_channel_and_refuses_what_sets_no_scale():
    for constant in (0.0, 3.0, 1e-20):
        layer = bi.ActNorm(2).train()
        assert layer(torch.full((5, 2), constant)).abs().max() < 1e-5 and (layer.log_scale == 0).all()
    for scale in (1e-36, 1e-12, 1e12, 1e36):  # of any unit
        assert_close(bi.ActNorm(2).train()(scale * randn(50, 2).float()).std(0, correction=0), torch.ones(2))
    nothing = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    for x, said in ((nothing, "NaN or inf"), (torch.ones(1, 2), "2 values"), (torch.ones(4, 1), "features")):
        layer = bi.ActNorm(2).train()
        with pytest.raises(ValueError, match=rf"ActNorm\(2\).*{said}"):
            layer(x)  # the last one would broadcast
        assert not layer.initialised and not layer.bias.any()


def test_batch_norm_is_torchs_in_both_modes():
    ours, torchs = bi.BatchNorm(3).double(), nn.BatchNorm2d(3).double()
    with torch.no_grad():
        ours.log_scale.copy_(randn(3, seed=1))
        ours.bias.copy_(randn(3, seed=2))
        torchs.weight.copy_(ours.log_scale.exp())
        torchs.bias.copy_(ours.bias)
    for step in range(3):
        x = 3 * randn(4, 3, 2, 5, seed=step) + step
        if step == 0:  # before any batch the running statistics are there
            assert_close(ours.pinv(x), copy.deepcopy(ours).eval().pinv(x))
        assert_close(ours(x), torchs(x))
    assert_close(ours.running_mean, torchs.running_mean)
    assert_close(ours.running_var, torchs.running_var)
    assert_close(ours.eval()(x), torchs.eval()(x))


# --- Coupling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_coupling_moves_what_it_should_within_its_bound():
    x = randn(4, 6, 3, 3)
    layer = ready(bi.Coupling(6, kept=2, hidden=8, scale_bound=0.5))
    for parameter in layer.s.parameters():
        parameter.mul_(100)  # saturates the bound
    y = layer(x)
    assert torch.equal(y[:, :2], x[:, :2]) and (y[:, 2:] != x[:, 2:]).all()
    scale = (layer(x + torch.tensor([0, 0, 1, 1, 1, 1])[:, None, None]) - y)[:, 2:]  # exp(log-scale)
    assert math.exp(-0.5) - 1e-9 <= scale.min() < 0.7 and 1.4 < scale.max() <= math.exp(0.5) + 1e-9

    for layer, stays in (
        (bi.Coupling(6, kept=2, hidden=8, flip=True), torch.arange(6)[:, None, None] >= 4),
        (bi.Coupling(6, mask="checkerboard", hidden=8), (torch.arange(3)[:, None] + torch.arange(3)) % 2 == 1),
    ):
        assert torch.equal(ready(layer)(x) == x, stays.expand_as(x))

    additive = bi.Coupling(6, kind="additive", hidden=8).double()
    assert torch.equal(additive(x), x), "it does not start as the identity"
    assert torch.equal(ready(additive).log_abs_det(x), zeros(4)) and not torch.equal(additive(x), x)


def own(*shape: int) -> tuple[nn.Module, nn.Module]:
    """s and t."""
    return nn.Linear(*shape), nn.Sequential(nn.Linear(shape[0], 4), nn.Sigmoid(), nn.Linear(4, shape[1]))


@pytest.mark.parametrize("kind", ["affine", "additive"])
@pytest.mark.parametrize("mask", [None, [1.0, 1.0, 0.0, 1.0, 0.0]])
@torch.no_grad()
def test_coupling_takes_networks_of_your_own(mask, kind):
    """Which see what stays, and by which no more than the rest moves."""
    s, t = own(5, 5) if mask else own(2, 3)
    nets, x = {"s": s, "t": t} if kind == "affine" else {"t": t}, randn(4, 5).float()
    layer = bi.Coupling(5, kind=kind, mask=mask, dims=0, scale_bound=1.5, **nets)
    stays = torch.tensor(mask or [1.0, 1.0, 0.0, 0.0, 0.0]).bool()
    v, moves = (x * stays, x) if mask else (x[:, stays], x[:, ~stays])
    moved = (moves * torch.exp(1.5 * torch.tanh(s(v))) if kind == "affine" else moves) + t(v)
    assert_close(layer(x), torch.where(stays, x, moved) if mask else torch.cat([v, moved], 1))
    assert_close(layer.pinv(layer(x)), x)


def test_a_spline_bends_within_its_bound_and_starts_as_the_identity():
    layer = bi.SplineCoupling(3, kept=1, dims=0, hidden=8, bound=2.0).double()
    x = randn(200, 3, scale=2.0)
    assert_close(layer(x), x)
    y, inside = ready(layer)(x), x.abs() < 2
    inside[:, 0] = False  # which stays
    assert torch.equal(y[~inside], x[~inside]) and y[inside].abs().max() <= 2 and (y - x)[inside].abs().max() > 0.1


@pytest.mark.parametrize("bins", [2, 8, 64])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e5])
def test_a_spline_of_any_parameters_is_invertible_in_float32(scale, bins):
    """Both ways round, to a thousandth of its bound, and nothing leaves its range."""
    bound, n = 3.0, 5000
    parameters = randn(n, 3 * bins - 1, seed=1, scale=scale).float()
    x = 1.05 * bound * (2 * torch.rand(n, generator=seeded(2)) - 1)
    for backwards in (False, True):
        y, log_slope = bi.rational_quadratic(x, parameters, bound, backwards)
        again, log_slope_back = bi.rational_quadratic(y, parameters, bound, not backwards)
        assert (again - x).abs().max() < 1e-3 * bound and y.isfinite().all() and log_slope.isfinite().all()
        assert y[x.abs() < bound].abs().max() <= bound
        assert (log_slope.abs() < math.log(1e4)).all()


# --- Residual blocks -------------------------------------------------------------------------------------------------


def dense(conv, channels: int, size: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a convolution without bias on maps of ``size``."""
    n = channels * math.prod(size)
    return conv(torch.eye(n, dtype=torch.float64).view(n, channels, *size)).flatten(1).T


@pytest.mark.parametrize("size", [(6,), (5,), (4, 5), (3, 3)])
@torch.no_grad()
def test_the_norm_of_a_convolution_is_that_of_its_matrix(size):
    kind = (nn.Conv1d, nn.Conv2d)[len(size) - 1]
    conv = kind(2, 3, 3, padding=1, padding_mode="circular", bias=False).double()
    conv.weight.copy_(randn(*conv.weight.shape))
    expected = torch.linalg.matrix_norm(dense(conv, 2, size), ord=2)
    assert_close(bi.circular_conv_norm(conv.weight, size), expected)

    zeros = kind(2, 3, 3, padding=1, bias=False).double()
    zeros.weight.copy_(conv.weight)
    padded = torch.linalg.matrix_norm(dense(zeros, 2, size), ord=2)
    bound = bi.circular_conv_norm(conv.weight, [n + 2 for n in size])
    assert 0.5 * bound < padded <= bound


RESIDUALS = {
    "vectors": (lambda **o: bi.ResidualFC(5, hidden=6, **o), (5,)),
    "circular": (lambda **o: bi.ResidualConv1d(2, hidden=4, size=4, padding_mode="circular", **o), (2, 4)),
    "zeros": (lambda **o: bi.ResidualConv2d(2, hidden=4, size=3, **o), (2, 3, 3)),
}


def exaggerated(block: bi.Residual, factor: float = 50.0) -> bi.Residual:
    """Weights far too large, so that only the normalisation keeps h a contraction."""
    block = ready(block)
    with torch.no_grad():
        for layer in block.layers:
            layer.weight.mul_(factor)
    return block


@pytest.mark.parametrize("name", [*RESIDUALS, "power"])
def test_h_contracts_whatever_its_weights_are(name):
    """A power iteration's estimate needs a little training."""
    build, shape = RESIDUALS.get(name, (lambda **o: bi.ResidualConv2d(2, hidden=4, norm="power", **o), (2, 5, 4)))
    block, norms = exaggerated(build(lipschitz=0.8)).train(), []
    for x in randn(30, 1, *shape, scale=0.1):
        block(x)
    for x in randn(10, 1, *shape, seed=1, scale=0.1):
        jacobian = torch.autograd.functional.jacobian(block.h, x).view(x.numel(), -1)
        norms.append(torch.linalg.matrix_norm(jacobian, ord=2).item())
    assert (0.02 if name == "power" else 0.05) < max(norms) <= 0.8 + 1e-12
    assert_close(block.eval().pinv(block(x)), x)


@torch.no_grad()
def test_the_bound_is_reached_and_small_weights_are_left_alone():
    block = bi.ResidualFC(4, hidden=5, lipschitz=0.343).double()  # 0.7 a layer
    for layer in block.layers:
        layer.weight.copy_(randn(*layer.weight.shape))
    for weight in block.weights()[::2]:
        assert_close(torch.linalg.matrix_norm(weight, ord=2).item(), 0.7)
    small = [0.99 * weight for weight in block.weights()[::2]]
    for layer, weight in zip(block.layers, small, strict=True):
        layer.weight.copy_(weight)
    assert all(torch.equal(a, b) for a, b in zip(block.weights()[::2], small, strict=True))


def test_a_map_that_does_not_contract_is_found_out():
    """A power iteration that has met the smallest singular value in place of the largest."""
    block = exaggerated(bi.ResidualFC(5, hidden=5, norm="power", exact_below=0), factor=10)
    for i, layer in enumerate(block.layers):
        getattr(block, f"left{i}").copy_(torch.linalg.svd(layer.weight.detach()).U[:, -1])
    x = randn(3, 5)
    with pytest.raises(ValueError, match=r"ResidualFC\(5->5\): the inverse does not converge.*times the one before"):
        block.pinv(x)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"ResidualFC\(5->5\).*diverges: J stretches by"):
        block.log_abs_det(x)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
def test_an_inverse_reports_a_true_bound_of_its_error(tolerance):
    block = exaggerated(bi.ResidualFC(5, hidden=6, tolerance=tolerance), factor=3)
    with torch.no_grad():
        x = randn(8, 5)
        y = block(x)
        error = ((block.pinv(y) - x).norm(dim=1) / block._scale(y, block.weights())).max().item()
    assert tolerance * 1e-6 < error <= block.inverse_error <= tolerance
    with pytest.raises(ValueError, match="above tolerance=1e-09"):
        exaggerated(bi.ResidualFC(5, tolerance=1e-9)).float().pinv(y.float())


@pytest.mark.parametrize("lipschitz", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RESIDUALS)
@torch.no_grad()
def test_an_inverse_is_exact_at_any_scale(name, dtype, lipschitz):
    """To what rounding leaves of x, in a batch of all scales; at 0 and next to it, h(x) is all there is of y."""
    build, shape = RESIDUALS[name]
    scales = [0.0, 1e-30, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e30]
    for bias in (0.0, 0.1, 1e6):
        block = exaggerated(build(lipschitz=lipschitz), factor=1.0 if bias else 3.0).to(dtype)
        for layer in block.layers:
            layer.bias.mul_(bias)
        x = randn(len(scales), *shape, seed=1).to(dtype) * torch.tensor(scales, dtype=dtype).view(-1, *[1] * len(shape))
        y = block(x)
        error, size = ((block.pinv(y) - x).flatten(1).norm(dim=1), block._scale(y, block.weights()))
        assert (error <= 100 / (1 - lipschitz) * torch.finfo(dtype).eps * size)[1:-1].all()
        assert error[0] == 0 if bias == 0 else error[0] <= 100 / (1 - lipschitz) * torch.finfo(dtype).eps * size[0]
        assert_close(block.pinv(y[:1]), block.pinv(y)[:1], rtol=0, atol=size[0].item() * 1e-4)


def test_an_inverse_has_derivatives_of_every_order_in_both_modes():
    """Of vectors too, by the laws."""
    block, y = exaggerated(RESIDUALS["zeros"][0](lipschitz=0.1), factor=3), randn(2, 2, 3, 3).requires_grad_()
    parameters = tuple(block.parameters())
    inverse = lambda y, *_: block.pinv(y)  # noqa: E731
    assert torch.autograd.gradcheck(inverse, (y, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(inverse, (y, *parameters), fast_mode=True)

    one = lambda y: block.pinv(y[None])[0]  # noqa: E731
    y = y.detach()
    by_reverse, by_forward = (vmap(jac(one))(y) for jac in (jacrev, jacfwd))
    assert_close(by_forward, by_reverse)
    assert_close(vmap(one)(y), block.pinv(y))
    n = y[0].numel()
    there = vmap(jacrev(lambda x: block(x[None])[0]))(block.pinv(y)).view(2, n, n)
    assert_close(by_reverse.view(2, n, n), torch.linalg.inv(there))
    loss = lambda y: one(y).pow(3).sum()  # noqa: E731
    assert_close(jacfwd(jacrev(loss))(y[0]), jacrev(jacrev(loss))(y[0]))


@pytest.mark.slow  # each step is recorded
def test_an_inverse_is_linearized():
    block, y, t = ready(bi.ResidualFC(3, hidden=4, lipschitz=0.01)), randn(2, 3), randn(2, 3, seed=1)
    x, push = torch.func.linearize(block.pinv, y)
    assert_close((x, push(t)), torch.func.jvp(block.pinv, (y,), (t,)))


def test_the_series_estimates_the_log_determinant_without_bias():
    """For h = W x: log |det(I + W)| and its gradient (I + W)^-T, over 200 estimates of 100 copies.

    With few certain terms, what follows is a matter of the roulette; those alone are far off.
    """
    torch.manual_seed(0)
    block = bi.ResidualFC(4, lipschitz=0.7, series_terms=2, exact_below=0).double()
    basis = torch.linalg.qr(randn(4, 4)).Q
    w = basis @ torch.diag(torch.tensor([-0.68, -0.6, -0.4, 0.3]).double()) @ basis.T
    w.requires_grad_()
    block.h = lambda x, *_: x @ w.T
    identity = torch.eye(4, dtype=torch.float64)
    exact, exact_gradient = torch.linalg.slogdet(identity + w).logabsdet.item(), torch.linalg.inv(identity + w).T
    certain = torch.trace(w) - torch.trace(w @ w) / 2
    estimates, gradients = [], []
    for _ in range(200):
        estimate = block.log_abs_det(randn(1, 4).expand(100, -1)).mean()
        gradients.append(torch.autograd.grad(estimate, w)[0])
        estimates.append(estimate.item())
    estimates, gradients = torch.tensor(estimates), torch.stack(gradients)
    sigma = (estimates.std() / math.sqrt(200)).item()
    assert abs(estimates.mean().item() - exact) < 4 * sigma < abs(certain.item() - exact) / 2
    sigma = gradients.std(0) / math.sqrt(200)
    assert ((gradients.mean(0) - exact_gradient).abs() < 4 * sigma + 1e-3).all()
    assert sigma.max() < 0.1 * exact_gradient.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_estimated_log_determinant_needs_no_gradients_around_it(mode):
    block, x = exaggerated(bi.ResidualFC(4, hidden=5, exact_below=0)), randn(3, 4)
    torch.manual_seed(0)
    _, _, expected = block.forward_log_det(x)
    torch.manual_seed(0)
    with mode():
        y, _, log_det = block.forward_log_det(x)
        assert_close(y, block(x))
    assert not y.requires_grad and not log_det.requires_grad
    assert_close(log_det.clone(), expected.detach())


# --- Adding and extracting noise -------------------------------------------------------------------------------------


NOISES = ["normal", "uniform", "laplace", Normal(0.0, 2.0), Bernoulli(0.3)]


@pytest.mark.parametrize("noise", NOISES, ids=str)
@torch.no_grad()
def test_concat_noise_draws_and_counts_it(noise):
    layer, x = bi.ConcatNoise(1, 2, noise=noise), torch.zeros(20000, 1)
    torch.manual_seed(0)
    y, _, log_det = layer.forward_log_det(x)
    e = layer.split(y)[1]
    assert_close(e.std().item(), layer.noise.stddev.item(), rtol=0.03, atol=0)
    assert_close(log_det, -layer.noise.log_prob(e).sum(1))
    assert torch.equal(layer.pinv(y), x) and not torch.equal(layer(x), y), "the same noise twice"
    assert torch.equal(layer.inverted()(y, True)[1], e)


@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_whitening_whitens_what_it_was_fitted_to(kind):
    mixing = torch.linalg.qr(randn(4, 4, seed=1)).Q @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1]).double())
    x = torch.einsum("ij,bjl->bil", mixing, randn(50, 4, 6)) + torch.arange(4.0)[:, None]
    layer = bi.Whitening(4, kind=kind).double()
    assert torch.equal(layer(x), x), "the identity until it is fitted"
    y = layer.fit(x)(x).movedim(1, 0).flatten(1)
    assert_close(torch.cov(y), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(y.mean(1), zeros(4), rtol=0, atol=1e-10)
    symmetric = (layer.whiten - layer.whiten.T).abs().max() < 1e-10
    assert symmetric == (kind == "zca")
    diagonal = layer.whiten @ layer.whiten.T  # of PCA: one over the eigenvalues
    assert (diagonal - torch.diag(diagonal.diagonal())).abs().max() < 1e-8 or kind == "zca"


def test_whitening_refuses_data_of_fewer_dimensions():
    with pytest.raises(ValueError, match=r"Whitening\(5\): 3 samples"):
        bi.Whitening(5).fit(randn(3, 5))
    flat = randn(100, 3)
    flat[:, 2] = flat[:, 0] + flat[:, 1]
    with pytest.raises(ValueError, match=r"Whitening\(3\): 100 samples span fewer than 3"):
        bi.Whitening(3).fit(flat)
    with pytest.raises(ValueError, match=r"Whitening\(3\): the samples hold NaN"):
        bi.Whitening(3).fit(torch.full_like(flat, math.nan))


# --- Densities -------------------------------------------------------------------------------------------------------


def toy_flow() -> PINN:
    blocks = [
        bi.Diagonal(2),
        bi.Orthogonal(2),
        bi.Coupling(2, dims=0, hidden=8, scale_bound=0.7),
        bi.BairdActivation(2),
        bi.Conv1x1(2),
        bi.ResidualFC(2, hidden=8, lipschitz=0.7),
        bi.PReLU(2, slope=0.6),
        bi.Bias(2),
    ]
    torch.manual_seed(0)
    pinn = ready(PINN(blocks, (2,)))
    with torch.no_grad():
        pinn.blocks[4].log_scale.zero_()
        pinn.blocks[6].log_slope.fill_(math.log(0.6))
    return pinn


def surjective_toy() -> PINN:
    """Two pixels to one, so that half of it is latents."""
    blocks = [bi.BairdActivation(2), ConvPINNBlock(2, 1, hidden=8, feat_size=1, scale_bound=0.7), bi.Diagonal(1)]
    return ready(PINN(blocks, (2, 1, 1)))


CHAINS = {"bijections": toy_flow, "SPNN block": surjective_toy}


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_a_density_integrates_to_one(name, natural):
    chain = CHAINS[name]()
    density = Density(chain, natural=natural)
    axis = torch.linspace(-15, 15, 201, dtype=torch.float64)
    points, area = torch.cartesian_prod(axis, axis), 0.15**2
    p = density.log_prob(points.view(-1, *chain.in_shape)).exp()
    assert p.max() > 0.01
    assert_close((p.sum() * area).item(), 1.0, rtol=0, atol=2e-3)

    torch.manual_seed(0)
    samples = density.sample(20000).flatten(1)
    mean = (p[:, None] * points).sum(0) * area
    cov = (p[:, None, None] * (points - mean)[:, :, None] * (points - mean)[:, None, :]).sum(0) * area
    assert_close(samples.mean(0), mean, rtol=0, atol=0.05 * cov.diagonal().max().sqrt().item())
    assert_close(torch.cov(samples.T), cov, rtol=0, atol=0.08 * cov.max().item())


@torch.no_grad()
def test_latents_are_natural_where_asked():
    """log p(x) = log N(y) + log N(z; r(y), 1) + log |det|, term by term."""
    block = ready(ConvPINNBlock(3, 2, hidden=8, feat_size=1))
    chain = PINN([block], (3, 1, 1))
    x = randn(5, 3, 1, 1)
    y, z = block(x, True)
    rest = STANDARD.log_prob(y).flatten(1).sum(1) + block.log_abs_det(x)
    plain, natural = Density(chain).log_prob(x), Density(chain, natural=True).log_prob(x)
    assert_close(plain, rest + STANDARD.log_prob(z).flatten(1).sum(1))
    assert_close(natural, rest + STANDARD.log_prob(z - block.natural_latent(y)).flatten(1).sum(1))
    assert (plain - natural).abs().min() > 1e-3


@torch.no_grad()
def test_a_linear_density_is_the_gaussian_it_stands_for():
    chain = ready(PINN([bi.SVDLinear(3)], (3,)))
    w = matrix(chain, 3) - chain(zeros(1, 3)).T
    mean = torch.linalg.solve(w, -chain(zeros(1, 3))[0])
    expected = MultivariateNormal(mean, precision_matrix=w.T @ w)
    x = randn(6, 3)
    assert_close(Density(chain).log_prob(x), expected.log_prob(x))


@torch.no_grad()
def test_a_base_of_an_spnn_is_one_of_logits_or_of_maps():
    layers = [("PixelUnshuffle", {"r": 2}), ("ConvPINNBlock", {"in_ch": 4, "out_ch": 2, "hidden": 4, "feat_size": 1})]
    model = ready(SPNN(img_ch=1, num_classes=2, img_size=2, layer_channels=layers))
    x, mean = randn(3, 1, 2, 2), torch.tensor([3.0, -1.0]).double()
    plain = Density(model).log_prob(x) - STANDARD.log_prob(model(x)).sum(1)
    for shape in ((2,), (2, 1, 1)):
        normal = Normal(mean.view(shape), torch.full(shape, 0.5).double())
        for base in (normal, Independent(normal, len(shape))):
            density = Density(model, base=base)
            expected = plain + Normal(mean, 0.5).log_prob(model(x)).sum(1)
            assert_close(density.log_prob(x), expected)
            assert density.sample(4).shape == (4, 1, 2, 2)
    with pytest.raises(ValueError, match="Density: expected x of shape"):
        density.log_prob(torch.zeros(1, 1, 4, 4))


def test_what_would_broadcast_is_no_density():
    """A base, a log-determinant or a natural latent of a user's own: the sum would be another number."""

    class Scaled(bi.Bias):
        def forward_log_det(self, x):
            return 2 * x, None, math.log(2) * torch.ones(len(x), 1) * 3

    class Elsewhere(bi.ResidualFC):
        def natural_latent(self, y):
            return torch.zeros(len(y), 1, 1)

    for shape in ((2,), (1,), (1, 3), (3, 1), (3, 3)):
        with pytest.raises(ValueError, match=r"Density: base must be of single numbers or of shape \(3,\), got"):
            Density(PINN([bi.Bias(3)], (3,)), base=Normal(torch.zeros(shape), torch.ones(shape)))
    for call in (Density(PINN([Scaled(3)], (3,))).log_prob, PINN([Scaled(3)], (3,)).log_abs_det):
        with pytest.raises(RuntimeError, match="equal size"):
            call(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"Elsewhere.natural_latent does not fit \(4, 1\)"):
        Density(PINN([Elsewhere(3, 2)], (3,)), natural=True).log_prob(torch.zeros(4, 3))


@torch.no_grad()
def test_extracted_noise_has_the_density_of_its_noise():
    chain = PINN([bi.ConcatNoise(1, 1, noise="uniform").inverted()], (2,))
    density = Density(chain)
    x = torch.tensor([[0.3, 0.4], [0.3, 1.4]])
    expected = STANDARD.log_prob(torch.tensor(0.3)).item()
    assert density.log_prob(x).tolist() == pytest.approx([expected, -math.inf])
    samples = density.sample(1000)
    assert samples[:, 1].min() >= 0 and samples[:, 1].max() <= 1 and samples[:, 0].std() > 0.8


@torch.no_grad()
def test_added_noise_is_counted_out_of_the_density(monkeypatch):
    """log p(x, e) - log q(e): the mean of its exponential is p(x), as the density of (x, e) integrates to one."""
    flow = toy_flow()
    density = Density(PINN([bi.ConcatNoise(1, 1), *flow.blocks], (1,)))
    x, e = randn(2, 50, 1)
    monkeypatch.setattr(density.pinn.blocks[0], "draw", lambda x: e)
    log_q = STANDARD.log_prob(e).squeeze(1)
    assert_close(density.log_prob(x) + log_q, Density(flow).log_prob(torch.cat([x, e], 1)))


# --- Transforms and directions ---------------------------------------------------------------------------------------


def test_a_transform_is_torchs():
    ours, torchs = as_transform(bi.Sigmoid(), (3,)), SigmoidTransform()
    x = randn(2, 5, 3)
    assert_close(ours(x), torchs(x))
    assert_close(ours.inv(torchs(x)), x)
    assert_close(ours.log_abs_det_jacobian(x, ours(x)), torchs.log_abs_det_jacobian(x, torchs(x)).sum(-1))
    base = Independent(Normal(torch.zeros(3).double(), 1.0), 1)
    # asked for: torch.compile switches the default off for the whole process
    mine, other = (TransformedDistribution(base, [part], validate_args=True) for part in (ours, torchs))
    y = torch.rand(7, 3, generator=seeded(0), dtype=torch.float64)
    assert_close(mine.log_prob(y), other.log_prob(y))
    with pytest.raises(ValueError, match="support"):
        mine.log_prob(y + 1)


@torch.no_grad()
def test_a_transform_may_change_the_shape():
    chain = ready(PINN([bi.PixelUnshuffle(2), bi.Conv1x1(4), bi.View((4, 1, 2), (8,))], (1, 2, 4)))
    transform = as_transform(chain, (1, 2, 4))
    assert transform.forward_shape((5, 1, 2, 4)) == (5, 8) and transform.inverse_shape((5, 8)) == (5, 1, 2, 4)
    base = Independent(Normal(torch.zeros(1, 2, 4).double(), 1.0), 3)
    distribution = TransformedDistribution(base, [transform])
    assert distribution.event_shape == (8,)
    y = distribution.sample((3,))
    x = transform.inv(y)
    expected = base.log_prob(x) - chain.log_abs_det(x)
    assert_close(distribution.log_prob(y), expected)
    assert chain.log_abs_det(x).abs().min() > 1e-3


def test_what_is_no_bijection_has_no_transform():
    narrow, concat = bi.ResidualFC(3, 2), bi.Concat(2, 1)
    for block in (ConvPINNBlock(3, 2), narrow, concat, concat.inverted(), PINN([bi.Bias(3), narrow], (3,))):
        shape = (3, 2, 2) if isinstance(block, ConvPINNBlock) else (2,) if block is concat else (3,)
        with pytest.raises(ValueError, match="is no bijection"):
            as_transform(block, shape)


def test_inverted_twice_is_the_layer_itself_and_its_parameters_are_the_layers():
    for layer in (bi.Conv1x1(3), bi.Concat(3, 2), bi.PixelUnshuffle(2)):
        swapped = layer.inverted()
        assert swapped.inverted() is layer and set(swapped.parameters()) == set(layer.parameters())


# --- In a chain ------------------------------------------------------------------------------------------------------


def test_every_layer_has_a_name_and_so_has_its_inverse():
    """What `test_laws.py` holds to the laws can stand in a YAML file."""
    base = {bi.Bijection, bi.PerFeature, bi.Affine, bi.Activation, bi.OverChannels, bi.Split, bi.Residual, bi.Inverted}
    base |= {bi.VolumePreserving}
    layers = {kind for kind in vars(bi).values() if isinstance(kind, type) and issubclass(kind, bi.Bijection)} - base
    assert len(layers) == 26 and layers == {kind for kind in BLOCKS.values() if kind in layers}

    chain = yaml.safe_load(
        """
        - [Inverted, {block: Tanh}]
        - [Inverted, {block: PixelShuffle, r: 2}]
        - [Inverted, {block: ConcatNoise, channels: 8, extra: 4, noise: laplace}]
        - [Inverted, {block: Coupling, channels: 8, hidden: 4}]
        """
    )
    model = SPNN(num_classes=8, img_size=2, layer_channels=chain)
    again = SPNN(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x = randn(2, 3, 2, 2).tanh().float()
    y, z = model(x, return_latents=True)
    assert [None if part is None else part.shape[1] for part in z] == [None, None, 4, None]
    assert_close(again.pinv(y, latents=z), x)
    assert_close(model(again.pinv(y)), y)


REFUSED = {
    "an inverse of no block": (lambda: bi.inverted("Cube"), "Inverted: block must be one of .*'Tanh'.*, got 'Cube'"),
    "an inverse that loses": (lambda: bi.inverted("ResidualFC", in_ch=3, out_ch=2), "discards a latent"),
    "features": (lambda: PINN([bi.Bias((3, 2))], (3, 4)), r"block 0: Bias\(3x2\).*\(3, 4\) arrives"),
    "a view": (lambda: PINN([bi.View((4,), (2, 2))], (5,)), r"View.*expected \(4,\), got \(5,\)"),
    "a mask": (lambda: PINN([bi.Coupling(4, mask=[1, 0, 1], dims=0)], (4,)), r"mask of shape \(3,\).*\(4,\)"),
    "a mask of halves": (lambda: bi.Coupling(2, mask=[0.5, 1], dims=0), "0 and 1 only"),
    "dimensions": (lambda: PINN([bi.Coupling(4)], (4,)), r"Coupling\(4\): dims is 2"),
    "nothing to move": (lambda: bi.Coupling(4, kept=4), "kept must be positive and at most 3, got 4"),
    "a mask and a split": (lambda: bi.Coupling(4, kept=1, mask="checkerboard"), "a mask stands in place of kept"),
    "a scale of none": (lambda: bi.Coupling(4, kind="additive", s=nn.Linear(2, 2)), "s is for kind 'affine'"),
    "reflections": (lambda: bi.Orthogonal(3, reflections=0), "reflections must be positive"),
    "momentum": (lambda: bi.BatchNorm(3, momentum=1.5), "momentum must be positive and at most 1"),
    "an order": (lambda: bi.Shuffle(3, order=[0, 0, 1]), r"each of 0\.\.\.2 once"),
    "lipschitz 1": (lambda: bi.ResidualFC(3, lipschitz=1.0), "lipschitz must be above 0 and below 1.*1.0"),
    "no size": (lambda: bi.ResidualConv2d(3), "needs the size of the map"),
    "another size": (lambda: PINN([bi.ResidualConv2d(3, size=4)], (3, 4, 5)), r"size is \(4, 4\).*\(4, 5\)"),
    "an even kernel": (lambda: bi.ResidualConv1d(3, size=8, kernel_size=4), "odd"),
    "noise": (lambda: bi.ConcatNoise(2, 1, noise="pink"), "'pink'"),
    "noise of vectors": (lambda: bi.ConcatNoise(2, 1, noise=Normal(torch.zeros(3), 1)), "single numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_built(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build()
