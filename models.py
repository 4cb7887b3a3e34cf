"""Pseudo-invertible neural networks: a classifier ``g``, its exact pseudo-inverse ``g'``, and back-projection.

A network is a chain of the blocks of blocks.py, and itself such a surjection. Whatever the weights are,
``g(g'(y)) = y``: that is algebra, and tests/test_laws.py holds every block and chain to it.

Source: Ehrlich, Berman and Shocher, "Pseudo-Invertible Neural Networks", arXiv 2602.06042. B batch, C channels, H and W
size, d classes; x an image, y logits, z a latent, u a mixed feature map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bijections  # noqa: F401  (adds its layers to BLOCKS)
from blocks import (
    BLOCKS,
    CayleyMixing,
    ConvPINNBlock,
    HouseholderMixing,
    PixelUnshuffleBlock,
    Shape,
    Surjection,
    is_transformed,
    no_volume,
    solved_once,
)
from checkpoints import Pretrained
from networks import MOVING, Layer, conv, down, in_training, point, shuffle, unet, up
from utils import check_positive, sides

__all__ = ["BUILT_IN", "PINN", "SPNN", "BackProjection", "CayleyMixing", "Completion", "ConvPINNBlock"]
__all__ += ["HouseholderMixing", "PixelUnshuffleBlock", "Surjection"]

Latents = list[Tensor | None]
Completed = Tensor | tuple[Tensor, Latents]  # what was asked for, with latents or without

# --- The chain -------------------------------------------------------------------------------------------------------


def concatenated(latents: Latents) -> Tensor:
    """All latents of a network as one vector per image, (B, total)."""
    return torch.cat([z.flatten(1) for z in latents if z is not None], dim=1)


def along(a: Tensor, strength: float | Tensor, direction: Tensor) -> Tensor:
    """``a + strength * direction``, (B, ...); strength is a number, or one per image, (B,)."""
    if isinstance(strength, Tensor):
        strength = strength.to(a).view(-1, *[1] * (a.dim() - 1))
    return a + strength * direction


@dataclass(frozen=True)
class Completion:
    """A point ``(y, z)`` of the completed network's output space, where ``G`` is a bijection."""

    y: Tensor  # logits (B, d), or a feature map
    z: Latents  # of the blocks, in the order of forward; None of one that drops nothing

    def each(self, f: Callable[[Tensor, Tensor], Tensor], other: "Completion") -> "Completion":
        """f of every part of both."""
        latents = [a if a is None else f(a, b) for a, b in zip(self.z, other.z, strict=True)]
        return Completion(f(self.y, other.y), latents)


