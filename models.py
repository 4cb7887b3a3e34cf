"""Pseudo-invertible neural networks: a classifier ``g``, its exact pseudo-inverse ``g'``, and back-projection.

A surjective block maps many channels to few, ``y = g(x)``. The channels it drops, ``z``, would complete it to a
bijection ``G(x) = (g(x), z)``. Its pseudo-inverse puts natural ones back, ``g'(y) = G^-1(y, r(y))`` with ``r`` learned.
Whatever the weights are, ``g(g'(y)) = y``: that is algebra, and tests/test_laws.py holds every block to it.

Source: Ehrlich, Berman and Shocher, "Pseudo-Invertible Neural Networks", arXiv 2602.06042.

Letters: B batch, C channels, H and W size, d classes; x an image, y logits, z a latent, u a mixed feature map.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bijections  # noqa: F401  (adds its layers to BLOCKS)
from blocks import (
    BLOCKS,
    PLAIN,
    POINTWISE,
    UNET,
    BlockNets,
    ConvPINNBlock,
    PixelUnshuffleBlock,
    Shape,
    Surjection,
    check_whole,
    solved_once,
)
from checkpoints import Pretrained

__all__ = [
    "BUILT_IN",
    "PINN",
    "PLAIN",
    "POINTWISE",
    "SPNN",
    "UNET",
    "BackProjection",
    "BlockNets",
    "Completion",
    "ConvPINNBlock",
    "PixelUnshuffleBlock",
    "Surjection",
]


# --- The chain -------------------------------------------------------------------------------------------------------

Latents = list[Tensor | None]


def concatenated(latents: Latents) -> Tensor:
    """All latents of a network as one vector an image, (B, total)."""
    return torch.cat([z.flatten(1) for z in latents if z is not None], dim=1)


def _by_image(strength: float | Tensor, like: Tensor) -> float | Tensor:
    """A strength an image, (B,), shaped to multiply ``like``, (B, ...)."""
    if not isinstance(strength, Tensor):
        return strength
    return strength.to(like).view(-1, *[1] * (like.dim() - 1)) if strength.dim() else strength.to(like)


@dataclass(frozen=True)
class Completion:
    """A point ``(y, z)`` of the completed network's output space, where ``G`` is a bijection.

    Attributes:
        y: logits (B, d), or a feature map.
        z: the latent of every block, in the order of forward; None for a block that drops nothing.
    """

    y: Tensor
    z: Latents

    def __sub__(self, other: "Completion") -> "Completion":
        return Completion(
            self.y - other.y, [None if a is None else a - b for a, b in zip(self.z, other.z, strict=True)]
        )

    def moved(self, direction: "Completion", strength: float | Tensor) -> "Completion":
        """``self + strength * direction``; strength is a number, or one an image, (B,)."""
        z = [None if a is None else a + _by_image(strength, a) * b for a, b in zip(self.z, direction.z, strict=True)]
        return Completion(self.y + _by_image(strength, self.y) * direction.y, z)

    def __getitem__(self, images) -> "Completion":
        """The same for some images of the batch: an index, a mask or a slice over dimension 0."""
        return Completion(self.y[images], [None if a is None else a[images] for a in self.z])


class PINN(nn.Module):
    """A chain of surjections, itself one: (B, C, H, W) -> (B, C', H', W'), its latents the list of its blocks'.

    Args:
        blocks: `Surjection`s, applied in order.
        in_shape: (C, H, W) of the input.

    Raises:
        ValueError: a block that does not fit what reaches it, named with what it got and what it needs.
    """

    def __init__(self, blocks: Sequence[Surjection], in_shape: Shape):
        super().__init__()
        shape = in_shape
        for index, block in enumerate(blocks):
            try:
                shape = block.output_shape(shape)
            except ValueError as error:
                raise ValueError(f"block {index}: {error}") from None
        self.blocks = nn.ModuleList(blocks)
        self.in_shape, self.out_shape = tuple(in_shape), tuple(shape)

    def forward(self, x: Tensor, return_latents: bool = False) -> Tensor | tuple[Tensor, Latents]:
        """``g(x)``, or ``G(x)`` as (y, latents)."""
        latents = []
        for block in self.blocks:
            x, z = block(x, return_latent=True)
            latents.append(z)
        return (x, latents) if return_latents else x

    def pinv(
        self, y: Tensor, latents: Latents | None = None, return_latents: bool = False
    ) -> Tensor | tuple[Tensor, Latents]:
        """``g'(y)``, or ``G^-1(y, latents)``; on request with the latents it used, natural where none were given."""
        latents = [None] * len(self.blocks) if latents is None else list(latents)
        if len(latents) != len(self.blocks):
            raise ValueError(f"pinv expects a latent a block, {len(self.blocks)}, got {len(latents)}")
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            if latents[index] is None:
                latents[index] = block.natural_latent(y)
            y = block.pinv(y, latents[index])
        return (y, latents) if return_latents else y

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Latents, Tensor]:
        """``G(x)`` and ``log |det dG/dx|``: (y, latents, (B,))."""
        latents, total = [], x.new_zeros(len(x))
        for block in self.blocks:
            x, z, log_det = block.forward_log_det(x)
            latents.append(z)
            total = torch.stack([total, log_det]).sum(0)  # and not a sum that broadcasts
        return x, latents, total

    def log_abs_det(self, x: Tensor) -> Tensor:
        """``log |det dG/dx|``, (B,)."""
        return self.forward_log_det(x)[-1]

    def natural_latents(self, y: Tensor) -> Latents:
        """The latents of ``g'(y)``, met on the way down to it: ``G(g'(y)) = (y, natural_latents(y))``.

        No forward pass is needed to know them, nor the inverse of the first lossy block, the largest.
        """
        latents: Latents = [None] * len(self.blocks)
        first = next((index for index, block in enumerate(self.blocks) if block.lossy), len(self.blocks))
        for index in reversed(range(first, len(self.blocks))):
            latents[index] = self.blocks[index].natural_latent(y)
            if index > first:
                y = self.blocks[index].pinv(y, latents[index])
        return latents


