"""Densities of small flows on toy sets in the plane, and on scikit-learn's handwritten digits.

    pip install -r requirements-experiments.txt
    python experiments/toy_density.py

Prints bits per dimension on held-out points and writes `toy_density.png` (data, density, samples) and `digits.png`. The
digits' grey levels are whole numbers 0...16, spread by uniform noise (Theis et al., arXiv 1511.01844, section 3.1), so
theirs are bits of the discrete data: log2(17) = 4.09 would be a uniform guess.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bijections import ActNorm, Conv1x1, Coupling, Density, PixelUnshuffle, Sigmoid, View
from models import PINN
from utils import atomic_write, number, run_command

LEVELS = 17  # grey levels of the digits


def plane(name: str, count: int, seed: int) -> Tensor:
    """``count`` points of a toy set, (count, 2)."""
    if name == "two moons":
        points = datasets.make_moons(count, noise=0.05, random_state=seed)[0] - [0.5, 0.25]
    elif name == "two circles":
        points = datasets.make_circles(count, noise=0.04, factor=0.5, random_state=seed)[0]
    else:
        points = datasets.make_swiss_roll(count, noise=0.3, random_state=seed)[0][:, [0, 2]] / 8
    return torch.tensor(points, dtype=torch.float32)


def plane_flow(depth: int, hidden: int) -> PINN:
    """Real NVP in the plane: normalise, mix, move one coordinate by the other."""
    blocks = []
    for _ in range(depth):
        blocks += [ActNorm(2), Conv1x1(2), Coupling(2, dims=0, hidden=hidden, scale_bound=1.0)]
    return PINN(blocks, (2,))


def digits_flow(depth: int, hidden: int) -> PINN:
    """Of digits in (0, 1), (1, 8, 8): logits of the pixels, then Glow's step on 4 and on 16 channels."""
    blocks = [Sigmoid().inverted()]
    for channels in (4, 16):
        blocks.append(PixelUnshuffle(2))
        for _ in range(depth):
            blocks += [ActNorm(channels), Conv1x1(channels), Coupling(channels, hidden=hidden, scale_bound=1.0)]
    return PINN([*blocks, View((16, 2, 2), (64,)), ActNorm(64)], (1, 8, 8))


def fit(density: Density, data: Tensor, steps: int, lr: float, dequantise: bool = False) -> None:
    """Maximum likelihood by Adam, its rate falling to 0 along a cosine."""
    optimiser = torch.optim.Adam(density.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    density.train()
    for _ in range(steps):
        x = data[torch.randint(len(data), (256,))]
        loss = -density.log_prob(spread(x) if dequantise else x).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(density.parameters(), 1.0)  # one outlier must not undo the rest
        optimiser.step()
        schedule.step()
    density.eval()


def spread(levels: Tensor) -> Tensor:
    """Whole grey levels with uniform noise, in (0, 1), a little off the ends, where a logit is infinite."""
    return ((levels + torch.rand_like(levels)) / LEVELS).clamp(1e-4, 1 - 1e-4)


def bits(log_prob: Tensor, dims: int) -> float:
    return -log_prob.mean().item() / (dims * math.log(2))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder of the pictures")
    parser.add_argument("--steps", type=number(int, 1), default=2000, help="training steps of each flow")
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32 - 2), default=0
    )  # what scikit-learn takes, with the next one
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    names = ["two moons", "two circles", "swiss roll"]
    figure, axes = plt.subplots(3, len(names), figsize=(3 * len(names), 9), sharex="col", sharey="col")
    print("| data | bits per dimension, held out | seconds |\n|---|---|---|")
    for column, name in enumerate(names):
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        density = Density(plane_flow(depth=8, hidden=64))
        fit(density, plane(name, 5000, seed=args.seed), args.steps, lr=1e-3)
        held_out = plane(name, 5000, seed=args.seed + 1)
        with torch.no_grad():
            figure_of_merit = bits(density.log_prob(held_out), 2)
            reach = 1.15 * held_out.abs().max().item()
            axis = torch.linspace(-reach, reach, 200)
            p = density.log_prob(torch.cartesian_prod(axis, axis)).exp().view(200, 200).T
            samples = density.sample(2000)
        print(f"| {name} | {figure_of_merit:.3f} | {time.perf_counter() - start:.0f} |", flush=True)
        for ax, points in ((axes[0, column], held_out[:2000]), (axes[2, column], samples)):
            ax.scatter(*points.T, s=1, color="black", linewidths=0)
        axes[1, column].imshow(p, extent=[-reach, reach, -reach, reach], origin="lower", cmap="magma", aspect="auto")
        axes[0, column].set(title=f"{name}\n{figure_of_merit:.2f} bits per dimension", xlim=(-reach, reach))
        axes[0, column].set_ylim(-reach, reach)
    for ax, label in zip(axes[:, 0], ("held-out data", "density of the flow", "samples of the flow"), strict=True):
        ax.set_ylabel(label, fontsize=11)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.tight_layout()
    with atomic_write(args.out / "toy_density.png") as temporary:
        figure.savefig(temporary, dpi=100)

    torch.manual_seed(args.seed)
    start = time.perf_counter()
    images = torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    images = images[torch.randperm(len(images))]
    train, test = images[:1500], images[1500:]
    density = Density(digits_flow(depth=4, hidden=64))
    fit(density, train, args.steps, lr=1e-3, dequantise=True)
    with torch.no_grad():
        log_prob = torch.stack([density.log_prob(spread(test)) for _ in range(10)])  # of x / LEVELS
        figure_of_merit = bits(log_prob, 64) + math.log2(LEVELS)
        samples = density.sample(40)
    print(f"| digits | {figure_of_merit:.3f} | {time.perf_counter() - start:.0f} |")
    figure, axes = plt.subplots(8, 10, figsize=(8, 7.2))
    for ax, image in zip(axes.flat, torch.cat([test[:40] / (LEVELS - 1), samples]), strict=True):
        ax.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        ax.axis("off")
    figure.suptitle(f"rows 1 to 4: held-out digits; rows 5 to 8: samples ({figure_of_merit:.2f} bits per dimension)")
    figure.tight_layout()
    with atomic_write(args.out / "digits.png") as temporary:
        figure.savefig(temporary, dpi=100)
    print(f"Pictures: {args.out / 'toy_density.png'}, {args.out / 'digits.png'}")


if __name__ == "__main__":
    run_command(main)
