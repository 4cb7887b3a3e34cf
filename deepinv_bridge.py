"""deepinv in both directions: operators and priors of here as its physics and denoisers, and its own here.

    pip install -r requirements-deepinv.txt

deepinv's images have values in [0, 1], those of here in [-1, 1]. All that passes over is converted; what a physics
measures stays as it is. ``experiments/deepinv_samplers.py`` and ``deepinv_physics.py`` show either way.
"""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from deepinv.models import Denoiser
from deepinv.physics import DecomposablePhysics, LinearPhysics, Physics
from torch import Tensor, nn

from DDNM.guided_diffusion.schedule import Schedule
from operators import LinearChain, LinearOperator, Move, Operator, Shape, Shifted, SquaredError, as_operator


def _to_unit(x: Tensor) -> Tensor:
    return (x + 1) / 2


def _from_unit(x: Tensor) -> Tensor:
    return 2 * x - 1


# --- Operators of here, there ----------------------------------------------------------------------------------------


class NetworkPhysics(Physics):
    """A non-linear operator, of which ``A_dagger`` is the pseudo-inverse in closed form."""

    def __init__(self, operator: Operator, **settings) -> None:
        super().__init__(**settings)
        self.operator, self.img_size = operator, operator.in_shape
        self.network = getattr(operator, "model", None)  # that .to() reaches it

    def A(self, x: Tensor, **_) -> Tensor:
        return self.operator.A(_from_unit(x))

    def A_dagger(self, y: Tensor, x_init: Tensor | None = None, **_) -> Tensor:
        return _to_unit(self.operator.pinv(y))


class MatrixPhysics(LinearPhysics):
    """A linear operator with its A+; the adjoint is autograd's."""

    def __init__(self, operator: LinearOperator, **settings) -> None:
        super().__init__(A=operator.A, img_size=operator.in_shape, **settings)
        self.operator = operator

    def A_adjoint(self, y: Tensor, **_) -> Tensor:
        return torch.func.vjp(self.operator.A, y.new_zeros(len(y), *self.operator.in_shape))[1](y)[0]

    def A_dagger(self, y: Tensor, **_) -> Tensor:
        return self.operator.pinv(y)


class ChainPhysics(DecomposablePhysics):
    """A `LinearChain`, whose completion G is the operator's singular value decomposition: DDRM runs on it.

    What G keeps and what it drops, each divided by how much it was scaled, are an image's coordinates in an orthonormal
    basis: ``V^T x``, (B, C H W), the measured ones first. The singular values are `LinearChain.gain` and 0.
    """

    def __init__(self, operator: LinearChain, **settings) -> None:
        self.measured, self.total = math.prod(operator.out_shape), math.prod(operator.in_shape)
        values = torch.zeros(1, self.total)
        values[:, : self.measured] = operator.gain
        super().__init__(mask=values, img_size=operator.in_shape, **settings)
        self.operator = operator
        blocks = operator.chain.pinn.blocks
        # how much the latent of each block was scaled by the blocks before it
        self.scales = [math.prod(getattr(block, "scale", 1.0) for block in blocks[:i]) for i in range(len(blocks))]

    def A(self, x: Tensor, **_) -> Tensor:  # the products of U, values and V that follow, but not rounded
        return self.operator.A(x)

    def A_dagger(self, y: Tensor, **_) -> Tensor:
        return self.operator.pinv(y)

    def A_adjoint(self, y: Tensor, **_) -> Tensor:
        return self.operator.gain**2 * self.operator.pinv(y)

    def V_adjoint(self, x: Tensor) -> Tensor:
        y, latents = self.operator.chain(x, return_latents=True)
        dropped = [z.flatten(1) / scale for z, scale in zip(latents, self.scales, strict=True) if z is not None]
        return torch.cat([y.flatten(1) / self.operator.gain, *dropped], dim=1)

    def V(self, x: Tensor, **_) -> Tensor:
        like = self.operator.chain.natural(x[:0, : self.measured].unflatten(1, self.operator.out_shape)).z
        parts = x[:, self.measured :].split([0 if z is None else z.shape[1:].numel() for z in like], dim=1)
        latents = [
            None if z is None else scale * part.unflatten(1, z.shape[1:])
            for z, part, scale in zip(like, parts, self.scales, strict=True)
        ]
        return self.operator.chain.pinv(self.operator.gain * self.U(x), latents)

    def U(self, x: Tensor) -> Tensor:
        return x[:, : self.measured].unflatten(1, self.operator.out_shape)

    def U_adjoint(self, x: Tensor, **_) -> Tensor:
        return F.pad(x.flatten(1), (0, self.total - self.measured))


def as_physics(operator, **settings) -> Physics:
    """An operator as a ``deepinv.physics.Physics`` on images in [0, 1].

    A linear one is a ``LinearPhysics``, with ``A_adjoint``; a `LinearChain` a ``DecomposablePhysics``. What they
    measure of an image in [0, 1] is in that range too: A itself, which is linear, and not of ``2 x - 1``.

    Args:
        operator: of operators.py, or an `models.SPNN`.
        settings: of the physics: ``noise_model``, ``device``, ...
    """
    operator = as_operator(operator)
    if isinstance(operator, (PhysicsOperator, IterativeOperator)):
        return operator.physics
    if isinstance(operator, LinearChain):
        return ChainPhysics(operator, **settings)
    return (MatrixPhysics if isinstance(operator, LinearOperator) else NetworkPhysics)(operator, **settings)


# --- Its physics, here -----------------------------------------------------------------------------------------------


