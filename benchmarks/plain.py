"""Back-projection in its plain formulation: the paper's equation term by term, nothing shared and nothing kept.

    G(x') = G(x) + strength * ( G(g'(y)) - G(g'(g(x))) )

Seven passes through the network: G(x), g(x), g'(y), G of it, g'(g(x)), G of it, and G^-1. Every block solves its Cayley
system anew in every pass. Written against the blocks' weights alone, it shares no arithmetic with `models`: it is what
the closed form there is timed against, and compared with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import SPNN, ConvPINNBlock, PixelUnshuffleBlock


def cayley(block: ConvPINNBlock) -> Tensor:
    """``W = (I + A)^-1 (I - A)``, A = B - B^T, as the weights of a 1x1 convolution, (C, C, 1, 1)."""
    b = block.mix.A_unconstrained
    skew = b - b.T
    identity = torch.eye(len(b), dtype=b.dtype, device=b.device)
    return torch.linalg.solve(identity + skew, identity - skew)[:, :, None, None]


def scale_and_shift(block: ConvPINNBlock, u1: Tensor) -> tuple[Tensor, Tensor]:
    """S(u1) and t(u1)."""
    return torch.exp(block.scale_bound * torch.tanh(block.s(u1))), torch.tanh(block.t(u1))


def forward(model: SPNN, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """``G(x)``: (B, C, H, W) -> (B, d, 1, 1) and the latent of every block."""
    latents: list[Tensor | None] = []
    for block in model.pinn.blocks:
        if isinstance(block, PixelUnshuffleBlock):
            x, u1 = F.pixel_unshuffle(x, block.r), None
        else:
            u = F.conv2d(x, cayley(block))
            u0, u1 = u[:, : block.out_ch], u[:, block.out_ch :]
            scale, shift = scale_and_shift(block, u1)
            x = u0 * scale + shift
        latents.append(u1)
    return x, latents


def inverse(model: SPNN, y: Tensor, latents: list[Tensor | None] | None = None) -> Tensor:
    """``G^-1(y, latents)``, or ``g'(y)`` without latents: (B, d, 1, 1) -> (B, C, H, W)."""
    for index in reversed(range(len(model.pinn.blocks))):
        block = model.pinn.blocks[index]
        if isinstance(block, PixelUnshuffleBlock):
            y = F.pixel_shuffle(y, block.r)
        else:
            u1 = torch.tanh(block.r(y)) if latents is None else latents[index]
            scale, shift = scale_and_shift(block, u1)
            y = F.conv2d(torch.cat([(y - shift) / scale, u1], dim=1), cayley(block).transpose(0, 1))
    return y


def back_project(model: SPNN, x: Tensor, target: Tensor, strength: float = 1.0) -> Tensor:
    """Images x, (B, C, H, W), moved towards logits ``target``, (B, d), by seven passes."""
    y, z = forward(model, x)
    logits, _ = forward(model, x)
    y_target, z_target = forward(model, inverse(model, target[..., None, None]))
    y_own, z_own = forward(model, inverse(model, logits))
    moved = [
        None if start is None else start + strength * (to - own)
        for start, to, own in zip(z, z_target, z_own, strict=True)
    ]
    return inverse(model, y + strength * (y_target - y_own), moved)
