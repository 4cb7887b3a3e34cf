"""What is measured of an image: operators ``y = A(x)`` behind one interface. A sampler never knows which one it has.

B images of shape ``in_shape``, (3, H, W), and their measurements of shape ``out_shape``: (d,) logits, or a picture.
"""

import importlib
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blocks import PixelUnshuffleBlock, Surjection, at_least_float32, exact, no_volume, solved_once
from images import read_rgb, to_float, to_uint8
from models import PINN, SPNN, BackProjection, Completion, along
from networks import networks_in
from utils import InputError, nearest

Shape = tuple[int, ...]


class Move(Protocol):
    """The back-projection of images x towards a target, as a function of its strength: what it needs is computed once.

    Attributes:
        y: ``A(x)``, (B, *out_shape).
    """

    y: Tensor

    def __call__(self, strength: float | Tensor, images=slice(None)) -> Tensor:
        """x' for some ``images`` of the batch; the strength is a number, or one per image, (B,)."""


class Operator(Protocol):
    """A surjective operator and its pseudo-inverse: ``A(pinv(y)) = y``."""

    in_shape: Shape
    out_shape: Shape

    def A(self, x: Tensor) -> Tensor:
        """``y``, (B, *out_shape), of images (B, *in_shape). Differentiable."""

    def pinv(self, y: Tensor) -> Tensor:
        """Images whose measurement is y."""

    def back_project(self, x: Tensor, y: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """Move x towards images whose measurement is y; strength 1 reaches it, 0 returns x."""

    def towards(self, y: Tensor) -> Callable[[Tensor], Move]:
        """`back_project` for one target and many x: what depends on y alone is computed once."""

    def distance(self, y1: Tensor, y2: Tensor) -> Tensor:
        """How far two measurements are apart, (B,), in the unit that a stop condition is given in."""

    def loss(self, y1: Tensor, y2: Tensor) -> Tensor:
        """What a gradient makes smaller, (B,): the negative log-likelihood of y1 with respect to y2."""


class _SPNNMove(BackProjection):
    @property
    def y(self) -> Tensor:
        return self.start.y

    def __call__(self, strength: float | Tensor, images=slice(None)) -> Tensor:
        with networks_in("float32", self.start.y.device):
            return super().__call__(strength, images)


class SPNNOperator:
    """The logits of a pseudo-invertible network, whose back-projection is the non-linear one.

    ``distance`` is the mean |sigmoid(y1) - sigmoid(y2)|, in [0, 1]; ``loss`` is the binary cross-entropy against the
    probabilities sigmoid(y2), a mean over logits. The networks compute in float32, whatever surrounds them.

    Args:
        model: an `models.SPNN`, or what else has its ``complete``, ``natural``, ``pinv`` and shapes.
    """

    def __init__(self, model) -> None:
        self.model = model

    @property
    def in_shape(self) -> Shape:
        return self.model.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.model.out_shape

    def A(self, x: Tensor) -> Tensor:
        with networks_in("float32", x.device):
            return self.model(x)

    def pinv(self, y: Tensor) -> Tensor:
        with networks_in("float32", y.device):
            return self.model.pinv(y)

    @solved_once()
    def back_project(self, x: Tensor, y: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        return self.towards(y)(x)(strength)

    def towards(self, y: Tensor) -> Callable[[Tensor], Move]:
        with networks_in("float32", y.device):
            goal: Completion = self.model.natural(y)

        def move(x: Tensor) -> Move:
            with networks_in("float32", x.device):  # that the logits are reached to rounding
                return _SPNNMove(self.model, x, goal)

        return move

    def distance(self, y1: Tensor, y2: Tensor) -> Tensor:
        return (y1.sigmoid() - y2.sigmoid()).abs().flatten(1).mean(dim=1)

    def loss(self, y1: Tensor, y2: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y1, y2.sigmoid(), reduction="none").flatten(1).mean(dim=1)


class SquaredError:
    """What operators whose measurements have a scale have in common.

    ``distance`` is the root mean square of the difference, ``loss`` half its mean square.
    """

    towards: Callable[[Tensor], Callable[[Tensor], Move]]

    def back_project(self, x: Tensor, y: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        return self.towards(y)(x)(strength)

    def distance(self, y1: Tensor, y2: Tensor) -> Tensor:
        return (y1 - y2).flatten(1).square().mean(dim=1).sqrt()

    def loss(self, y1: Tensor, y2: Tensor) -> Tensor:
        return (y1 - y2).flatten(1).square().mean(dim=1) / 2


class PictureOperator(SPNNOperator):
    """An SPNN whose output is a picture: numbers that have a scale."""

    distance, loss = SquaredError.distance, SquaredError.loss


class Shifted:
    """A `Move` along a straight line: ``x + strength * direction``."""

    def __init__(self, x: Tensor, y: Tensor, direction: Tensor) -> None:
        self.x, self.y, self.direction = x, y, direction

    def __call__(self, strength: float | Tensor, images=slice(None)) -> Tensor:
        return along(self.x[images], strength, self.direction[images])


class LinearOperator(SquaredError):
    """A linear operator with its pseudo-inverse A+, whose back-projection is ``x + strength (A+ y - A+ A x)``.

    That is NLBP's equation with A+ for g', and as offsets cancel in it, A and A+ may be affine.

    Args:
        a, a_plus: functions of batches, (B, *in_shape) -> (B, *out_shape) and back. Of targets outside the range of A
            the nearest one inside is reached.
        gain: s if ``A A^T = s^2 I``: A's only singular value other than 0. None: it may have several.
    """

    def __init__(self, a: Callable, a_plus: Callable, in_shape: Shape, out_shape: Shape, gain: float | None = None):
        self.A, self.pinv, self.in_shape, self.out_shape = a, a_plus, tuple(in_shape), tuple(out_shape)
        self.gain = gain

    def towards(self, y: Tensor) -> Callable[[Tensor], Move]:
        goal = self.pinv(y)

        def move(x: Tensor) -> Move:
            measured = self.A(x)
            return Shifted(x, measured, goal - self.pinv(measured))

        return move


def as_operator(network) -> Operator:
    """An operator as it is; an `models.SPNN` behind the interface."""
    return network if hasattr(network, "towards") else SPNNOperator(network)


# --- Linear operators as chains of blocks ----------------------------------------------------------------------------


class LinearBlock(Surjection):
    """A fixed orthogonal change of coordinates, some of which are kept: ``y = scale u0``, ``z = u1``, natural is z = 0.

    So ``A A^T = scale^2 I`` and g' is the Moore-Penrose inverse of A. A chain's is too: ``(A B)+ = B+ A+`` if the rows
    of B are orthogonal to each other and of one length. In float64, as mixing.

    Attributes:
        dim: in which the last ``dropped`` coordinates are z.
    """

    scale = 1.0
    dim = 1
    dropped: int

    def turned(self, x: Tensor) -> Tensor:
        """u, the coordinates of x, (B, ...)."""
        raise NotImplementedError

    def back(self, u: Tensor) -> Tensor:
        """x, of its coordinates."""
        raise NotImplementedError

    def forward(self, x: Tensor, return_latent: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        u = self.turned(exact(x)).to(at_least_float32(x).dtype)
        y, z = u.split([u.shape[self.dim] - self.dropped, self.dropped], self.dim)
        return (self.scale * y, z) if return_latent else self.scale * y

    def natural_latent(self, y: Tensor) -> Tensor:
        return y.new_zeros([*y.shape[: self.dim], self.dropped, *y.shape[self.dim + 1 :]])

    def pinv(self, y: Tensor, latent: Tensor | None = None) -> Tensor:
        z = self.natural_latent(y) if latent is None else latent
        return self.back(torch.cat([exact(y) / self.scale, exact(z)], self.dim)).to(at_least_float32(y).dtype)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, z = self(x, True)
        return y, z, no_volume(x) + math.log(self.scale) * y[:1].numel()


class Weights(LinearBlock):
    """Weighted sums of the channels, (B, C, H, W) -> (B, k, H, W).

    Args:
        rows: A, (k, C): k < C rows, orthogonal to each other and of one length, which is ``scale``.
    """

    def __init__(self, rows: Sequence[Sequence[float]]):
        super().__init__()
        a = torch.tensor(rows, dtype=torch.float64)
        self.scale = a[0].norm().item()
        kept = a / self.scale
        rest = torch.linalg.qr(kept.T, mode="complete").Q[:, len(rows) :].T  # (C - k, C)
        self.w, self.dropped = torch.cat([kept, rest]), len(rest)  # W is no buffer: `float` would round it

    def output_shape(self, shape: Shape) -> Shape:
        c = len(self.w)
        if len(shape) != 3 or shape[0] != c:
            raise ValueError(f"takes images of shape ({c}, H, W), got {tuple(shape)}")
        return c - self.dropped, *shape[1:]

    def turned(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.w.to(x)).movedim(-1, 1)  # (B, C, H, W)

    def back(self, u: Tensor) -> Tensor:
        return F.linear(u.movedim(1, -1), self.w.T.to(u)).movedim(-1, 1)


class KnownPixels(LinearBlock):
    """Those pixels of an image that a mask knows, in its order: (B, C, H, W) -> (B, C, K, 1).

    Args:
        mask: (H, W), true for the K pixels that are known. Some must be, and some not.
    """

    dim = 2

    def __init__(self, mask: Sequence[Sequence[bool]]):
        super().__init__()
        known = torch.tensor(mask).flatten()
        if known.all() or not known.any():
            raise ValueError(f"a mask needs known pixels and missing ones, this one has {known.sum()} of {len(known)}")
        self.size, self.dropped = (len(mask), len(mask[0])), int((~known).sum())
        self.order = torch.argsort(~known, stable=True)  # known pixels first

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape[1:]) != self.size:
            raise ValueError(f"the mask is {self.size}, the images it would cover are {tuple(shape[1:])}")
        return shape[0], len(self.order) - self.dropped, 1

    def turned(self, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, self.order.to(x.device), None]  # (B, C, H W, 1)

    def back(self, u: Tensor) -> Tensor:
        return u[:, :, torch.argsort(self.order).to(u.device)].view(*u.shape[:2], *self.size)


class LinearChain(LinearOperator):
    """An SPNN of `LinearBlock`s, and of bijections that keep every length, as one operator.

    Args:
        layers: the chain, (class, its arguments) each, as of `models.SPNN`.

    Attributes:
        chain: the `models.SPNN`, with no weights to train. Its completion is A's singular value decomposition.
    """

    def __init__(self, layers: Sequence[tuple[type[Surjection], dict]], in_shape: Shape) -> None:
        blocks = [kind(**arguments) for kind, arguments in layers]
        scales = [block.scale for block in blocks if isinstance(block, LinearBlock)]
        channels, *size = in_shape
        self.chain = SPNN(channels, PINN(blocks, in_shape).out_shape[0], img_size=size, layer_channels=layers)
        super().__init__(self.chain, self.chain.pinv, in_shape, self.chain.out_shape, math.prod(scales))


def is_linear(model: SPNN) -> bool:
    """Whether a network is a chain of fixed linear blocks."""
    return all(isinstance(block, LinearBlock | PixelUnshuffleBlock) for block in model.pinn.blocks)


GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and most software weigh the colours
KNOWN = ("grey", "inpaint:FILE", "sr4")


def _layers_of(part: str, shape: Shape) -> list[tuple[type[Surjection], dict]]:
    """The layers of one factor of a product, for images of this shape."""
    if factor := re.fullmatch(r"sr([2-9]|[1-9]\d+)", part):
        r = int(factor[1])
        mean = torch.full((1, r * r), 1 / r**2, dtype=torch.float64)
        rows = torch.kron(torch.eye(shape[0]), mean)  # (C, C r^2)
        return [(PixelUnshuffleBlock, {"r": r}), (Weights, {"rows": rows.tolist()})]
    if part == "grey":
        return [(Weights, {"rows": [GREY]})]
    kind, _, file = part.partition(":")
    if kind == "inpaint" and file:
        return [(KnownPixels, {"mask": (np.asarray(read_rgb(Path(file)).convert("L")) > 127).tolist()})]
    raise InputError(f"no such operator{nearest(part, KNOWN)}; known are {', '.join(KNOWN)}, and products, grey*sr4")


def is_network(spec: str) -> bool:
    """Whether an operator is given by weights; a folder that happens to be called as a word is does not count."""
    return spec != "" and re.fullmatch(r"sr\d+|grey", spec) is None and Path(spec).exists()


def make_operator(spec: str, in_shape: Shape) -> LinearChain | PictureOperator:
    """The operator that a word stands for, exact, with nothing to train; or an SPNN that was fitted to one.

    ``sr4`` means of 4x4 pixels (any factor that divides the size); ``grey`` the grey picture of a colour one;
    ``inpaint:FILE`` the pixels where a picture of the same size is white; ``grey*sr4`` a product, the rightmost first
    (``sr`` must stand right of ``inpaint``); a file or folder: weights of an SPNN that ends at a picture.

    Args:
        in_shape: (3, H, W).

    Raises:
        InputError: an unknown word, or one that does not fit the images that reach it, with both shapes.
    """
    shape = tuple(in_shape)
    if is_network(spec):
        model = SPNN.from_pretrained(spec).eval().requires_grad_(False)
        if model.in_shape != shape or len(model.out_shape) == 1:
            raise InputError(f"operator {spec}: takes {model.in_shape} to {model.out_shape}, not {shape} to a picture")
        return PictureOperator(model)
    layers: list[tuple[type[Surjection], dict]] = []
    for part in reversed(spec.split("*")):
        try:
            for kind, arguments in _layers_of(part.strip(), shape):
                shape = kind(**arguments).output_shape(shape)
                layers.append((kind, arguments))
        except ValueError as error:
            raise InputError(f"operator {spec}: {part.strip()}: {error}") from None
    return LinearChain(layers, in_shape)


# --- Non-linear measurements, to fit an SPNN to ----------------------------------------------------------------------
#
# Functions (B, 3, H, W) -> (B, 3, H', W') of pictures in [-1, 1]. All give fewer numbers than they take, by averaging
# at the end: a surjective network has no more outputs than inputs.

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
