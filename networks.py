"""The networks s, t and r inside a block: their layers, the precision they compute in, and how they are compiled.

The round trip of a block holds for whatever its networks compute, so their arithmetic is free to choose.
"""

import functools
import logging
import math
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from utils import InputError

log = logging.getLogger(__name__)

# --- Layers ----------------------------------------------------------------------------------------------------------


class StridedConv2d(nn.Conv2d):
    """A convolution; on a CPU one matrix product if its result is a map of at most 2x2.

    There its weights are far larger than its maps, and oneDNN reorders all of them in every pass: without this a step
    of stage 1 at 64x64 takes a fifth longer. No groups, no dilation, zeros for padding.

    Source: Chellapilla et al. 2006, "High Performance Convolutional Neural Networks for Document Processing".
    """

    largest_map = 4  # pixels

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, self.padding, strict=True)
        h, w = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        if h * w > self.largest_map or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        columns = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)  # (B, in k k, h w)
        rows = columns.transpose(1, 2).flatten(0, 1)  # (B h w, in k k)
        y = F.linear(rows, self.weight.flatten(1), self.bias)  # (B h w, out)
        y = y.unflatten(0, (x.shape[0], h * w)).transpose(1, 2)  # (B, out, h w)
        return y.unflatten(2, (h, w)).contiguous()  # (B, out, h, w)


class UpConv2d(nn.ConvTranspose2d):
    """A transposed convolution; on a CPU one matrix product if x is a map of at most 2x2, as in `StridedConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h * w > StridedConv2d.largest_map or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        columns = x.permute(0, 2, 3, 1) @ self.weight.flatten(1)  # (B, h, w, out k k): what every pixel adds
        columns = columns.flatten(1, 2).transpose(1, 2)  # (B, out k k, h w)
        sizes = zip((h, w), self.kernel_size, self.stride, self.padding, strict=True)
        size = tuple((n - 1) * stride - 2 * padding + kernel for n, kernel, stride, padding in sizes)
        y = F.fold(columns, size, self.kernel_size, padding=self.padding, stride=self.stride)  # (B, out, h', w')
        return y + self.bias.to(y.dtype)[:, None, None]


class LocatedConv2d(nn.Conv2d):
    """A convolution that also sees where it is: two more channels, the height and the width, each from -1 to 1.

    Source: Liu et al. 2018, "An Intriguing Failing of Convolutional Neural Networks and the CoordConv Solution".
    """

    def forward(self, x: Tensor) -> Tensor:
        axes = [torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:]]
        where = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], -1, -1, -1)  # (B, 2, H, W)
        return super().forward(torch.cat([x, where], dim=1))


Layer = tuple[Callable[[int, int], nn.Module], int, int]  # how it is made, channels in, channels out


def conv(before: int, after: int) -> nn.Module:
    """3x3, the size stays."""
    return nn.Conv2d(before, after, 3, padding=1)


def located(before: int, after: int) -> nn.Module:
    """3x3, and it knows its place."""
    return LocatedConv2d(before + 2, after, 3, padding=1)


def point(before: int, after: int) -> nn.Module:
    """1x1."""
    return nn.Conv2d(before, after, 1)


def down(before: int, after: int) -> nn.Module:
    """3x3 with stride 2: half the size."""
    return StridedConv2d(before, after, 3, stride=2, padding=1)


def up(before: int, after: int) -> nn.Module:
    """Transposed, 4x4 with stride 2: twice the size."""
    return UpConv2d(before, after, 4, stride=2, padding=1)


def shuffle(before: int, after: int) -> nn.Module:
    """A pixel shuffle: channels into pixels."""
    return nn.PixelShuffle(math.isqrt(before // after))


def unet(before: int, after: int, width: int) -> list[Layer]:
    """The layers of a custom block on a map of even sides."""
    wide = min(2 * width, 2048)
    return [(conv, before, width), (conv, width, width), (down, width, wide),
            (conv, wide, wide), (up, wide, width), (conv, width, after)]  # fmt: skip


def pointwise(before: int, after: int, width: int) -> list[Layer]:
    """Those of a custom block on a map of one pixel."""
    wide = min(2 * width, 2048)
    return [(point, before, width), (point, width, wide), (point, wide, width), (point, width, after)]


def any_size(before: int, after: int, width: int) -> list[Layer]:
    """Those of a custom block on a map of any size."""
    wide = min(2 * width, 2048)
    return [(conv, before, width), (conv, width, wide), (conv, wide, wide), (conv, wide, width), (conv, width, after)]


def custom_layers(size: tuple[int, ...] | None, before: int, after: int, hidden: int) -> list[Layer]:
    """Those of a custom block on a map of ``size``, or of any: at least as wide as what arrives, at most 1024."""
    layers = any_size if size is None else pointwise if size == (1, 1) else unet
    return layers(before, after, min(max(hidden, before), 1024))


class ConvMLP(nn.Module):
    """One of a block's networks s, t, r: (B, in, H, W) -> (B, out, H', W'), in the precision of its own weights.

    A ReLU between layers, the last layer zero at first. Input and output have the block's type, whatever the weights
    have. In reduced precision (half weights, autocast, TF32 convolutions) ``G^-1 G = I`` stays as exact, s and t seeing
    the same u1 in both directions; ``g g' = I`` holds to that precision only, as u1 comes back rounded.

    Args:
        layers: (kind, channels in, channels out) each; a pixel shuffle may come first.
        scale: a factor on the channels between layers.
        see_place: the first layer sees where on the map it is.
    """

    def __init__(self, layers: Sequence[Layer], scale: float = 1.0, see_place: bool = False):
        super().__init__()
        net: list[nn.Module] = []
        for index, (kind, before, after) in enumerate(layers):
            if see_place and index == 0:
                kind = located
            if kind is shuffle:
                net.append(shuffle(before, after))
                continue
            if net and isinstance(net[-1], nn.ReLU):
                before = max(1, round(before * scale))
            if index < len(layers) - 1:
                after = max(1, round(after * scale))
            net += [kind(before, after), nn.ReLU()]
        self.net = nn.Sequential(*net[:-1])
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, v: Tensor) -> Tensor:
        # contiguous: mixing leaves the channels last, and a convolution would copy all of its weights to that format
        return self.net(v.to(self.net[-1].weight.dtype).contiguous()).to(v.dtype)


# --- Networks of one's own -------------------------------------------------------------------------------------------

SPECTRAL = nn.utils.parametrizations._SpectralNorm, SpectralNorm  # as a parametrization, and as a hook
MOVING = nn.modules.batchnorm._NormBase, *SPECTRAL  # what changes with every pass of training mode


def in_training(network: nn.Module) -> Iterator[object]:
    """The parts of a network that are in training mode, and what is hooked to them."""
    for module in network.modules():
        if module.training:
            yield from (module, *module._forward_pre_hooks.values())


# --- Precision -------------------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in the type that coupling computes in: float32, or float64 if it has it already."""
    if x.is_complex():
        raise ValueError("a block takes real numbers, got complex ones: give view_as_real of them, say")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def no_volume(x: Tensor) -> Tensor:
    """The log-determinant of a map that keeps volumes: zeros, (B,), in float32 at least."""
    return torch.zeros(x.shape[0], dtype=at_least_float32(x[:0]).dtype, device=x.device)


