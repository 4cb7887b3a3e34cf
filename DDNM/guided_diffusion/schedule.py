"""The noise schedule: betas, the steps a sampler visits, and time travel. Knows nothing of data, files or devices.

Notation (DDPM, Ho et al. 2020): ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``, where
``abar_t = prod_{s <= t} (1 - beta_s)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_ABAR = 2.0**-30  # if a schedule ends in pure noise, abar = 0: eps -> x_0 divides by its root


class Schedule:
    """Betas: linear ones (DDPM, section 4) over ``num_diffusion_timesteps`` steps, or others.

    The cumulative product is taken in float64 and stored in float32, so it is the same on every machine. Two schedules
    are equal if their betas are.

    Args:
        betas: (T,), in place of linear ones: cosine, scaled-linear, trained, with a last step of pure noise, ...

    Attributes:
        betas: (T,), float32.
        linear: whether the three numbers say all.

    Raises:
        ValueError: no betas, or one outside (0, 1]; only the last may be 1.
    """

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, num_diffusion_timesteps: int = 1000,
                 betas: Sequence[float] | Tensor | None = None) -> None:  # fmt: skip
        self.beta_start, self.beta_end, self.linear = beta_start, beta_end, betas is None
        if betas is None:
            betas = torch.linspace(beta_start, beta_end, num_diffusion_timesteps, dtype=torch.float64)
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not (betas > 0).all() or not (betas[:-1] < 1).all() or betas[-1] > 1:
            raise ValueError("betas must be numbers in (0, 1), at least one; the last may be 1")
        self.betas, self.num_diffusion_timesteps = betas.float(), len(betas)
        abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        self._abar = abar.clamp_min(SMALLEST_ABAR).float()  # (T + 1,); entry 0 belongs to t = -1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and torch.equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash((self.num_diffusion_timesteps, self.betas[0].item(), self.betas[-1].item()))

    def abar(self, t: int | Tensor) -> Tensor:
        """``abar_t`` in (0, 1] for t in -1 ... T - 1; ``abar_{-1} = 1`` is the clean image.

        Args:
            t: an integer, or an integer tensor of any shape on any device.

        Returns:
            float32 of the shape of ``t``, on its device.

        Raises:
            ValueError: a step outside -1 ... T - 1 (a tensor's are looked at on the CPU only), or not an integer.
        """
        t, last = torch.as_tensor(t), self.num_diffusion_timesteps - 1
        # a GPU is not waited for
        if t.is_floating_point() or t.device.type == "cpu" and ((t < -1) | (t > last)).any():
            raise ValueError(f"t must be in -1 ... {last}, whole numbers, got {t.tolist()}")
        return self._abar.to(t.device)[t.long() + 1]

    def per_mille(self, t: int) -> float:
        """t in the unit in which a rule's settings name steps: as if T were 1000."""
        return t * 1000 / self.num_diffusion_timesteps


def sampling_timesteps(num_diffusion_timesteps: int, num_sampling_steps: int) -> list[int]:
    """The training-time steps t that a sampler of n = ``num_sampling_steps`` visits, ascending, of T training steps.

    If n divides T it is the published walk, ``t_i = i T / n``. Else, and for n = 1, the steps are spread evenly
    from 0 to T - 1, so that a walk begins next to T: what it begins with is pure noise. (The published rule,
    ``i * (T // n)``, begins at t = 500 of 1000 for 501 steps.)

    Raises:
        ValueError: not ``1 <= num_sampling_steps <= num_diffusion_timesteps``.
    """
    total, steps = num_diffusion_timesteps, num_sampling_steps
    if not 1 <= steps <= total:
        raise ValueError(f"the number of sampling steps must be in 1 ... {total}, got {steps}")
    if steps == 1:
        return [total - 1]
    if total % steps == 0:
        return [i * (total // steps) for i in range(steps)]
    return [round(i * (total - 1) / (steps - 1)) for i in range(steps)]


def time_travel_steps(num_steps: int, travel_length: int = 1, travel_repeat: int = 1) -> list[int]:
    """The walk ``num_steps - 1, ..., 0, -1`` with its jumps back (RePaint, Lugmayr et al. 2022, as DDNM states it).

    At every multiple j of ``travel_length`` with ``j < num_steps - travel_length`` the walk climbs back to
    ``j + travel_length``, one index at a time, and descends again: ``travel_repeat - 1`` times each.

    Returns:
        Indices; consecutive ones differ by exactly 1, the first is ``num_steps - 1``, the last is -1.

    Raises:
        ValueError: an argument below 1.
    """
    if min(num_steps, travel_length, travel_repeat) < 1:
        raise ValueError(f"must be at least 1 each, got {num_steps=}, {travel_length=}, {travel_repeat=}")
    jumps_left = dict.fromkeys(range(0, num_steps - travel_length, travel_length), travel_repeat - 1)
    walk, index = [], num_steps
    while index > 0:
        index -= 1
        walk.append(index)
        if jumps_left.get(index, 0) > 0:
            jumps_left[index] -= 1
            walk.extend(range(index + 1, index + travel_length + 1))
            index += travel_length
    return [*walk, -1]


def time_pairs(
    num_diffusion_timesteps: int, num_sampling_steps: int, travel_length: int = 1, travel_repeat: int = 1
) -> list[tuple[int, int]]:
    """Consecutive ``(t, t_next)`` of the walk in training-time units; ``t_next > t`` jumps back, -1 is the clean image.

    Raises:
        ValueError: an argument out of range.
    """
    times = sampling_timesteps(num_diffusion_timesteps, num_sampling_steps)
    walk = time_travel_steps(num_sampling_steps, travel_length, travel_repeat)
    visited = [times[index] if index >= 0 else -1 for index in walk]
    return list(zip(visited[:-1], visited[1:], strict=True))
