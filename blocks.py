"""Surjective blocks: orthogonal mixing, what a block is, the pixel unshuffle, the coupling block, the registry.

A surjective block maps many channels to few, ``y = g(x)``. The channels it drops, ``z``, would complete it to a
bijection ``G(x) = (g(x), z)``. Its pseudo-inverse puts natural ones back, ``g'(y) = G^-1(y, r(y))`` with ``r`` learned.

Source and letters: those of models.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from networks import ConvMLP, Layer, at_least_float32, custom_layers, exact, is_transformed, no_volume
from utils import check_positive, sides

Shape = tuple[int, int, int]  # (C, H, W)

# --- Orthogonal mixing -----------------------------------------------------------------------------------------------

_block: ContextVar[object] = ContextVar("block", default=None)  # the `solved_once` that this thread is in


@contextmanager
def solved_once() -> Iterator[None]:
    """Let passes that record gradients share every W, as those of g and g' in a training step can.

    Outside each such pass solves anew: weights may have been written to behind torch's back, by a step by hand or by
    `torch.autograd.gradcheck`.
    """
    token = _block.set(_block.get() or object())
    try:
        yield
    finally:
        _block.reset(token)


def _mark_as_changed(optimizer: torch.optim.Optimizer, *_) -> None:
    """Count a step in the versions of the parameters that it moved: the fused optimisers leave no trace there."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not parameter.is_inference():
                torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_mark_as_changed)


class Mixing(nn.Module):
    """A learned orthogonal matrix W over the channels of x: ``forward`` is ``W x``, ``inverse`` is ``W^T x``.

    W is made and applied in float64, which no autocast and no TF32 rounds: rounding W to ten bits breaks
    ``W^T W = I``. Next to the networks of a block that costs little.
    """

    weight_name: str  # of the parameter

    def product(self, x: Tensor, transpose: bool) -> Tensor:
        """W x or W^T x for x of shape (..., C), in float64."""
        raise NotImplementedError

    def forward(self, x: Tensor, transpose: bool = False) -> Tensor:
        """``W x``, or ``W^T x``, over dimension 1 of x, (B, C, ...) -> (B, C, ...)."""
        with torch.autocast("mps", enabled=False) if x.device.type == "mps" else nullcontext():
            y = self.product(exact(x).movedim(1, -1), transpose)  # (B, ..., C)
        return y.movedim(-1, 1).to(at_least_float32(x).dtype)

    def inverse(self, u: Tensor) -> Tensor:
        return self(u, transpose=True)

    def matrix(self) -> Tensor:
        """W itself, (C, C): for tests, the network never forms it."""
        weight = at_least_float32(getattr(self, self.weight_name))
        return self(torch.eye(weight.shape[-1]).to(weight)).T


def _shrunk(b: Tensor, largest: float = 1e7) -> Tensor:
    """What scales B back to ``largest`` if it has larger entries; a constant to derivatives."""
    return largest / exact(b.detach().abs().amax()).clamp(min=largest)


def cayley(b: Tensor) -> Tensor:
    """``(I + A)^-1 (I - A)`` in float64, with ``A = B - B^T`` and B, (C, C), scaled back if it has entries above 1e7.

    ``I + A`` has no singular value below 1, but beside large entries I would be lost, and of odd size A is singular.
    """
    scaled = exact(b) * _shrunk(b)
    skew, identity = scaled - scaled.T, torch.eye(len(b), dtype=scaled.dtype, device=b.device)
    w = 2 * torch.linalg.inv_ex(identity + skew).inverse - identity  # = (I + A)^-1 (I - A); _ex never raises
    if b.dtype == torch.float64:  # a step of Newton and Schulz squares what is missing to W^T W = I
        w = w + w @ (identity - w.T @ w) / 2
    return w