def exact(x: Tensor) -> Tensor:
    """``x`` in float64, or in float32 on a device that has nothing finer (Apple's)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def is_transformed() -> bool:
    """Whether this is a compiler's, an exporter's or a torch.func transform's pass: nothing to keep, read or refuse."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tracing or torch._C._functorch.peek_interpreter_stack() is not None


PRECISIONS = ("float32", "tf32", "bf16")
# torch's switches hold for all threads of the process
_convolving = threading.RLock()  # threads that want convolutions of one kind or the other take turns
_exact = {"users": 0, "before": None, "lock": threading.Lock()}  # of products all want the same: the last sets it back


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in TF32: NVIDIA's, from Ampere on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _switch_tf32(backend, value: bool | str) -> bool | str:
    """Set a backend's switch, to a bool or to what it was; returns what it was."""
    newer = hasattr(backend, "fp32_precision")  # torch refuses to read the older switch once the newer one was set
    name = "fp32_precision" if newer else "allow_tf32"
    before = getattr(backend, name)
    setattr(backend, name, ("tf32" if value else "ieee") if newer and isinstance(value, bool) else value)
    return before


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run matrix products in true float32: no autocast, no rounding of factors to TF32's 11 bits."""
    on_gpu, products = device.type == "cuda", torch.backends.cuda.matmul
    if on_gpu:
        with _exact["lock"]:
            _exact["users"] += 1
            if _exact["users"] == 1:
                _exact["before"] = _switch_tf32(products, False)
    try:
        has_autocast = torch.amp.is_autocast_available(device.type)  # the meta device has none
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        if on_gpu:
            with _exact["lock"]:
                _exact["users"] -= 1
                if not _exact["users"]:
                    _switch_tf32(products, _exact["before"])


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Let cuDNN round convolutions to TF32 inside the block if ``precision`` is "tf32", and not otherwise."""
    if not torch.cuda.is_available():
        yield
        return
    cudnn = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    with _convolving:
        before = _switch_tf32(cudnn, precision == "tf32")
        try:
            yield
        finally:
            _switch_tf32(cudnn, before)


@contextmanager
def networks_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let s, t and r compute in ``precision`` inside the block; mixing and coupling stay as exact as they are.

    For a forward pass, and for one step: weights that change inside would not be converted again. The backward pass
    belongs outside, but within `convolutions_in`. See `ConvMLP` for what stays exact. A residual block is no more exact
    than its network: its inverse iterates it.

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
    if bf16:
        warn_if_emulated(device)
    with convolutions_in(precision), torch.autocast(device.type, torch.bfloat16 if bf16 else None, enabled=bf16):
        yield


@functools.cache
def warn_if_emulated(device: torch.device) -> None:
    """Say once if bf16 is slower there than float32."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning("this CPU has no bf16 arithmetic, its emulation takes several times as long as float32")


# --- Devices and compilers -------------------------------------------------------------------------------------------


def prepare_networks(model: nn.Module, device: torch.device) -> nn.Module:
    """Move ``model`` to ``device``, on a GPU in the memory format that is fast there; returns it."""
    return model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Have ``torch.compile`` translate ``networks`` at their first use: in place, under the same weights' names.

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


def inner_networks(model: nn.Module) -> list[nn.Module]:
    """The layers of s, t and r of every block."""
    return [module.net for module in model.modules() if isinstance(module, ConvMLP)]
