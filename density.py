"""The density of a completed chain, and chains as `torch.distributions` transforms.

Letters: B batch, x input, y output, z latent; shapes are those of one image, without B.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from bijections import NOISES, Concat, ConcatNoise, Extract, Shape, per_image, statistics_held
from blocks import Surjection, at_least_float32, no_volume
from models import PINN, SPNN


class Density(nn.Module):
    """The density of x if a chain's completion ``G(x) = (y, z)`` has a given one.

    ::

        log p(x) = log p(y) + sum_k log p(z_k | y_k) + log |det dG/dx|        y_k the output of block k, y the last one

    y is standard normal, or as ``base`` says. A latent is standard normal, or N(r(y_k), 1) with ``natural``: r is what
    ``natural_latent`` gives, the r-network of an SPNN block. What a `ConcatNoise` extracts has its noise's density.

    Args:
        chain: a `PINN` or an `SPNN`.
        base: a distribution of single numbers for every entry of y, or of y: its batch and event shape together are
            y's, or (d,) for the d logits of an SPNN.

    Raises:
        ValueError: a base of another shape.
    """

    def __init__(self, chain: PINN | SPNN, base: Distribution | None = None, natural: bool = False):
        super().__init__()
        self.chain = chain
        self.base, self.natural = NOISES["normal"] if base is None else base, natural
        shapes = [self.pinn.out_shape] + ([(chain.num_classes,)] if isinstance(chain, SPNN) else [])
        shape = tuple(self.base.batch_shape + self.base.event_shape)
        if shape not in [(), *shapes]:
            raise ValueError(f"Density: base must be of single numbers or of shape {shapes[-1]}, got {shape}")
        self._base_shape = shape or self.pinn.out_shape

    @property
    def pinn(self) -> PINN:
        return self.chain.pinn if isinstance(self.chain, SPNN) else self.chain

    @staticmethod
    def _noise(block: Surjection) -> Concat | None:
        """The `ConcatNoise` whose noise a block extracts."""
        return block.concat if isinstance(block, Extract) and isinstance(block.concat, ConcatNoise) else None

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, (B, *out_shape), the log-density of all latents on the way to it, (B,), and log |det dG/dx|, (B,)."""
        if tuple(x.shape[1:]) != self.pinn.in_shape:
            raise ValueError(f"Density: expected x of shape (B, {self.pinn.in_shape}), got {tuple(x.shape)}")
        latents, log_dets = [no_volume(x)], [no_volume(x)]
        for block in self.pinn.blocks:
            x, z, log_det = block.forward_log_det(x)
            log_dets.append(log_det)
            if z is not None:
                noise, z = self._noise(block), at_least_float32(z)
                centre = block.natural_latent(x) if self.natural and noise is None else torch.zeros_like(z)
                if centre.shape != z.shape:
                    raise ValueError(f"Density: {type(block).__name__}.natural_latent does not fit {tuple(z.shape)}")
                latents.append(noise.log_density(z) if noise else per_image(NOISES["normal"].log_prob(z - centre)))
        return x, torch.stack(latents).sum(0), torch.stack(log_dets).sum(0)  # and no sums of what broadcasts

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,), of x of (B, *in_shape); in nats."""
        y, latents, log_det = self.terms(x)
        y = at_least_float32(y).reshape(y.shape[0], *self._base_shape)
        return latents + log_det + per_image(self.base.log_prob(y))

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Draws of x, (count, *in_shape), from torch's global generator."""
        tensors = (*self.chain.parameters(), *self.chain.buffers())
        like = next((t for t in tensors if t.is_floating_point()), torch.empty(()))
        of_numbers = not self.base.batch_shape and not self.base.event_shape
        y = self.base.sample((count, *self.pinn.out_shape) if of_numbers else (count,))
        y = y.to(like).view(count, *self.pinn.out_shape)
        for block in reversed(self.pinn.blocks):
            z = None
            if block.lossy:
                noise, centre = self._noise(block), block.natural_latent(y)
                z = noise.draw(y) if noise else torch.randn_like(centre) + (centre if self.natural else 0)
            y = block.pinv(y, z)
        return y


class BlockTransform(Transform):
    """A block or chain that drops nothing as a `torch.distributions.Transform`; see `as_transform`.

    A distribution is one law, so the statistics of layers in training mode are held (`bijections.statistics_held`):
    they are set by passes through the chain itself, such as `Density.log_prob`.
    """

    bijective = True

    def __init__(self, block: Surjection | PINN, in_shape: Sequence[int]):
        super().__init__()
        self.chain = chain = PINN([block], in_shape)
        for part in chain.blocks:
            if part.lossy or not part.exact:
                raise ValueError(f"as_transform: {type(part).__name__} is no bijection, so it has no Transform")
        first, last = chain.blocks[0], chain.blocks[-1]
        self.domain = constraints.independent(getattr(first, "domain", constraints.real), len(chain.in_shape))
        self.codomain = constraints.independent(getattr(last, "codomain", constraints.real), len(chain.out_shape))

    def _over(self, f: Callable[[Tensor], Tensor], x: Tensor, shape: Shape) -> Tensor:
        """f, which takes one batch dimension, over any number of them."""
        batch = x.shape[: max(x.dim() - len(shape), 0)]
        if x.shape[len(batch) :] != shape:
            raise ValueError(f"as_transform: expected events of shape {shape}, got {tuple(x.shape)}")
        with statistics_held():
            result = f(x.reshape(-1, *shape))
        return result.reshape(*batch, *result.shape[1:])

    def _call(self, x: Tensor) -> Tensor:
        return self._over(self.chain, x, self.chain.in_shape)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._over(self.chain.pinv, y, self.chain.out_shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._over(self.chain.log_abs_det, x, self.chain.in_shape)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[: len(shape) - len(self.chain.in_shape)], *self.chain.out_shape))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[: len(shape) - len(self.chain.out_shape)], *self.chain.in_shape))


def as_transform(block: Surjection | PINN, in_shape: Sequence[int]) -> BlockTransform:
    """``block`` (a layer, or a chain of them) as a Transform of events of ``in_shape``, such as (C,) or (C, H, W).

    Raises:
        ValueError: a block that discards a latent, or one that is exact on one side only.
    """
    return BlockTransform(block, in_shape)
