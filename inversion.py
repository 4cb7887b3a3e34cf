"""Inversion of a network by optimisation, plain and through a learned landscape.

Given a network f and an output y, find an input x with f(x) near y: gradient descent on x (`invert`). The loss as a
function of x is rough, because f was trained over its weights and not over its input. Landscape learning looks for x
as theta(z) instead, theta being a network trained on the trajectories of earlier inversions, so that later ones
converge in fewer steps (`train_mapping`, `invert_through`).

Source: R. Liu, C. Mao, P. Tendulkar, H. Wang, C. Vondrick, "Landscape Learning for Neural Network Inversion",
arXiv 2206.09027.

Letters: B batch, T steps of a trajectory, N samples of a buffer, X the input space of f, Z that of theta.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loop import Loop, Run
from networks import ConvMLP, any_size, pointwise, unet
from utils import InputError

Network = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # f(x) and y, both (B, ...), to one loss per sample, (B,)


# --- Losses ----------------------------------------------------------------------------------------------------------


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each sample, (B, ...), (B, ...) -> (B,). Raises ValueError if the shapes differ."""
    if output.shape != y.shape:
        raise ValueError(f"squared_error: outputs {tuple(output.shape)} and goals {tuple(y.shape)} differ in shape")
    return (output - y).square().flatten(1).mean(1)


def perceptual_loss(distance: Network | nn.Module, weight: float = 1.0) -> Loss:
    """`squared_error` plus ``weight`` times a perceptual distance of images, one value per sample (LPIPS, say)."""

    def loss(output: Tensor, y: Tensor) -> Tensor:
        apart: Tensor = distance(output, y)  # type: ignore[call-arg]
        return squared_error(output, y) + weight * apart.reshape(len(output), -1).mean(1)

    return loss


class FeatureDistance(nn.Module):
    """Squared distance of a network's features at several depths: images in [-1, 1], (B, 3, S, S) twice -> (B,).

    With the layers of VGG-16 it is the loss of Image2StyleGAN (Abdal et al. 2019, arXiv 1904.03189): the network sees
    images in [0, 1] of 256x256 at most, and pixels are compared at their own size.

    Args:
        layers: applied in turn. weights: by the number of the layer after which features are compared.
    """

    def __init__(self, layers: nn.Sequential, weights: Mapping[int, float]):
        super().__init__()
        self.layers, self.weights = layers[: max(weights) + 1], weights

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (a + 1) / 2, (b + 1) / 2
        total = squared_error(a, b)
        if a.shape[-1] > 256:
            a, b = (F.interpolate(x, size=(256, 256), mode="bilinear") for x in (a, b))
        for i, layer in enumerate(self.layers):
            a, b = layer(a), layer(b)
            if i in self.weights:  # a clone: the ReLU that follows may write in place
                a, b = a.clone(), b.clone()
                total = total + self.weights[i] * squared_error(a, b)
        return total


# --- Plain inversion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inversion:
    """What `invert` found, sample by sample.

    Attributes:
        x: (B, ...), the best input met on the way.
        loss: (B,), its loss; infinite if not even the start has a finite one.
        best_step: (B,), the number of updates that made it; 0 is the start.
        curve: (T + 1, B), the loss after each number of updates. A sample that stopped repeats its best one.
        stopped: (B,), the step with a loss or a gradient that is not finite, at which the search ended; -1: none.
        trajectory: (T + 1, B, ...), the input after each number of updates, if it was asked for.
        z: (B, ...), with ``x = theta(z, x0)``, for an inversion through a landscape.
        state: what `invert` needs to go on from here with more steps.
    """

    x: Tensor
    loss: Tensor
    best_step: Tensor
    curve: Tensor
    stopped: Tensor
    trajectory: Tensor | None = None
    z: Tensor | None = None
    state: dict[str, Tensor] | None = None


def _losses(loss: Loss, output: Tensor, y: Tensor) -> Tensor:
    losses = loss(output, y)
    if losses.shape != (len(y),):
        raise ValueError(f"the loss must be one value per sample, ({len(y)},), got {tuple(losses.shape)}")
    return losses