class BackProjection:
    """Non-linear back-projection of an image as a function of its strength.

    ::

        G(x') = G(x) + strength * ( G(g'(y)) - G(g'(g(x))) )

    Both ``G(g'(.))`` are known without a forward pass (`PINN.natural_latents`), so this costs one forward and one
    descent of the r-networks, and each call one inverse. At strength 1, ``g(x') = y``.

    Args:
        model: an `SPNN`.
        x: images, (B, C, H, W).
        goal: ``model.natural(y)`` for the targets y. It is the same for every x: compute it once a run.

    Attributes:
        start: ``G(x)``; ``start.y`` is ``g(x)``, (B, d).
    """

    def __init__(self, model: "SPNN", x: Tensor, goal: Completion):
        self.model = model
        self.start = model.complete(x)
        self.direction = goal - model.natural(self.start.y)

    def __call__(self, strength: float | Tensor, images=slice(None)) -> Tensor:
        """x', (B, C, H, W), for a strength (a number, or (B,)) and, if given, for some ``images`` of the batch only."""
        point = self.start[images].moved(self.direction[images], strength)
        return self.model.pinv(point.y, point.z)


# --- Architectures ---------------------------------------------------------------------------------------------------

_SHUFFLED_32 = "PS(4) 1>32 32>128 128>256/2 256>512 512>512/2 512>out"
_SHUFFLED_2048 = "PS(8) 16>128 128>256 256>512/2 512>512 512>1024/2 1024>out/2"
_HEAD = BlockNets("in.512 512.256 256.128 128.out", "in.128 128.256 256.512 512.out")
_HEAD_32 = (
    (4, 48, 32, BlockNets(_SHUFFLED_32, "in>512 512>256 256>128 128>64 64>out")),
    (8, 2048, 1024, BlockNets(_SHUFFLED_2048, _SHUFFLED_2048)),
    (1, 1024, None, _HEAD),
)
# img_size -> the chain: (unshuffle by, channels in, channels out, networks); out None is num_classes. Widths given as
# numbers are those of hidden = 128, the published ones, and scale with it.
BUILT_IN: dict[int, tuple[tuple[int, int, int | None, BlockNets], ...]] = {
    256: (
        (4, 48, 12, BlockNets(UNET, UNET, 128)),
        (4, 192, 48, BlockNets(UNET, UNET, 256)),
        (4, 768, 192, BlockNets(UNET, UNET, 512)),
        (4, 3072, 1024, BlockNets("in.2048 2048.1536 1536.out", "in.1536 1536.2048 2048.out")),
        (1, 1024, None, _HEAD),
    ),
    64: (
        (2, 12, 6, BlockNets(*["in>64 64>128/2 128>128 128>64^ 64>out"] * 2)),
        (1, 6, 3, BlockNets(*["in>64 64>64 64>64 64>out"] * 2)),
        *_HEAD_32,
    ),
    32: _HEAD_32,
}