class PINN(nn.Module):
    """A chain of surjections, itself one: (B, C, H, W) -> (B, C', H', W'), its latents the list of its blocks'.

    Args:
        blocks: `Surjection`s, applied in order; of a `PINN` among them, its blocks.
        in_shape: (C, H, W) of the input.

    Attributes:
        checkpoint_activations: whether the backward pass computes what is inside a block again, so that only what goes
            in and out of blocks is kept for it; same weights and gradients (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        ValueError: a block that does not fit what reaches it, named with what it got and what it needs.
    """

    checkpoint_activations = False

    def __init__(self, blocks: Sequence[Surjection], in_shape: Shape):
        super().__init__()
        shape = in_shape
        blocks = [part for block in blocks for part in (block.blocks if isinstance(block, PINN) else [block])]
        for index, block in enumerate(blocks):
            if block.stateful and any(block is other for other in blocks[:index]):
                raise ValueError(f"block {index}: {type(block).__name__} is there twice, with statistics of one place")
            try:
                shape = block.output_shape(shape)
            except ValueError as error:
                raise ValueError(f"block {index}: {error}") from None
        self.blocks = nn.ModuleList(blocks)
        self.in_shape, self.out_shape = tuple(in_shape), tuple(shape)

    def forward(self, x: Tensor, return_latents: bool = False) -> Completed:
        """``g(x)``, or ``G(x)`` as (y, latents)."""
        latents = []
        for block in self.blocks:
            x, z = self._run(block, block, x, True)
            latents.append(z)
        return (x, latents) if return_latents else x

    def _run(self, block: Surjection, method: Callable, *arguments):
        """``method(*arguments)`` of a block, whose activations the backward pass recomputes if that is asked for."""
        recompute = self.checkpoint_activations and torch.is_grad_enabled() and not (block.stateful or is_transformed())
        if recompute and not any(isinstance(part, MOVING) for part in in_training(block)):
            return checkpoint(method, *arguments, use_reentrant=False)
        return method(*arguments)

    def pinv(self, y: Tensor, latents: Latents | None = None, return_latents: bool = False) -> Completed:
        """``g'(y)``, or ``G^-1(y, latents)``; on request with the latents it used, natural if none are given."""
        latents = [None] * len(self.blocks) if latents is None else list(latents)
        if len(latents) != len(self.blocks):
            raise ValueError(f"pinv: expected one latent per block ({len(self.blocks)}), got {len(latents)}")
        y = self._descend(y, latents, 0)
        return (y, latents) if return_latents else y

    def _descend(self, y: Tensor, latents: Latents, last: int) -> Tensor:
        """The input of block ``last`` for the chain's output y. Latents that are None become natural ones."""
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            if latents[index] is None:
                latents[index] = self._run(block, block.natural_latent, y)
            if index >= last:
                y = self._run(block, block.pinv, y, latents[index])
        return y

    def natural_latents(self, y: Tensor) -> Latents:
        """The latents of ``g'(y)``, met on the way down to it: ``G(g'(y)) = (y, natural_latents(y))``.

        No forward pass is needed to know them, nor the inverse of the first lossy block, the largest.
        """
        latents: Latents = [None] * len(self.blocks)
        first = next((index for index, block in enumerate(self.blocks) if block.lossy), len(self.blocks))
        self._descend(y, latents, first + 1)
        return latents

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Latents, Tensor]:
        """``G(x)`` and ``log |det dG/dx|``: (y, latents, (B,))."""
        latents, total = [], no_volume(x)
        for block in self.blocks:
            x, z, log_det = block.forward_log_det(x)
            latents.append(z)
            total = torch.stack([total, log_det]).sum(0)  # and not a sum that broadcasts
        return x, latents, total

    def log_abs_det(self, x: Tensor) -> Tensor:
        """``log |det dG/dx|``, (B,)."""
        return self.forward_log_det(x)[-1]


class BackProjection:
    """Non-linear back-projection of an image as a function of its strength.

    ::

        G(x') = G(x) + strength * ( G(g'(y)) - G(g'(g(x))) )

    Both ``G(g'(.))`` are known without a forward pass (`PINN.natural_latents`), so this costs one forward and one
    descent of the r-networks, and each call one inverse. At strength 1, ``g(x') = y``.

    Args:
        model: an `SPNN`. x: images, (B, C, H, W).
        goal: ``model.natural(y)`` for the targets y. It is the same for every x: compute it once a run.

    Attributes:
        start: ``G(x)``; ``start.y`` is ``g(x)``, (B, d).
    """

    def __init__(self, model: "SPNN", x: Tensor, goal: Completion):
        self.model = model
        self.start = model.complete(x)
        self.direction = goal.each(torch.sub, model.natural(self.start.y))

    def __call__(self, strength: float | Tensor, images=slice(None)) -> Tensor:
        """x', (B, C, H, W), for a strength (a number, or (B,)) and, if given, for some ``images`` of the batch only."""
        point = self.start.each(lambda a, b: along(a[images], strength, b[images]), self.direction)
        return self.model.pinv(point.y, point.z)


# --- Architectures ---------------------------------------------------------------------------------------------------
# The published networks, for d classes: st are the layers of s and T, r those of R, a ReLU between any two of them.


def row(kind: Callable[[int, int], nn.Module], *channels: int) -> list[Layer]:
    """Layers of one kind, from each number of channels to the next."""
    return [(kind, before, after) for before, after in pairwise(channels)]


def published_head(d: int) -> dict[str, list[Layer]]:
    """Of the last block of all three, on 1x1."""
    return {"st": row(point, 1024 - d, 512, 256, 128, d), "r": row(point, d, 128, 256, 512, 1024 - d)}


