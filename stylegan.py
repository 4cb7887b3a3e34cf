"""StyleGAN v1's generator (Karras, Laine, Aila 2019, arXiv 1812.04948), in the layout of its published PyTorch weights.

    G = load_generator("karras2019stylegan-ffhq-1024x1024.for_g_all.pt")
    image = G(torch.randn(1, 512), psi=0.7)             # (1, 3, 1024, 1024), about [-1, 1]

Letters: B batch, R resolution, r of a block, L = 2 log2(R) - 2 styled layers, d numbers of a z, a w, a row of w+,
C channels.

The layout's choices: every weight is stored unscaled and multiplied by gain / sqrt(fan-in) at run time; instance norm
adds 1e-5 to the variance; blocks of 128 and more turn the kernel of their first convolution by 180 degrees.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import HUB_ID, built, check_tensors, find, read_object
from utils import InputError

FILES = ("karras2019stylegan-ffhq-1024x1024.for_g_all.pt", "stylegan.safetensors", "model.safetensors")
SLOPE = 0.2
TURNED_FROM = 128  # blocks of this resolution and above were trained with the kernel turned


class Equalised(nn.Module):
    """A linear layer or convolution with weight and bias as stored, multiplied at run time (arXiv 1710.10196, 4.1).

    Args:
        shape: of the weight, (out, in) or (out, in, k, k). gain: sqrt(2) before a leaky ReLU.
        lr: relative learning rate; weight and bias are multiplied by it.
    """

    def __init__(self, shape: Sequence[int], gain: float = 1.0, lr: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / lr)
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.scale, self.lr = gain * lr / math.sqrt(math.prod(shape[1:])), lr

    def scaled(self) -> Tensor:
        """The weight that acts."""
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias * self.lr if self.lr != 1 else self.bias
        if self.weight.dim() == 2:
            return F.linear(x, self.scaled(), bias)
        return F.conv2d(x, self.scaled(), bias, padding=self.weight.shape[-1] // 2)


class Blur(nn.Module):
    """[1 2 1] / 4 both ways, zeros beyond the border; then the bias, if there is one."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (row[:, None] * row / 16)[None, None])

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), bias, padding=1, groups=channels)


class UpConvolution(Equalised):
    """Nearest-neighbour doubling, a 3x3 convolution, the blur, the bias: (B, C_in, r/2, r/2) -> (B, C_out, r, r).

    Doubling and convolution are one transposed convolution of stride 2, with the sum of the four kernels that shifts
    by 0 or 1 both ways make of the 3x3 one: less than half of the multiplications.
    """

    def __init__(self, c_in: int, c_out: int, r: int):
        super().__init__((c_out, c_in, 3, 3), math.sqrt(2))
        self.intermediate, self.turned = Blur(), r >= TURNED_FROM

    def forward(self, x: Tensor) -> Tensor:
        k = self.scaled() if self.turned else self.scaled().flip(2, 3)  # a transposed convolution turns it by itself
        k = F.pad(k, (1, 1, 1, 1))
        k = k[..., 1:, 1:] + k[..., 1:, :-1] + k[..., :-1, 1:] + k[..., :-1, :-1]  # (C_out, C_in, 4, 4)
        x = F.conv_transpose2d(x, k.transpose(0, 1), stride=2, padding=1)
        return self.intermediate(x, self.bias)


