"""Convolutions and a U-Net's residual blocks on a CPU, in less than half the time and the same to rounding.

Normalisation, SiLU, 3x3 convolution, bias and skip connection are one kernel, winograd.cpp, which GCC compiles at its
first use. `DDNM/main.py --compile` asks for it. What is only read once is not written to memory: neither a
normalisation's result nor an enlarged map nor a concatenation, for which its parts stand, of C_p channels each.

B batch, C and O channels in and out, H, W map.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.
"""

import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.autograd import forward_ad

from performance import Col2imConvTranspose2d, Im2colConv2d
from utils import InputError, atomic_write

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("winograd.cpp")
ARCH_FLAGS = {"AVX512": ["-march=skylake-avx512"], "AVX2": ["-march=haswell"]}  # by the name that PyTorch has for it
FEW_PIXELS = 192  # with fewer, reading weights is what takes the time, and Winograd's are four times as many
WEIGHT_TRANSFORM = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
                    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip


# --- The kernel ------------------------------------------------------------------------------------------------------


@functools.cache
def kernels() -> torch._ops._OpNamespace:
    """``convolve``, ``moments``, ``affine``, ``empty`` and ``lanes`` of winograd.cpp, compiled once for this machine.

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


def pack_weight(weight: Tensor, winograd: bool) -> Tensor:
    """The weights w (O, C, K, K) as the kernel reads them, zeros in the last panel.

    Args:
        weight: K is 3 or 1.
        winograd: 3x3 ones as ``G w G^T``, (36, O / panel, C, panel); else as they are, (1, O / panel, K K C, panel).

    Raises:
        InputError: as `kernels`.
    """
    if winograd:
        g = torch.tensor(WEIGHT_TRANSFORM, dtype=torch.float64)
        u = torch.einsum("ai,ocij,bj->abco", g, weight.detach().double(), g).float().flatten(0, 1)  # (36, C, O)
    else:
        u = weight.detach().permute(2, 3, 1, 0).flatten(0, 2)[None]  # (1, K K C, O)
    panel = 2 * kernels().lanes()
    u = F.pad(u, (0, -len(weight) % panel))  # (points, depth, a multiple of panel)
    return u.unflatten(2, (-1, panel)).transpose(1, 2).contiguous()


# --- Layers ----------------------------------------------------------------------------------------------------------


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)


def _nchw(y: Tensor, moments: Tensor) -> Tensor:
    """y (B, H, W, O) as (B, O, H, W), with its moments for a normalisation that may follow.

    They serve while nothing has been written to it (``.data`` and NumPy aside).
    """
    y = y.permute(0, 3, 1, 2)  # (B, O, H, W)
    if not y.is_inference():  # there nothing would tell that somebody has written to it
        y.moments = y._version, moments
    return y


def _moments(x: Tensor) -> Tensor:
    """Means of x (B, C, H, W) and of its square over the pixels, float64: (B, 2, C)."""
    version, moments = getattr(x, "moments", (None, None))
    return moments if version is not None and version == x._version else kernels().moments(_nhwc(x))


def norm_affine(norm: nn.GroupNorm, moments: Sequence[Tensor]) -> Tensor:
    """The scale and the shift that ``norm`` amounts to for a map with these moments, (B, 2, C_p) each: (B, 2, C).

    Raises:
        RuntimeError: moments of another shape or type than `kernels`' or of other channels than ``norm``'s.
    """
    return kernels().affine(moments, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _use_kernel(layer: nn.Module, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel may compute ``layer`` for x (B, C, H, W): of its type, and nobody asks for a derivative."""
    inputs = [x, *(other for other in others if other is not None)]
    if torch.is_autocast_enabled("cpu") or any(t.device.type != "cpu" for t in inputs):
        return False
    tensors = [*inputs, *layer.parameters()]
    if any(t.dtype != torch.float32 for t in tensors) or any(t.is_inference() for t in layer.parameters()):
        return False
    if x.ndim != 4 or x.numel() == 0 or any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _few(x: Tensor, stride: int = 1) -> bool:
    """Whether one in ``stride`` pixels of x (B, C, H, W) are so few that reading weights is what takes the time."""
    return len(x) * x.shape[2] * x.shape[3] < FEW_PIXELS * stride


