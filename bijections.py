"""Bijections with log-determinants: surjections that discard nothing, to mix with the blocks of blocks.py.

Every layer has the interface of `blocks.Surjection` and may stand anywhere in ``layer_channels``, by class or by name:
``forward(x, return_latent)``, its inverse ``pinv(y, latent)``, and ``forward_log_det(x)``, which gives log |det dG/dx|
in the same pass. SPNN's own blocks have it too, so the completion of any chain is a bijection with a density
(`density.Density`).

Letters: B batch, C channels, * any number of positions (none for vectors, W, H W or D H W for maps), x input, y output,
z latent. Layers act on dimension 1 and take vectors (B, C) and maps (B, C, *) alike, unless they say otherwise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, Normal, Uniform, constraints

from blocks import BLOCKS, MIXINGS, PixelUnshuffleBlock, Surjection
from fixed_point import Banach, FixedPoint, norm
from networks import SPECTRAL, at_least_float32, exact, full_precision, in_training, is_transformed, no_volume
from utils import check_positive, sides

Shape = tuple[int, ...]  # of one image, without B: (C,), (C, L), (C, H, W) or (C, D, H, W)
Completed = tuple[Tensor, Tensor | None, Tensor]  # y, z and log |det|, (B,)


def per_image(values: Tensor) -> Tensor:
    """The sum over everything but the batch, (B, ...) -> (B,), in float32 or float64."""
    values = at_least_float32(values)
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def widest(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their types, float32 at least."""
    dtype = reduce(torch.promote_types, (at_least_float32(t[:0]).dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


# --- Statistics ------------------------------------------------------------------------------------------------------

_held: ContextVar[bool] = ContextVar("held", default=False)


@contextmanager
def statistics_held() -> Iterator[None]:
    """Let layers in training mode keep the statistics that they have, so that a chain is one fixed map.

    Inside, forward uses what ``pinv`` uses: the last batch's mean and variance, the last power iteration, an `ActNorm`
    as it is. Without it, each forward pass in training mode is a pass over training data.
    """
    token = _held.set(True)
    try:
        yield
    finally:
        _held.reset(token)


def several() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, with its gradient."""
    if not several():
        return values
    from torch.distributed.nn.functional import all_reduce  # a build of torch may lack it

    return all_reduce(values)


def moments(x: Tensor, owner: str) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of each channel of x, (B, C, *), and the number n of its values, over all processes.

    In float64, where squares neither over- nor underflow. Raises ValueError, by the name of ``owner``, if a channel has
    fewer than 2 values.
    """
    values = exact(x).movedim(1, 0).flatten(1)  # (C, B*...)
    n = int(total(torch.tensor(values.shape[1], device=x.device))) if several() else values.shape[1]
    if n < 2:
        raise ValueError(f"{owner}: a batch in training mode must hold 2 values per channel or more, got {n}")
    mean = total(values.sum(1)) / n
    return mean, total((values - mean[:, None]).square().sum(1)) / n, n


class Bijection(Surjection):
    """A surjection that drops nothing: ``pinv(g(x)) = x`` and ``g(pinv(y)) = y``, its latent is None.

    A subclass gives ``forward_log_det`` and ``pinv``, and the two shapes if it changes them.

    Attributes:
        domain, codomain: the numbers that x and y consist of.
    """

    lossy = False
    domain = codomain = constraints.real

    def output_shape(self, shape: Shape) -> Shape:
        return tuple(shape)

    def input_shape(self, shape: Shape) -> Shape:
        """The shape of x for a y of ``shape``: `output_shape` of the other direction."""
        return self.output_shape(shape)

    def inverted(self) -> Surjection:
        """The same map with its directions swapped, and the same parameters."""
        return Inverted(self)


class VolumePreserving(Bijection):
    """A bijection whose log-determinant is 0. A subclass gives ``g(x)`` and ``pinv``."""

    def g(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_log_det(self, x: Tensor) -> Completed:
        return self.g(x), None, no_volume(x)


class Inverted(Bijection):
    """``block`` from its outputs to its inputs; see `Bijection.inverted`, and `inverted` for it by name.

    What passes through it is no data of the block's, so the block's statistics are held (`statistics_held`): they are
    set by passes through the block itself.
    """

    def __init__(self, block: Bijection):
        super().__init__()
        if block.lossy or not block.exact:
            raise ValueError(f"{block.name}: it discards a latent, so there is no inverse to swap directions with")
        self.block, self.stateful = block, block.stateful
        self.domain, self.codomain = block.codomain, block.domain

    def output_shape(self, shape: Shape) -> Shape:
        return self.block.input_shape(shape)

    def input_shape(self, shape: Shape) -> Shape:
        return self.block.output_shape(shape)

    def forward(self, x: Tensor, return_latent: bool = False) -> Tensor | tuple[Tensor, None]:
        y = self.block.pinv(x)
        return (y, None) if return_latent else y

    def forward_log_det(self, x: Tensor) -> Completed:
        y = self.block.pinv(x)
        with statistics_held():
            return y, None, -self.block.log_abs_det(y)

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        with statistics_held():
            return self.block(y)

    def inverted(self) -> Bijection:
        return self.block


# --- Layers with a parameter per feature -----------------------------------------------------------------------------


class PerFeature(Bijection):
    """A layer whose parameters come one per feature.

    Args:
        features: C, for one per channel; or a shape such as (C, H, W), for one per entry.
    """

    def __init__(self, features: int | Sequence[int]):
        super().__init__()
        self.features = tuple(features) if isinstance(features, Sequence) else (features,)
        check_positive(type(self).__name__, whole=True, features=min(self.features, default=0))

    def extra_repr(self) -> str:
        return "x".join(map(str, self.features))

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape[: len(self.features)]) != self.features:
            raise ValueError(f"{self.name}: features are {self.features}, but {tuple(shape)} arrives")
        return tuple(shape)

    def spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter, (*features), over x, (B, *features, ...), in float32 at least."""
        self.output_shape(x.shape[1:])
        return at_least_float32(parameter).view(*self.features, *[1] * (x.dim() - 1 - len(self.features))).expand_as(x)


class Affine(PerFeature):
    """``y = exp(log_scale) x + bias``; the scale is positive, so that no step of training makes it singular."""

    def __init__(self, features: int | Sequence[int], scale: bool = True, bias: bool = True):
        super().__init__(features)
        self.log_scale = nn.Parameter(torch.zeros(self.features)) if scale else None
        self.bias = nn.Parameter(torch.zeros(self.features)) if bias else None

    def coefficients(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """log_scale and bias, (*features) each, for a forward pass of x, or for an inverse, if x is None."""
        zeros = torch.zeros_like(self.bias if self.log_scale is None else self.log_scale)
        return tuple(zeros if c is None else c for c in (self.log_scale, self.bias))

    def forward_log_det(self, x: Tensor) -> Completed:
        x = at_least_float32(x)
        log_scale, bias = (self.spread(c, x) for c in self.coefficients(x))
        return x * log_scale.exp() + bias, None, per_image(log_scale)

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        log_scale, bias = (self.spread(c, y) for c in self.coefficients(None))
        return (y - bias) * torch.exp(-log_scale)


class Bias(Affine):
    """``y = x + bias``."""

    def __init__(self, features: int | Sequence[int]):
        super().__init__(features, scale=False)


class Diagonal(Affine):
    """``y = exp(log_scale) x``: a diagonal matrix."""

    def __init__(self, features: int | Sequence[int]):
        super().__init__(features, bias=False)


class ActNorm(Affine):
    """`Affine`, set by the first batch in training mode to mean 0 and variance 1 per channel, over all processes.

    Before that, and in evaluation mode, it is what its parameters say: the identity at first. (Kingma and Dhariwal,
    "Glow", arXiv 1807.03039, section 3.1.)
    """

    stateful = True

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("initialised", torch.tensor(False))
        self.known = False  # that it is: to ask the buffer in every pass would wait for a GPU

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the parameters from x, (B, C, *)."""
        self.output_shape(x.shape[1:])
        mean, var, _ = moments(x, self.name)
        if not (mean + var).isfinite().all():
            raise ValueError(f"{self.name}: the first batch in training mode, which sets it, holds NaN or infinity")
        std = var.sqrt()
        log_std = torch.where(std > 1e-6 * mean.abs(), std, 1.0).log()  # what rounding leaves of a constant is no scale
        self.log_scale.copy_(-log_std)
        self.bias.copy_(-mean * torch.exp(-log_std))
        self.initialised.fill_(True)

    def coefficients(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        if x is not None and self.training and not self.known and not _held.get():
            if not self.initialised:
                self.initialise(x)
            self.known = True
        return super().coefficients(x)

    def _load_from_state_dict(self, *args) -> None:
        self.known = False
        super()._load_from_state_dict(*args)


class BatchNorm(Affine):
    """``y = exp(log_scale) (x - mean) / sqrt(var + eps) + bias``, with the batch's statistics in training mode.

    It is invertible in both modes. In evaluation mode both directions use the running statistics. In training mode
    forward uses those of its batch, over all processes, and ``pinv`` those of the last batch that forward saw, as
    constants: so it undoes that forward, and is a fixed map between two of them. The log-determinant takes the
    statistics as constants too (Dinh et al., "Real NVP", arXiv 1605.08803, section 3.7), so in training mode it is that
    of one image among many.
    """

    stateful = True

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__(channels)
        check_positive(self.name, most=1, momentum=momentum)
        check_positive(self.name, eps=eps)
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.last: tuple[Tensor, Tensor] | None = None  # mean and variance of the last batch in training mode

    def coefficients(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        if self.training and x is not None and not _held.get():
            self.output_shape(x.shape[1:])
            mean, var, n = moments(x, self.name)
            with torch.no_grad():
                for running, new in ((self.running_mean, mean), (self.running_var, var * n / (n - 1))):
                    running.lerp_(new.to(running), self.momentum)
            with torch.inference_mode(False):  # so that any later pass may use them
                self.last = mean.detach().clone(), var.detach().clone()
        elif self.training and self.last is not None:
            mean, var = (t.to(self.bias.device) for t in self.last)
        log_scale = exact(self.log_scale) - torch.log(exact(var) + self.eps) / 2
        bias = exact(self.bias) - exact(mean) * log_scale.exp()
        return tuple(t.to(at_least_float32(self.bias).dtype) for t in (log_scale, bias))


# --- Activations -----------------------------------------------------------------------------------------------------


def within_one(v: Tensor) -> Tensor:
    """v in [-1, 1] moved off the ends, to the last number before them: where the inverse is infinite, it saturates."""
    end = 1 - torch.finfo(v.dtype).eps / 2
    return v.clamp(-end, end)


class Activation(Bijection):
    """A monotone function f of each entry. A subclass gives f and its inverse; and ``codomain``, closed.

    It may give log f' too, which by default comes of automatic differentiation. Where rounding takes f(x) to an end of
    its range, the inverse gives the largest x it can tell from the end.
    """

    def f(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        """log |f'(x)|, with y = f(x) at hand."""
        with torch.inference_mode(False):  # with torch 2.4 a derivative in inference mode is 0
            x = x.clone() if x.is_inference() else x
            return torch.func.vjp(self.f, x)[1](torch.ones_like(x))[0].abs().log()

    def forward(self, x: Tensor, return_latent: bool = False) -> Tensor | tuple[Tensor, None]:
        y = self.f(at_least_float32(x))
        return (y, None) if return_latent else y

    def forward_log_det(self, x: Tensor) -> Completed:
        x = at_least_float32(x)
        y = self.f(x)
        return y, None, per_image(self.log_derivative(x, y).expand_as(x))

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        y = at_least_float32(y)
        if self.codomain is not constraints.real:
            inside = self.codomain.check(y)
            if not (y.is_meta or is_transformed() or inside.all()):
                found = y[~inside][0].item()
                raise ValueError(f"{self.name}: its inverse takes values of {self.codomain}, got {found:g}")
            y = torch.where(inside, y, math.nan)
        return self.inverse(y)


class Sigmoid(Activation):
    """``y = 1 / (1 + exp(-x))``."""

    codomain = constraints.unit_interval

    def f(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def inverse(self, y: Tensor) -> Tensor:
        y = within_one(y.clamp_min(torch.finfo(y.dtype).tiny))
        return y.log() - torch.log1p(-y)

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return F.logsigmoid(x) + F.logsigmoid(-x)


class Tanh(Activation):
    """``y = tanh(x)``."""

    codomain = constraints.interval(-1.0, 1.0)

    def f(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        y = within_one(y)
        return (torch.log1p(y) - torch.log1p(-y)) / 2

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return -2 * log_cosh(x)


class LeakyReLU(Activation):
    """``y = x`` above 0 and ``slope x`` below, slope above 0, so that it is monotone."""

    def __init__(self, slope: float = 0.01):
        super().__init__()
        check_positive(type(self).__name__, slope=slope)
        self.slope = slope

    def extra_repr(self) -> str:
        return f"slope={self.slope}"

    def slopes(self, x: Tensor) -> Tensor:
        """Those of the entries of x, in a shape that broadcasts to it."""
        return x.new_full((), self.slope)

    def f(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, self.slopes(x) * x, x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.where(y < 0, y / self.slopes(y), y)

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x < 0, self.slopes(x).log(), 0.0)


class PReLU(PerFeature, LeakyReLU):
    """`LeakyReLU` with a learned slope per feature, ``exp(log_slope)``, at first ``slope``."""

    def __init__(self, features: int | Sequence[int], slope: float = 0.25):
        super().__init__(features)
        check_positive(self.name, slope=slope)
        self.log_slope = nn.Parameter(torch.full(self.features, math.log(slope)))

    def slopes(self, x: Tensor) -> Tensor:
        return self.spread(self.log_slope, x).exp()


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0) -> Tensor:
    """scale x above 0, scale alpha (exp(x) - 1) below, to rounding near 0, as torch's is not in all versions."""
    # both sides are computed everywhere, on values that neither overflow nor have infinite derivatives, and no clamp:
    # torch takes its derivative at the end itself for 0
    return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(torch.where(x > 0, 0.0, x)))


class ELU(Activation):
    """``y = scale x`` above 0 and ``scale alpha (exp(x) - 1)`` below; y >= -scale alpha."""

    def __init__(self, alpha: float = 1.0, scale: float = 1.0):
        super().__init__()
        check_positive(type(self).__name__, alpha=alpha, scale=scale)
        self.alpha, self.scale = alpha, scale
        self.codomain = constraints.greater_than_eq(-scale * alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, scale={self.scale:g}"

    def f(self, x: Tensor) -> Tensor:
        return elu(x, self.alpha, self.scale)

    def inverse(self, y: Tensor) -> Tensor:
        below = within_one(torch.where(y > 0, 0.0, y) / (self.scale * self.alpha))
        return torch.where(y > 0, y / self.scale, torch.log1p(below))

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(self.scale) + torch.where(x > 0, 0.0, x + math.log(self.alpha))


class SELU(ELU):
    """`ELU` with the two constants that keep mean 0 and variance 1 (Klambauer et al., arXiv 1706.02515)."""

    def __init__(self):
        super().__init__(alpha=1.6732632423543772, scale=1.0507009873554805)


def log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x) - math.log(2)


class BairdActivation(PerFeature, Activation):
    """``y = asinh(sinh(x) + c)``, c learned, one per feature; its inverse is itself with -c.

    (Baird, Smalenberger and Ingkiriwang, "One-step neural network inversion with PDF learning and emulation", 2005.)
    Its derivative is ``cosh(x) / cosh(y)``. Beyond 20, sinh would soon overflow. There all is in units of exp(m), m the
    larger of |x| and log(2 |c|): ``sinh(x) + c = q e^m`` and ``y = sign(q) (m + log(|q| + hypot(q, e^-m)))``.
    """

    far = 20.0

    def __init__(self, features: int | Sequence[int]):
        super().__init__(features)
        self.c = nn.Parameter(torch.zeros(self.features))

    def _shifted(self, x: Tensor, c: Tensor) -> Tensor:
        unit = x.abs().maximum((2 * c.abs()).clamp_min(1.0).log()).detach()  # any number would do
        near = unit <= self.far
        direct = torch.asinh(torch.sinh(torch.where(near, x, 0.0)) + torch.where(near, c, 0.0))
        m = unit.clamp_min(self.far)
        q = (torch.exp(x - m) - torch.exp(-x - m)) / 2 + c * torch.exp(-m)
        q = torch.where(near, 1.0, q)
        scaled = q.sign() * (m + torch.log(q.abs() + torch.hypot(q, torch.exp(-m))))
        return torch.where(near, direct, scaled)

    def f(self, x: Tensor) -> Tensor:
        return self._shifted(x, self.spread(self.c, x))

    def inverse(self, y: Tensor) -> Tensor:
        return self._shifted(y, -self.spread(self.c, y))

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return log_cosh(x) - log_cosh(y)


# --- Linear layers over channels -------------------------------------------------------------------------------------


def positions(x: Tensor) -> int:
    """How often a map over channels is applied: H W for (B, C, H, W), 1 for (B, C)."""
    return math.prod(x.shape[2:])


class OverChannels(PerFeature):
    """A layer over exactly ``channels`` channels, the same at every position."""

    def __init__(self, channels: int):
        check_positive(type(self).__name__, whole=True, channels=channels)
        super().__init__(channels)
        self.channels = channels

    def over_columns(self, f: Callable[..., Tensor], x: Tensor, *matrices: Tensor) -> Tensor:
        """f of columns, (C, n), and of matrices, over the channels of x, (B, C, *) -> (B, C, *), in full precision."""
        self.output_shape(x.shape[1:])
        x, *matrices = widest(x, *matrices)
        with full_precision(x.device):
            columns = f(x.movedim(1, 0).flatten(1), *matrices)  # (C, B*...)
        return columns.unflatten(1, (x.shape[0], *x.shape[2:])).movedim(0, 1)


class Orthogonal(VolumePreserving, OverChannels):
    """``y = W x``, W the product of Householder reflections, or Cayley's (`blocks.HouseholderMixing`, `CayleyMixing`).

    Args:
        reflections: of the Householder product; ``channels`` of them reach every orthogonal W of determinant
            (-1)^channels (Mhammedi et al., arXiv 1612.00188).
    """

    def __init__(self, channels: int, mix_type: str = "householder", reflections: int = 8):
        super().__init__(channels)
        if mix_type not in MIXINGS:
            raise ValueError(f"{self.name}: mix_type must be one of {sorted(MIXINGS)}, got {mix_type!r}")
        check_positive(self.name, whole=True, reflections=reflections)
        self.mix = MIXINGS[mix_type](channels, **({"reflections": reflections} if mix_type == "householder" else {}))

    def g(self, x: Tensor) -> Tensor:
        return self.mix(x)

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        return self.mix.inverse(y)


class SVDLinear(OverChannels):
    """``y = U diag(exp(log_scale)) V x + b``, U and V orthogonal (Zhang et al., arXiv 1803.09327)."""

    def __init__(self, channels: int, bias: bool = True, mix_type: str = "householder", reflections: int = 8):
        super().__init__(channels)
        layers = [Orthogonal(channels, mix_type, reflections), Diagonal(channels)]
        layers += [Orthogonal(channels, mix_type, reflections)] + [Bias(channels)] * bias
        self.layers = nn.ModuleList(layers)

    def forward_log_det(self, x: Tensor) -> Completed:
        total = no_volume(x)
        for layer in self.layers:
            x, _, log_det = layer.forward_log_det(x)
            total = total + log_det
        return x, None, total

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        for layer in reversed(self.layers):
            y = layer.pinv(y)
        return y


class Conv1x1(OverChannels):
    """``y = P L (U + diag(s)) x``: P a fixed permutation, L unit lower and U strictly upper triangular.

    The sign of s is fixed. Starts as a random rotation (Kingma and Dhariwal, "Glow", arXiv 1807.03039, eq. 10 and 11).
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels)).Q)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(upper.diagonal().abs().log())

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, L and U + diag(s)."""
        lower, upper, log_scale = (at_least_float32(p) for p in (self.lower, self.upper, self.log_scale))
        lower = lower.tril(-1) + torch.eye(self.channels).to(lower)
        return self.permutation, lower, upper.triu(1) + torch.diag(self.sign * log_scale.exp())

    def forward_log_det(self, x: Tensor) -> Completed:
        y = self.over_columns(lambda columns, p, lower, upper: p @ lower @ upper @ columns, x, *self._factors())
        return y, None, (positions(x) * at_least_float32(self.log_scale).sum()).expand(x.shape[0])

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        def solve(columns: Tensor, p: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
            columns = torch.linalg.solve_triangular(lower, p.T @ columns, upper=False, unitriangular=True)
            return torch.linalg.solve_triangular(upper, columns, upper=True)

        return self.over_columns(solve, y, *self._factors())


class Whitening(OverChannels):
    """``y = M (x - mean)``, of covariance I on the data it was fitted to: the identity until `fit`.

    With the covariance ``E diag(v) E^T``: ZCA ``M = E diag(v^-1/2) E^T``, the whitening nearest to the identity; PCA
    ``M = diag(v^-1/2) E^T`` (Kessy, Lewin and Strimmer, arXiv 1512.00809). ``inverted()`` turns white
    noise into noise like the data; `density.as_transform` makes it one of `torch.distributions`.
    """

    def __init__(self, channels: int, kind: str = "zca"):
        super().__init__(channels)
        if kind not in ("zca", "pca"):
            raise ValueError(f"{self.name}: kind must be 'zca' or 'pca', got {kind!r}")
        self.kind = kind
        self.register_buffer("mean", torch.zeros(channels, 1))
        self.register_buffer("whiten", torch.eye(channels))

    @torch.no_grad()
    def fit(self, x: Tensor, momentum: float = 1.0) -> "Whitening":
        """Fit to observed x, (B, C, *), of all processes, every position a sample; returns the layer.

        With a ``momentum`` below 1 it adapts: to a mixture of the data it was fitted to, and that share of x. Raises
        ValueError if the data span fewer than C dimensions.
        """
        self.output_shape(x.shape[1:])
        check_positive(self.name, most=1, momentum=momentum)
        mean, _, n = moments(x, self.name)
        samples = (exact(x).movedim(1, 0).flatten(1) - mean[:, None]) / math.sqrt(n - 1)  # (C, B*...)
        covariance = total(samples @ samples.T)
        if not covariance.isfinite().all():
            raise ValueError(f"{self.name}: the samples hold NaN or infinity")
        if momentum < 1:
            before, shift = torch.linalg.inv(exact(self.whiten)), mean[:, None] - self.mean
            covariance = torch.lerp(before @ before.T, covariance, momentum)
            covariance += momentum * (1 - momentum) * shift @ shift.T
            mean = mean - (1 - momentum) * shift[:, 0]
        values, vectors = torch.linalg.eigh(covariance)
        if not values[0] > values[-1] * 1e-10:
            raise ValueError(f"{self.name}: {n} samples span fewer than {self.channels} dimensions")
        whiten = torch.diag(values**-0.5) @ vectors.T
        self.mean.copy_(mean[:, None])
        self.whiten.copy_(vectors @ whiten if self.kind == "zca" else whiten)
        return self

    def forward_log_det(self, x: Tensor) -> Completed:
        log_det = positions(x) * torch.linalg.slogdet(at_least_float32(self.whiten)).logabsdet
        y = self.over_columns(lambda columns, whiten, mean: whiten @ (columns - mean), x, self.whiten, self.mean)
        return y, None, log_det.expand(x.shape[0])

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        return self.over_columns(lambda c, m, mean: torch.linalg.solve(m, c) + mean, y, self.whiten, self.mean)


# --- Rearrangements --------------------------------------------------------------------------------------------------


class Shuffle(VolumePreserving, OverChannels):
    """A fixed permutation of the channels: ``order``, or a random one by ``seed``. ``y[:, i] = x[:, order[i]]``."""

    def __init__(self, channels: int, order: Iterable[int] | None = None, seed: int = 0):
        super().__init__(channels)
        if order is None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(channels, generator=generator, device=generator.device).tolist()
        order = list(order)
        if sorted(order) != list(range(channels)):
            raise ValueError(f"{self.name}: order must hold each of 0...{channels - 1} once, got {order}")
        self.register_buffer("order", torch.tensor(order, dtype=torch.long))

    def g(self, x: Tensor) -> Tensor:
        self.output_shape(x.shape[1:])
        return x[:, self.order]

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        self.output_shape(y.shape[1:])
        return y[:, torch.argsort(self.order)]


class View(VolumePreserving):
    """An image of shape ``before`` read as one of shape ``after``, such as (4, 1, 1) as (4,)."""

    def __init__(self, before: Sequence[int], after: Sequence[int]):
        super().__init__()
        self.before, self.after = tuple(before), tuple(after)
        if math.prod(self.before) != math.prod(self.after):
            raise ValueError(f"{self.name}: the two shapes must hold as many entries")

    def extra_repr(self) -> str:
        return f"{self.before} as {self.after}"

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape) != self.before:
            raise ValueError(f"{self.name}: expected {self.before}, got {tuple(shape)}")
        return self.after

    def input_shape(self, shape: Shape) -> Shape:
        return View(self.after, self.before).output_shape(shape)

    def g(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.output_shape(x.shape[1:]))

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        return y.reshape(y.shape[0], *self.input_shape(y.shape[1:]))


class PixelUnshuffle(PixelUnshuffleBlock, Bijection):
    """`blocks.PixelUnshuffleBlock`, on maps of any ``dims``, that can be `inverted` as the others here can."""


class PixelShuffle(Inverted):
    """Channels into positions, (B, C r^dims, *) -> (B, C, * r): `PixelUnshuffle` backwards."""

    def __init__(self, r: int, dims: int = 2):
        super().__init__(PixelUnshuffle(r, dims))


# --- Coupling --------------------------------------------------------------------------------------------------------

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by the number of a map's dimensions


def coupling_net(in_ch: int, out_ch: int, hidden: int, dims: int) -> nn.Sequential:
    """Three layers, 3x3, 1x1 and 3x3 convolutions on maps, the last of them zero: (B, in_ch, *) -> (B, out_ch, *)."""
    around, alone = ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}) if dims else ({}, {})
    layer = LAYERS[dims]
    last = layer(hidden, out_ch, **around)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(layer(in_ch, hidden, **around), nn.ReLU(), layer(hidden, hidden, **alone), nn.ReLU(), last)


class Split(OverChannels):
    """A coupling: some entries of x stay as they are, and say how the others move. A subclass gives `moved`."""

    def __init__(self, channels: int, kept: int | None, flip: bool, hidden: int, dims: int, mask=None):
        super().__init__(channels)
        self.kept, self.flip, self.dims = channels // 2 if kept is None else kept, flip, dims
        self.checkerboard = isinstance(mask, str)
        check_positive(self.name, whole=True, hidden=hidden)
        if mask is None:
            check_positive(self.name, whole=True, most=channels - 1, kept=self.kept)
        if dims not in range(4):
            raise ValueError(f"{self.name}: dims must be 0 to 3, got {dims}")
        # what a network gets, and what it moves
        self.shown, self.moving = (self.kept, channels - self.kept) if mask is None else (channels, channels)
        given = None if mask is None or self.checkerboard else torch.as_tensor(mask, dtype=torch.get_default_dtype())
        self.register_buffer("mask", given)

    def output_shape(self, shape: Shape) -> Shape:
        super().output_shape(shape)
        if len(shape) != self.dims + 1:
            raise ValueError(f"{self.name}: dims is {self.dims}, but {tuple(shape)} arrives")
        mask = () if self.mask is None else self.mask.shape
        pairs = zip(reversed(mask), reversed(shape), strict=False)
        if len(mask) > len(shape) or not all(m in (1, n) for m, n in pairs):
            raise ValueError(f"{self.name}: a mask of shape {tuple(mask)} does not fit {tuple(shape)}")
        return tuple(shape)

    def moved(self, x: Tensor, stays: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """What x, (B, moving, *), becomes, or backwards was, and the log-derivatives; ``stays`` is (B, shown, *)."""
        raise NotImplementedError

    def _through(self, x: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """y for x, or backwards x for y, and the log-derivatives of the entries that move."""
        self.output_shape(x.shape[1:])
        x = at_least_float32(x)
        if self.checkerboard or self.mask is not None:
            mask = self.mask
            if self.checkerboard:
                axes = [torch.arange(n, device=x.device) for n in x.shape[2:] or x.shape[1:]]
                mask = sum(torch.meshgrid(*axes, indexing="ij")) % 2
            stay = mask.bool() != self.flip
            moved, log_slope = self.moved(x, torch.where(stay, x, 0.0), backwards)
            return torch.where(stay, x, moved), torch.where(stay, 0.0, log_slope)
        first, last = x.tensor_split([self.moving if self.flip else self.kept], dim=1)
        stays, moves = (last, first) if self.flip else (first, last)
        moved, log_slope = self.moved(moves, stays, backwards)
        return torch.cat([moved, stays] if self.flip else [stays, moved], dim=1), log_slope

    def forward_log_det(self, x: Tensor) -> Completed:
        y, log_slope = self._through(x, backwards=False)
        return y, None, per_image(log_slope)

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        return self._through(y, backwards=True)[0]

    def _ask(self, net: nn.Module, stays: Tensor, shape: Sequence[int]) -> Tensor:
        """What ``net`` says of ``stays``, of ``shape``, in the type of ``stays`` whatever the network computes in.

        It gets a copy: a network whose first layer works in place would change x.
        """
        weight = next(net.parameters(), stays)
        said = net(stays.to(weight.dtype, copy=True)).to(stays.dtype)
        if said.shape != shape:
            raise ValueError(f"{self.name}: a network must give {tuple(shape)} here, it gives {tuple(said.shape)}")
        return said


class Coupling(Split):
    """One part of x moves by what another says, which stays as it is.

    ::

        affine     y = x * exp(scale_bound * tanh(s(v))) + t(v)      v the part that stays; Real NVP, arXiv 1605.08803
        additive   y = x + t(v)                                      i-RevNet, arXiv 1802.07088

    Args:
        channels: of x.
        kind: "affine" or "additive".
        kept: how many channels stay, by default half; the first ones, or with ``flip`` the last ones.
        mask: in place of a split, 1 where an entry stays and 0 where it moves, of a shape that broadcasts to x's; or
            "checkerboard" of a map's positions, or of a vector's entries (``flip`` swaps its colours).
        flip: the other part moves.
        hidden: width of the networks that are made if none are given (see `coupling_net`).
        dims: dimensions of a map, 0 for vectors, up to 3.
        scale_bound: largest absolute log-scale.
        s, t: networks of your own: from the kept channels to the others, or, with a mask, from all to all. One that
            changes from pass to pass, as dropout and spectral norms do in training mode, has no inverse then.
    """

    def __init__(
        self,
        channels: int,
        kind: str = "affine",
        kept: int | None = None,
        mask: Tensor | Sequence | str | None = None,
        flip: bool = False,
        hidden: int = 64,
        dims: int = 2,
        scale_bound: float = 2.0,
        s: nn.Module | None = None,
        t: nn.Module | None = None,
    ):
        super().__init__(channels, kept, flip, hidden, dims, mask)
        check_positive(self.name, scale_bound=scale_bound)
        if kind not in ("affine", "additive"):
            raise ValueError(f"{self.name}: kind must be 'affine' or 'additive', got {kind!r}")
        if mask is not None and kept is not None or kind == "additive" and s is not None:
            raise ValueError(f"{self.name}: a mask stands in place of kept, and s is for kind 'affine': leave one out")
        if self.checkerboard and mask != "checkerboard":
            raise ValueError(f"{self.name}: mask must be 'checkerboard' or given, got {mask!r}")
        if self.mask is not None and not self.mask.is_meta and not ((self.mask == 0) | (self.mask == 1)).all():
            raise ValueError(f"{self.name}: a mask holds 0 and 1 only")
        self.kind, self.scale_bound, self.own = kind, scale_bound, t is not None or s is not None
        self.t = coupling_net(self.shown, self.moving, hidden, dims) if t is None else t
        if kind == "affine":
            self.s = coupling_net(self.shown, self.moving, hidden, dims) if s is None else s

    def moved(self, x: Tensor, stays: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._ask(self.t, stays, x.shape), torch.zeros_like(x)
        if self.kind == "affine":
            log_scale = self.scale_bound * torch.tanh(self._ask(self.s, stays, x.shape))
        return (x - shift) * torch.exp(-log_scale) if backwards else x * log_scale.exp() + shift, log_scale

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        generator = partial(torch.cuda.get_rng_state, y.device) if y.is_cuda else torch.get_rng_state
        before = generator() if self.own and not is_transformed() else None
        x = super().pinv(y)
        drew = before is not None and not torch.equal(before, generator())
        if drew or self.own and any(isinstance(part, SPECTRAL) for part in in_training(self)):
            raise ValueError(f"{self.name}: a network changes from pass to pass, which has no inverse: call eval()")
        return x


def rational_quadratic(x: Tensor, parameters: Tensor, bound: float, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """A monotone spline of each entry of x on [-bound, bound], the identity outside, and its log-derivative.

    Between two knots it is a quotient of quadratics, in which the spline's slope and its inverse are closed forms
    (Gregory and Delbourgo 1982; Durkan et al., arXiv 1906.04032, eq. 4 to 8 of section 3.1 and appendix A.1). These are
    computed in float64: if a bin is a thousand times as high as wide, float32 leaves nothing of them.

    Args:
        parameters: (*x.shape, 3 bins - 1): widths and heights of the bins before a softmax, and the slopes of the inner
            knots before a softplus. Zeros are the identity.
        backwards: give the inverse at x, and its log-derivative.
    """
    bins = (parameters.shape[-1] + 1) // 3
    least = 1e-3  # of a bin's share and of a slope

    def knots(free: Tensor) -> Tensor:
        shares = least + (1 - least * bins) * free.softmax(-1)
        return F.pad(bound * (2 * F.pad(shares.cumsum(-1)[..., :-1], (1, 0)) - 1), (0, 1), value=bound)

    widths, heights, slopes = parameters.split([bins, bins, bins - 1], dim=-1)
    starts, levels = knots(widths), knots(heights)  # (..., bins + 1)
    slopes = least + F.softplus(slopes + math.log(math.expm1(1 - least)))
    means = levels.diff() / starts.diff()
    means = torch.cat([means[..., :1], means, means[..., -1:]], dim=-1)  # of the bins on both sides of each knot
    # a knot much steeper than its bins would leave them next to flat in their middle, and there x is lost
    slopes = F.pad(slopes, (1, 1), value=1.0).minimum(10 * means[..., :-1].minimum(means[..., 1:]))

    inside = x.clamp(-bound, bound)
    among = (levels if backwards else starts)[..., 1:-1].contiguous()
    index = torch.searchsorted(among, inside.detach()[..., None].contiguous())

    def at(values: Tensor, offset: int = 0) -> Tensor:
        return values.gather(-1, index + offset).squeeze(-1).double()

    left, low, first, last = at(starts), at(levels), at(slopes), at(slopes, 1)
    width, height = at(starts, 1) - left, at(levels, 1) - low
    mean = height / width
    bend = first + last - 2 * mean
    inside = inside.double()
    if backwards:
        up = inside - low
        b = height * first - up * bend
        c = -mean * up
        root = (b**2 - 4 * (height * (mean - first) + up * bend) * c).clamp_min(0).sqrt()
        part = 2 * c / (-b - root)  # of the bin's width; this form of the root has no cancellation
        y = left + part * width
    else:
        part = (inside - left) / width
        y = low + height * (mean * part**2 + first * part * (1 - part)) / (mean + bend * part * (1 - part))
    rest = part * (1 - part)
    slope = mean**2 * (last * part**2 + 2 * mean * rest + first * (1 - part) ** 2) / (mean + bend * rest) ** 2
    log_slope = -slope.log() if backwards else slope.log()
    outside = x.abs() >= bound
    return torch.where(outside, x, y.to(x.dtype)), torch.where(outside, 0.0, log_slope.to(x.dtype))


class SplineCoupling(Split):
    """`Coupling` whose moving part goes through a monotone spline, which bends and splits as no affine map can.

    ``y = spline(x; net(v))``, entry by entry, v the channels that stay; see `rational_quadratic` for the spline.

    Args:
        channels, kept, flip, hidden, dims: as for `Coupling`.
        bins: of the spline.
        bound: the spline is the identity beyond it, so data should be within, after an `ActNorm` for instance.
    """

    def __init__(
        self,
        channels: int,
        kept: int | None = None,
        flip: bool = False,
        hidden: int = 64,
        dims: int = 2,
        bins: int = 8,
        bound: float = 4.0,
    ):
        super().__init__(channels, kept, flip, hidden, dims)
        if bins not in range(2, 257):
            raise ValueError(f"{self.name}: bins must be 2 to 256, got {bins}")
        check_positive(self.name, bound=bound)
        self.bins, self.bound = bins, bound
        self.net = coupling_net(self.shown, self.moving * (3 * bins - 1), hidden, dims)

    def moved(self, x: Tensor, stays: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        said = self._ask(self.net, stays, (x.shape[0], self.moving * (3 * self.bins - 1), *x.shape[2:]))
        parameters = said.unflatten(1, (self.moving, -1)).movedim(2, -1)  # (B, moving, *, 3 bins - 1)
        return rational_quadratic(x, parameters, self.bound, backwards)


# --- Residual blocks -------------------------------------------------------------------------------------------------


def circular_conv_norm(weight: Tensor, size: Sequence[int]) -> Tensor:
    """The largest singular value of a circular convolution of maps of ``size``, exactly.

    In the Fourier basis it is one matrix (out, in) per frequency (Sedghi, Gupta and Long, arXiv 1805.10408).
    Frequencies f and -f have conjugate matrices, so half of them are enough.
    """
    dims = tuple(range(2, weight.dim()))
    spectrum = torch.fft.rfftn(weight, s=tuple(size), dim=dims)  # (out, in, *frequencies)
    return torch.linalg.svdvals(spectrum.flatten(2).permute(2, 0, 1))[:, 0].max()


class Residual(OverChannels):
    """``y = x + h(x)``, h three layers with ELUs between them and a Lipschitz constant of at most ``lipschitz`` < 1.

    (Behrmann et al., "Invertible residual networks", arXiv 1811.00995.) Use `ResidualFC`, `ResidualConv1d` or
    `ResidualConv2d`. With ``out_ch`` below ``in_ch`` the last channels of ``x + h(x)`` are its latent, whose natural
    value is 0.

    The inverse is the limit of ``x <- y - h(x)``, iterated for each image until the step is down to rounding, at any
    scale. It is within ``lipschitz / (1 - lipschitz)`` times the last step (Banach); `inverse_error` holds that bound
    for the last inverse, relative to the largest of y and what h computes of it. See `FixedPoint` for its derivatives.

    The log-determinant is exact if an image has at most ``exact_below`` entries. Above, it is an unbiased estimate
    (Chen et al., "Residual flows", arXiv 1906.02735, theorem 1) of ``sum_k (-1)^(k+1) tr(J^k) / k``: traces as
    ``v^T J^k v`` with v standard normal, and after the first ``series_terms`` each term is reached with probability
    ``lipschitz`` and divided by it. A smaller probability would give an infinite variance once below lipschitz^2.

    h is computed in float32 at least, also under autocast and with weights of half precision: in fewer bits it would
    be no contraction.

    Args:
        in_ch, out_ch: channels; out_ch is in_ch by default.
        hidden: width of h.
        lipschitz: bound of h's Lipschitz constant, above 0 and below 1.
        norm: "exact", the layers' true norms, which guarantees the bound: a convolution padded with zeros is a part of
            the circular one on maps wider by the kernel less one, so its norm is at most that one's. Or "power", one
            step of a power iteration in each forward pass of training, cheaper for wide layers, any map size: then h
            contracts as far as the estimate holds; if it does not, inverse and series say so.
        size: H = W of the map, or (H, W), for norm "exact".
        kernel_size, padding_mode: of the convolutions; odd; "zeros" or "circular".
        tolerance: largest `inverse_error`; by default as small as rounding allows.
    """

    dims = 0

    def __init__(
        self,
        in_ch: int,
        out_ch: int | None = None,
        hidden: int = 64,
        lipschitz: float = 0.9,
        norm: str = "exact",
        size: int | Sequence[int] | None = None,
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        tolerance: float | None = None,
        exact_below: int = 64,
        series_terms: int = 5,
    ):
        super().__init__(in_ch)
        self.out_ch = in_ch if out_ch is None else out_ch
        self.lossy = self.out_ch < in_ch
        check_positive(self.name, whole=True, most=in_ch, out_ch=self.out_ch)
        check_positive(self.name, whole=True, hidden=hidden, series_terms=series_terms, kernel_size=kernel_size)
        check_positive(self.name, tolerance=1 if tolerance is None else tolerance)
        if not 0 < lipschitz < 1:
            raise ValueError(f"{self.name}: lipschitz must be above 0 and below 1 to be invertible, got {lipschitz}")
        if norm not in ("exact", "power"):
            raise ValueError(f"{self.name}: norm must be 'exact' or 'power', got {norm!r}")
        if kernel_size % 2 == 0 or padding_mode not in ("zeros", "circular"):
            raise ValueError(f"{self.name}: kernel_size must be odd and padding_mode 'zeros' or 'circular'")
        self.size = None
        if self.dims and norm == "exact":
            if size is None:
                raise ValueError(f"{self.name}: norm 'exact' needs the size of the map; norm 'power' fits any")
            self.size = sides(self.name, "size", size, self.dims)
            if min(self.size) < kernel_size:
                raise ValueError(f"{self.name}: size must be at least {kernel_size} per dimension, got {size}")
        self.lipschitz, self.tolerance = lipschitz, tolerance
        self.exact_below, self.series_terms = exact_below, series_terms
        self.inverse_error: float | None = None
        self.wider = 0 if padding_mode == "circular" else kernel_size - 1  # the circular one that the norm is of

        kernel = {"kernel_size": kernel_size, "padding": kernel_size // 2, "padding_mode": padding_mode}
        kernel = kernel if self.dims else {}
        channels = (in_ch, hidden, hidden, in_ch)
        self.layers = nn.ModuleList(LAYERS[self.dims](*channels[i : i + 2], **kernel) for i in range(3))
        self.power = self.stateful = norm == "power"
        if self.power:
            for i, layer in enumerate(self.layers):
                self.register_buffer(f"left{i}", torch.randn(layer.weight.shape[0]))
            for _ in range(15):
                self._iterate()

    def extra_repr(self) -> str:
        return f"{self.channels}->{self.out_ch}"

    def output_shape(self, shape: Shape) -> Shape:
        super().output_shape(shape)
        if len(shape) != self.dims + 1:
            raise ValueError(f"{self.name}: expected maps of {self.dims} dimensions, got shape {tuple(shape)}")
        if self.size is not None and tuple(shape[1:]) != self.size:
            raise ValueError(f"{self.name}: size is {self.size}, but the map that arrives is {tuple(shape[1:])}")
        return self.out_ch, *shape[1:]

    def natural_latent(self, y: Tensor) -> Tensor | None:
        return y.new_zeros(y.shape[0], self.channels - self.out_ch, *y.shape[2:]) if self.lossy else None

    @torch.no_grad()
    def _iterate(self) -> None:
        """One step of the power iteration."""
        for i, layer in enumerate(self.layers):
            left, weight = getattr(self, f"left{i}"), at_least_float32(layer.weight).flatten(1)  # (out, in k^dims)
            weight = weight / weight.abs().amax().clamp_min(1)  # of any size
            left.copy_(F.normalize(weight @ F.normalize(weight.T @ at_least_float32(left), dim=0), dim=0))

    def _norm(self, i: int, weight: Tensor) -> Tensor:
        """The norm of layer i, or its estimate."""
        if self.power:
            # the norm of a convolution is at most sqrt(k^dims) times that of its weight as a matrix
            left = F.normalize(at_least_float32(getattr(self, f"left{i}")), dim=0)
            return (weight.flatten(1).T @ left).norm() * math.sqrt(math.prod(weight.shape[2:]))
        if self.size is None:
            return torch.linalg.svdvals(weight)[0]
        return circular_conv_norm(weight, [n + self.wider for n in self.size])

    def weights(self) -> list[Tensor]:
        """Weight and bias of each layer of h: scaled down if the layer's norm is above its bound, else as it is."""
        found = []
        for i, layer in enumerate(self.layers):
            weight = at_least_float32(layer.weight)
            size = weight.detach().abs().amax().clamp_min(1)  # a constant; in its units no norm overflows
            weight = weight / size
            with full_precision(weight.device):
                # ELU has Lipschitz constant 1, so the layers' bounds multiply
                norm = self._norm(i, weight.nan_to_num()) / self.lipschitz ** (1 / 3)  # of NaN it would raise
            found += [weight / norm.maximum(1 / size), at_least_float32(layer.bias)]
        return found

    def _layers(self, x: Tensor, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        """The outputs of the three layers."""
        for i, layer in enumerate(self.layers):
            f = layer._conv_forward if self.dims else F.linear
            x = f(elu(x) if i else x, *weights[2 * i : 2 * i + 2])
            yield x

    def h(self, x: Tensor, *weights: Tensor) -> Tensor:
        """h(x), (B, in_ch, *), with ``weights`` as they are by default (see `weights`)."""
        x, *weights = widest(x, *(weights or self.weights()))
        with full_precision(x.device):
            *_, h = self._layers(x, weights)
        return h

    def _arriving(self, x: Tensor) -> Tensor:
        self.output_shape(x.shape[1:])
        if self.power and self.training and not _held.get():
            self._iterate()
        return at_least_float32(x)

    def _cut(self, whole: Tensor) -> tuple[Tensor, Tensor | None]:
        return (whole[:, : self.out_ch], whole[:, self.out_ch :]) if self.lossy else (whole, None)

    def forward(self, x: Tensor, return_latent: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        x = self._arriving(x)
        y, z = self._cut(x + self.h(x))
        return (y, z) if return_latent else y

    def forward_log_det(self, x: Tensor) -> Completed:
        x, differentiate = self._arriving(x), torch.is_grad_enabled()
        exact = math.prod(x.shape[1:]) <= self.exact_below
        # the Jacobian needs a graph, which inference mode refuses to make
        with torch.inference_mode(False), torch.set_grad_enabled(differentiate), full_precision(x.device):
            x, *weights = (t.clone() if t.is_inference() else t for t in widest(x, *self.weights()))
            if not x.shape[0]:
                return *self._cut(x), no_volume(x)
            h, log_det = (self._exact_log_det if exact else self._estimated_log_det)(x, weights)
        return *self._cut(x + h), log_det

    def _exact_log_det(self, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """h(x) and log |det(I + J)|, from the Jacobian J of h."""

        def one(v: Tensor) -> tuple[Tensor, Tensor]:
            h = self.h(v[None], *weights)[0]
            return h.flatten(), h

        jacobian, h = torch.func.vmap(torch.func.jacrev(one, has_aux=True))(x)  # (B, n, *), (B, *)
        jacobian = jacobian.flatten(2)  # (B, n, n)
        return h, torch.linalg.slogdet(torch.eye(jacobian.shape[-1]).to(jacobian) + jacobian).logabsdet

    def _estimated_log_det(self, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """h(x) and the estimate of the series; its gradient is that of the estimate, unbiased as well."""
        h, pull = torch.func.vjp(lambda x: self.h(x, *weights), x)
        v = torch.randn_like(x)
        product, total, reached, k = v, no_volume(x), 1.0, 0
        while k < self.series_terms or torch.rand(()).item() < self.lipschitz:
            k += 1
            reached *= 1 if k <= self.series_terms else self.lipschitz  # the probability of reaching term k
            (following,) = pull(product)
            lengths = (norm(t.detach(), self.dims + 1) for t in (following, product))
            growth = torch.div(*lengths).nan_to_num(0.0).max().item()
            if growth > 1 + 1e-4:
                raise ValueError(
                    f"{self.name}: the series of the log-determinant diverges: J stretches by {growth:.4f}, so h "
                    f"has a Lipschitz constant above 1, and {self.lipschitz} was asked for"
                )
            product = following
            total = total + (-1) ** (k + 1) / (k * reached) * per_image(product * v)
        return h, total

    @torch.no_grad()
    def _scale(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The size of what h computes with, (B,): of x, the layers' outputs and their biases."""
        scale = norm(x, self.dims + 1)
        with full_precision(x.device):
            for out, bias in zip(self._layers(x, weights), weights[1::2], strict=True):
                scale = scale.maximum(norm(out, self.dims + 1)).maximum(norm(bias, 1) * math.sqrt(positions(x)))
        return scale

    def pinv(self, y: Tensor, latent: Tensor | None = None) -> Tensor:
        if self.lossy:
            y = torch.cat([y, self.natural_latent(y) if latent is None else latent], dim=1)  # (B, in_ch, *)
        Residual.output_shape(self, y.shape[1:])  # h contracts for maps of its size
        y, *weights = widest(y, *self.weights())

        def make(y: Tensor, *weights: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: y - self.h(x, *weights)

        report = partial(setattr, self, "inverse_error")
        solve = Banach(self.name, self.lipschitz, self.dims + 1, self.tolerance, report)
        return FixedPoint.apply(make, solve, self._scale(y.detach(), weights), y.detach(), y, *weights)


class ResidualFC(Residual):
    """`Residual` on vectors, (B, C), which have no size and no kernel."""


class ResidualConv1d(Residual):
    """`Residual` on (B, C, L)."""

    dims = 1


class ResidualConv2d(Residual):
    """`Residual` on (B, C, H, W)."""

    dims = 2


# --- Adding and extracting noise -------------------------------------------------------------------------------------

# of numbers without dimensions on the CPU, which go with any device, whatever torch's default is while this is read;
# without validation: outside of its support a density is 0, and no error
_zero, _one = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))
NOISES: dict[str, Distribution] = {
    "normal": Normal(_zero, _one),
    "uniform": Uniform(_zero, _one, validate_args=False),
    "laplace": Laplace(_zero, _one),
}


class Concat(OverChannels):
    """``y = [x | e]``, e given or else a learned constant per channel: (B, C, *) -> (B, C + extra, *).

    The other way round from a surjection: ``pinv(g(x)) = x`` is exact, and ``g(pinv(y))`` keeps x and renews e. Its
    ``inverted()`` is a surjection, which extracts e as its latent. The log-determinant is 0, e being fixed.
    """

    exact = False

    def __init__(self, channels: int, extra: int):
        super().__init__(channels)
        check_positive(type(self).__name__, whole=True, extra=extra)
        self.extra = extra
        self.constant = nn.Parameter(torch.zeros(extra))

    def extra_repr(self) -> str:
        return f"{self.channels} + {self.extra}"

    def output_shape(self, shape: Shape) -> Shape:
        return super().output_shape(shape)[0] + self.extra, *shape[1:]

    def input_shape(self, shape: Shape) -> Shape:
        if shape[0] != self.channels + self.extra:
            raise ValueError(f"{self.name}: expected {self.channels + self.extra} channels to split, got {shape[0]}")
        return self.channels, *shape[1:]

    def natural_extra(self, x: Tensor) -> Tensor:
        """What is most natural for e, (B, extra, *), for x of (B, C, *)."""
        constant = self.constant.to(at_least_float32(x[:0]).dtype)
        return constant.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[0], self.extra, *x.shape[2:])

    def draw(self, x: Tensor) -> Tensor:
        return self.natural_extra(x)

    def log_density(self, e: Tensor) -> Tensor:
        """log q(e), (B,); 0 for a constant."""
        return no_volume(e)

    def forward(self, x: Tensor, return_latent: bool = False, e: Tensor | None = None) -> Tensor | tuple[Tensor, None]:
        self.output_shape(x.shape[1:])
        x = at_least_float32(x)
        y = torch.cat([x, self.draw(x) if e is None else e], dim=1)  # (B, C + extra, *)
        self.input_shape(y.shape[1:])
        return (y, None) if return_latent else y

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and e."""
        self.input_shape(y.shape[1:])
        return y[:, : self.channels], y[:, self.channels :]

    def forward_log_det(self, x: Tensor) -> Completed:
        y = self(x)
        return y, None, -self.log_density(self.split(y)[1])

    def pinv(self, y: Tensor, latent: None = None) -> Tensor:
        return self.split(y)[0]

    def inverted(self) -> "Extract":
        return Extract(self)


class ConcatNoise(Concat):
    """`Concat` with e drawn anew, entry by entry, from ``noise``.

    ``noise`` is "normal", "uniform" (on [0, 1]), "laplace", or a `Distribution` of single numbers, or of vectors of
    ``extra`` numbers, one for each position: correlated noise (see `Whitening`). The log-determinant it gives is
    -log q(e): in a `Density` the expectation over e of log p(x) is then a lower bound of the true one (Huang, Dinh and
    Courville, "Augmented normalizing flows", arXiv 2002.07101). Most natural for e is the noise's mean, 0 without one.
    """

    def __init__(self, channels: int, extra: int, noise: str | Distribution = "normal"):
        if isinstance(noise, str) and noise not in NOISES:
            raise ValueError(f"ConcatNoise: noise must be one of {sorted(NOISES)} or a distribution, got {noise!r}")
        noise = NOISES[noise] if isinstance(noise, str) else noise
        if noise.batch_shape or noise.event_shape not in ((), (extra,)):
            raise ValueError(f"ConcatNoise: noise must be a distribution of single numbers or of {extra}, got {noise}")
        super().__init__(channels, extra)
        self.constant, self.noise = None, noise

    def natural_extra(self, x: Tensor) -> Tensor:
        try:
            mean = self.noise.mean.to(at_least_float32(x[:0])).nan_to_num(0.0).view(-1, *[1] * (x.dim() - 2))
        except NotImplementedError:  # a transformed distribution's
            mean = at_least_float32(x[:0]).new_zeros([1] * (x.dim() - 1))
        return mean.expand(x.shape[0], self.extra, *x.shape[2:])

    def draw(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], *x.shape[2:], *[self.extra][len(self.noise.event_shape) :])
        return self.noise.sample(shape).movedim(-1, 1).to(x)

    def log_density(self, e: Tensor) -> Tensor:
        return per_image(self.noise.log_prob(e.movedim(1, -1)))


class Extract(Surjection):
    """A `Concat` backwards, (B, C + extra, *) -> (B, C, *), the last channels its latent; by name see `inverted`."""

    def __init__(self, concat: Concat):
        super().__init__()
        self.concat = concat

    def output_shape(self, shape: Shape) -> Shape:
        return self.concat.input_shape(shape)

    def forward_log_det(self, x: Tensor) -> Completed:
        return *self.concat.split(x), no_volume(x)

    def pinv(self, y: Tensor, latent: Tensor | None = None) -> Tensor:
        return self.concat(y, e=self.natural_latent(y) if latent is None else latent)

    def natural_latent(self, y: Tensor) -> Tensor:
        return self.concat.natural_extra(y)

    def inverted(self) -> Concat:
        return self.concat


# --- By name --------------------------------------------------------------------------------------------------------


def inverted(block: str, **arguments) -> Surjection:
    """A block by its name, its directions swapped: ``("Inverted", {"block": "Sigmoid"})`` in ``layer_channels``.

    Args:
        block: "ConcatNoise", say, whose inverse extracts.
        arguments: those of the block.

    Raises:
        ValueError: no such block, or none that has an inverse.
    """
    known = sorted(name for name, kind in BLOCKS.items() if isinstance(kind, type) and issubclass(kind, Bijection))
    if block not in known:
        raise ValueError(f"Inverted: block must be one of {known}, got {block!r}")
    return BLOCKS[block](**arguments).inverted()


BLOCKS["Inverted"] = inverted
BLOCKS.update(
    (kind.__name__, kind)
    for kind in (
        *(Sigmoid, Tanh, LeakyReLU, PReLU, ELU, SELU, BairdActivation, Bias, Diagonal, Orthogonal, SVDLinear),
        *(Shuffle, PixelShuffle, PixelUnshuffle, View, Coupling, SplineCoupling, ActNorm, BatchNorm, Conv1x1),
        *(ResidualFC, ResidualConv1d, ResidualConv2d, Concat, ConcatNoise, Whitening),
    )
)
