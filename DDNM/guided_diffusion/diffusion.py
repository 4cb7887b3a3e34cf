"""The sampler: a frozen diffusion prior, steered towards given measurements by a guidance.

Symbols: ``x_t`` the noisy image at step t, ``x0`` the clean image the prior sees in it, ``eps`` the noise it predicts,
``abar`` the schedule (abar_{-1} = 1), ``y`` the target. B images of shape (3, H, W). A step of `sampling`:

    1  eps = prior(x_t, t)
    2  x0  = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)                                      (guidance.Denoiser)
    3  x0' = x0 moved towards y                                                               (guidance.Guidance)
    4  x_next = sqrt(abar_next) x0' + c eps + sqrt(s2) noise  (+ the guidance's correction)   (renoise)
       a jump back: x_next = sqrt(abar_next) x0' + sqrt(1 - abar_next) noise
       a recurrence: x_t = sqrt(abar_t / abar_next) x_next + sqrt(1 - abar_t / abar_next) noise, and again from 1

Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), DDNM (Wang et al. 2023) for the walk; guidance.py has its own.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from blocks import solved_once
from DDNM.guided_diffusion.guidance import Denoiser, Guidance, NoisePredictor, RuleSettings, Unguided
from DDNM.guided_diffusion.schedule import time_pairs
from operators import Operator, as_operator

# the best rule measured on the demo (docs/guidance.md), for eta 0.5
BEST = RuleSettings(guidance="nlbp+gradient", nlbp_stop_cond=0.05, total_move=3.0)


def added_variance(abar: Tensor, abar_next: Tensor, eta: float | None) -> Tensor:
    """``s2``, of the noise that a step adds: the published ``1 - abar_t / abar_next``, or DDIM's for a number eta.

    That is ``eta^2 (1 - abar_next) / (1 - abar_t) (1 - abar_t / abar_next)``.
    """
    s2 = 1 - abar / abar_next
    return s2 if eta is None else eta**2 * (1 - abar_next) / (1 - abar) * s2


def renoise(x0: Tensor, eps: Tensor, noise: Tensor, abar: Tensor, abar_next: Tensor, eta: float | None) -> Tensor:
    """The next, less noisy x: ``sqrt(abar_next) x0 + c eps + sqrt(s2) noise``, ``c^2 = max(0, 1 - abar_next - s2)``."""
    s2 = added_variance(abar, abar_next, eta)
    c = (1 - abar_next - s2).clamp_min(0).sqrt()
    return abar_next.sqrt() * x0 + c * eps + s2.sqrt() * noise


def image_generator(seed: int, name: str) -> torch.Generator:
    """The noise source of one image. It depends on the seed and the image's name alone: not on batch, order, device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise, (B, *shape), one image per generator, on the device."""
    drawn = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


@torch.inference_mode(False)  # a rule may need gradients
@torch.no_grad()
def sampling(
    prior: NoisePredictor,
    generators: Sequence[torch.Generator],
    device: torch.device,
    operator: Operator | None = None,
    target: Tensor | None = None,
    guidance: Guidance = Unguided(),  # noqa: B008  (frozen)
    *,
    steps: int = 100,
    eta: float | None = None,
    travel_length: int = 1,
    travel_repeat: int = 1,
    clip_x0: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Draw one image per generator from the prior, steered by ``guidance`` towards ``target``, step by step.

    Args:
        generators: B noise sources on the CPU, see `image_generator`; the networks are on ``device``.
        operator, target: A and y, (B, *out_shape). A rule that needs none ignores them.
        steps: T_sampling, of the schedule's ``num_diffusion_timesteps``. eta: see `added_variance`.
        clip_x0: keep x0 in [-1, 1], before and after it is moved; after the ``linear`` rule it stays as it is.

    Yields:
        t and x0', (B, 3, H, W), after each evaluation of the prior; the last x0' are the images. One that a network
        breaks is not finite, the others are what they are without.

    Raises:
        ValueError: more steps than the prior was trained with; operator, targets or their number that do not fit.
    """
    shape, denoise = (3, prior.image_size, prior.image_size), Denoiser(prior, clip_x0)
    if operator is not None and tuple(operator.in_shape) != shape:
        raise ValueError(f"the prior draws images {shape}, the operator measures images {tuple(operator.in_shape)}")
    if operator is not None and target is not None:
        expected, target = (len(generators), *operator.out_shape), target.clone() if target.is_inference() else target
        if tuple(target.shape) != expected:
            raise ValueError(f"targets must have shape {expected}, got {tuple(target.shape)}")

    noise = partial(draw_noise, generators, shape, device)
    x = x0 = noise()  # (B, 3, H, W)
    steer = guidance.towards(operator, target)
    pairs = time_pairs(prior.schedule.num_diffusion_timesteps, steps, travel_length, travel_repeat)
    for (t, t_next), (after, after_next) in pairwise([*pairs, (-1, 0)]):
        abar, abar_next = denoise.abar(t), denoise.abar(t_next)
        if t_next > t:
            x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * noise()
            continue
        for again in reversed(range(guidance.recurrences(prior.schedule.per_mille(t)))):
            x0, eps, correction, settle = steer(denoise, x, t)  # 1, 2, 3
            z = noise()
            if settle is not None:
                x0, z = settle(z, abar_next.sqrt(), added_variance(abar, abar_next, eta).sqrt())
            x = renoise(x0, eps, z, abar, abar_next, eta)  # 4
            if correction is not None and (again or after_next < after):  # else no x_next is used: x0' is
                x = x + correction()
            correction = None  # or it would keep the prior's activations
            if again:
                x = (abar / abar_next).sqrt() * x + (1 - abar / abar_next).sqrt() * noise()
            yield t, x0


@solved_once()  # gradients of g at every step, of weights that stand still
def sample(prior: NoisePredictor, generators: Sequence[torch.Generator], *arguments, **settings) -> Tensor:
    """What `sampling` draws, which has the same arguments: the last x0', (B, 3, H, W)."""
    return deque(sampling(prior, generators, *arguments, **settings), maxlen=1)[0][1]


def reconstruct(
    spnn: nn.Module,
    prior: nn.Module,
    logits: Tensor,
    *,
    guidance: Guidance | None = None,
    steps: int = 50,
    eta: float | None = 0.5,
    seed: int = 1234,
    names: Sequence[str] | None = None,
    **settings,
) -> Tensor:
    """Images of given logits, (N, d) -> (N, 3, H, W) in [-1, 1], on the logits' device: what DDNM/main.py draws.

    Args:
        spnn: an `models.SPNN`, or any `operators.Operator`; prior: see `prior.load_prior`. On one device.
        guidance: a rule of guidance.py; none: `BEST`, for the number of steps. settings: of `sample`.
        names: each image's noise comes of the seed and its name; by default its number, from 0.
    """
    device = next(prior.parameters()).device
    names = [str(i) for i in range(len(logits))] if names is None else names
    generators = [image_generator(seed, name) for name in names]
    given = as_operator(spnn), logits.to(device), BEST.build(steps) if guidance is None else guidance
    return sample(prior, generators, device, *given, steps=steps, eta=eta, **settings).to(logits.device)