class PhysicsOperator(LinearOperator):
    """A linear physics, which is affine on images in [-1, 1]."""

    gain = None

    def __init__(self, physics: Physics, in_shape: Shape, out_shape: Shape) -> None:
        self.physics, self.in_shape, self.out_shape = physics, in_shape, out_shape

    def A(self, x: Tensor) -> Tensor:
        return self.physics.A(_to_unit(x))

    def pinv(self, y: Tensor) -> Tensor:
        return _from_unit(self.physics.A_dagger(y))


class IterativeOperator(SquaredError):
    """A non-linear physics, whose ``A_dagger`` is found by gradient descent: no closed form, and no exactness.

    ``pinv`` begins with grey, back-projection with the image it moves.
    """

    physics: Physics
    in_shape: Shape
    out_shape: Shape
    __init__, A = PhysicsOperator.__init__, PhysicsOperator.A

    def pinv(self, y: Tensor) -> Tensor:
        return self.nearest(y, y.new_zeros(len(y), *self.in_shape))

    def nearest(self, y: Tensor, x: Tensor) -> Tensor:
        """What descent from x finds for y."""
        return _from_unit(self.physics.A_dagger(y, x_init=_to_unit(x)))

    def towards(self, y: Tensor) -> Callable[[Tensor], Move]:
        return lambda x: Shifted(x, self.A(x), self.nearest(y, x) - x)


def from_physics(physics: Physics, in_shape: Shape) -> Operator:
    """A deepinv physics as an operator on images in [-1, 1]; its targets are what the physics measures, noise aside.

    A linear one is back-projected by its ``A_dagger``: exact if that is a closed form, else to its tolerance. A
    non-linear one by its iterative ``A_dagger``, with a warning.

    Args:
        in_shape: (3, H, W) of the images, the prior's.

    Raises:
        ValueError: such images do not fit, with both shapes if the physics tells its own.
    """
    name, in_shape, linear = type(physics).__name__, tuple(in_shape), isinstance(physics, LinearPhysics)
    like = next((buffer for buffer in physics.buffers() if buffer.is_floating_point()), torch.zeros(()))
    grey = torch.full((1, *in_shape), 0.5, dtype=like.dtype, device=like.device)
    own, why = tuple(getattr(physics, "img_size", None) or in_shape), ""
    try:
        y = physics.A(grey)
        fits = own == in_shape and isinstance(y, Tensor) and (not linear or physics.A_dagger(y).shape == grey.shape)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        fits, why = False, f": {error}"
    if not fits:
        why = f", but of {own}" if own != in_shape else why
        raise ValueError(f"{name} does not take images of shape {in_shape}{why}")
    if linear:
        return PhysicsOperator(physics, in_shape, tuple(y.shape[1:]))
    warnings.warn(
        f"{name} is not linear: it is inverted by iteration, which is no closed form and may miss its target; an SPNN "
        "trained on it has one",
        stacklevel=2,
    )
    return IterativeOperator(physics, in_shape, tuple(y.shape[1:]))


# --- Priors ----------------------------------------------------------------------------------------------------------


class PriorDenoiser(Denoiser):
    """A prior of here, `DDNM.guided_diffusion.prior.Prior` say, as a ``deepinv.models.Denoiser``.

    ``D(x, sigma)`` are the clean images that the prior sees, for images and noise of the range [0, 1]. The noise level
    asked for becomes the nearest step of the prior's schedule.

    Args:
        clip: keep what is denoised in the range of images.
    """

    def __init__(self, prior: nn.Module, clip: bool = True) -> None:
        super().__init__()
        self.prior, self.clip = prior, clip
        steps = torch.arange(prior.schedule.num_diffusion_timesteps)
        self.register_buffer("abar", prior.schedule.abar(steps))

    def forward(self, x: Tensor, sigma: float | Tensor, **_) -> Tensor:
        sigma = 2 * self._handle_sigma(sigma, reference_tensor=x)  # (B, 1, 1, 1), of images in [-1, 1]
        levels = (1 / self.abar - 1).sqrt().log()  # (T,)
        t = (levels - sigma.clamp_min(1e-6).log().view(-1, 1)).abs().argmin(1).to(x.device)  # (B,)
        x = _from_unit(x)
        eps = self.prior(x * self.abar[t].to(x).sqrt().view(-1, 1, 1, 1), t)
        x0 = x - sigma * eps
        return _to_unit(x0.clamp(-1, 1) if self.clip else x0)


class DenoiserPrior(nn.Module):
    """A deepinv denoiser of images in [0, 1] as a prior for `DDNM.guided_diffusion.diffusion.sample`.

    ``eps(x_t, t) = (x_t / sqrt(abar_t) - D) / sigma_t``, D the denoiser's image, ``sigma_t^2 = 1 / abar_t - 1``. It is
    asked for all noise levels of the schedule, up to sigma 79: one that was trained on small ones only does not know
    what to do with those.
    """

    def __init__(self, denoiser: nn.Module, image_size: int, schedule: Schedule = Schedule()) -> None:  # noqa: B008
        super().__init__()
        self.denoiser, self.image_size, self.schedule = denoiser, image_size, schedule

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        abar = self.schedule.abar(t).to(x).reshape(-1).expand(len(x)).view(-1, 1, 1, 1)
        sigma, noisy = (1 / abar - 1).sqrt(), x / abar.sqrt()
        return (noisy - _from_unit(self.denoiser(_to_unit(noisy), sigma.flatten() / 2))) / sigma


as_denoiser, as_prior = PriorDenoiser, DenoiserPrior
