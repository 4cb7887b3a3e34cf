"""Small networks, seeded numbers and broken layers that several test files share."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from blocks import ConvPINNBlock, PixelUnshuffleBlock
from models import PINN, SPNN
from utils import InputError

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
}


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Fill every parameter with moderate random values, the last layers and mixing parameters that start at zero too.

    Drawn in float64 and in the order of names, so float32 and float64 copies of a module get the same weights.
    """
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("A_unconstrained"):
            values *= 0.5 / math.sqrt(len(parameter))  # eigenvalues of A near 1: W far from the identity
        elif name.endswith("mix.V") or name == "V":
            pass
        elif parameter.dim() > 1:
            values *= math.sqrt(1 / parameter[0].numel())  # sqrt(2 / n) makes a chain that amplifies rounding by 1e9
        else:
            values *= 0.1
        parameter.copy_(values)
    return module


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)).to(dtype)


def refused(said: str, call: Callable, *arguments, **keywords) -> str:
    """``call`` refuses with one line that matches ``said``; it is returned."""
    with pytest.raises(InputError, match=said) as error:
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def diy16() -> SPNN:
    """The worked example of a custom architecture in the README."""
    return SPNN(
        img_ch=3,
        num_classes=7,
        hidden=64,
        scale_bound=2.0,
        img_size=16,
        layer_channels=[
            (PixelUnshuffleBlock, {"r": 4}),
            (ConvPINNBlock, {"in_ch": 48, "out_ch": 12, "hidden": 64, "scale_bound": 2.0, "feat_size": 4}),
            (PixelUnshuffleBlock, {"r": 4}),
            (ConvPINNBlock, {"in_ch": 192, "out_ch": 7, "hidden": 64, "scale_bound": 2.0, "feat_size": 1}),
        ],
    )


def tiny(num_classes: int = 3, mix_type: str = "cayley", img_size: int = 4, hidden: int = 6) -> SPNN:
    """A network of 4x4 images with a block of every kind that fits, small enough for any test."""
    half = img_size // 2
    return SPNN(
        num_classes=num_classes,
        img_size=img_size,
        mix_type=mix_type,
        layer_channels=[
            ("PixelUnshuffleBlock", {"r": 2}),
            ("ConvPINNBlock", {"in_ch": 12, "out_ch": 5, "hidden": hidden, "feat_size": None}),
            ("ConvPINNBlock", {"in_ch": 5, "out_ch": 4, "hidden": hidden, "feat_size": half}),
            ("PixelUnshuffleBlock", {"r": half}),
            ("ConvPINNBlock", {"in_ch": 4 * half**2, "out_ch": num_classes, "hidden": hidden, "feat_size": 1}),
        ],
    )


def diy12() -> SPNN:
    """Both mixings in one chain, blocks that name theirs and blocks that take the network's."""
    return SPNN(
        num_classes=5,
        img_size=12,
        layer_channels=[
            (PixelUnshuffleBlock, {"r": 2}),
            (ConvPINNBlock, {"in_ch": 12, "out_ch": 5, "hidden": 16}),
            (PixelUnshuffleBlock, {"r": 6}),
            (ConvPINNBlock, {"in_ch": 180, "out_ch": 40, "hidden": 16, "feat_size": 1, "mix_type": "householder"}),
            (ConvPINNBlock, {"in_ch": 40, "out_ch": 5, "hidden": 16, "feat_size": 1}),
        ],
    )


def landscape() -> SPNN:
    """A network of 6x8 images that ends at a map, 4 channels at 3x2, with both mixings."""
    return SPNN(
        num_classes=4,
        img_size=(6, 8),
        layer_channels=[
            (PixelUnshuffleBlock, {"r": (1, 2)}),
            (ConvPINNBlock, {"in_ch": 6, "out_ch": 5, "hidden": 6, "feat_size": (6, 4)}),
            (PixelUnshuffleBlock, {"r": 2}),
            (ConvPINNBlock, {"in_ch": 20, "out_ch": 4, "hidden": 6, "mix_type": "householder"}),
        ],
    )


def oblong() -> PINN:
    """A chain over images that are not square."""
    blocks = [PixelUnshuffleBlock(2), ConvPINNBlock(12, 5, 8), ConvPINNBlock(5, 4, 8, mix_type="householder")]
    return PINN(blocks, (3, 6, 10))


class ForgetsShift(ConvPINNBlock):
    """g' without the shift t."""

    def pinv(self, y, latent=None):
        u1 = self.natural_latent(y) if latent is None else latent
        return self.mix.inverse(torch.cat([y * torch.exp(-self.coefficients(u1, y)[0]), u1], dim=1))