def _checked_losses(f: Network, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """The losses (B,) of f(x). Raises ValueError if f changes as it is run, or one's loss depends on another."""

    def versions() -> dict[str, int]:  # how often each tensor was changed in place
        tensors = [*f.named_parameters(), *f.named_buffers()] if isinstance(f, nn.Module) else []
        return {name: t._version for name, t in tensors if not t.is_inference()}

    before = versions()
    losses = _losses(loss, f(x), y)
    if changed := [name for name, version in versions().items() if version != before[name]]:
        raise ValueError(f"invert: the network changes its {changed[0]} as it is run: call f.eval()")
    finite = losses.detach().isfinite().nonzero().flatten().tolist() if len(x) > 1 else []
    for i in {*finite[:1], *finite[-1:]}:  # one may see those before it alone; whatever layer or closure makes it so
        (cross,) = torch.autograd.grad(losses[i], x, retain_graph=True)
        others = cross.nan_to_num(0.0, 0.0, 0.0).flatten(1).any(1)
        others[i] = False
        if others.any():
            raise ValueError(
                f"invert: the network mixes the samples of a batch, the loss of sample {i} depends on sample "
                f"{int(others.long().argmax())}: put its norms in eval mode, or invert one sample at a time"
            )
    return losses


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to broadcast over ``like``, (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


class _Best:
    """The best of each sample's search, and its losses; attributes as in `Inversion`, the curve as a list of rows."""

    def __init__(self, x: Tensor, state: Mapping[str, Tensor] | None) -> None:
        if state is None:
            losses, steps = x.new_full((len(x),), math.inf), torch.zeros(len(x), dtype=torch.long, device=x.device)
            state = {"best": x, "loss": losses, "best_step": steps, "stopped": steps - 1, "curve": losses[None]}
        self.x, self.loss, self.best_step = state["best"], state["loss"], state["best_step"]
        self.stopped, self.curve = state["stopped"], [*state["curve"][:-1]]  # where it ended is evaluated once more

    def note(self, step: int, x: Tensor, losses: Tensor, norm: Tensor) -> Tensor:
        """Take a step's x (B, ...), losses and norms of gradients (B,) down; which searches go on, (B,)."""
        alive = (self.stopped < 0) & losses.isfinite()
        better = alive & (losses < self.loss)
        self.x = torch.where(_per_sample(better, x), x, self.x)
        self.loss, self.best_step = torch.where(better, losses, self.loss), self.best_step.masked_fill(better, step)
        alive &= norm.isfinite()
        self.stopped = torch.where((self.stopped < 0) & ~alive, step, self.stopped)
        self.curve.append(torch.where(alive, losses, self.loss))
        return alive


def invert(
    f: Network,
    y: Tensor,
    x0: Tensor,
    loss: Loss = squared_error,
    steps: int = 20,
    lr: float = 0.1,
    clip: float | None = 10.0,
    bounds: tuple[float, float] | None = None,
    keep_trajectory: bool = False,
    on_step: Callable[[int], None] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Inversion:
    """Find x with f(x) near y by Adam on x, from x0, and return the best x met. Samples do not influence each other.

    Args:
        f: a differentiable network, (B, ...) -> (B, ...), in eval mode. Its weights gather no gradients.
        y, x0: wanted outputs and where to start, (B, ...).
        steps: T, updates of x. There are T + 1 evaluations of f; ``on_step`` is called with the number made so far.
        clip: largest norm of a sample's gradient. bounds: range of every element of x, the start's too. None: no limit.
        state: of an earlier call with fewer steps, to go on from there. The trajectory then begins there.

    Returns:
        An `Inversion`. A sample whose loss or gradient is not finite stops there and keeps its best.

    Raises:
        ValueError: a loss that is not one value per sample, or a network that changes as it is run or mixes samples.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # clones: tensors made in inference mode could not take part in a graph
        state = None if state is None else {name: tensor.to(x0.device, copy=True) for name, tensor in state.items()}
        y, x = y.detach().clone(), x0.detach().clone() if state is None else state["x"]
        x = (x if bounds is None else x.clamp(*bounds)).requires_grad_()
        optimiser, best, trajectory = torch.optim.Adam([x], lr=lr), _Best(x.detach().clone(), state), []
        first, clip = len(best.curve), math.inf if clip is None else clip
        if first:
            moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[x] = {**moments, "step": torch.tensor(float(first))}
        for step in range(first, steps + 1):
            losses = _checked_losses(f, x, y, loss) if step == first < steps else _losses(loss, f(x), y)
            gradient = torch.autograd.grad(losses.sum(), x)[0] if step < steps else torch.zeros_like(x)
            norm = gradient.flatten(1).norm(dim=1)
            alive = best.note(step, x.detach(), losses.detach(), norm)
            if keep_trajectory:
                trajectory.append(torch.where(_per_sample(alive, x), x.detach(), best.x))
            if step == steps:
                break
            gradient = gradient * _per_sample((clip / norm.clamp_min(1e-12)).clamp_max(1.0), gradient)
            x.grad = torch.where(_per_sample(alive, x), gradient, 0.0)  # NaN would stay in Adam's moments
            optimiser.step()
            with torch.no_grad():
                if bounds is not None:
                    x.clamp_(*bounds)
                x.copy_(torch.where(_per_sample(alive, x), x, best.x))
            if on_step is not None:
                on_step(step + 1)
    found = {"loss": best.loss, "best_step": best.best_step, "stopped": best.stopped, "curve": torch.stack(best.curve)}
    moments = {name: optimiser.state[x][name] for name in ("exp_avg", "exp_avg_sq") if steps}
    path = torch.stack(trajectory) if keep_trajectory else None
    return Inversion(best.x, **found, trajectory=path, state={"x": x.detach(), "best": best.x, **found, **moments})


# --- Landscape learning ----------------------------------------------------------------------------------------------


class MappingNet(nn.Module):
    """theta: Z -> X around a start x0, ``theta(z) = x0 + scale * z + h(z, x0)``; h is zero until it is trained.

    So z = 0 is the start, an untrained theta leaves the landscape as it is, and inversion through it is plain inversion
    of a rescaled x. h is a small convolutional network for images and a bottleneck of pointwise layers for vectors.

    Args:
        shape: of one x and one z, (D,) or (C, H, W).
        width: channels of h's first layer.
        scale: units of x in a unit of z. Adam moves x by at most lr * scale per step while h is zero.
        bounds: range of x; gradients pass through the clamp as if it were not there.

    Raises:
        ValueError: a shape that is neither a vector nor an image.
    """

    def __init__(
        self, shape: Sequence[int], width: int = 16, scale: float = 1.0, bounds: Sequence[float] | None = None
    ):
        super().__init__()
        if len(shape) not in (1, 3):
            raise ValueError(f"MappingNet: expected the shape of a vector (D,) or an image (C, H, W), got {shape}")
        self.shape, self.bounds, self.scale = tuple(shape), bounds, scale
        self.config = {"shape": list(shape), "width": width, "scale": scale, "bounds": bounds and list(bounds)}
        even = len(shape) == 3 and shape[1] % 2 == shape[2] % 2 == 0
        layers = pointwise if len(shape) == 1 else unet if even else any_size
        self.h = ConvMLP(layers(2 * shape[0], shape[0], width)).net

    def forward(self, z: Tensor, x0: Tensor) -> Tensor:
        """x, (B, ...), for z and starts x0 of the same shape."""
        both = torch.cat([z, x0], dim=1)  # (B, 2C, H, W) or (B, 2D)
        x = x0 + self.scale * z + self.h(both if both.dim() == 4 else both[..., None, None]).view_as(z)
        if self.bounds is not None:  # a clamp's own zero gradient would keep a pixel at its bound for good
            x = x + (x.clamp(*self.bounds) - x).detach()
        return x


class Through(nn.Module):
    """``f(theta(z, x0))`` as a network of z."""

    def __init__(self, theta: nn.Module, f: Network, x0: Tensor):
        super().__init__()
        self.theta, self.f, self.x0 = theta, f, x0

    def forward(self, z: Tensor) -> Tensor:
        return self.f(self.theta(z, self.x0))


def invert_through(
    theta: nn.Module, f: Network, y: Tensor, x0: Tensor, loss: Loss = squared_error, **settings
) -> Inversion:
    """`invert` over z, with ``x = theta(z, x0)`` and z from 0. ``settings`` are those of `invert`.

    Returns:
        An `Inversion` whose x is in X, and whose z and trajectory are in Z. Its curve's first row is theta's own start,
        ``theta(0, x0)``.
    """
    x0 = x0.detach().clone()
    found = invert(Through(theta, f, x0), y, torch.zeros_like(x0), loss, **settings)
    with torch.no_grad():
        return replace(found, x=theta(found.x, x0), z=found.x)


@dataclass(frozen=True)
class Buffer:
    """Trajectories of N inversions: every z met, with the start it left and the output it was on the way to.

    Attributes:
        z: (T + 1, N, ...). x0, y: (N, ...).
        start, end: mean loss at the start of the trajectories and best on them.
    """

    z: Tensor
    x0: Tensor
    y: Tensor
    start: float
    end: float

    def batches(
        self, batch_size: int, updates: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``updates`` times (z, x0, y) of ``batch_size`` points, in passes over all points in a random order."""
        points, samples = len(self.z) * len(self.y), len(self.y)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(updates):
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(points, generator=generator)])
            chosen, order = order[:batch_size].to(self.z.device), order[batch_size:]
            yield self.z.flatten(0, 1)[chosen], self.x0[chosen % samples], self.y[chosen % samples]


def collect(theta: nn.Module, f: Network, y: Tensor, x0: Tensor, loss: Loss = squared_error, **settings) -> Buffer:
    """Fill a buffer: invert every y through theta as it is now. Samples that broke down are left out.

    Raises:
        InputError: every sample broke down.
    """
    found = invert_through(theta, f, y, x0, loss, keep_trajectory=True, **settings)
    whole = found.stopped < 0
    if not whole.any():
        raise InputError("landscape: no trajectory is finite; lower the learning rate")
    start, end = found.curve[0, whole].mean().item(), found.loss[whole].mean().item()
    return Buffer(found.trajectory[:, whole], x0[whole], y[whole], start, end)


def fit(
    theta: nn.Module, f: Network, optimizer: torch.optim.Optimizer, loss: Loss,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
) -> float:  # fmt: skip
    """An update of theta for each batch (z, x0, y) of a buffer; the mean loss. Raises InputError: none is finite."""
    total, seen = 0.0, 0
    for z, x0, y in batches:
        losses = _losses(loss, f(theta(z, x0)), y)
        finite = losses.isfinite()
        if finite.any():
            optimizer.zero_grad(set_to_none=True)
            losses[finite].mean().backward()
            norm = nn.utils.clip_grad_norm_(theta.parameters(), math.inf)
            if norm.isfinite():  # one point's gradient may overflow though its loss does not
                optimizer.step()
                total, seen = total + losses[finite].sum().item(), seen + int(finite.sum())
    if not seen:
        raise InputError("landscape: no loss of a buffer is finite; lower the learning rate")
    return total / seen


def train_mapping(
    theta: nn.Module,
    f: Network,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    loss: Loss = squared_error,
    *,
    run: Run | None = None,
    buffers: int = 500,
    samples: int = 64,
    steps: int = 20,
    z_lr: float = 0.1,
    clip: float = 10.0,
    lr: float = 1e-4,
    weight_decay: float = 0.1,
    batch_size: int = 64,
    updates: int | None = None,
    saved: Callable[[Loop], None] = lambda loop: None,
) -> list[dict]:
    """Train theta by turns: collect the trajectories of a buffer with theta fixed, then fit theta on them.

    ::

        z_0 = 0,  z_t+1 = Adam step on z of L(f(theta(z_t, x0)), y)      t = 0 ... T - 1, theta fixed
        theta <- AdamW step of  mean L(f(theta(z_t, x0)), y)             (z_t, x0, y) drawn from the buffer

    Args:
        draw: N ``samples`` as (y, x0), from their number and a generator.
        run: where it runs; its seed is that of all draws, and its state one to go on from. None: on the CPU, seed 0.
        buffers: how many; 500 in the paper. ``saved`` is called after each.
        steps, z_lr, clip: of the inversions, as in `invert`. lr, weight_decay: of AdamW on theta.
        batch_size, updates: points (z_t, x0, y) per update, and updates per buffer; None: one pass over the buffer.

    Returns:
        A row for each buffer: its number from 1, the mean loss of the updates, and the mean loss where its trajectories
        start and the best on them, with theta before the updates.

    Raises:
        InputError: no loss is finite any more.
        Stopped: a signal came to ``run``; the state is saved.
    """
    optimizer = torch.optim.AdamW(theta.parameters(), lr=lr, weight_decay=weight_decay)

    def turn() -> dict[str, Tensor]:
        generator = torch.default_generator  # seeded by the loop before each buffer
        y, x0 = draw(samples, generator)
        theta.eval().requires_grad_(False)
        buffer = collect(theta, f, y, x0, loss, steps=steps, lr=z_lr, clip=clip)
        theta.train().requires_grad_(True)
        count = updates if updates is not None else max(1, math.ceil((steps + 1) * len(buffer.y) / batch_size))
        row = {"loss": fit(theta, f, optimizer, loss, buffer.batches(batch_size, count, generator))}
        row |= {"start_loss": buffer.start, "end_loss": buffer.end}
        return {name: torch.tensor(value) for name, value in row.items()}

    run = run if run is not None else Run(None, next(theta.parameters()).device)
    loop = Loop(run, "", turn, lambda done: itertools.repeat(((), ())), buffers, row_every=1,
                parts={"model": theta, "optimizer": optimizer}, rate=lambda done, progress: lr, axis="step",
                saved=lambda goes_on: saved(loop))  # fmt: skip
    loop.train()
    theta.eval().requires_grad_(False)
    return [{name: float(value) for name, value in row.items()} for row in loop.rows]