class _ApplyCayley(torch.autograd.Function):
    """``u = W x``, or ``W^T x``, for x (..., C) and a constant W (W^T), with the gradient of B in the precision of B.

    From ``du = -2 M dA M x`` and ``M = (W + I) / 2``: with ``d = W^T du``, ``dA = -(du + d) (u + x)^T / 2``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, b: Tensor, w: Tensor, transpose: bool) -> Tensor:
        ctx.save_for_backward(x, b, w)
        ctx.transpose = transpose
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, du: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, b, w = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative asks how W follows from B
            w = cayley(b).T if ctx.transpose else cayley(b)
        u, dx = F.linear(x, w), F.linear(du, w.T)
        left, right = ((part / 2).reshape(-1, len(b)).to(b.dtype) for part in (du + dx, u + x))
        if ctx.transpose:  # W^T is the transform of -A
            left, right = right, left
        scale = -2 * _shrunk(b).to(b.dtype)
        db = torch.cat([left, -right]).T @ (scale * torch.cat([right, left]))  # dA - dA^T, in one product
        return dx, db.fill_diagonal_(0), None, None  # of whose diagonal Adam would make steps of rounding errors


class CayleyMixing(Mixing):
    """``W = (I + A)^-1 (I - A)`` with ``A = B - B^T``, B unconstrained, (C, C) and zero at first (W = I).

    W is orthogonal for every finite B, whatever a step that diverges has left (see `cayley`). The published weights
    were trained with ``(1 + 1e-6) I + A`` on the left, which is orthogonal to 1e-6 only; W agrees with it to rounding.

    Where no gradients are recorded, and in `solved_once`, W is kept until the weights change, by whatever torch counts
    as a change. After writing to ``weight.data`` in place, behind torch's back, call ``model.train()`` or ``.eval()``.
    """

    weight_name = "A_unconstrained"

    def __init__(self, channels: int):
        super().__init__()
        self.A_unconstrained = nn.Parameter(torch.zeros(channels, channels))

    def solved(self, recording: bool) -> Tensor:
        """W for the weights as they are now, (C, C), solved once for them; it records no gradients itself."""
        b, block = self.A_unconstrained, _block.get()
        if recording and block is None:
            self.__dict__.pop("_kept", None)  # a step by hand may follow
            return cayley(b.detach())
        memory = b.untyped_storage()._cdata, b.storage_offset()  # fake tensors have no data_ptr
        state = id(b), memory, b.stride(), b.dtype, b.device, b._version  # known without reading a value
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != state or kept[1] not in (block, block if recording else None):
            with torch.inference_mode(False), torch.no_grad():  # whose tensors could serve no later gradient
                # the last two hold id and memory: no other weights can have them
                kept = state, block if recording else None, cayley(b), b, b.detach()
            self.__dict__["_kept"] = kept
        return kept[2]

    def train(self, mode: bool = True) -> "CayleyMixing":
        self.__dict__.pop("_kept", None)
        return super().train(mode)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def product(self, x: Tensor, transpose: bool) -> Tensor:
        b = self.A_unconstrained
        passing = is_transformed() or not isinstance(b, nn.Parameter) or b.is_inference()  # no use to a later pass
        passing = passing or torch.autograd.forward_ad._current_level >= 0
        recording = torch.is_grad_enabled() and b.requires_grad and not passing
        w = cayley(b) if passing else self.solved(recording)
        w = w.T if transpose else w
        return _ApplyCayley.apply(x, b, w, transpose) if recording else F.linear(x, w)


class HouseholderMixing(Mixing):
    """``W = H_k ... H_1`` with ``H = I - 2 v v^T / |v|^2``, the v being the rows of V, (k, C). W is never formed.

    The k reflections are applied as one: ``W = I - V^T S^-1 V`` with S the lower triangle of ``V V^T``, its diagonal
    halved (the compact form of a product of reflections; Joffrain et al. 2006, "UT transform").
    """

    weight_name = "V"

    def __init__(self, channels: int, reflections: int = 8):
        super().__init__()
        self.V = nn.Parameter(torch.randn(reflections, channels))

    def product(self, x: Tensor, transpose: bool) -> Tensor:
        v = exact(self.V)
        size = v.abs().amax(-1, keepdim=True)
        v = v / torch.where(size > 0, size, 1.0)  # rows of any length: their squares would over- or underflow
        v = v / v.norm(dim=-1, keepdim=True).clamp(min=0.5)  # a row of zeros stays it and reflects nothing: H is I
        gram = v @ v.T  # (k, k)
        triangle = gram.tril(-1) + torch.diag(gram.diagonal().clamp(min=0.5) / 2)
        identity = torch.eye(len(v), dtype=triangle.dtype, device=triangle.device)
        inner = torch.linalg.solve_triangular(triangle, identity, upper=False)  # S^-1
        return x - F.linear(F.linear(x, v), inner.T if transpose else inner) @ v


MIXINGS = {"cayley": CayleyMixing, "householder": HouseholderMixing}


# --- Blocks ----------------------------------------------------------------------------------------------------------


class Surjection(nn.Module):
    """A map onto its outputs, g, with a pseudo-inverse g' that is exact on one side: ``g(g'(y)) = y`` for every y.

    ``forward(x, return_latent=True)`` completes it to the bijection ``G(x) = (y, z)``, whose inverse is ``pinv(y, z)``.
    Without a latent, ``pinv(y)`` takes ``natural_latent(y)``. The other order, ``g'(g(x))``, is the projection of x on
    the natural images and differs from x.

    Attributes:
        lossy: whether something is dropped; if False, the latent is None.
        exact: whether the laws above hold to rounding, whatever the weights are.
        stateful: whether a forward pass in training mode changes what the next one does, so that none may be repeated.
    """

    lossy = True
    exact = True
    stateful = False

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def output_shape(self, shape: Shape) -> Shape:
        """(C, H, W) of y for an x of ``shape``; a ValueError if such an x does not fit."""
        raise NotImplementedError

    def forward(self, x: Tensor, return_latent: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """``y = g(x)``, or ``G(x) = (y, z)``."""
        y, z, _ = self.forward_log_det(x)
        return (y, z) if return_latent else y

    def pinv(self, y: Tensor, latent: Tensor | None = None) -> Tensor:
        """``g'(y)``, or ``G^-1(y, latent)``."""
        raise NotImplementedError

    def natural_latent(self, y: Tensor) -> Tensor | None:
        """``r(y)``, the latent of ``g'(y)``."""
        return None

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """``G(x)`` and ``log |det dG/dx|`` in one pass: (y, z, (B,))."""
        raise NotImplementedError(f"{type(self).__name__} has no log-determinant")

    def log_abs_det(self, x: Tensor) -> Tensor:
        """``log |det dG/dx|``, (B,)."""
        return self.forward_log_det(x)[-1]


