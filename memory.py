"""Less memory for more arithmetic: a network whose blocks compute their activations again in the backward pass.

What a block's networks keep for their gradients is far more than what goes in and out of the block. Recomputed, only
the latter is kept for every block, and the former for one block at a time (Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost").
"""

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models import SPNN, ConvPINNBlock, Surjection


class Recomputed:
    """Mixin before a `Surjection`: every method through which gradients flow runs again in the backward pass."""

    def _again(self, method, *arguments):
        if not torch.is_grad_enabled():
            return method(*arguments)
        if isinstance(self, ConvPINNBlock):
            self.mix.factors()  # W outside of what is recomputed: solved once, as without (see `models.solved_once`)
        return checkpoint(method, *arguments, use_reentrant=False, preserve_rng_state=False)

    def forward(self, x: Tensor, return_latent: bool = False):
        return self._again(super().forward, x, return_latent)

    def pinv(self, y: Tensor, latent: Tensor | None = None):
        return self._again(super().pinv, y, latent)

    def natural_latent(self, y: Tensor):
        return self._again(super().natural_latent, y)


@functools.cache
def _recomputed(kind: type[Surjection]) -> type[Surjection]:
    return type(kind.__name__, (Recomputed, kind), {})


def checkpoint_activations(model: SPNN) -> SPNN:
    """Make the blocks of ``model`` recompute their activations; same weights, results and gradients. Returns it."""
    for block in model.pinn.blocks:
        if not isinstance(block, Recomputed):
            block.__class__ = _recomputed(type(block))
    return model
