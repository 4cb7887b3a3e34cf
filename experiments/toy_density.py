"""Densities by chains that mix an SPNN block with bijections: toy sets in the plane, and handwritten digits.

    pip install -r requirements-experiments.txt
    python experiments/toy_density.py

Prints bits per dimension on held-out points and writes `toy_density.png` and `digits.png`.

In the plane the chain ends in an SPNN block from two numbers to one, so it is a surjection g with a natural
pseudo-inverse g', and its completion has a density: y is standard normal, the latent N(r(y), 1). The fourth row of the
picture shows all three: the density, the lines on which g is constant, and g', which picks one point of every line.
Each toy set is a curve, or some points, with Gaussian noise, so the least bits possible are known: its entropy.

The digits are scikit-learn's, 1,200 for training, 200 to stop in time and 397 held out. Their grey levels are whole
numbers 0...16, spread by uniform noise, so theirs is an upper bound of the bits that the levels themselves need (Theis
et al., arXiv 1511.01844, section 3.1); a uniform guess needs log2(17) = 4.09.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bijections import ActNorm, Conv1x1, PixelUnshuffle, Sigmoid, SplineCoupling, View
from blocks import ConvPINNBlock
from DDNM.guided_diffusion.results import contact_sheet, picture
from density import Density
from models import PINN
from utils import option, parse, run_command

LEVELS = 17  # grey levels of the digits


@dataclass(frozen=True)
class Settings:
    """Settings."""

    out: Path = option(Path("experiments/results"), "folder of the pictures")
    steps: int = option(800, "training steps of each chain", 1)
    seed: int = option(0, "of weights, data and draws", 0, 2**32 - 2)  # what scikit-learn takes, with the next one


NOISE = {"two moons": 0.05, "two circles": 0.04, "swiss roll": 0.04, "eight blobs": 0.12}  # standard deviations


def centres(name: str, count: int, seed: int) -> Tensor:
    """Points of a toy set without its noise, (count, 2)."""
    if name == "two moons":
        points = datasets.make_moons(count, random_state=seed)[0] - [0.5, 0.25]
    elif name == "two circles":
        points = datasets.make_circles(count, factor=0.5, random_state=seed)[0]
    elif name == "swiss roll":
        points = datasets.make_swiss_roll(count, random_state=seed)[0][:, [0, 2]] / 8
    else:
        angle = torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed)) * math.pi / 4
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.tensor(points, dtype=torch.float32)


def plane(name: str, count: int, seed: int) -> Tensor:
    """Points of a toy set, (count, 2)."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed + 1000))
    return centres(name, count, seed) + NOISE[name] * noise


def true_log_prob(name: str, x: Tensor) -> Tensor:
    """The log-density that the points of a toy set are drawn from, (B,), by 20,000 centres."""
    around = centres(name, 20000, seed=2)
    exponent = torch.cat([-(torch.cdist(part, around) ** 2) for part in x.split(500)]) / (2 * NOISE[name] ** 2)
    return exponent.logsumexp(1) - math.log(len(around)) - math.log(2 * math.pi * NOISE[name] ** 2)


def plane_chain(depth: int = 4, hidden: int = 64) -> PINN:
    """From the plane to one number: splines that move one coordinate by the other, then an SPNN block."""
    blocks = []
    for i in range(depth):
        blocks += [ActNorm(2), SplineCoupling(2, dims=0, hidden=hidden, bins=16, bound=3.0, flip=bool(i % 2))]
    return PINN([*blocks, View((2,), (2, 1, 1)), ConvPINNBlock(2, 1, hidden=16, feat_size=1)], (2,))


def digits_chain(depth: int, hidden: int) -> PINN:
    """Of digits in (0, 1), (1, 8, 8): logits of the pixels, then Glow's step, with splines, on 4 and on 16 channels."""
    blocks = [Sigmoid().inverted()]
    for channels in (4, 16):
        blocks.append(PixelUnshuffle(2))
        for _ in range(depth):
            blocks += [ActNorm(channels), Conv1x1(channels), SplineCoupling(channels, hidden=hidden)]
    return PINN([*blocks, View((16, 2, 2), (64,)), ActNorm(64)], (1, 8, 8))


def fit(density: Density, batch: Callable[[], Tensor], steps: int, lr: float, decay: float = 0.0,
        watch: Callable[[], float] | None = None) -> None:  # fmt: skip
    """Maximum likelihood by AdamW, its rate up for a tenth of the steps, then down to 0 along a cosine.

    With ``watch``, a loss on other data, the weights are in the end those of the step, of each 50, where it was least.
    """
    optimiser = torch.optim.AdamW(density.parameters(), lr=lr, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(steps, 2), pct_start=0.1)
    least, best = math.inf, None
    for step in range(1, steps + 1):
        density.train()
        loss = -density.log_prob(batch()).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(density.parameters(), 1.0)  # one outlier must not undo the rest
        optimiser.step()
        schedule.step()
        density.eval()
        if watch is not None and step % 50 == 0 and (now := watch()) < least:
            least, best = now, copy.deepcopy(density.state_dict())
    if best is not None:
        density.load_state_dict(best)