class PixelUnshuffleBlock(Surjection):
    """Pixels into channels, (B, C, H, W) -> (B, C rh rw, H/rh, W/rw): a bijection, nothing learned, latent None.

    The new channels are in the order (C, row, column), as torch has them.

    Args:
        r: the factor on all sides, or (rh, rw).
        dims: dimensions of a map: (B, C, *) -> (B, C r^dims, */r).
    """

    lossy = False

    def __init__(self, r: int | Sequence[int], dims: int = 2):
        super().__init__()
        self.factors = sides(type(self).__name__, "r", r, dims)
        self.r = self.factors[0] if len(set(self.factors)) == 1 else self.factors

    def extra_repr(self) -> str:
        return f"r={self.r}"

    def output_shape(self, shape: Shape) -> Shape:
        c, *size = shape
        if len(size) != len(self.factors) or any(n % r for n, r in zip(size, self.factors, strict=True)):
            found = "x".join(map(str, size))
            raise ValueError(f"{self.name}: r must divide the size, got {found} for {len(self.factors)} dimensions")
        return c * math.prod(self.factors), *(n // r for n, r in zip(size, self.factors, strict=True))

    def input_shape(self, shape: Shape) -> Shape:
        """The shape of x for a y of ``shape``."""
        c, *size = shape
        if len(size) != len(self.factors) or c % math.prod(self.factors):
            raise ValueError(f"{self.name}: {c} channels and size {tuple(size)} do not come apart by r")
        return c // math.prod(self.factors), *(n * r for n, r in zip(size, self.factors, strict=True))

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        c, *size = self.output_shape(tuple(x.shape[1:]))
        pairs = [n for pair in zip(size, self.factors, strict=True) for n in pair]
        y = x.reshape(*x.shape[:2], *pairs)  # (B, C, H/rh, rh, W/rw, rw)
        fine, coarse = range(3, y.dim(), 2), range(2, y.dim(), 2)
        return y.permute(0, 1, *fine, *coarse).reshape(x.shape[0], c, *size), None, no_volume(x)

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        dims, (c, *size) = len(self.factors), self.input_shape(tuple(y.shape[1:]))
        x = y.reshape(y.shape[0], c, *self.factors, *y.shape[2:])  # (B, C, rh, rw, H/rh, W/rw)
        pairs = [dim for i in range(2, 2 + dims) for dim in (dims + i, i)]
        return x.permute(0, 1, *pairs).reshape(y.shape[0], c, *size)


class ConvPINNBlock(Surjection):
    """The surjective coupling block, (B, in_ch, H, W) -> (B, out_ch, H, W).

    ::

        u = W x = [u0 | u1]                              W orthogonal, u0 the first out_ch channels
        y = u0 * S(u1) + t(u1),   z = u1                 S = exp(scale_bound * tanh(s)),   t = tanh(T)
        g'(y):  u1 = r(y),  u0 = (y - t(u1)) / S(u1),  x = W^T [u0 | u1]                   r = tanh(R)

    Args:
        in_ch, out_ch: channels, 0 < out_ch < in_ch.
        hidden: width of s, T and R; at least their input's channels, at most 1024.
        scale_bound: largest absolute log-scale: the inverse amplifies by at most exp(scale_bound).
        feat_size: H = W at this block, or (H, W). Even: U-Net like networks; 1: pointwise; None: 3x3, for any size.
        mix_type: "cayley" or "householder".
        st, r: layers of s and T, and of R (see `ConvMLP`), in place of those that feat_size stands for.
        scale: a factor on their widths.
        see_place: the first layers of s, T and R also see where on the map they are.

    Raises:
        ValueError: out_ch not below in_ch, an odd feat_size above 1, an unknown mix_type.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        hidden: int = 64,
        scale_bound: float = 2.0,
        feat_size: int | Sequence[int] | None = None,
        mix_type: str = "cayley",
        st: Sequence[Layer] | None = None,
        r: Sequence[Layer] | None = None,
        scale: float = 1.0,
        see_place: bool = False,
    ):
        super().__init__()
        self.in_ch, self.out_ch, self.feat_size, self.scale_bound = in_ch, out_ch, feat_size, scale_bound
        check_positive(self.name, whole=True, in_ch=in_ch, out_ch=out_ch, hidden=hidden)
        check_positive(self.name, scale_bound=scale_bound)
        self.size = size = None if feat_size is None else sides(self.name, "feat_size", feat_size)
        if out_ch >= in_ch:
            raise ValueError(f"{self.name}: out_ch must be below in_ch, got out_ch {out_ch}, in_ch {in_ch}")
        if size not in (None, (1, 1)) and (size[0] % 2 or size[1] % 2):
            raise ValueError(f"{self.name}: feat_size must be 1, even or None, got {feat_size}; None fits any size")
        if mix_type not in MIXINGS:
            raise ValueError(f"{self.name}: mix_type must be one of {sorted(MIXINGS)}, got {mix_type!r}")

        dropped = in_ch - out_ch
        st = custom_layers(size, dropped, out_ch, hidden) if st is None else st
        r = custom_layers(size, out_ch, dropped, hidden) if r is None else r
        self.t, self.s, self.r = (ConvMLP(layers, scale, see_place) for layers in (st, st, r))
        self.mix = MIXINGS[mix_type](in_ch)

    def extra_repr(self) -> str:
        return f"{self.in_ch}->{self.out_ch}"

    def output_shape(self, shape: Shape) -> Shape:
        c, h, w = shape
        if c != self.in_ch:
            raise ValueError(f"{self.name}: in_ch is {self.in_ch}, but {c} channels arrive")
        if self.size not in (None, (h, w)):
            raise ValueError(f"{self.name}: feat_size is {self.feat_size}, but the map that arrives is {h}x{w}")
        return self.out_ch, h, w

    def coefficients(self, u1: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """``log S(u1)``, within +-scale_bound, and ``t(u1)``, within +-1, of the shape of what they move."""
        log_scale, shift = self.scale_bound * torch.tanh(self.s(u1)), torch.tanh(self.t(u1))
        for name, value in (("s", log_scale), ("T", shift)):
            if value.shape != moves.shape:  # no sum of what broadcasts
                raise ValueError(f"{self.name}: {name} must give {tuple(moves.shape)} here, got {tuple(value.shape)}")
        return log_scale, shift

    def natural_latent(self, y: Tensor) -> Tensor:
        return torch.tanh(self.r(at_least_float32(y)))  # (B, in_ch - out_ch, H, W)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = self.mix(x)  # (B, in_ch, H, W)
        u0, u1 = u[:, : self.out_ch], u[:, self.out_ch :]  # (B, out_ch, H, W), (B, in_ch - out_ch, H, W)
        log_scale, shift = self.coefficients(u1, u0)
        return u0 * torch.exp(log_scale) + shift, u1, log_scale.flatten(1).sum(1)  # |det W| = 1

    def pinv(self, y: Tensor, latent: Tensor | None = None) -> Tensor:
        y = at_least_float32(y)
        u1 = self.natural_latent(y) if latent is None else at_least_float32(latent)  # (B, in_ch - out_ch, H, W)
        log_scale, shift = self.coefficients(u1, y)
        u0 = (y - shift) * torch.exp(-log_scale)  # (B, out_ch, H, W)
        return self.mix.inverse(torch.cat([u0, u1], dim=1))  # (B, in_ch, H, W)


# the registry: what a checkpoint or a preset may name
BLOCKS: dict[str, Callable[..., Surjection]] = {kind.__name__: kind for kind in (PixelUnshuffleBlock, ConvPINNBlock)}