@dataclass(frozen=True)
class Deferred:
    """``silu(norm(x))`` of x (B, C, H, W), yet to be computed: by the `CompiledConv2d` that gets it."""

    x: Tensor
    norm: nn.GroupNorm


class _PackedWeight:
    """Keeps a layer's weights as the kernel reads them, while nothing has been written to them (``.data`` aside)."""

    def packed(self, winograd: bool) -> Tensor:
        """`pack_weight` of the weights: (points, O / panel, depth, panel)."""
        version = self.weight.data_ptr(), self.weight._version
        known = self.__dict__.setdefault("_packed", {})
        if winograd not in known or known[winograd][1] != version:
            # with an alias of the weights, whose address no others can have meanwhile
            known[winograd] = self.weight.detach(), version, pack_weight(self.matrices(), winograd)
        return known[winograd][2]

    def matrices(self) -> Tensor:
        """The weights as those of a convolution: (O, C, K, K)."""
        return self.weight

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


class CompiledConv2d(_PackedWeight, Im2colConv2d):
    """A convolution with a bias, by the kernel where that pays: (B, C, h, w) -> (B, O, H, W).

    It is 3x3 with stride 1 or 2 and padding 1, or 1x1 with stride 1.
    """

    def convolve(
        self,
        x: Sequence[Tensor],
        affine: Tensor | None = None,
        bias: Tensor | None = None,
        skip: Tensor | None = None,
        scale_factor: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """``self(silu(scale x + shift)) + skip``, (B, H, W, O), and its moments, (B, 2, O).

        Args:
            x: the parts, (B, h, w, C_p) each.
            affine: scale and shift, (B, 2, C); without it there is no SiLU either.
            bias: (O,) or (B, O), in the place of the layer's own.
            skip: (B, H, W, O), O a multiple of the lanes.
            scale_factor: 1, or 2 to enlarge x first, every pixel to 2x2.

        Raises:
            InputError: as `kernels`.
            RuntimeError: a tensor of another shape, or channels that are no multiples of the lanes.
        """
        if sum(part.shape[3] for part in x) != self.in_channels:  # the kernel reads K off the weights' depth
            raise RuntimeError(f"expected {self.in_channels} channels, got {[tuple(part.shape) for part in x]}")
        batch, h, w = len(x[0]), x[0].shape[1] * scale_factor, x[0].shape[2] * scale_factor
        many = batch * h * w >= FEW_PIXELS and h * w > 4 * -(-h // 4) * -(-w // 4)  # more than 4 pixels a tile of 4x4
        u = self.packed(self.is_winograd() and many)
        bias = (self.bias if bias is None else bias).expand(batch, -1)  # (B, O)
        bias = F.pad(bias, (0, -self.out_channels % kernels().lanes())).contiguous()  # (B, a multiple of the lanes)
        y, moments = kernels().convolve(x, affine, u, bias, skip, scale_factor, self.stride[0])
        return y[..., : self.out_channels], moments[..., : self.out_channels]

    def is_winograd(self) -> bool:
        """Whether Winograd's way can compute it: 3x3 with stride 1."""
        return self.kernel_size == (3, 3) and self.stride == (1, 1)

    def forward(self, x: Tensor | Deferred) -> Tensor:
        if isinstance(x, Deferred):
            affine = norm_affine(x.norm, [_moments(x.x)])  # (B, 2, C)
            return _nchw(*self.convolve([_nhwc(x.x)], affine))  # (B, O, H, W)
        if not _use_kernel(self, x) or not (self.is_winograd() or _few(x, math.prod(self.stride))):
            return super().forward(x)
        return _nchw(*self.convolve([_nhwc(x)]))  # (B, O, H, W)


class CompiledConvTranspose2d(_PackedWeight, Col2imConvTranspose2d):
    """A transposed convolution whose product the kernel computes for small maps: (B, C, h, w) -> (B, O, H, W)."""

    def matrices(self) -> Tensor:
        return self.weight.flatten(1).T[..., None, None]  # (O K K, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not _use_kernel(self, x) or not _few(x) or x.shape[1] != self.in_channels:
            return super().forward(x)
        none = x.new_zeros(len(x), self.weight[0].numel())  # (B, O K K)
        columns, _ = kernels().convolve([_nhwc(x)], None, self.packed(False), none, None)  # (B, h, w, O K K)
        return self.fold(columns)  # (B, O, H, W)


class DeferredGroupNorm(nn.GroupNorm):
    """A normalisation that leaves its work to the convolution after the next SiLU, where the kernel computes that.

    (B, C, H, W) -> what that takes in the place of a tensor of this shape. It is not to be exchanged alone.
    """

    def defer_to(self, convolution: CompiledConv2d) -> None:
        self.convolution = (convolution,)  # in a tuple: not a layer of this one

    def forward(self, x: Tensor) -> Tensor | Deferred:
        return Deferred(x, self) if _use_kernel(self.convolution[0], x, *self.parameters()) else super().forward(x)


class DeferredSiLU(nn.SiLU):
    """A SiLU that passes on what is yet to be computed."""

    def forward(self, x: Tensor | Deferred) -> Tensor | Deferred:
        return x if isinstance(x, Deferred) else super().forward(x)


def _pointwise(weight: Tensor, x: Sequence[Tensor]) -> Tensor:
    """1x1 convolution of parts (B, H, W, C_p) by weight (O, C, 1, 1), into memory of the pool: (B, H, W, O)."""
    y = kernels().empty([*x[0].shape[:3], len(weight)])
    rows, weights = y.flatten(0, 2), weight[:, :, 0, 0].T.split([part.shape[3] for part in x])  # (B H W, O), (C_p, O)
    for i, (part, w) in enumerate(zip(x, weights, strict=True)):
        torch.addmm(rows, part.flatten(0, 2), w, beta=int(i > 0), out=rows)
    return y


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block as two calls of the kernel: (B, C, H, W), or its parts -> (B, O, H, W)."""

    def forward(self, input_tensor: Tensor | Sequence[Tensor], temb: Tensor | None = None, *args, **kwargs) -> Tensor:
        x = [input_tensor] if isinstance(input_tensor, Tensor) else list(input_tensor)  # (B, C_p, H, W) each
        use_kernel = _use_kernel(self, *x, temb) and not (self.training and self.dropout.p > 0)
        if not use_kernel or self.conv_shortcut is None or any(part.shape[1] % kernels().lanes() for part in x):
            x = [torch.cat(x, 1)] if len(x) > 1 else x  # (B, C, H, W)
        if not use_kernel:
            return super().forward(*x, temb, *args, **kwargs)
        bias = self.conv1.bias[None]  # (1, O)
        if self.time_emb_proj is not None:
            bias = bias + self.time_emb_proj(F.silu(temb))  # (B, O)
        rows = [_nhwc(part) for part in x]  # (B, H, W, C_p) each
        affine = norm_affine(self.norm1, [_moments(part) for part in x])  # (B, 2, C)
        h, moments = self.conv1.convolve(rows, affine, bias)  # (B, H, W, O), (B, 2, O)
        skip, bias = rows[0], self.conv2.bias  # (B, H, W, O), (O,)
        if self.conv_shortcut is not None:
            skip, bias = _pointwise(self.conv_shortcut.weight, rows), bias + self.conv_shortcut.bias
        y = self.conv2.convolve([h], norm_affine(self.norm2, [moments]), bias, skip)  # (B, H, W, O), (B, 2, O)
        return _nchw(*y)  # (B, O, H, W)


class FusedUpsample2D(Upsample2D):
    """Nearest-neighbour enlargement and convolution as one call of the kernel: (B, C, H, W) -> (B, O, 2 H, 2 W)."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args, **kwargs) -> Tensor:
        if output_size is not None or not _use_kernel(self, hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return _nchw(*self.conv.convolve([_nhwc(hidden_states)], scale_factor=2))


class _FusedUpBlock:
    """A block of the U-Net's second half, without the concatenations before its residual blocks."""

    def forward(self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], *args, **kwargs) -> Tensor:
        checkpoints, freeu = getattr(self, "gradient_checkpointing", False), getattr(self, "s1", None)
        if checkpoints or freeu is not None or len(args) != 1 or kwargs:  # args: (temb,)
            return super().forward(hidden_states, res_hidden_states_tuple, *args, **kwargs)
        h, skips = hidden_states, res_hidden_states_tuple[::-1]  # (B, C_p, H, W) each
        attentions = getattr(self, "attentions", [nn.Identity()] * len(self.resnets))
        for block, attention, skip in zip(self.resnets, attentions, skips, strict=True):
            h = attention(block([h, skip], *args))  # (B, O, H, W)
        for upsampler in self.upsamplers or ():
            h = upsampler(h)  # (B, O, 2 H, 2 W)
        return h


class FusedUpBlock2D(_FusedUpBlock, UpBlock2D):
    __doc__ = _FusedUpBlock.__doc__


class FusedAttnUpBlock2D(_FusedUpBlock, AttnUpBlock2D):
    __doc__ = _FusedUpBlock.__doc__


# --- What of a network the kernel computes ---------------------------------------------------------------------------


def _fits(layer: nn.Conv2d) -> bool:
    if layer.bias is None or layer.in_channels % kernels().lanes():
        return False
    form = (layer.kernel_size, layer.stride, layer.padding)
    known = [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (1, 1), (0, 0))]
    return form in known and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")


def _transposed_fits(layer: nn.ConvTranspose2d) -> bool:
    return layer.in_channels % kernels().lanes() == layer.weight[0].numel() % kernels().lanes() == 0


def _gives_whole_vectors(layer: nn.Module) -> bool:
    return isinstance(layer, CompiledConv2d) and layer.is_winograd() and layer.out_channels % kernels().lanes() == 0


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1 and layer.bias is not None


def _fused_resnet_block(block: ResnetBlock2D) -> bool:
    return (
        _gives_whole_vectors(block.conv1)
        and _gives_whole_vectors(block.conv2)
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.time_embedding_norm == "default"
        and block.output_scale_factor == 1
        and (block.conv_shortcut is None or _is_pointwise(block.conv_shortcut))
        and not (block.up or block.down or block.skip_time_act)
    )


def _fused_upsample(layer: Upsample2D) -> bool:
    return layer.name == "conv" and layer.interpolate and layer.norm is None and _gives_whole_vectors(layer.conv)


def _fused_up_block(block: UpBlock2D | AttnUpBlock2D) -> bool:
    return all(type(m) is FusedResnetBlock2D for m in block.resnets) and all(
        isinstance(m, Upsample2D) for m in block.upsamplers or ()
    )


FUSED = [  # in this order: a block's layers before the block
    (nn.Conv2d, CompiledConv2d, _fits),
    (Im2colConv2d, CompiledConv2d, _fits),
    (Col2imConvTranspose2d, CompiledConvTranspose2d, _transposed_fits),
    (ResnetBlock2D, FusedResnetBlock2D, _fused_resnet_block),
    (Upsample2D, FusedUpsample2D, _fused_upsample),
    (UpBlock2D, FusedUpBlock2D, _fused_up_block),
    (AttnUpBlock2D, FusedAttnUpBlock2D, _fused_up_block),
]


def compile_convolutions(network: nn.Module) -> None:
    """Have the kernel compute what it can of ``network``, in place, under the same weights' names: for inference.

    Convolutions whose input channels are multiples of 16 (of 8 without AVX-512) become `CompiledConv2d`, a U-Net's
    residual blocks, upsampling layers, up blocks and last normalisation what writes less to memory. Their weights lie
    in memory again from their first use on, as large, or four times as large where Winograd's way takes them, and
    results, up to 1 GiB of those no longer used, until the process ends. Where a gradient is to be propagated back, on
    another device or in another type, they compute as before. Hooks on layers inside blocks are not
    called, and those on a U-Net's last normalisation and SiLU get a `Deferred`.

    Raises:
        InputError: as `kernels`.
    """
    for plain, fused, serves in FUSED:
        for layer in network.modules():
            if type(layer) is plain and serves(layer):
                layer.__class__ = fused
    for unet in network.modules():
        if isinstance(unet, UNet2DModel) and type(unet.conv_out) is CompiledConv2d and unet.conv_out.is_winograd():
            if type(unet.conv_norm_out) is nn.GroupNorm and type(unet.conv_act) is nn.SiLU:
                unet.conv_norm_out.__class__, unet.conv_act.__class__ = DeferredGroupNorm, DeferredSiLU
                unet.conv_norm_out.defer_to(unet.conv_out)