def published_256(d: int, block: Callable[..., ConvPINNBlock]) -> list[Surjection]:
    """Images of 3x256x256. ``block`` makes a `ConvPINNBlock`; `unet` goes down, through twice its width, and up."""
    return [
        PixelUnshuffleBlock(4),
        block(48, 12, st=unet(36, 12, 128), r=unet(12, 36, 128)),  # on 64x64
        PixelUnshuffleBlock(4),
        block(192, 48, st=unet(144, 48, 256), r=unet(48, 144, 256)),  # on 16x16
        PixelUnshuffleBlock(4),
        block(768, 192, st=unet(576, 192, 512), r=unet(192, 576, 512)),  # on 4x4
        PixelUnshuffleBlock(4),
        block(3072, 1024, st=row(point, 2048, 2048, 1536, 1024), r=row(point, 1024, 1536, 2048, 2048)),  # on 1x1
        block(1024, d, **published_head(d)),
    ]


def published_64(d: int, block: Callable[..., ConvPINNBlock]) -> list[Surjection]:
    """Images of 3x64x64."""
    twelve = [(conv, 6, 64), (down, 64, 128), (conv, 128, 128), (up, 128, 64), (conv, 64, 6)]
    six = row(conv, 3, 64, 64, 64, 3)
    return [
        PixelUnshuffleBlock(2),
        block(12, 6, st=twelve, r=twelve),  # on 32x32
        block(6, 3, st=six, r=six),  # on 32x32
        *published_32(d, block),
    ]


def published_32(d: int, block: Callable[..., ConvPINNBlock]) -> list[Surjection]:
    """Images of 3x32x32."""
    narrow = [(shuffle, 16, 1), *row(conv, 1, 32, 128), (down, 128, 256), (conv, 256, 512), (down, 512, 512)]
    last = row(down, 512, 1024, 1024)
    wide = [(shuffle, 1024, 16), *row(conv, 16, 128, 256), (down, 256, 512), (conv, 512, 512), *last]
    return [
        PixelUnshuffleBlock(4),
        block(48, 32, st=[*narrow, (conv, 512, 32)], r=row(conv, 32, 512, 256, 128, 64, 16)),  # on 8x8
        PixelUnshuffleBlock(8),
        block(2048, 1024, st=wide, r=wide),  # on 1x1
        block(1024, d, **published_head(d)),
    ]


BUILT_IN = {32: published_32, 64: published_64, 256: published_256}


