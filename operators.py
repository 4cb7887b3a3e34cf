"""What is measured of an image: operators ``y = A(x)`` behind one interface. A sampler never knows which one it has.

B images of shape ``in_shape``, (3, H, W), and their measurements of shape ``out_shape``: (d,) logits, or a picture.
"""

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from blocks import solved_once
from models import BackProjection, Completion
from networks import networks_in

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
        model: an `models.SPNN`, or what else has ``complete``, ``natural`` and ``pinv``.
    """

    def __init__(self, model) -> None:
        self.model = model

    @property
    def in_shape(self) -> Shape:
        return self.model.pinn.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.model.out_shape

    def A(self, x: Tensor) -> Tensor:
        with networks_in("float32", x.device):
            return self.model(x)

    def pinv(self, y: Tensor) -> Tensor:
        with networks_in("float32", y.device):
            return self.model.pinv(y)

    def back_project(self, x: Tensor, y: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        with solved_once():
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


class LinearOperator:
    """A linear operator with a right inverse A+ (``A A+ = I``), whose back-projection is ``x + strength A+(y - A x)``.

    ``distance`` is the root mean square of the difference, ``loss`` half its mean square.

    Args:
        a, a_plus: functions of batches, (B, *in_shape) -> (B, *out_shape) and back.
    """

    def __init__(
        self, a: Callable[[Tensor], Tensor], a_plus: Callable[[Tensor], Tensor], in_shape: Shape, out_shape: Shape
    ) -> None:
        self.A, self.pinv, self.in_shape, self.out_shape = a, a_plus, tuple(in_shape), tuple(out_shape)

    def back_project(self, x: Tensor, y: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        return self.towards(y)(x)(strength)

    def towards(self, y: Tensor) -> Callable[[Tensor], Move]:
        return lambda x: _LinearMove(self, x, y)

    def distance(self, y1: Tensor, y2: Tensor) -> Tensor:
        return (y1 - y2).flatten(1).square().mean(dim=1).sqrt()

    def loss(self, y1: Tensor, y2: Tensor) -> Tensor:
        return (y1 - y2).flatten(1).square().mean(dim=1) / 2


class _LinearMove:
    def __init__(self, operator: LinearOperator, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, operator.A(x)
        self.direction = operator.pinv(y - self.y)

    def __call__(self, strength: float | Tensor, images=slice(None)) -> Tensor:
        if isinstance(strength, Tensor) and strength.ndim:
            strength = strength.view(-1, *[1] * (self.x.ndim - 1))
        return self.x[images] + strength * self.direction[images]


def as_operator(network) -> Operator:
    """An operator as it is; an `models.SPNN` behind the interface."""
    return network if hasattr(network, "towards") else SPNNOperator(network)
