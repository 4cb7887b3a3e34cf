"""Invertible and ordinary networks of the same size and budget on 500 of scikit-learn's handwritten digits.

    pip install -r requirements-experiments.txt
    python experiments/digits.py

Prints one table over the seeds, and writes `digits_table.md` and `interpolation.png`. Each network has about the same
number of parameters, and the same steps of the same optimiser. An inverse starts from everything a network keeps: the
features before the linear head, or, for SPNN, which has none, the logits and the latents.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from bijections import Coupling, PixelUnshuffle, ResidualConv2d
from models import PINN, SPNN
from utils import atomic_write, number, run_command

SIZE = 4  # of the maps: digits of 8x8 pixels as 4 channels of 4x4
DEPTH = 4


class Classifier(nn.Module):
    """Features of a digit, and a linear head: (B, 1, 8, 8) -> (B, 10). ``invert`` undoes the features."""

    def __init__(self, features: nn.Module, width: int):
        super().__init__()
        self.features, self.head = features, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Plain(nn.Module):
    """Four 3x3 convolutions with ReLUs: no inverse."""

    def __init__(self, hidden: int):
        super().__init__()
        channels = [4, *[hidden] * DEPTH]
        layers = [PixelUnshuffle(2)]
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ResNet(nn.Module):
    """``x + h(x)`` four times, with the h of the i-ResNet and no bound on it. ``pinv`` tries the same fixed point."""

    def __init__(self, hidden: int):
        super().__init__()
        self.unshuffle = PixelUnshuffle(2)
        sizes = [(4, hidden), (hidden, hidden), (hidden, 4)]
        self.branches = nn.ModuleList(
            nn.Sequential(*[layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ELU())][:-1])
            for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.unshuffle(x)
        for h in self.branches:
            x = x + h(x)
        return x

    def pinv(self, y: Tensor) -> Tensor:
        for h in reversed(self.branches):
            x = y
            for _ in range(100):
                x = y - h(x)
            y = x
        return self.unshuffle.pinv(y)


def i_revnet(hidden: int) -> PINN:
    blocks = [Coupling(4, kind="additive", hidden=hidden, flip=bool(i % 2)) for i in range(DEPTH)]
    return PINN([PixelUnshuffle(2), *blocks], (1, 8, 8))


def i_resnet(hidden: int) -> PINN:
    blocks = [ResidualConv2d(4, hidden=hidden, size=SIZE, lipschitz=0.9) for _ in range(DEPTH)]
    return PINN([PixelUnshuffle(2), *blocks], (1, 8, 8))


def spnn(hidden: int) -> SPNN:
    chain = [
        ("PixelUnshuffleBlock", {"r": 2}),  # (4, 4, 4)
        ("ConvPINNBlock", {"in_ch": 4, "out_ch": 3, "hidden": hidden, "scale_bound": 1.0}),  # (3, 4, 4)
        ("PixelUnshuffleBlock", {"r": 4}),  # (48, 1, 1)
        ("ConvPINNBlock", {"in_ch": 48, "out_ch": 10, "hidden": hidden, "scale_bound": 1.0, "feat_size": 1}),
    ]
    return SPNN(img_ch=1, num_classes=10, img_size=8, layer_channels=chain)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "plain CNN": lambda hidden: Classifier(Plain(hidden), hidden * SIZE**2),
    "ResNet": lambda hidden: Classifier(ResNet(hidden), 64),
    "i-RevNet": lambda hidden: Classifier(i_revnet(hidden), 64),
    "i-ResNet": lambda hidden: Classifier(i_resnet(hidden), 64),
    "SPNN": spnn,
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What a classification loss reaches: all but an SPNN's r-networks."""
    return [parameter for name, parameter in model.named_parameters() if ".r.net" not in name]


def width_of_size(build: Callable[[int], nn.Module], budget: int) -> int:
    """The largest width of 4 or more whose trained parameters are within ``budget``; 4 where none are."""
    low, high = 4, 256
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(p.numel() for p in trained(build(middle))) > budget else (middle, high)
    return low


def encode(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Everything that the network keeps of x."""
    if isinstance(model, SPNN):
        completion = model.complete(x)
        return [completion.y, *[z for z in completion.z if z is not None]]
    return [model.features(x)]


def decode(model: nn.Module, code: list[Tensor]) -> Tensor:
    """The image of a code."""
    if isinstance(model, SPNN):
        latents = iter(code[1:])
        return model.pinv(code[0], [next(latents) if block.lossy else None for block in model.pinn.blocks])
    return model.features.pinv(code[0])


def fit(model: nn.Module, x: Tensor, labels: Tensor, epochs: int) -> None:
    optimiser = torch.optim.Adam(trained(model), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimiser.step()
    model.eval()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder of table and picture")
    parser.add_argument("--epochs", type=number(int, 1), default=40)
    parser.add_argument("--seeds", type=number(int, 1), default=3)
    parser.add_argument("--parameters", type=number(int, 1), default=20000, help="budget of each network")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    labels = torch.tensor(digits.target)
    rows = [
        "| network | parameters | test accuracy | worst inversion error | training, seconds |",
        "|---|---|---|---|---|",
    ]
    strips: dict[str, Tensor] = {}
    for name, build in NETWORKS.items():
        accuracies, errors, seconds = [], [], []
        width = width_of_size(build, args.parameters)
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            order = torch.randperm(len(images))
            train, test = order[:500], order[500:]
            model = build(width)
            start = time.perf_counter()
            fit(model, images[train], labels[train], args.epochs)
            seconds.append(time.perf_counter() - start)
            with torch.no_grad():
                x = images[test]
                accuracies.append((model(x).argmax(1) == labels[test]).double().mean().item())
                if name == "plain CNN":
                    continue
                x = x[:500]
                errors.append((decode(model, encode(model, x)) - x).abs().max().item())
                if seed == 0:
                    first, last = (images[test[labels[test] == digit][:1]] for digit in (3, 8))
                    t = torch.linspace(0, 1, 9)[:, None]
                    strips["pixels"] = (1 - t[..., None, None]) * first + t[..., None, None] * last
                    codes = zip(encode(model, first), encode(model, last), strict=True)
                    between = [(1 - t) * a.flatten(1) + t * b.flatten(1) for a, b in codes]
                    shapes = [part.shape[1:] for part in encode(model, first)]
                    strips[name] = decode(model, [b.view(9, *s) for b, s in zip(between, shapes, strict=True)])
        size = sum(p.numel() for p in trained(model))
        worst = f"{max(errors):.1e}" if errors else "no inverse"
        spread = f"{sum(accuracies) / len(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"
        rows.append(f"| {name} | {size} | {spread} | {worst} | {sum(seconds) / len(seconds):.1f} |")
        print("\n".join(rows if len(rows) == 3 else rows[-1:]), flush=True)
    with atomic_write(args.out / "digits_table.md") as temporary:
        temporary.write_text("\n".join(rows) + "\n")

    figure, axes = plt.subplots(len(strips), 9, figsize=(9, 1.15 * len(strips)))
    for row, (name, strip) in zip(axes, strips.items(), strict=True):
        for ax, image in zip(row, strip, strict=True):
            ax.imshow(image[0].nan_to_num(), cmap="gray_r", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("From a 3 to an 8, in each network's code; pixels: their mean, for comparison", fontsize=10)
    figure.tight_layout()
    with atomic_write(args.out / "interpolation.png") as temporary:
        figure.savefig(temporary, dpi=100)
    print(f"Picture: {args.out / 'interpolation.png'}")


if __name__ == "__main__":
    run_command(main)