def custom_blocks(layer_channels: Sequence, mix_type: str) -> list[Surjection]:
    """The blocks of a ``layer_channels`` list. Raises ValueError: an unknown block, or arguments that it refuses."""
    if not isinstance(layer_channels, (list, tuple)) or not layer_channels:
        raise ValueError(f"layer_channels: expected a list of (block, arguments), got {layer_channels!r}")
    blocks = []
    for index, entry in enumerate(layer_channels):
        try:
            kind, arguments = entry
            kind = BLOCKS[kind] if isinstance(kind, str) else kind
            own = {"mix_type": mix_type} if kind is ConvPINNBlock else {}
            blocks.append(kind(**{**own, **arguments}))
        except KeyError:
            raise ValueError(f"block {index}: unknown block {entry[0]!r}, known are {sorted(BLOCKS)}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"block {index}: {error}") from None
    return blocks


class SPNN(Pretrained):
    """A surjective network g from images to logits, with its pseudo-inverse g' from logits to images.

    A chain that ends at 1x1 gives logits (B, d), as every built-in architecture does; any other a map (B, d, H', W').

    Args:
        img_ch: channels of an image.
        num_classes: d, the number of logits, of the image or of each of the map's pixels.
        hidden: width of a built-in architecture's networks; 128 is the published one, others scale it.
        scale_bound: bound of a built-in architecture's log-scales. Custom blocks have their own, as they have hidden.
        img_size: H = W, or (H, W). 32, 64 and 256 have a built-in architecture.
        mix_type: "cayley" or "householder", of all blocks but custom ones that name theirs.
        layer_channels: a custom architecture, a list of (block class or its name, its arguments).

    Attributes:
        in_shape, out_shape: of an image, (C, H, W), and of what g gives, (d,) or (d, H', W').
        config: these arguments as JSON values.
        notes: what `save_pretrained` keeps beside them, JSON values: ``attributes``, the names of the logits, ...

    Raises:
        ValueError: a chain that does not fit: the block, what it got and what it needs are named.
    """

    def __init__(
        self,
        img_ch: int = 3,
        num_classes: int = 40,
        hidden: int = 128,
        scale_bound: float = 2.0,
        img_size: int | Sequence[int] = 256,
        mix_type: str = "cayley",
        layer_channels: Sequence | None = None,
    ):
        super().__init__()
        check_positive("SPNN", whole=True, img_ch=img_ch, num_classes=num_classes, hidden=hidden)
        h, w = sides("SPNN", "img_size", img_size)
        self.num_classes, self.img_size = num_classes, h if h == w else (h, w)
        self.config = {"img_ch": img_ch, "num_classes": num_classes, "hidden": hidden, "scale_bound": scale_bound}
        self.config |= {"img_size": h if h == w else [h, w], "mix_type": mix_type}
        self.notes = {}
        if layer_channels is not None:
            blocks = custom_blocks(layer_channels, mix_type)
            names = {kind: name for name, kind in BLOCKS.items()}
            entries = [[names.get(kind, getattr(kind, "__name__", kind)), dict(of)] for kind, of in layer_channels]
            self.config["layer_channels"] = entries
        elif self.img_size in BUILT_IN:
            block = partial(ConvPINNBlock, scale_bound=scale_bound, mix_type=mix_type, scale=hidden / 128)
            blocks = BUILT_IN[self.img_size](num_classes, block)
        else:
            raise ValueError(f"SPNN: img_size {img_size} is none of {sorted(BUILT_IN)}: give layer_channels")
        self.pinn = PINN(blocks, (img_ch, h, w))
        c, *size = self.pinn.out_shape
        self.in_shape, self.out_shape = self.pinn.in_shape, (c,) if size == [1, 1] else (c, *size)
        if c != num_classes:
            raise ValueError(f"block {len(blocks) - 1}: num_classes is {num_classes}, but {c} channels leave it")

    @staticmethod
    def _check(what: str, given: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(given.shape[1:]) != shape:
            expected = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"SPNN expects {what} of shape ({expected}), got {tuple(given.shape)}")

    def _as_map(self, logits: Tensor) -> Tensor:
        self._check("logits", logits, self.out_shape)
        return logits.reshape(logits.shape[0], *self.pinn.out_shape)  # (B, d, H', W')

    def forward(self, x: Tensor, return_latents: bool = False) -> Completed:
        """Logits ``g(x)``, (B, *out_shape), of images (B, C, H, W) in [-1, 1]; on request with latents, ``G(x)``."""
        self._check("images", x, self.in_shape)
        y, latents = self.pinn(x, return_latents=True)  # (B, d, H', W')
        y = y.reshape(x.shape[0], *self.out_shape)
        return (y, latents) if return_latents else y

    def pinv(self, logits: Tensor, latents: Latents | None = None, return_latents: bool = False) -> Completed:
        """Images ``g'(y)``, (B, C, H, W), of logits (B, *out_shape); with latents of `forward`, ``G^-1``."""
        return self.pinn.pinv(self._as_map(logits), latents, return_latents)

    def complete(self, x: Tensor) -> Completion:
        """``G(x) = (g(x), z)``."""
        return Completion(*self(x, return_latents=True))

    def natural(self, logits: Tensor) -> Completion:
        """``G(g'(y)) = (y, r-latents)``, without a forward pass."""
        return Completion(logits, self.pinn.natural_latents(self._as_map(logits)))

    def back_project(self, x: Tensor, target: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """x', (B, C, H, W): images x moved towards logits ``target``, (B, *out_shape) (see `BackProjection`).

        ``strength`` is lambda, a number or one per image, (B,). 1 reaches the target, 0 returns x.
        """
        with solved_once():
            return BackProjection(self, x, self.natural(target))(strength)
