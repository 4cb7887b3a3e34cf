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
from collections.abc import Callable, Mapping, Sequence
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


@dataclass
class Inversion:
    """What `invert` found, sample by sample.

    Attributes:
        x: (B, ...), the best input met on the way.
        loss: (B,), its loss; infinite if not even the start has a finite one.
        best_step: (B,), the number of updates that made it; 0 is the start.
        curve: (T + 1, B), the loss after each number of updates; NaN from where a loss or gradient was not finite.
        last, exp_avg, exp_avg_sq: (B, ...), where the search stands, and Adam's moments there.
        trajectory: (T + 1, B, ...), the input after each number of updates, if it was asked for.
    """

    x: Tensor
    loss: Tensor
    best_step: Tensor
    curve: Tensor
    last: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    trajectory: Tensor | None = None

    @classmethod
    def begun(cls, x: Tensor) -> "Inversion":
        """Of a search that stands at x (B, ...) and has evaluated nothing."""
        loss, still = x.new_full((len(x),), math.inf), torch.zeros_like(x)
        return cls(x, loss, torch.zeros_like(loss, dtype=torch.long), loss[None], x, still, still)

    def tensors(self) -> dict[str, Tensor]:
        """What `invert` needs to go on, by name."""
        return {name: value for name, value in vars(self).items() if name != "trajectory"}


