"""Fixed points of contractions, found to rounding at any scale, with derivatives of every order in both modes.

Letters: B batch, x the fixed point, J the Jacobian of a step at it, v and w gradients, t a tangent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode

from networks import exact, full_precision


def norm(x: Tensor, dims: int) -> Tensor:
    """The Euclidean norm over the last ``dims`` dimensions, in float64: there no float32's square overflows."""
    return torch.linalg.vector_norm(exact(x), dim=tuple(range(-dims, 0)))


def pushforward(f: Callable[..., Tensor], *at: Tensor) -> Callable[..., Tensor]:
    """The linear map ``t -> J t``, J the Jacobian of f: its transpose's transpose, which needs reverse mode only."""
    value, pull = torch.func.vjp(f, *at)
    push = torch.func.vjp(pull, torch.zeros_like(value))[1]
    return lambda *tangents: push(tangents)[0]


class Banach(NamedTuple):
    """The iteration ``x <- step(x)`` of contractions with constant ``lipschitz``, each image until rounding stops it.

    Attributes:
        dims: dimensions of an image.
        tolerance: largest bound of the error, relative to ``scale``; None: as small as rounding allows.
        report: told the bound that was reached.
    """

    owner: str
    lipschitz: float
    dims: int
    tolerance: float | None
    report: Callable[[float], None] | None = None

    def __call__(self, step: Callable[[Tensor], Tensor], scale: Tensor, x: Tensor) -> Tensor:
        if x.is_meta:
            return step(x)
        tail = self.lipschitz / (1 - self.lipschitz)  # the error is at most that times the last step
        rounding = 8 * torch.finfo(x.dtype).eps
        goal = rounding if self.tolerance is None else self.tolerance / tail
        # the first step is at most ``scale`` long, and each of the others shrinks by ``lipschitz``
        iterations = max(math.ceil(math.log(goal) / math.log(self.lipschitz)), 1) + 20
        length = torch.full_like(scale, math.inf)
        traced = get_innermost_proxy_mode() is not None  # values are unknown to it: as many as it may take
        for _ in range(iterations):
            x, before = step(x), x
            last, length = length, norm(x - before, self.dims)
            resting = (length >= last) & (length <= 256 * rounding * scale)  # it moves by rounding only
            if not traced and not ((length > goal * scale) & ~resting).any():  # one that is no number comes to no end
                break
        if traced:
            return x
        failed = (length > max(goal, 256 * rounding) * scale) | scale.isfinite() & ~length.isfinite()
        if failed.any():
            growth = (length / last)[failed].max().item()
            raise ValueError(
                f"{self.owner}: the inverse does not converge, as its weights are infinite or NaN or stretch more than "
                f"the Lipschitz constant of {self.lipschitz} allows: the last step is {growth:.4f} times the one before"
            )
        if self.report is not None:
            bound = (tail * length / scale).nan_to_num(0.0).max().item() if len(scale) else 0.0
            if self.tolerance is not None and bound > self.tolerance:
                raise ValueError(f"{self.owner}: the inverse is known to {bound:.1e}, above tolerance={self.tolerance}")
            self.report(bound)
        return x


class FixedPoint(torch.autograd.Function):
    """The x with ``x = step(x)``, where ``step = make(*args)`` is a contraction, as a function of ``args``.

    Its derivatives are those of the implicit function, of any order, in both modes: the gradient w and the tangent t

    ::

        w = J^T w + v          t = J t + (d step / d args) . tangents          J = d step / dx at the solution

    are fixed points themselves, of contractions with the same constant. Under `torch.func.vmap` all are solved at once.

    Args:
        scale: (B,), the size of the numbers that a step computes with, image by image; its rounding is relative to it.
        start: where to begin; like scale it moves x by rounding only.
    """

    @staticmethod
    def forward(make, solve: Banach, scale, start, *args):
        return solve(make(*args), scale, start)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.make, solve, _, _, *args = inputs
        ctx.solve = solve._replace(report=None)
        ctx.save_for_backward(output, *args)
        ctx.save_for_forward(output, *args)

    @staticmethod
    def backward(ctx, v):
        make, solve, (x, *args) = ctx.make, ctx.solve, ctx.saved_tensors

        def transposed(v, x, *args):
            pull = torch.func.vjp(make(*args), x)[1]
            return lambda w: v + pull(w)[0]

        with full_precision(v.device):
            w = FixedPoint.apply(transposed, solve, norm(v.detach(), solve.dims), v, v, x, *args)
            return None, None, None, None, *torch.func.vjp(lambda *args: make(*args)(x), *args)[1](w)

    @staticmethod
    def jvp(ctx, _make, _solve, _scale, _start, *tangents):
        make, solve, (x, *args) = ctx.make, ctx.solve, ctx.saved_tensors

        def along(r, x, *args):
            push = pushforward(make(*args), x)
            return lambda t: r + push(t)

        with full_precision(x.device):
            tangents = [torch.zeros_like(a) if t is None else t for t, a in zip(tangents, args, strict=True)]
            r = pushforward(lambda *args: make(*args)(x), *args)(*tangents)
            return FixedPoint.apply(along, solve, norm(r.detach(), solve.dims), r, r, x, *args)

    @staticmethod
    def vmap(info, in_dims, make, solve, scale, start, *args):
        def made(*args):
            return lambda x: torch.func.vmap(lambda x, *args: make(*args)(x), in_dims=(0, *in_dims[4:]))(x, *args)

        scale, start = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in ((scale, in_dims[2]), (start, in_dims[3]))
        )
        return FixedPoint.apply(made, solve, scale, start, *args), 0