def built_in_blocks(
    img_size: int, num_classes: int, hidden: int, scale_bound: float, mix_type: str
) -> list[Surjection]:
    """The blocks of a built-in architecture. Raises ValueError where img_size has none."""
    if img_size not in BUILT_IN:
        raise ValueError(
            f"SPNN: img_size {img_size} has no built-in architecture ({sorted(BUILT_IN)} have): give layer_channels"
        )
    blocks: list[Surjection] = []
    for unshuffle, in_ch, out_ch, nets in BUILT_IN[img_size]:
        if unshuffle > 1:
            blocks.append(PixelUnshuffleBlock(unshuffle))
        out_ch = num_classes if out_ch is None else out_ch
        blocks.append(
            ConvPINNBlock(in_ch, out_ch, hidden, scale_bound, mix_type=mix_type, nets=nets, nets_scale=hidden / 128)
        )
    return blocks


def custom_blocks(layer_channels: Sequence, mix_type: str) -> list[Surjection]:
    """The blocks of a ``layer_channels`` list: (class or its name, its arguments) a block.

    Raises:
        ValueError: an unknown block or argument, or arguments that the block refuses.
    """
    if not isinstance(layer_channels, Sequence) or isinstance(layer_channels, str) or not layer_channels:
        raise ValueError(f"layer_channels: expected a list of (block, arguments), got {layer_channels!r}")
    blocks = []
    for index, entry in enumerate(layer_channels):
        try:
            kind, arguments = entry
            kind = BLOCKS[kind] if isinstance(kind, str) else kind
            arguments = dict(arguments)
        except KeyError:
            raise ValueError(f"block {index}: unknown block {entry[0]!r}, known are {sorted(BLOCKS)}") from None
        except (TypeError, ValueError):
            raise ValueError(f"block {index}: expected (block, arguments), got {entry!r}") from None
        if kind is ConvPINNBlock:
            arguments.setdefault("mix_type", mix_type)
        try:
            blocks.append(kind(**arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"block {index}: {error}") from None
    return blocks


class SPNN(Pretrained):
    """A surjective classifier g from images to logits, with its pseudo-inverse g' from logits to images.

    Args:
        img_ch: channels of an image.
        num_classes: d, the number of logits.
        hidden: width of a built-in architecture's networks; 128 is the published one, others scale it. Custom blocks
            have their own.
        scale_bound: bound of the log-scales of a built-in architecture. Custom blocks have their own.
        img_size: H = W. 32, 64 and 256 have a built-in architecture.
        mix_type: "cayley" or "householder"; for custom blocks, that of those which do not name one.
        layer_channels: a custom architecture, a list of (block class or its name, its arguments).

    Attributes:
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
        img_size: int = 256,
        mix_type: str = "cayley",
        layer_channels: Sequence | None = None,
    ):
        super().__init__()
        check_whole("SPNN", img_ch=img_ch, num_classes=num_classes, hidden=hidden, img_size=img_size)
        if layer_channels is None:
            blocks = built_in_blocks(img_size, num_classes, hidden, scale_bound, mix_type)
        else:
            blocks = custom_blocks(layer_channels, mix_type)
        self.pinn = PINN(blocks, (img_ch, img_size, img_size))
        c, h, w = self.pinn.out_shape
        if (h, w) != (1, 1):
            raise ValueError(f"block {len(blocks) - 1}: the chain must end at 1x1, it ends at {h}x{w}")
        if c != num_classes:
            raise ValueError(
                f"block {len(blocks) - 1}: num_classes is {num_classes}, but the chain ends with {c} channels"
            )
        self.img_size, self.num_classes = img_size, num_classes
        self.notes = {}
        self.config = {
            "img_ch": img_ch,
            "num_classes": num_classes,
            "hidden": hidden,
            "scale_bound": scale_bound,
            "img_size": img_size,
            "mix_type": mix_type,
        }
        if layer_channels is not None:
            names = {kind: name for name, kind in BLOCKS.items()}
            self.config["layer_channels"] = [
                [kind if isinstance(kind, str) else names.get(kind, kind.__name__), dict(arguments)]
                for kind, arguments in layer_channels
            ]

    @classmethod
    def config_of(cls, state: Mapping[str, Tensor]) -> dict | None:
        """The settings of the built-in architecture (hidden 128) that weights belong to, or None.

        Names and shapes decide. scale_bound is in no weight: it is taken to be the published 2.0.
        """
        last = max((int(name.split(".")[2]) for name in state if re.match(r"pinn\.blocks\.\d+\.t\.", name)), default=0)
        biases = [name for name in state if re.fullmatch(rf"pinn\.blocks\.{last}\.t\.net\.\d+\.bias", name)]
        if not biases:
            return None
        num_classes = len(state[max(biases, key=lambda name: int(name.split(".")[5]))])
        mix_type = "householder" if any(name.endswith(".mix.V") for name in state) else "cayley"
        for img_size in (32, 64, 256):
            config = {"img_ch": 3, "num_classes": num_classes, "hidden": 128, "scale_bound": 2.0}
            config |= {"img_size": img_size, "mix_type": mix_type}
            try:
                with torch.device("meta"):
                    own = cls(**config).state_dict()
            except ValueError:  # so many classes that the last block would drop nothing
                continue
            if {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in state.items()}:
                return config
        return None

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.pinn.in_shape:
            c, h, w = self.pinn.in_shape
            raise ValueError(f"SPNN expects images of shape (B, {c}, {h}, {w}), got {tuple(x.shape)}")

    def _as_map(self, logits: Tensor) -> Tensor:
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"SPNN expects logits of shape (B, {self.num_classes}), got {tuple(logits.shape)}")
        return logits[..., None, None]  # (B, d, 1, 1)

    def forward(self, x: Tensor, return_latents: bool = False) -> Tensor | tuple[Tensor, Latents]:
        """Logits ``g(x)``, (B, d), of images (B, C, H, W) in [-1, 1]; with their latents on request, ``G(x)``."""
        self._check(x)
        y, latents = self.pinn(x, return_latents=True)  # (B, d, 1, 1)
        return (y.flatten(1), latents) if return_latents else y.flatten(1)

    def pinv(
        self, logits: Tensor, latents: Latents | None = None, return_latents: bool = False
    ) -> Tensor | tuple[Tensor, Latents]:
        """Images ``g'(y)``, (B, C, H, W), of logits (B, d); with latents of `forward`, ``G^-1``."""
        return self.pinn.pinv(self._as_map(logits), latents, return_latents)

    def complete(self, x: Tensor) -> Completion:
        """``G(x) = (g(x), z)``."""
        return Completion(*self(x, return_latents=True))

    def natural(self, logits: Tensor) -> Completion:
        """``G(g'(y)) = (y, r-latents)``, without a forward pass."""
        return Completion(logits, self.pinn.natural_latents(self._as_map(logits)))

    def back_project(self, x: Tensor, target: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """Move images x towards logits ``target`` by non-linear back-projection (see `BackProjection`).

        Args:
            x: (B, C, H, W).
            target: (B, d).
            strength: lambda, a number or one an image, (B,). 1 reaches the target, 0 returns x.

        Returns:
            x', (B, C, H, W).
        """
        with solved_once():
            return BackProjection(self, x, self.natural(target))(strength)
