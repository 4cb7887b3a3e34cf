"""How a sampler is steered: rules that are handed the prior, x_t and t, and give back what it goes on with.

A rule knows nothing of the loop that calls it, nor of the schedule's walk; steps in its settings are of 1000, whatever
the schedule's T. ``guidance.towards(operator, y)`` is the rule for one batch of targets; called with (denoise, x_t, t)
it makes steps 1 to 3 of `diffusion.sampling`:

    1, 2  x0, eps = denoise(x_t, t)
    3     x0'     = x0 moved towards y;  and what is added to x_next

Symbols: ``x_t`` the noisy images at step t, ``x0`` the clean ones that the prior sees in them, ``eps`` the noise it
predicts, ``abar`` the schedule, A the operator, y the target, ``unit(v) = v / rms(v)``, image by image. A gradient that
is not finite makes its image not finite, and no other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from DDNM.guided_diffusion.schedule import Schedule, time_pairs
from operators import LinearOperator, Move, Operator
from utils import InputError, nearest, option


class Denoised(NamedTuple):
    """What the sampler goes on with: the clean images, moved, and the noise, (B, 3, H, W) each.

    Attributes:
        correction: what is to be added to x_next, computed if it is asked for; None for nothing.
        settle: for targets with noise: given z, a and sigma of ``x_next = a x0 + c eps + sigma z``, x0 and z as they
            should be; None for as they are.
    """

    x0: Tensor
    eps: Tensor
    correction: Callable[[], Tensor] | None = None
    settle: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


class NoisePredictor(Protocol):
    """What a sampler draws from: ``eps(x_t, t)``, the schedule it was trained with, and H = W of its images."""

    schedule: Schedule
    image_size: int

    def __call__(self, x: Tensor, t: int) -> Tensor: ...


@dataclass(frozen=True)
class Denoiser:
    """The clean images that a prior sees in x_t; with ``clip_x0`` in [-1, 1]: g has seen no others, G^-1 amplifies."""

    prior: NoisePredictor
    clip_x0: bool = True

    def __call__(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """``x0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)``, and eps."""
        eps = self.prior(x, t)
        return self.in_range(predict_x0(x, eps, self.abar(t))), eps

    def abar(self, t: int) -> Tensor:
        return self.prior.schedule.abar(t)  # on the CPU: a number, for which no copy waits

    def per_mille(self, t: int) -> float:
        return self.prior.schedule.per_mille(t)

    def in_range(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if self.clip_x0 else x0


def predict_x0(x: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """``(x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)``: the clean image that ``eps`` stands for, (B, 3, H, W)."""
    return (x - (1 - abar).sqrt() * eps) / abar.sqrt()


Steer = Callable[[Denoiser, Tensor, int], Denoised]


class Guidance:
    """A rule with its settings."""

    def towards(self, operator: Operator, y: Tensor) -> Steer:
        """The rule for targets y, (B, *out_shape)."""
        raise NotImplementedError

    def recurrences(self, t: float) -> int:
        """How often the step from t, of 1000, is made; before each but the first, noise takes x_next back to t."""
        return 1

    def evaluations(self, schedule: Schedule, steps: int, travel_length: int = 1, travel_repeat: int = 1) -> int:
        """How often a drawing evaluates the prior. Raises ValueError: more steps than it was trained with."""
        pairs = time_pairs(schedule.num_diffusion_timesteps, steps, travel_length, travel_repeat)
        return sum(self.recurrences(schedule.per_mille(t)) for t, t_next in pairs if t_next < t)


@dataclass(frozen=True)
class Unguided(Guidance):
    """``none``: plain samples of the prior."""

    def towards(self, operator: Operator | None = None, y: Tensor | None = None) -> Steer:
        return lambda denoise, x, t: Denoised(*denoise(x, t))


# --- Back-projection -------------------------------------------------------------------------------------------------

HALVINGS = 6


@dataclass(frozen=True)
class NLBP(Guidance):
    """``nlbp``: non-linear back-projection, ``G(x0') = G(x0) + lambda (G(g'(y)) - G(g'(g(x0))))``.

    Source: Ehrlich, Berman and Shocher, "Pseudo-Invertible Neural Networks", arXiv 2602.06042. With an operator that is
    linear, ``x0' = x0 + lambda A+(y - A x0)``.

    Attributes:
        lambda1: strength at steps t below ``min_bp_step``, the later, cleaner ones; lambda2: at the other steps.
        nlbp_stop_cond: an image is left alone if its ``operator.distance`` to y is at most this.
        max_move: lambda is halved, at most `HALVINGS` times, until the image moves by at most this (root mean square);
            if it still moves further, the image is left alone. None: no limit.
        last_bp_step: no back-projection at steps below this one: the prior alone finishes the picture. 0: to the end.
        noise: standard deviation of what the target has, in its unit. Then, as DDNM+ does (`Linear`), a step is no
            stronger than the noise that it brings into ``x_next = a x0' + c eps + sigma z`` allows: to ``sigma``.
    """

    lambda1: float = 1.0
    lambda2: float = 0.5
    min_bp_step: int = 600
    nlbp_stop_cond: float = 0.11
    max_move: float | None = 0.15
    last_bp_step: int = 0
    noise: float = 0.0

    def towards(self, operator: Operator, y: Tensor) -> Steer:
        move = operator.towards(y)
        brought = noise_brought(operator, y, self.noise) if self.noise else None  # (B,), by lambda = 1

        def steer(denoise: Denoiser, x: Tensor, t: int) -> Denoised:
            x0, eps = denoise(x, t)
            step = denoise.per_mille(t)
            if step < self.last_bp_step:
                return Denoised(x0, eps)
            strength = self.lambda1 if step < self.min_bp_step else self.lambda2
            project = move(x0)
            far = operator.distance(project.y, y) > self.nlbp_stop_cond  # (B,)

            def moved(strength: float | Tensor) -> Tensor:
                return guide(project, x0, far, strength, self.max_move, denoise.in_range)

            if brought is None:
                return Denoised(moved(strength), eps)
            return Denoised(x0, eps, settle=lambda z, a, sigma: (moved((sigma / (a * brought)).clamp(max=strength)), z))

        return steer


def noise_brought(operator: Operator, y: Tensor, noise: float) -> Tensor:
    """How much of a target's noise back-projection brings into an image, (B,): ``|A+(y + noise z) - A+ y| / |z|``.

    That is its standard deviation in each direction that A measures; for a linear A with one singular value ``gain``
    it is ``noise / gain``, whatever z is.
    """
    z = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(0)).to(y)
    return (operator.pinv(y + noise * z) - operator.pinv(y)).flatten(1).norm(dim=1) / z.norm()


def guide(
    project: Move,
    x0: Tensor,
    far: Tensor,
    strength: float | Tensor,
    max_move: float | None,
    in_range: Callable[[Tensor], Tensor] = lambda x: x.clamp(-1, 1),
) -> Tensor:
    """Back-project those of the images x0, (B, 3, H, W), that are still ``far``, (B,), by a limited move.

    Without ``max_move`` (see `NLBP`) the choice is a mask, and a GPU's queue is never waited for. With it, the search
    for a strength asks the device once per halving which images are still to move.

    Args:
        project: the back-projection of x0. strength: lambda, a number or one per image, (B,).
    """
    if max_move is None:
        return torch.where(far[:, None, None, None], in_range(project(strength)), x0)
    images = far.nonzero()[:, 0]  # those still to move
    moved = x0.clone()
    for halving in range(HALVINGS + 1):
        if len(images) == 0:
            break
        part = strength[images] if isinstance(strength, Tensor) else strength
        proposed = in_range(project(part / 2**halving, images))
        distance = (proposed - x0[images]).square().mean(dim=(1, 2, 3)).sqrt()
        accepted = distance <= max_move  # never for NaN
        moved[images[accepted]] = proposed[accepted]
        images = images[~accepted]
    return moved


@dataclass(frozen=True)
class Linear(Guidance):
    """``linear``: ``x0' = x0 + lambda A+(y - A x0)``, the range-null space decomposition of a linear operator.

    Source: Wang et al. 2023, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model" (DDNM): equation
    13, and for a target with noise DDNM+, equations 17 to 19. x0' is not clamped: A x0' is y to rounding.

    Of a target's noise, ``a lambda noise / gain`` comes into ``x_next = a x0' + c eps + sigma z``, in the directions
    that A measures. There the step adds so much less of its own, and ``lambda = min(1, sigma gain / (a noise))``.

    Attributes:
        noise: standard deviation of what the target has, in its unit. 0: lambda is 1.
    """

    noise: float = 0.0

    def towards(self, operator: Operator, y: Tensor) -> Steer:
        if not isinstance(operator, LinearOperator):
            raise InputError("--guidance linear is for linear operators; nlbp is the same for a network")
        if self.noise and operator.gain is None:
            raise InputError("--noise: this operator has singular values that are not known, or more than one")
        move = operator.towards(y)

        def steer(denoise: Denoiser, x: Tensor, t: int) -> Denoised:
            x0, eps = denoise(x, t)
            project = move(x0)
            if not self.noise:
                return Denoised(project(1.0), eps)

            def settle(z: Tensor, a: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
                ratio = a * self.noise / operator.gain / sigma  # of y's noise in x_next by lambda = 1, to the step's
                left = (1 - ratio.clamp(max=1).square()).sqrt()
                return project((1 / ratio).clamp(max=1)), z + (left - 1) * operator.pinv(operator.A(z))

            return Denoised(x0, eps, settle=settle)

        return steer


# --- Gradients -------------------------------------------------------------------------------------------------------


def unit(v: Tensor) -> Tensor:
    """``v / rms(v)``, image by image; 0 stays 0, and what is not finite becomes NaN in its whole image."""
    rms = v.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return v / rms.clamp_min(torch.finfo(v.dtype).tiny)


@dataclass(frozen=True)
class Gradient(Guidance):
    """Gradients of ``loss(A(x0), y)``, by x_t through the prior, by x0, or both, with recurrences.

    ::

        x_next <- x_next - through sqrt(1 - abar_t) unit(d loss(A(x0(x_t)), y) / d x_t)       (variance guidance)
        x0'     = x0     - clean   sqrt(1 - abar_t) unit(d loss(A(x0), y) / d x0)             (mean guidance)

    Source: Ye et al. 2024, "TFG: Unified Training-Free Guidance for Diffusion Models", of which these are cases:

    - ``gradient``: ``through`` alone. Chung et al. 2023, "Diffusion Posterior Sampling for General Noisy Inverse
      Problems" (DPS), algorithm 1, with a step whose length does not depend on the loss.
    - ``clean_gradient``: ``clean`` alone. He et al. 2024, "Manifold Preserving Guided Diffusion" (MPGD), without its
      autoencoder. The prior is evaluated without gradients.
    - ``freedom``: ``through`` with several recurrences at the steps where content is decided. Yu et al. 2023,
      "FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model", algorithm 2.
    - ``tfg``: all of them.

    Through the prior, the activations of its network are kept for a backward pass, some ten times the memory of a
    forward pass; `Prior(recompute=True)` computes them again instead.

    Attributes:
        through, clean: step of the gradient by x_t, and of that by x0; 0 for none.
        repeats: how often a step is made for ``repeat_to <= t < repeat_from``.
    """

    through: float = 0.03
    clean: float = 0.0
    repeats: int = 1
    repeat_from: int = 700
    repeat_to: int = 300

    def recurrences(self, t: float) -> int:
        return self.repeats if self.repeat_to <= t < self.repeat_from else 1

    def towards(self, operator: Operator, y: Tensor) -> Steer:
        @torch.enable_grad()
        def gradient(x0: Tensor, by: Tensor) -> Tensor:
            return unit(torch.autograd.grad(operator.loss(operator.A(x0), y).sum(), by)[0])

        def steer(denoise: Denoiser, x: Tensor, t: int) -> Denoised:
            scale = (1 - denoise.abar(t)).sqrt()
            with torch.set_grad_enabled(self.through > 0):
                x = x.detach().requires_grad_()
                seen, eps = denoise(x, t)
            x0, eps = seen.detach(), eps.detach()
            if self.clean:
                by = x0.detach().requires_grad_()
                x0 = denoise.in_range(x0 - self.clean * scale * gradient(by, by))
            return Denoised(x0, eps, (lambda: -self.through * scale * gradient(seen, x)) if self.through else None)

        return steer


# --- Composition, and rules by name ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switched(Guidance):
    """``A+B``: ``noisy`` at steps t >= switch, where the face is decided; ``clean`` below, where details are."""

    noisy: Guidance
    clean: Guidance
    switch: int = 400

    def recurrences(self, t: float) -> int:
        return (self.noisy if t >= self.switch else self.clean).recurrences(t)

    def towards(self, operator: Operator, y: Tensor) -> Steer:
        noisy, clean = self.noisy.towards(operator, y), self.clean.towards(operator, y)
        return lambda denoise, x, t: (noisy if denoise.per_mille(t) >= self.switch else clean)(denoise, x, t)


RULES: dict[str, Callable[["RuleSettings"], Guidance]] = {
    "none": lambda s: Unguided(),
    "nlbp": lambda s: NLBP(
        s.lambda1, s.lambda2, s.min_bp_step, s.nlbp_stop_cond, s.max_move or None, s.last_bp_step, s.noise
    ),
    "gradient": lambda s: Gradient(s.gradient_scale),
    "clean_gradient": lambda s: Gradient(0.0, s.clean_scale),
    "freedom": lambda s: Gradient(s.gradient_scale, 0.0, s.recurrences, s.recur_from, s.recur_to),
    "tfg": lambda s: Gradient(s.gradient_scale, s.mean_scale, s.recurrences, s.recur_from, s.recur_to),
    "linear": lambda s: Linear(s.noise),
}


@dataclass(frozen=True)
class RuleSettings:
    """Guidance."""

    guidance: str = option(
        "auto",
        f"{', '.join(RULES)}, or two of them as A+B (none: plain samples of the prior; auto: nlbp, and linear for an "
        "--operator that is)",
    )
    switch: int = option(400, "of A+B: A at steps from here on, B below", 0, 1000)
    min_bp_step: int = option(NLBP.min_bp_step, "nlbp: lambda2 at steps from here on, lambda1 below", 0)
    lambda1: float = option(NLBP.lambda1, "nlbp: strength at the cleaner steps", 0)
    lambda2: float = option(NLBP.lambda2, "nlbp: strength at the noisier steps", 0)
    nlbp_stop_cond: float = option(NLBP.nlbp_stop_cond, "nlbp: none below this mean attribute error", 0, 1)
    max_move: float | None = option(
        None,
        "nlbp: largest root mean square move of a step; none: --total_move / steps, or 0.15; 0: no limit, the "
        "published rule",
        0,
    )
    total_move: float | None = option(None, "nlbp: largest sum of its steps' moves: few move more; 0: no limit", 0)
    last_bp_step: int = option(NLBP.last_bp_step, "nlbp: none below this step", 0)
    gradient_scale: float | None = option(
        None, "gradient, freedom, tfg: step of the gradient through the prior; none: 0.03 sqrt(50 / steps)", 0, 100
    )
    clean_scale: float = option(0.1, "clean_gradient: step of the gradient on x0", 0, 100)
    mean_scale: float = option(0.005, "tfg: step of its gradient on x0", 0, 100)
    noise: float = option(
        0.0, "nlbp, linear: the target's noise, standard deviation for images in [-1, 1] (DDNM+)", 0, 10
    )
    recurrences: int = option(2, "freedom, tfg: how often a step is made between the next two", 1, 100)
    recur_from: int = option(700, "freedom, tfg: from below this step ...", 0, 1000)
    recur_to: int = option(300, "freedom, tfg: ... down to this one", 0, 1000)

    @property
    def rules(self) -> list[str]:
        """The one or two rules that ``guidance`` names. Raises InputError with the nearest known one."""
        parts = ("nlbp" if self.guidance == "auto" else self.guidance).split("+")
        for part in parts:
            if part not in RULES:
                known = f"{nearest(part, RULES)}; known are {', '.join(RULES)}, or two of them as A+B"
                raise InputError(f"--guidance {self.guidance}: no rule {part!r}{known}")
        if len(parts) > 2:
            raise InputError(f"--guidance {self.guidance}: two rules at most, A+B")
        return parts

    @property
    def through_the_prior(self) -> bool:
        """Whether a rule differentiates the prior."""
        return not {"gradient", "freedom", "tfg"}.isdisjoint(self.rules)

    def build(self, steps: int) -> Guidance:
        """The rule, for so many sampling steps. Raises InputError as `rules`."""
        scale = self.gradient_scale if self.gradient_scale is not None else 0.03 * (50 / steps) ** 0.5
        total = NLBP.max_move if self.total_move is None else self.total_move / steps
        move = total if self.max_move is None else self.max_move
        rules = [RULES[name](replace(self, gradient_scale=scale, max_move=move)) for name in self.rules]
        return rules[0] if len(rules) == 1 else Switched(*rules, switch=self.switch)
