"""Non-linear measurements of pictures, each a function (B, 3, H, W) -> (B, 3, H', W') in [-1, 1], to fit an SPNN to.

All give fewer numbers than they take, by averaging at the end: a surjective network has no more outputs than inputs.
"""

import importlib
import io
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from images import to_float, to_uint8
from utils import InputError, nearest

Function = Callable[[Tensor], Tensor]


def lens(x: Tensor, bend: float = 0.25, shade: float = 0.35, gamma: float = 0.7, by: int = 2) -> Tensor:
    """A cheap camera: barrel distortion, corners in the shade, a tone curve, and averages over ``by`` x ``by`` pixels.

    At radius r (1 in the middle of a side) light comes from ``r (1 + bend r^2) / (1 + bend)``, and ``1 - shade r^2`` of
    it arrives; v in [0, 1] becomes ``v^gamma``.
    """
    h, w = x.shape[-2:]
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in (h, w)),
                                   indexing="ij")  # fmt: skip
    squared = rows**2 + columns**2  # (H, W)
    source = torch.stack([columns, rows], dim=-1) * ((1 + bend * squared) / (1 + bend))[..., None]  # (H, W, 2)
    bent = F.grid_sample(x, source.expand(len(x), -1, -1, -1), padding_mode="reflection", align_corners=True)
    light = (bent + 1) / 2 * (1 - shade * squared)
    return F.avg_pool2d(2 * light.clamp_min(1e-3) ** gamma - 1, by)  # the slope of a power is infinite at 0


def saturation(x: Tensor, gain: float = 1.8, offset: float = 0.2, by: int = 4) -> Tensor:
    """Overexposed and out of focus: ``gain (x + offset)`` cut at the ends, a blur, averages over ``by`` x ``by``."""
    bright = (gain * (x + offset)).clamp(-1, 1)
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    return F.avg_pool2d(F.conv2d(F.pad(bright, (2, 2, 2, 2), mode="reflect"), kernel, groups=3), by)


def jpeg(x: Tensor, quality: int = 10, by: int = 2) -> Tensor:
    """JPEG, and averages over ``by`` x ``by`` pixels. No gradient passes: it rounds."""
    decoded = []
    for image in to_uint8(x).cpu().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(image.shape))
    return F.avg_pool2d(to_float(torch.stack(decoded).movedim(-1, 1)).to(x), by)


DEGRADATIONS: dict[str, Function] = {"lens": lens, "saturation": saturation, "jpeg": jpeg}


def find_function(name: str) -> Function:
    """A built-in measurement, or ``package.module:function``. Raises InputError."""
    if name in DEGRADATIONS:
        return DEGRADATIONS[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = f"known are {', '.join(DEGRADATIONS)}; your own is package.module:function"
        raise InputError(f"--operator {name}: no such measurement{nearest(name, DEGRADATIONS)}; {known}")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no name before the colon
        raise InputError(f"--operator {name}: {error}") from None


@torch.no_grad()
def measured_shape(function: Function, in_shape: Sequence[int], name: str = "the measurement") -> tuple[int, int, int]:
    """(C, H', W') of what is measured of images of ``in_shape``, (3, H, W).

    Raises:
        InputError: no picture of fewer numbers, of sides that divide H and W, comes out; both shapes are named.
    """
    try:
        y = function(torch.zeros(2, *in_shape))
    except (RuntimeError, ValueError) as error:  # too small for it, say
        raise InputError(f"{name}: cannot measure images {tuple(in_shape)}: {error}") from None
    out = tuple(y.shape[1:]) if isinstance(y, Tensor) and y.ndim == 4 and len(y) == 2 else None
    if out is None or in_shape[1] % out[1] or in_shape[2] % out[2] or not y.isfinite().all():
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"{name}: of images (2, {', '.join(map(str, in_shape))}) it must make finite pictures "
                         f"(2, C, H', W') whose sides divide theirs, it makes {got}")  # fmt: skip
    if y[0].numel() >= torch.Size(in_shape).numel():
        raise InputError(f"{name}: {out} holds no fewer numbers than {tuple(in_shape)}, so no network is onto it and "
                         "drops something: average over pixels, say")  # fmt: skip
    return out
