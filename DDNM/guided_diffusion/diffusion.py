"""The sampler: a frozen diffusion prior, steered towards given logits by non-linear back-projection.

Symbols: ``x_t`` the noisy image at step t, ``x0`` the clean image the prior sees in it, ``eps`` the noise it predicts,
``abar`` the schedule (abar_{-1} = 1), ``y`` the target logits, lambda the strength of a back-projection. B images of
shape (3, H, W), d logits.

Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), DDNM (Wang et al. 2023) for the walk with its time travel, and
Ehrlich, Berman and Shocher, "Pseudo-Invertible Neural Networks", arXiv 2602.06042, for the back-projection.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blocks import solved_once
from DDNM.guided_diffusion.schedule import Schedule, time_pairs
from models import BackProjection, Completion
from performance import networks_in


class Operator(Protocol):
    """What the sampler needs of g: `models.SPNN` has it."""

    def complete(self, x: Tensor) -> Completion: ...

    def natural(self, logits: Tensor) -> Completion: ...

    def pinv(self, logits: Tensor, latents=None) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """How a clean image is steered.

    Attributes:
        lambda1: strength of a back-projection at steps t below ``min_bp_step``, the later, cleaner ones.
        lambda2: strength at the other steps.
        min_bp_step: in training-time steps, 0 to 1000.
        nlbp_stop_cond: an image is left alone where mean |sigmoid(g(x0)) - sigmoid(y)| is at most this.
        clip_x0: clamp x0 to [-1, 1] before and after. g has seen nothing outside, and G^-1 amplifies.
        max_move: lambda is halved, at most `HALVINGS` times, until the image moves by at most this (root mean square);
            where it still moves further, the image is left alone. None: no limit.
        last_bp_step: no back-projection at steps below this one: the prior alone finishes the picture. 0: to the end.
    """

    lambda1: float = 1.0
    lambda2: float = 0.5
    min_bp_step: int = 600
    nlbp_stop_cond: float = 0.11
    clip_x0: bool = True
    max_move: float | None = 0.15
    last_bp_step: int = 0


HALVINGS = 6


def predict_x0(x: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """``(x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)``: the clean image that ``eps`` stands for, (B, 3, H, W)."""
    return (x - (1 - abar).sqrt() * eps) / abar.sqrt()


def guide(operator: Operator, x0: Tensor, goal: Completion, strength: float, guidance: Guidance) -> Tensor:
    """Back-project those of the images x0, (B, 3, H, W), whose logits are not near the target yet.

    Without ``max_move`` the choice is a mask, and a GPU's queue is never waited for. With it, the search for a strength
    asks the device once a halving which images are still to move.

    Args:
        goal: ``operator.natural(y)`` for the targets y, (B, d).
        strength: lambda.

    Returns:
        x0', (B, 3, H, W).
    """
    project = BackProjection(operator, x0, goal)
    error = (project.start.y.sigmoid() - goal.y.sigmoid()).abs().mean(dim=1)  # (B,)
    far = error > guidance.nlbp_stop_cond  # (B,)
    if guidance.max_move is None:
        moved = project(strength)
        if guidance.clip_x0:
            moved = moved.clamp(-1, 1)
        return torch.where(far[:, None, None, None], moved, x0)
    images = far.nonzero()[:, 0]  # those still to move
    moved = x0.clone()
    for halving in range(HALVINGS + 1):
        if len(images) == 0:
            break
        proposed = project(strength / 2**halving, images)
        if guidance.clip_x0:
            proposed = proposed.clamp(-1, 1)
        distance = (proposed - x0[images]).square().mean(dim=(1, 2, 3)).sqrt()
        accepted = distance <= guidance.max_move  # never for NaN
        moved[images[accepted]] = proposed[accepted]
        images = images[~accepted]
    return moved


def renoise(x0: Tensor, eps: Tensor, noise: Tensor, abar: Tensor, abar_next: Tensor, eta: float | None) -> Tensor:
    """The next, less noisy x from a clean image: ``sqrt(abar_next) x0 + c eps + sqrt(s2) noise``.

    Args:
        eta: None for the published variance ``s2 = 1 - abar_t / abar_next``; a number for DDIM's,
            ``eta^2 (1 - abar_next) / (1 - abar_t) (1 - abar_t / abar_next)``. ``c^2 = max(0, 1 - abar_next - s2)``.
    """
    s2 = 1 - abar / abar_next
    if eta is not None:
        s2 = eta**2 * (1 - abar_next) / (1 - abar) * s2
    c = (1 - abar_next - s2).clamp_min(0).sqrt()
    return abar_next.sqrt() * x0 + c * eps + s2.sqrt() * noise


def image_generator(seed: int, name: str) -> torch.Generator:
    """The noise source of one image. It depends on the seed and the image's name alone: not on batch, order, device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def sample(
    prior: Callable[[Tensor, int], Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    device: torch.device,
    steps: int = 100,
    travel_length: int = 1,
    travel_repeat: int = 1,
    eta: float | None = None,
    operator: Operator | None = None,
    target: Tensor | None = None,
    guidance: Guidance = Guidance(),  # noqa: B008  (frozen)
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one image a generator from the prior; with ``operator`` and ``target``, images of these logits.

    ::

        1  eps = prior(x_t, t)
        2  x0  = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
        3  x0' = back-projection of x0 towards y with strength lambda, where g(x0) is still far from y     (guide)
        4  x_next = sqrt(abar_next) x0' + c eps + sqrt(s2) noise                                           (renoise)
           a jump back: x_next = sqrt(abar_next) x0' + sqrt(1 - abar_next) noise

    Args:
        prior: ``eps(x_t, t)``, (B, 3, H, W) and a number -> (B, 3, H, W).
        generators: B noise sources on the CPU, see `image_generator`.
        shape: (3, H, W).
        steps: T_sampling, of ``schedule.num_diffusion_timesteps``.
        eta: see `renoise`.
        operator, target: g and the logits y, (B, d). Without them the sampler is the plain one.
        on_step: called with (t, x0') after each step.

    Returns:
        The last x0', (B, 3, H, W); in [-1, 1] where ``guidance.clip_x0``.
    """

    def noise() -> Tensor:
        drawn = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)

    x = noise()  # (B, 3, H, W)
    x0 = x
    with solved_once():
        goal = operator.natural(target) if operator is not None else None
        for t, t_next in time_pairs(schedule.num_diffusion_timesteps, steps, travel_length, travel_repeat):
            abar, abar_next = schedule.abar(t), schedule.abar(t_next)  # on the CPU: numbers, for which no copy waits
            if t_next > t:
                x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * noise()
                continue
            eps = prior(x, t)
            x0 = predict_x0(x, eps, abar)
            if guidance.clip_x0:
                x0 = x0.clamp(-1, 1)
            if goal is not None and t >= guidance.last_bp_step:
                strength = guidance.lambda1 if t < guidance.min_bp_step else guidance.lambda2
                with networks_in("float32", device):  # that the logits are reached to rounding
                    x0 = guide(operator, x0, goal, strength, guidance)
            x = renoise(x0, eps, noise(), abar, abar_next, eta)
            if on_step is not None:
                on_step(t, x0)
    return x0
