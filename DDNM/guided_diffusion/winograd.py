"""3x3 convolutions and a U-Net's residual blocks on a CPU, in less than half the time and the same to rounding.

Normalisation, SiLU, 3x3 convolution, bias and skip connection are one kernel, winograd.cpp, which GCC compiles at its
first use. `DDNM/main.py --compile` asks for it.

B batch, C and O channels in and out, H, W map, N = H W, G groups.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.
"""

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from utils import InputError, atomic_write

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("winograd.cpp")
ARCH_FLAGS = {"AVX512": ["-march=skylake-avx512"], "AVX2": ["-march=haswell"]}  # by the name that PyTorch has for it
FEWEST_TILES = 12  # of 4x4 results: with fewer, reading the weights takes all the time, and they are four times as many
WEIGHT_TRANSFORM = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
                    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip


# --- The kernel ------------------------------------------------------------------------------------------------------


@functools.cache
def kernels() -> torch._ops._OpNamespace:
    """``convolve``, ``channel_sums``, ``empty`` and ``lanes`` of winograd.cpp, compiled once for this kind of machine.

    The library stays in ``~/.cache/spnn`` (or ``$XDG_CACHE_HOME/spnn``); ``$CXX`` names the compiler.

    Raises:
        InputError: it cannot be compiled here, not be kept or not be loaded.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (RuntimeError, ValueError) as error:  # no home, or a quote that does not end
        raise InputError(f"{SOURCE.name}: {error}: set CXX and XDG_CACHE_HOME, or leave --compile out") from None
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *ARCH_FLAGS.get(capability, [])]
    made_of = [SOURCE.read_text(encoding="utf-8"), *compiler, *flags, torch.__version__, platform.machine()]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    library = cache / "spnn" / f"winograd-{digest}.so"
    if not library.exists():
        log.warning("compiling %s, once; the library stays in %s", SOURCE.name, library.parent)
        _compile([*compiler, *flags], library)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise InputError(
            f"{library} cannot be loaded ({error.__cause__ or error}): delete it, or leave --compile out"
        ) from None
    return torch.ops.spnn_winograd


def _compile(command: Sequence[str], library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    headers, libraries = [f"-I{torch_folder / 'include'}"], [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / library.name
        command = [*command, *headers, str(SOURCE), "-o", str(made), *libraries]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            reason = " ".join(next((line for line in said.splitlines() if "error" in line), said).split())[:200]
            raise InputError(
                f"{SOURCE.name} cannot be compiled here ({reason}); it needs GCC: install g++, name it in CXX, or "
                f"leave --compile out ({platform.platform(terse=True)})"
            ) from None
        with atomic_write(library) as temporary:  # another process may be at it too
            shutil.copyfile(made, temporary)


def transform_weight(weight: Tensor) -> Tensor:
    """``G w G^T`` for w (O, C, 3, 3) as the kernel reads it: (36, O / panel, C, panel), zeros in the last panel.

    Raises:
        InputError: as `kernels`.
    """
    g = torch.tensor(WEIGHT_TRANSFORM, dtype=torch.float64)
    u = torch.einsum("ai,ocij,bj->abco", g, weight.detach().double(), g).float().flatten(0, 1)  # (36, C, O)
    panel = 2 * kernels().lanes()
    u = F.pad(u, (0, -len(weight) % panel))  # (36, C, a multiple of panel)
    return u.unflatten(2, (-1, panel)).transpose(1, 2).contiguous()


def norm_affine(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The scale and the shift that ``norm`` amounts to for x (B, H, W, C), from sums in float64: (B, 2, C).

    scale = weight / sqrt(var + eps), shift = bias - mean scale (Wu and He 2018, "Group Normalization", equation 1).
    """
    x = x.flatten(1, 2)  # (B, N, C)
    mean, square = (kernels().channel_sums(x).sum(1, dtype=torch.float64) / x.shape[1]).unbind(1)  # (B, C) each
    origin = x[:, 0].double()  # what both are about
    mean, square = mean + origin, square + 2 * mean * origin + origin.square()
    mean, square = (m.unflatten(1, (norm.num_groups, -1)) for m in (mean, square))  # (B, G, C / G) each
    mean, square = mean.mean(2, keepdim=True), square.mean(2, keepdim=True)  # (B, G, 1) each
    variance = (square - mean.square()).clamp_min(0)  # (B, G, 1)
    scale = norm.weight.unflatten(0, (norm.num_groups, -1)) * (variance + norm.eps).rsqrt()  # (B, G, C / G)
    shift = norm.bias.unflatten(0, (norm.num_groups, -1)) - mean * scale
    return torch.stack([scale.flatten(1), shift.flatten(1)], 1).float()


# --- Layers ----------------------------------------------------------------------------------------------------------


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)