def bits(log_prob: Tensor, dims: int) -> float:
    return -log_prob.mean().item() / (dims * math.log(2))


def spread(levels: Tensor) -> Tensor:
    """Whole grey levels with uniform noise, in (0, 1), a little off the ends, where a logit is infinite."""
    return ((levels + torch.rand_like(levels)) / LEVELS).clamp(1e-4, 1 - 1e-4)


@torch.no_grad()
def digits_bits(density: Density, levels: Tensor, draws: int) -> float:
    """Bits per dimension of whole grey levels: those of x / LEVELS, and of the levels' width."""
    return bits(torch.stack([density.log_prob(spread(levels)) for _ in range(draws)]), 64) + math.log2(LEVELS)


def pixel_bits(train: Tensor, test: Tensor) -> float:
    """Bits per dimension where every pixel is independent of the others, by its histogram with one added."""
    counts = 1 + F.one_hot(train.long().flatten(1), LEVELS).sum(0)  # (64, LEVELS)
    share = counts / counts.sum(1, keepdim=True)
    return -share.log2().gather(1, test.long().flatten(1).T).mean().item()


def planes(args: Settings) -> None:
    names = list(NOISE)
    figure, axes = plt.subplots(4, len(names), figsize=(2.4 * len(names), 9.9))
    for column, name in enumerate(names):
        torch.manual_seed(args.seed)
        start = time.process_time()
        density = Density(plane_chain(), natural=True)
        data = plane(name, 5000, seed=args.seed)
        fit(density, lambda data=data: data[torch.randint(len(data), (256,))], args.steps, lr=5e-3)
        seconds = time.process_time() - start
        held_out = plane(name, 5000, seed=args.seed + 1)
        with torch.no_grad():
            found, least = bits(density.log_prob(held_out), 2), bits(true_log_prob(name, held_out), 2)
            reach = 1.15 * held_out.abs().max().item()
            axis = torch.linspace(-reach, reach, 200)
            points = torch.cartesian_prod(axis, axis)
            p = density.log_prob(points).exp().view(200, 200).T
            samples = density.sample(5000)
            g = density.chain(points).view(200, 200).T
            y = torch.linspace(-2.5, 2.5, 2001).view(-1, 1, 1, 1)
            line = density.chain.pinv(y)  # g'(y)
            error = (density.chain(line) - y).abs().max().item()
        print(f"| {name} | {found:.3f} | {least:.3f} | {error:.1e} | {seconds:.0f} |", flush=True)
        for ax, shown in ((axes[0, column], held_out), (axes[2, column], samples)):
            ax.scatter(*shown.T, s=0.7, color="black", linewidths=0)
        for ax in axes[1::2, column]:
            ax.imshow(p, extent=[-reach, reach] * 2, origin="lower", cmap="magma", vmax=p.flatten().quantile(0.995))
        levels = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(1, 16) / 16)
        axes[3, column].contour(axis, axis, g, levels, colors="white", linewidths=0.4, alpha=0.7)
        axes[3, column].plot(*line.T, color="cyan", linewidth=1)
        axes[0, column].set_title(f"{name}\n{found:.2f} bits per dimension\n(least possible: {least:.2f})", fontsize=9)
        for ax in axes[:, column]:
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
    labels = "held-out data", "density", "samples", "lines of equal g, and g'"
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, fontsize=10)
    figure.tight_layout()
    figure.savefig(args.out / "toy_density.png", dpi=80)


def digits(args: Settings) -> None:
    torch.manual_seed(args.seed)
    start = time.process_time()
    levels = torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    train, stop, test = levels[torch.randperm(len(levels))].split([1200, 200, 397])
    density = Density(digits_chain(depth=3, hidden=48))
    fit(density, lambda: spread(train[torch.randint(len(train), (128,))]), args.steps, lr=2e-3, decay=0.01,
        watch=lambda: digits_bits(density, stop, draws=3))  # fmt: skip
    seconds = time.process_time() - start
    found, alone = digits_bits(density, test, draws=10), pixel_bits(train, test)
    print(f"| digits | {found:.3f} | - | - | {seconds:.0f} |")
    print(f"(digits, every pixel by its own histogram: {alone:.3f})")
    samples = (density.sample(40) * LEVELS).floor()  # whole grey levels again
    shown = [picture(1 - image.expand(3, -1, -1) / 8, 48) for image in torch.cat([test[:40], samples])]
    heading = f"held-out digits, and samples below ({found:.2f} bits per dimension)"
    contact_sheet(args.out / "digits.png", [heading], [shown[i : i + 10] for i in range(0, 80, 10)], [""] * 8)


def main() -> int:
    args, _ = parse(__doc__, Settings)
    args.out.mkdir(parents=True, exist_ok=True)
    print("| data | bits per dimension, held out | least possible | largest error of g g' | CPU seconds |")
    print("|---|---|---|---|---|")
    planes(args)
    digits(args)
    print(f"Pictures: {args.out / 'toy_density.png'}, {args.out / 'digits.png'}")
    return 0


if __name__ == "__main__":
    run_command(main)
