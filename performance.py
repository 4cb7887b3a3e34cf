"""Cheaper ways to train and use the same network: less memory, coarser, faster or compiled networks inside its blocks.

The round trip of `models` needs float32 in mixing and coupling only, and holds for whatever the networks s, t and r
compute. So the arithmetic of those is free to choose: `networks_in`, `compile_networks`, `prepare_networks`.
"""

import functools
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks import ConvMLP, ConvPINNBlock, Surjection, tf32
from models import SPNN
from utils import InputError

PRECISIONS = ("float32", "tf32", "bf16")


# --- Precision -------------------------------------------------------------------------------------------------------


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in TF32: NVIDIA's, from Ampere on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Let cuDNN round convolutions to TF32 inside the block where ``precision`` is "tf32", and not where it is not."""
    with tf32(getattr(torch.backends.cudnn, "conv", torch.backends.cudnn), precision == "tf32"):
        yield


@contextmanager
def networks_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let s, t and r compute in ``precision`` inside the block; mixing and coupling stay float32.

    For a forward pass, and for one step: weights that change inside would not be converted again. The backward pass
    belongs outside, but within `convolutions_in`. See `blocks.ConvMLP` for what stays exact. A residual block is no
    more exact than its network: its inverse iterates it.

    Args:
        precision: "float32" to all 24 bits, where cuDNN would round to 11 of itself; "tf32", that rounding; "bf16",
            autocast, 8 bits.
        device: where the model is.

    Raises:
        InputError: another precision, or TF32 on a device without it.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and not has_tf32(device):
        raise InputError(f"precision tf32 needs an NVIDIA GPU that has it, the device is {device}: choose another")
    bf16 = precision == "bf16"
    with convolutions_in(precision), torch.autocast(device.type, torch.bfloat16 if bf16 else None, enabled=bf16):
        yield


# --- Convolutions ----------------------------------------------------------------------------------------------------


class Im2colConv2d(nn.Conv2d):
    """A convolution, written as one matrix product where its result is a map of at most 2x2.

    There its weights are far larger than its maps, and oneDNN reorders all of them in every pass; where it has a
    stride, its backward pass takes several times as long as the product's. It must have no groups and no dilation, and
    zeros for padding.

    Source: Chellapilla et al. 2006, "High Performance Convolutional Neural Networks for Document Processing".
    """

    largest_map = 4  # pixels

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, self.padding, strict=True)
        h, w = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        if x.ndim != 4 or h * w > self.largest_map:
            return super().forward(x)
        columns = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)  # (B, in k k, h w)
        rows = columns.transpose(1, 2).flatten(0, 1)  # (B h w, in k k)
        y = F.linear(rows, self.weight.flatten(1), self.bias)  # (B h w, out)
        y = y.unflatten(0, (len(x), h * w)).transpose(1, 2)  # (B, out, h w)
        return y.unflatten(2, (h, w)).contiguous()  # (B, out, h, w)


class Col2imConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution, written as one matrix product where its input is a map of at most 2x2.

    For the reason, the source and the conditions of `Im2colConv2d`; it must have a bias and no output padding either.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] * x.shape[3] > Im2colConv2d.largest_map:
            return super().forward(x)
        return self.fold(x.permute(0, 2, 3, 1) @ self.weight.flatten(1))  # (B, out, h', w')

    def fold(self, columns: Tensor) -> Tensor:
        """What every pixel adds to the result, (B, h, w, out k k), where it belongs, and the bias: (B, out, h', w')."""
        sizes = zip(columns.shape[1:3], self.kernel_size, self.stride, self.padding, strict=True)
        size = tuple((n - 1) * stride - 2 * padding + kernel for n, kernel, stride, padding in sizes)
        columns = columns.flatten(1, 2).transpose(1, 2)  # (B, out k k, h w)
        y = F.fold(columns, size, self.kernel_size, padding=self.padding, stride=self.stride)  # (B, out, h', w')
        return y + self.bias.to(y.dtype)[:, None, None]


def prepare_networks(model: SPNN, device: torch.device) -> SPNN:
    """Move ``model`` to ``device`` and bring its networks' convolutions into the form that is fast there; returns it.

    On a GPU that is the memory format channels_last; on a CPU, where one format is as fast as the other, it is
    `Im2colConv2d` and `Col2imConvTranspose2d`. Names of weights are the same, and results to rounding.
    """
    model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    if device.type == "cpu":
        for layer in chain.from_iterable(inner_networks(model)):  # as `blocks.conv_mlp` makes them
            if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
                layer.__class__ = Im2colConv2d
            elif isinstance(layer, nn.ConvTranspose2d):
                layer.__class__ = Col2imConvTranspose2d
    return model


# --- Compilation -----------------------------------------------------------------------------------------------------


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Have ``torch.compile`` translate ``networks`` at their first use: in place, under the same weights' names.

    Of an SPNN take `inner_networks`: mixing and coupling, which remember and compare, stay as they are.

    Raises:
        InputError: nothing can be compiled here, for want of a compiler perhaps.
    """
    try:
        torch.compile(lambda x: torch.relu(x) + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch's, the compiler's or the operating system's: as many as there are set-ups
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"torch.compile does not work here ({reason}); it needs a C++ compiler, and Triton on a GPU: "
            f"install them or leave --compile out ({platform.platform(terse=True)})"
        ) from None
    # modules share an entry point, and torch counts their shapes against one limit, 8: the ninth would stay as it is
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 256))
    for network in networks:
        network.compile()


def inner_networks(model: SPNN) -> list[nn.Module]:
    """The layers of s, t and r of every block."""
    return [module.net for module in model.modules() if isinstance(module, ConvMLP)]


# --- Memory ----------------------------------------------------------------------------------------------------------
# What a block's networks keep for their gradients is far more than what goes in and out of the block. Recomputed, only
# the latter is kept for every block, and the former for one block at a time (Chen et al. 2016, "Training Deep Nets with
# Sublinear Memory Cost").


class Recomputed:
    """Mixin before a `Surjection`: every method through which gradients flow runs again in the backward pass."""

    def _again(self, method, *arguments):
        if not torch.is_grad_enabled() or getattr(self, "stateful", False):  # a second pass would move its state again
            return method(*arguments)
        if isinstance(self, ConvPINNBlock):
            self.mix.factors()  # W outside of what is recomputed: solved once, as without (see `blocks.solved_once`)
        return checkpoint(method, *arguments, use_reentrant=False)

    def forward(self, x: Tensor, return_latent: bool = False):
        return self._again(super().forward, x, return_latent)

    def pinv(self, y: Tensor, latent: Tensor | None = None):
        return self._again(super().pinv, y, latent)

    def natural_latent(self, y: Tensor):
        return self._again(super().natural_latent, y)


@functools.cache
def _recomputed(kind: type[Surjection]) -> type[Surjection]:
    return type(kind.__name__, (Recomputed, kind), {})


def checkpoint_activations(model: SPNN) -> SPNN:
    """Make the blocks of ``model`` recompute their activations; same weights, results and gradients. Returns it."""
    for block in model.pinn.blocks:
        if not isinstance(block, Recomputed):
            block.__class__ = _recomputed(type(block))
    return model