def _use_kernel(layer: nn.Module, x: Tensor, temb: Tensor | None = None) -> bool:
    """Whether the kernel computes ``layer`` for x (B, C, H, W), in less time and with nobody asking for a gradient."""
    inputs = [x] if temb is None else [x, temb]
    if torch.is_autocast_enabled("cpu") or any(t.device.type != "cpu" for t in inputs):
        return False
    tensors = [*inputs, *layer.parameters()]
    if any(t.dtype != torch.float32 for t in tensors) or any(t.is_inference() for t in layer.parameters()):
        return False
    if x.ndim != 4:
        return False
    tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    return tiles >= FEWEST_TILES and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, with a bias, by the kernel where that pays: (B, C, H, W) ->
    (B, O, H, W)."""

    def transformed_weight(self) -> Tensor:
        """`transform_weight` of the weights, kept while nothing has been written to them (``.data`` aside)."""
        version = self.weight.data_ptr(), self.weight._version
        kept, kept_version, u = self.__dict__.get("_transformed", (None, None, None))
        if kept is None or kept_version != version:
            u = transform_weight(self.weight)
            # with an alias of the weights, whose address no others can have meanwhile
            self.__dict__["_transformed"] = self.weight.detach(), version, u
        return u

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_transformed"}

    def convolve(self, x: Tensor, norm: nn.GroupNorm | None, bias: Tensor, skip: Tensor | None) -> Tensor:
        """``self(silu(norm(x))) + skip`` with ``bias`` (1 or B, O) for its own: (B, H, W, C) -> (B, H, W, O)."""
        affine = None if norm is None else norm_affine(norm, x)
        return kernels().convolve(x, affine, self.transformed_weight(), bias.expand(len(x), -1).contiguous(), skip)

    def forward(self, x: Tensor) -> Tensor:
        if not _use_kernel(self, x):
            return super().forward(x)
        return self.convolve(_nhwc(x), None, self.bias[None], None).permute(0, 3, 1, 2)  # (B, O, H, W)


def _pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of x (B, H, W, C), into memory of the kernel's pool: (B, H, W, O)."""
    y = kernels().empty([*x.shape[:3], layer.out_channels])
    torch.addmm(layer.bias, x.flatten(0, 2), layer.weight[:, :, 0, 0].T, out=y.flatten(0, 2))
    return y


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block as two calls of the kernel where that pays: (B, C, H, W) -> (B, O, H, W)."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs) -> Tensor:
        x = input_tensor  # (B, C, H, W)
        if not _use_kernel(self, x, temb) or (self.training and self.dropout.p > 0):
            return super().forward(x, temb, *args, **kwargs)
        bias = self.conv1.bias[None]  # (1, O)
        if self.time_emb_proj is not None:
            bias = bias + self.time_emb_proj(F.silu(temb))  # (B, O)
        rows = _nhwc(x)  # (B, H, W, C)
        h = self.conv1.convolve(rows, self.norm1, bias, None)  # (B, H, W, O)
        skip = rows if self.conv_shortcut is None else _pointwise(self.conv_shortcut, rows)  # (B, H, W, O)
        h = self.conv2.convolve(h, self.norm2, self.conv2.bias[None], skip)  # (B, H, W, O)
        return h.permute(0, 3, 1, 2)  # (B, O, H, W)


def _fits(layer: nn.Module) -> bool:
    """Whether the kernel computes this convolution."""
    if type(layer) is not nn.Conv2d or layer.bias is None:
        return False
    form = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    lanes = kernels().lanes()
    return (
        form == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        and layer.in_channels % lanes == 0
        and layer.out_channels % lanes == 0
    )


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1 and layer.bias is not None


def compile_convolutions(network: nn.Module) -> None:
    """Have the kernel compute what it can of ``network``, in place, under the same weights' names: for inference.

    Residual blocks become one `FusedResnetBlock2D` each and other 3x3 convolutions a `WinogradConv2d`, where channels
    are multiples of 16 (of 8 without AVX-512). Their transformed weights, four times as large, lie in memory beside
    them from their first use on, and results, up to 1 GiB of those no longer used, until the process ends. Where a
    gradient is to be propagated back, on another device or in another type, they compute as before. Hooks on layers
    inside a residual block are not called.

    Raises:
        InputError: as `kernels`.
    """
    for layer in network.modules():
        if _fits(layer):
            layer.__class__ = WinogradConv2d
    for block in network.modules():
        if (
            type(block) is ResnetBlock2D
            and isinstance(block.conv1, WinogradConv2d)
            and isinstance(block.conv2, WinogradConv2d)
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.time_embedding_norm == "default"
            and block.output_scale_factor == 1
            and (block.conv_shortcut is None or _is_pointwise(block.conv_shortcut))
            and not (block.up or block.down or block.skip_time_act)
        ):
            block.__class__ = FusedResnetBlock2D