class Epilogue(nn.Module):
    """Noise, leaky ReLU, instance norm, style: (B, C, r, r), w (B, d), noise (B, 1, r, r) -> (B, C, r, r)."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.top_epi = nn.ModuleDict({"noise": nn.ParameterDict({"weight": torch.zeros(channels)})})
        self.style_mod = nn.ModuleDict({"lin": Equalised((2 * channels, dim))})

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        weight = self.top_epi["noise"]["weight"]  # the same noise in all channels, by a weight each
        x = F.leaky_relu(x + weight.to(x.dtype)[:, None, None] * noise.to(x.dtype), SLOPE)
        scale, shift = self.style_mod["lin"](w).to(weight.dtype).chunk(2, dim=1)  # (B, C) each
        planes = x.flatten(0, 1)[None]  # (1, B C, r, r): one fused pass, there and back, for the norm and the style
        styled = F.batch_norm(planes, None, None, (scale + 1).flatten(), shift.flatten(), training=True, eps=1e-5)
        return styled.view_as(x)


class FirstBlock(nn.Module):
    """The learned constant, styled: -> (B, C, 4, 4)."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.const = nn.Parameter(torch.ones(1, channels, 4, 4))
        self.bias = nn.Parameter(torch.ones(channels))
        self.epi1 = Epilogue(channels, dim)
        self.conv = Equalised((channels, channels, 3, 3), math.sqrt(2))
        self.epi2 = Epilogue(channels, dim)

    def forward(self, x: None, w: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
        x = (self.const + self.bias[:, None, None]).expand(len(w[0]), -1, -1, -1)
        return self.epi2(self.conv(self.epi1(x, w[0], noise[0])), w[1], noise[1])


class Block(nn.Module):
    """(B, C_in, r/2, r/2) -> (B, C_out, r, r)."""

    def __init__(self, c_in: int, c_out: int, dim: int, r: int):
        super().__init__()
        self.conv0_up = UpConvolution(c_in, c_out, r)
        self.epi1 = Epilogue(c_out, dim)
        self.conv1 = Equalised((c_out, c_out, 3, 3), math.sqrt(2))
        self.epi2 = Epilogue(c_out, dim)

    def forward(self, x: Tensor, w: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
        x = self.epi1(self.conv0_up(x), w[0], noise[0])
        return self.epi2(self.conv1(x), w[1], noise[1])


def _resolutions(resolution: int) -> list[int]:
    return [4 << i for i in range(int(math.log2(resolution)) - 1)]


class StyleGAN(nn.Module):
    """z (B, d) -> image (B, 3, R, R), about [-1, 1], not clamped.

    Args:
        resolution: R, a power of two from 4 to 1024. dim: d. depth: layers of the mapping.
        channels: C of each block, from 4x4 on; None: those of the published networks.

    Raises:
        InputError: another resolution, or not one number of channels for each block.
    """

    def __init__(self, resolution: int, channels: Sequence[int] | None = None, dim: int = 512, depth: int = 8):
        super().__init__()
        if resolution not in [4 << i for i in range(9)]:
            raise InputError(f"StyleGAN: the resolution must be a power of two from 4 to 1024, got {resolution}")
        sides = _resolutions(resolution)
        channels = tuple(channels if channels is not None else (min(512, 16384 // r) for r in sides))
        if len(channels) != len(sides):
            raise InputError(f"StyleGAN: {resolution}x{resolution} has {len(sides)} blocks, got channels {channels}")
        self.resolution, self.channels, self.dim, self.layers = resolution, channels, dim, 2 * len(sides)
        self.noise_shapes = [(1, r, r) for r in sides for _ in range(2)]
        dense = {f"dense{i}": Equalised((dim, dim), math.sqrt(2), lr=0.01) for i in range(depth)}
        self.g_mapping = nn.ModuleDict(dense)
        blocks = {"4x4": FirstBlock(channels[0], dim)}
        for c_in, c_out, r in zip(channels, channels[1:], sides[1:], strict=False):
            blocks[f"{r}x{r}"] = Block(c_in, c_out, dim, r)
        torgb = Equalised((3, channels[-1], 1, 1))
        self.g_synthesis = nn.ModuleDict({"torgb": torgb, "blocks": nn.ModuleDict(blocks)})
        self._average: tuple[list, Tensor] | None = None

    def mapping(self, z: Tensor) -> Tensor:
        """z (B, d) -> w (B, d)."""
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for dense in self.g_mapping.values():
            x = F.leaky_relu(dense(x), SLOPE)
        return x

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Standard normal noise for each layer, (B, 1, r, r) with r = 4, 4, 8, 8, ..., R, R, on the weights' device.

        Args:
            generator: on the CPU, so that a seed gives the same noise on every device; None: the device's own.
        """
        like = self.g_synthesis["blocks"]["4x4"].const
        device = like.device if generator is None else "cpu"
        return [torch.randn(batch, *s, generator=generator, device=device).to(like) for s in self.noise_shapes]

    def synthesis(self, w_plus: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """w+ (B, L, d), a w for each layer -> image (B, 3, R, R).

        Args:
            w_plus: rows beyond the first L are left out.
            noise: for each layer (B or 1, 1, r, r), as from `draw_noise`; None: drawn anew, for every sample.

        Raises:
            ValueError: not as many rows as layers, or not of d numbers.
        """
        if w_plus.dim() != 3 or w_plus.shape[1] < self.layers or w_plus.shape[2] != self.dim:
            expected = f"(B, {self.layers}, {self.dim})"
            raise ValueError(f"StyleGAN: expected a latent of shape {expected}, got {tuple(w_plus.shape)}")
        noise = self.draw_noise(len(w_plus)) if noise is None else noise
        x, rows = None, w_plus.unbind(1)
        for i, block in enumerate(self.g_synthesis["blocks"].values()):
            x = block(x, rows[2 * i : 2 * i + 2], noise[2 * i : 2 * i + 2])  # (B, C, r, r)
        return self.g_synthesis["torgb"](x)

    def spread(self, w: Tensor) -> Tensor:
        """w (B, d), the same for all layers -> w+ (B, L, d)."""
        return w[:, None].expand(-1, self.layers, -1)

    @torch.no_grad()
    def average(self) -> Tensor:
        """The mean of 10,000 mapped z, (d,). Computed once and kept until a weight of the mapping changes."""
        key = [(p.data_ptr(), p._version) for p in self.g_mapping.parameters()]
        if self._average is None or self._average[0] != key:
            like = next(self.g_mapping.parameters())
            z = torch.randn(10_000, self.dim, generator=torch.Generator().manual_seed(0)).to(like)
            self._average = key, self.mapping(z).mean(0)
        return self._average[1]

    def forward(self, z: Tensor, psi: float = 1.0, cutoff: int = 8, noise: Sequence[Tensor] | None = None) -> Tensor:
        """z (B, d) -> image (B, 3, R, R); psi < 1 truncates the first ``cutoff`` layers."""
        w_plus = self.spread(self.mapping(z))
        if psi != 1:
            w_plus = truncate(w_plus, self.average(), psi, cutoff)
        return self.synthesis(w_plus, noise)


def truncate(w_plus: Tensor, w_avg: Tensor, psi: float = 0.7, cutoff: int = 8) -> Tensor:
    """Pull the first ``cutoff`` rows of w+ (B, L, d) to the average w (d,): ``avg + psi (row - avg)``."""
    return torch.cat([torch.lerp(w_avg.expand_as(w_plus), w_plus, psi)[:, :cutoff], w_plus[:, cutoff:]], dim=1)


SPACES = ("z", "w", "w+")


class Latents(nn.Module):
    """The generator as a network from one of its spaces to images: vectors (B, D) -> (B, 3, R, R).

    D is d in z and w, and L * d in w+.

    Args:
        space: ``"z"``, ``"w"`` or ``"w+"``.
        noise: as for `StyleGAN.synthesis`; None: drawn anew at every call.
        bf16: synthesise in bfloat16.
    """

    def __init__(self, generator: StyleGAN, space: str, noise: Sequence[Tensor] | None = None, bf16: bool = False):
        super().__init__()
        self.generator, self.space, self.noise, self.bf16 = generator, space, noise, bf16
        self.in_shape = (generator.dim * (generator.layers if space == "w+" else 1),)

    def w_plus(self, x: Tensor) -> Tensor:
        """The latent of every layer, (B, L, d)."""
        if self.space == "w+":
            return x.unflatten(1, (self.generator.layers, self.generator.dim))
        return self.generator.spread(self.generator.mapping(x) if self.space == "z" else x)

    def enter(self, w_plus: Tensor) -> Tensor:
        """w+ (B, L, d) as a vector of this space, w or w+: of all layers' w the first is taken for w."""
        return w_plus.flatten(1) if self.space == "w+" else w_plus[:, 0]

    @torch.no_grad()
    def average(self) -> Tensor:
        """The average latent as a vector of this space, (D,); in z that of a thousand whose w comes nearest to it."""
        w = self.generator.average()
        if self.space == "z":
            z = self.draw(1000, torch.Generator().manual_seed(0))
            return z[(self.generator.mapping(z) - w).square().sum(1).argmin()]
        return self.enter(self.generator.spread(w[None]))[0]

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random latents, (count, D)."""
        like = next(self.generator.parameters())
        z = torch.randn(count, self.generator.dim, generator=generator).to(like)
        return z if self.space == "z" else self.enter(self.generator.spread(self.generator.mapping(z)))

    def forward(self, x: Tensor) -> Tensor:
        w_plus = self.w_plus(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.generator.synthesis(w_plus, self.noise).to(x.dtype)


# --- Weights ---------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"g_synthesis\.blocks\.(\d+)x\1\.")


def generator_from_state_dict(
    state_dict: Mapping[str, Tensor], resolution: int | None = None, source: str | Path = "state dict"
) -> StyleGAN:
    """The generator that a state dict in the published layout belongs to, in eval mode, in float32.

    Channels, d and the mapping's depth come from the shapes.

    Args:
        resolution: what it must be; None: what the names say. source: what the messages call it.

    Raises:
        InputError: another layout or resolution; it names what is missing, left over or of another shape.
    """
    sides = sorted({int(m[1]) for name in state_dict if (m := _BLOCK.match(name))})
    resolution = resolution if resolution is not None else (sides or [4])[-1]
    last = [f"g_synthesis.blocks.{r}x{r}.epi1.top_epi.noise.weight" for r in _resolutions(resolution)]
    if missing := [name for name in ("g_mapping.dense0.weight", *last) if name not in state_dict]:
        raise InputError(f"weights {source}: no StyleGAN of {resolution}x{resolution}: it has no {missing[0]}")
    depth = sum(bool(re.fullmatch(r"g_mapping\.dense\d+\.weight", name)) for name in state_dict)
    channels, dim = [len(state_dict[name]) for name in last], state_dict["g_mapping.dense0.weight"].shape[-1]
    return built(lambda: StyleGAN(resolution, channels, dim, depth), state_dict, Path(source)).eval()


_FROM_TENSORFLOW = (  # of names in lower case, with dots
    (r"(g_synthesis)\.(\d)", r"\1.blocks.\2"),
    (r"\.const\.(const|bias)$", r".\1"),
    (r"\.(const|conv0_up)\.noise", ".epi1.top_epi.noise"),
    (r"\.(conv|conv1)\.noise", ".epi2.top_epi.noise"),
    (r"\.(const|conv0_up)\.stylemod", ".epi1.style_mod.lin"),
    (r"\.(conv|conv1)\.stylemod", ".epi2.style_mod.lin"),
    (r"torgb_lod0", "torgb"),
)


def from_tensorflow(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published layout's names and shapes from those of NVIDIA's TensorFlow networks (``G_synthesis/4x4/Const``).

    Only the last resolution's toRGB stays; the blurs, which are no variables there, are added.
    """
    converted = {}
    for name, tensor in state_dict.items():
        name = name.lower().replace("/", ".")
        for pattern, published in _FROM_TENSORFLOW:
            name = re.sub(pattern, published, name)
        if "torgb_lod" in name:
            continue
        if name.endswith("weight") and tensor.dim() > 1:
            tensor = tensor.T if tensor.dim() == 2 else tensor.permute(3, 2, 0, 1)  # from kh, kw, in, out
        converted[name] = tensor.contiguous()
        if name.endswith("conv0_up.weight"):
            converted[name.replace("weight", "intermediate.kernel")] = Blur().kernel
    return converted


def load_generator(source: str | Path, resolution: int | None = None, **hub: Any) -> StyleGAN:
    """The generator in a weight file (.safetensors, or what ``torch.save`` wrote), on the CPU in eval mode.

    The list of three dicts with TensorFlow names, which the conversion of NVIDIA's pickle leaves under the same file
    name, is recognised and its third, the averaged generator, converted.

    Args:
        source: a file; or a folder or hub id ``owner/repo`` that has one of `FILES`.
        resolution: what it must be; None: what the file says.
        hub: as for `checkpoints.hub_file`.

    Raises:
        InputError: no such file, a damaged one, or as `generator_from_state_dict`.
    """
    path = Path(source)
    if not path.is_file():
        named = path.is_dir() or HUB_ID.fullmatch(str(source))
        path = find(source, FILES, **hub) if named else None
        if path is None:
            raise InputError(
                f"weights {source}: no such file, and no folder or hub id with {' or '.join(FILES)}; the published "
                f"weights are {FILES[0]}, which github.com/lernapparat/lernapparat offers under Releases"
            )
    loaded = read_object(path)
    if isinstance(loaded, list) and len(loaded) == 3:  # G, D, Gs
        loaded = from_tensorflow(loaded[2])
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise InputError(f"weights {path}: expected one dict of tensors by name, got a {type(loaded).__name__}")
    check_tensors(loaded, path)
    return generator_from_state_dict(loaded, resolution, path)
