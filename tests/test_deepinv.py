"""deepinv in both directions; skipped without it (pip install -r requirements-deepinv.txt)."""

from functools import partial

import numpy as np
import pytest
import torch
from runs import SCHEDULE, draw, gaussian_prior, images, spnn8

pytest.importorskip("deepinv", reason="needs deepinv: pip install -r requirements-deepinv.txt")
import deepinv  # noqa: E402
from deepinv.physics import BlurFFT, Decolorize, Demosaicing, Downsampling, Haze, Inpainting, LinearPhysics, Physics  # noqa: E402

from DDNM.guided_diffusion.guidance import NLBP, Linear  # noqa: E402
from deepinv_bridge import as_denoiser, as_physics, as_prior, from_physics  # noqa: E402
from operators import GREY, KnownPixels, LinearChain, LinearOperator, make_operator  # noqa: E402
from utils import InputError  # noqa: E402

SHAPE = (3, 8, 12)
MASK = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) > 0.4
OURS = {
    "sr2": lambda: make_operator("sr2", SHAPE),
    "grey": lambda: make_operator("grey", SHAPE),
    "inpaint": lambda: LinearChain([(KnownPixels, {"mask": MASK.tolist()})], SHAPE),
    "grey*sr4": lambda: make_operator("grey*sr4", SHAPE),
}
exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def double(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Operators of here, there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_a_chain_passes_deepinvs_checks_and_its_completion_is_the_svd(name):
    operator = OURS[name]()
    physics, x = as_physics(operator).double(), double(2, *SHAPE)
    y = physics(x)
    assert physics.adjointness_test(x) < 1e-13
    assert physics.compute_sqnorm(x[:1], tol=1e-9, verbose=False).item() == pytest.approx(operator.gain**2)
    exactly(y, operator.A(x))
    exactly(physics.A_dagger(y), operator.pinv(y))
    exactly(physics.A_vjp(x, y), torch.func.vjp(operator.A, x)[1](y)[0])
    coordinates = physics.V_adjoint(x)
    exactly(coordinates.norm(dim=1), x.flatten(1).norm(dim=1))
    exactly(physics.V(coordinates), x)
    torch.testing.assert_close(physics.U(physics.mask * coordinates), y, rtol=1e-6, atol=1e-6)  # its values: float32
    exactly(physics.U(physics.U_adjoint(y)), y)


def test_an_operator_that_is_given_as_functions_is_linear_physics_too():
    a = double(5, 288)
    back = torch.linalg.pinv(a).T
    operator = LinearOperator(lambda x: x.flatten(1) @ a.T, lambda y: (y @ back).view(-1, *SHAPE), SHAPE, (5,))
    physics, x = as_physics(operator), double(2, *SHAPE)
    assert isinstance(physics, LinearPhysics) and physics.adjointness_test(x) < 1e-12
    exactly(physics.A(physics.A_dagger(physics.A(x))), physics.A(x))


def test_a_network_is_physics_with_its_pseudo_inverse():
    model = spnn8().double()
    physics, x, y = as_physics(model), double(2, 3, 8, 8).sigmoid(), double(2, 5)
    exactly(physics(x), model(2 * x - 1))
    torch.testing.assert_close(physics.A(physics.A_dagger(y)), y, rtol=0, atol=1e-9)
    x.requires_grad_()
    (grad,) = torch.autograd.grad((model(2 * x - 1) * y).sum(), x)
    exactly(physics.A_vjp(x.detach(), y), grad)
    assert next(physics.to(torch.float32).parameters()).dtype == torch.float32


SAMPLERS = {
    "DDRM": lambda d: deepinv.sampling.DDRM(d, sigmas=np.linspace(1, 0, 20)),
    "DiffPIR": lambda d: deepinv.sampling.DiffPIR(d, deepinv.optim.L2(), max_iter=20),
    "DPS": lambda d: deepinv.sampling.DPS(d, num_steps=20, weight=60.0, dtype=torch.float32),
    "DPIR": lambda d: deepinv.optim.DPIR(sigma=0.05, denoiser=d),  # plug and play
}


@pytest.mark.parametrize("name", [*SAMPLERS, "DPS of a network"])
def test_deepinvs_samplers_run_on_operator_and_prior(name):
    torch.manual_seed(0)
    operator = make_operator("sr2", (3, 8, 8)) if name in SAMPLERS else spnn8()
    physics = as_physics(operator, noise_model=deepinv.physics.GaussianNoise(0.01))
    x = (images(2, seed=4) * 0.9 + 1) / 2
    y = physics(x)
    build = SAMPLERS.get(name, partial(deepinv.sampling.DPS, num_steps=20, dtype=torch.float32))
    drawn = build(as_denoiser(gaussian_prior))(y, physics)
    assert drawn.shape == x.shape and drawn.isfinite().all()
    other = physics(x.flip(0))  # what another image gives
    assert (physics.A(drawn) - y).square().mean() < 0.7 * (other - y).square().mean()


# --- Its physics, here -----------------------------------------------------------------------------------------------

THEIRS = {
    "sr2": lambda: Downsampling(SHAPE, torch.full((1, 1, 2, 2), 0.25), 2, padding="valid", max_iter=30, tol=1e-12),
    "grey": lambda: Decolorize(srf=list(GREY)),
    "inpaint": lambda: Inpainting(SHAPE, MASK.double().expand(SHAPE)),
}


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_its_operators_and_those_of_here_are_the_same(name):
    """A, and ``A_dagger``, which deepinv finds in its own way."""
    ours, theirs, x = OURS[name](), THEIRS[name]().double(), double(2, *SHAPE)
    there = theirs.A(x)
    here = there[:, :, MASK][..., None] if name == "inpaint" else there
    rounding = {"rtol": 0, "atol": 1e-12 if name == "inpaint" else 2e-7}  # deepinv keeps filters and weights in float32
    torch.testing.assert_close(ours.A(x), here, **rounding)
    torch.testing.assert_close(ours.pinv(here), theirs.A_dagger(there), **rounding)


BLUR = torch.ones(1, 1, 3, 3) / 9


@pytest.mark.parametrize("build", [*THEIRS.values(), lambda: Demosaicing(SHAPE), lambda: BlurFFT(SHAPE, BLUR)])
@torch.no_grad()
def test_a_linear_physics_is_back_projected_by_its_pseudo_inverse(build):
    physics = build().double()
    operator, x, y = from_physics(physics, SHAPE), double(2, *SHAPE), physics.A(double(2, *SHAPE, seed=2).sigmoid())
    assert operator.in_shape == SHAPE and operator.out_shape == tuple(y.shape[1:]) and as_physics(operator) is physics
    torch.testing.assert_close(operator.A(x), physics.A((x + 1) / 2))
    rounding = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(operator.A(operator.pinv(y)), y, **rounding)
    torch.testing.assert_close(operator.A(operator.back_project(x, y)), y, **rounding)
    torch.testing.assert_close(operator.back_project(x, operator.A(x)), x, **rounding)


@torch.no_grad()
def test_a_non_linear_physics_is_inverted_by_iteration_and_says_so():
    physics = Physics(A=lambda x, **_: torch.tanh(3 * x - 1.5), max_iter=200, tol=1e-8)
    with pytest.warns(UserWarning, match="no closed form"):
        operator = from_physics(physics, (3, 8, 8))
    x, y = images(2) * 0.5, operator.A(images(2, seed=1) * 0.5)
    assert as_physics(operator) is physics
    for moved in (operator.back_project(x, y), operator.pinv(y)):
        assert (operator.distance(operator.A(moved), y) < 0.1 * operator.distance(operator.A(x), y)).all()
    torch.testing.assert_close(operator.back_project(x, y, 0.0), x)
    rule = NLBP(lambda2=1.0, nlbp_stop_cond=0.0, max_move=None)
    drawn = draw("ab", model=operator, target=y, guidance=rule, steps=5)
    assert (operator.distance(operator.A(drawn), y) < 0.05).all()
    with pytest.raises(InputError, match="linear is for linear operators"):
        Linear().towards(operator, y)


@pytest.mark.parametrize("build, said", [
    (lambda: Demosaicing((3, 8, 8)), r"Demosaicing does not take .*\(3, 8, 12\), but of \(3, 8, 8\)"),
    (lambda: Inpainting((3, 8, 12), torch.ones(3, 8, 6)), r"Inpainting does not take images of shape \(3, 8, 12\)"),
    (lambda: Decolorize(channels=4), r"Decolorize does not take images of shape \(3, 8, 12\)"),
    (Haze, r"Haze does not take images of shape \(3, 8, 12\)"),  # it takes two more pictures
])  # fmt: skip
def test_a_physics_of_other_images_is_refused(build, said):
    with pytest.raises(ValueError, match=said):
        from_physics(build(), SHAPE)


# --- Priors ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prior_as_a_denoiser_is_the_posterior_mean():
    """Of independent pixels of mean 0.1 and deviation 0.3 in [-1, 1]; each image at its own noise level."""
    x, sigma = double(3, 3, 8, 8), torch.tensor([0.02, 0.3, 4.0], dtype=torch.float64)
    seen, noise = 2 * x - 1, (2 * sigma.view(-1, 1, 1, 1)) ** 2
    expected = ((0.09 * seen + noise * 0.1) / (0.09 + noise) + 1) / 2
    denoiser = as_denoiser(gaussian_prior, clip=False)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=0, atol=0.02)  # the nearest level of a thousand
    torch.testing.assert_close(denoiser(x[:1], 0.02), denoiser(x, sigma)[:1])
    assert as_denoiser(gaussian_prior)(9 * x, sigma).abs().max() <= 1


@pytest.mark.parametrize("t", [0, 10, 500, 999])
@torch.no_grad()
def test_a_denoiser_as_a_prior_gives_the_noise_back(t):
    prior = as_prior(as_denoiser(gaussian_prior, clip=False), 8, SCHEDULE)
    x = double(2, 3, 8, 8)
    torch.testing.assert_close(prior(x, t), gaussian_prior(x, torch.tensor(t)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior(x, torch.tensor([t, t])), prior(x, t))