def _check_apart(losses: Tensor, x: Tensor) -> None:
    """Raise ValueError if a sample's loss, of losses (B,) at x (B, ...), depends on another sample."""
    finite = losses.detach().isfinite().nonzero().flatten().tolist() if len(x) > 1 else []
    for i in finite[-1:]:  # the last one may see those before it; whatever layer or closure makes it so
        (cross,) = torch.autograd.grad(losses[i], x, retain_graph=True)
        others = cross.nan_to_num(0.0, 0.0, 0.0).flatten(1).any(1)
        others[i] = False
        if others.any():
            raise ValueError(
                f"invert: the network mixes the samples of a batch, the loss of sample {i} depends on sample "
                f"{int(others.long().argmax())}: put its norms in eval mode, or invert one sample at a time"
            )


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
    on_step: Callable[[int], None] = lambda done: None,
    after: Inversion | None = None,
) -> Inversion:
    """Find x with f(x) near y by Adam on x, from x0, and return the best x met. Samples do not influence each other.

    Args:
        f: a differentiable network, (B, ...) -> (B, ...), in eval mode. Its weights gather no gradients.
        y, x0: wanted outputs and where to start, (B, ...).
        steps: T, updates of x. There are T + 1 evaluations of f; ``on_step`` is called with the number made so far.
        clip: largest norm of a sample's gradient. bounds: range of every element of x, the start's too. None: no limit.
        after: an earlier call with fewer steps, to go on from there. The trajectory then begins there.

    Returns:
        An `Inversion`. A sample whose loss or gradient is not finite is NaN from there on, and keeps its best.

    Raises:
        ValueError: a loss that is not one value per sample, or a network that mixes samples.
    """
    low, high = bounds if bounds is not None else (-math.inf, math.inf)
    clip, each = math.inf if clip is None else clip, (-1, *[1] * (x0.dim() - 1))  # the shape of a number per sample
    with torch.inference_mode(False), torch.enable_grad():
        after = Inversion.begun(x0.detach().clamp(low, high)) if after is None else after
        # copies: tensors made in inference mode could not take part in a graph
        found = Inversion(**{name: t.to(x0.device, copy=True) for name, t in after.tensors().items()})
        y, x, first = y.detach().clone(), found.last.requires_grad_(), len(found.curve) - 1
        curve, trajectory = [*found.curve[:-1]], []  # where it stands is evaluated once more
        optimiser = torch.optim.Adam([x], lr=lr)
        state = {"step": torch.tensor(float(first)), "exp_avg": found.exp_avg, "exp_avg_sq": found.exp_avg_sq}
        optimiser.state[x] = state
        for step in range(first, steps + 1):
            losses = loss(f(x), y)
            if losses.shape != (len(y),):
                raise ValueError(f"the loss must be one value per sample, ({len(y)},), got {tuple(losses.shape)}")
            if step == first < steps:
                _check_apart(losses, x)
            better, now = losses < found.loss, x.detach()  # NaN is not
            found.x = torch.where(better.view(each), now, found.x)
            found.loss = torch.where(better, losses.detach(), found.loss)
            found.best_step = found.best_step.masked_fill(better, step)
            curve.append(losses.detach())
            if keep_trajectory:
                trajectory.append(now.clone())
            if step < steps:
                (gradient,) = torch.autograd.grad(losses.sum(), x)
                x.grad = gradient * (clip / gradient.flatten(1).norm(dim=1)).clamp_max(1.0).view(each)
                optimiser.step()
                now.clamp_(low, high)
                on_step(step + 1)
    trajectory = torch.stack(trajectory) if keep_trajectory else None
    return replace(found, curve=torch.stack(curve), last=x.detach(), trajectory=trajectory)


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
        InputError: a shape that is neither a vector nor an image.
    """

    def __init__(
        self, shape: Sequence[int], width: int = 16, scale: float = 1.0, bounds: Sequence[float] | None = None
    ):
        super().__init__()
        if len(shape) not in (1, 3):
            raise InputError(f"MappingNet: expected the shape of a vector (D,) or an image (C, H, W), got {shape}")
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


def invert_through(
    theta: nn.Module, f: Network, y: Tensor, x0: Tensor, loss: Loss = squared_error, *more, **settings
) -> Inversion:
    """`invert` over z, with ``x = theta(z, x0)`` and z from 0. ``more`` and ``settings`` are those of `invert`.

    Returns:
        An `Inversion` whose x is in X, and whose trajectory is in Z. Its curve's first row is theta's own start,
        ``theta(0, x0)``.
    """
    x0 = x0.detach().clone()
    found = invert(lambda z: f(theta(z, x0)), y, torch.zeros_like(x0), loss, *more, **settings)
    with torch.no_grad():
        return replace(found, x=theta(found.x, x0))


def fit(
    theta: nn.Module, f: Network, optimizer: torch.optim.Optimizer, loss: Loss, z: Tensor, x0: Tensor, y: Tensor,
    batch_size: int,
) -> Tensor:  # fmt: skip
    """Update theta in one pass over a buffer's points, ``batch_size`` of them at a time; returns their mean loss.

    Args:
        z: of the trajectories of N inversions, (T + 1, N, ...), with their starts x0 and wanted outputs y, (N, ...).
    """
    seen = []
    for chosen in torch.randperm(len(z) * len(y)).to(z.device).split(batch_size):
        sample = chosen % len(y)
        losses = loss(f(theta(z.flatten(0, 1)[chosen], x0[sample])), y[sample])
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()
        seen.append(losses.detach())
    return torch.cat(seen).mean()


def train_mapping(
    theta: nn.Module,
    f: Network,
    draw: Callable[[int], tuple[Tensor, Tensor]],
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
    saved: Callable[[Loop], None] = lambda loop: None,
) -> list[dict]:
    """Train theta by turns: collect the trajectories of a buffer with theta fixed, then fit theta on them.

    ::

        z_0 = 0,  z_t+1 = Adam step on z of L(f(theta(z_t, x0)), y)      t = 0 ... T - 1, theta fixed
        theta <- AdamW step of  mean L(f(theta(z_t, x0)), y)             (z_t, x0, y) drawn from the buffer

    Args:
        draw: N ``samples`` as (y, x0), from their number; by torch's own generator, which is seeded before each buffer.
        run: where it runs; its seed is that of all draws, and its state one to go on from. None: on the CPU, seed 0.
        buffers: how many; 500 in the paper. ``saved`` is called after each.
        steps, z_lr, clip: of the inversions, as in `invert`. lr, weight_decay: of AdamW on theta.
        batch_size: points (z_t, x0, y) per update of theta; a buffer is passed over once.

    Returns:
        A row for each buffer: its number from 1, the mean loss of the updates, and the mean losses where its
        trajectories start and best on them, with theta before the updates.

    Raises:
        InputError: no trajectory is finite, or a loss is not.
        Stopped: a signal came to ``run``; the state is saved.
    """
    optimizer = torch.optim.AdamW(theta.parameters(), lr=lr, weight_decay=weight_decay)

    def turn() -> dict[str, Tensor]:
        y, x0 = draw(samples)
        theta.eval().requires_grad_(False)
        found = invert_through(theta, f, y, x0, loss, steps, z_lr, clip, keep_trajectory=True)
        if not (whole := found.curve.isfinite().all(0)).any():
            raise InputError("landscape: no trajectory is finite; lower the learning rate")
        theta.train().requires_grad_(True)
        mean = fit(theta, f, optimizer, loss, found.trajectory[:, whole], x0[whole], y[whole], batch_size)
        start, end = found.curve[0, whole].mean(), found.loss[whole].mean()
        return {"loss": mean, "start_loss": start, "end_loss": end}

    run = run if run is not None else Run(None, next(theta.parameters()).device)
    loop = Loop(run, "", turn, lambda done: itertools.repeat(((), ())), buffers, row_every=1,
                parts={"model": theta, "optimizer": optimizer}, rate=lambda done, progress: lr, axis="step",
                saved=lambda goes_on: saved(loop))  # fmt: skip
    loop.train()
    theta.eval().requires_grad_(False)
    return [{name: float(value) for name, value in row.items()} for row in loop.rows]
