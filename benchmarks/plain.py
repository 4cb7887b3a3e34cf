"""The plain formulation: the paper's equations term by term, nothing shared and nothing kept.

    G(x') = G(x) + strength * ( G(g'(y)) - G(g'(g(x))) )

Seven passes through the network: G(x), g(x), g'(y), G of it, g'(g(x)), G of it, and G^-1. Every block solves its Cayley
system anew in every pass. Written against the blocks' weights alone, it shares no arithmetic with `models`: it is what
the closed form there, and the losses in `train`, are timed against and compared with.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from blocks import ConvPINNBlock, PixelUnshuffleBlock
from models import SPNN
from train import Settings


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


def sampling_step(
    unet: nn.Module, model: SPNN, x: Tensor, target: Tensor, noise: Tensor, t: int, abar: Tensor, abar_next: Tensor
) -> Tensor:
    """x_t to the next, less noisy x, both (B, 3, H, W), guided towards logits ``target``, (B, d), at full strength."""
    (eps,) = unet(x, torch.full((len(x),), t, device=x.device), return_dict=False)
    x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
    x0 = back_project(model, x0, target).clamp(-1, 1)
    variance = 1 - abar / abar_next
    return abar_next.sqrt() * x0 + (1 - abar_next - variance).clamp_min(0).sqrt() * eps + variance.sqrt() * noise


def stage1_loss(model: SPNN, x: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Three passes, each with its graph: g(x), g'(y), and g of that for the right inverse."""
    y, _ = forward(model, x)  # (B, d, 1, 1)
    natural = inverse(model, y)
    again, _ = forward(model, natural)
    bce = F.binary_cross_entropy_with_logits(y.flatten(1), labels, reduction="none").mean(0).sum()
    return (
        settings.lambda_bce * bce
        + settings.lambda_img_rec * F.mse_loss(natural, x)
        + settings.lambda_right_inverse * F.mse_loss(again, y)
    )


def stage2_loss(model: SPNN, x: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Four passes: g(x), g'(y), G of that for its logits and latents, and G(0) for the origin's latents."""
    y, _ = forward(model, x)
    natural = inverse(model, y)
    again, latents = forward(model, natural)
    _, origin = forward(model, torch.zeros_like(x[:1]))
    z, z0 = (torch.cat([part.flatten(1) for part in parts if part is not None], 1) for parts in (latents, origin))
    return (
        settings.lambda_r_norm * (z - z0).square().mean()
        + settings.lambda_r_img_rec * F.mse_loss(natural, x)
        + settings.lambda_r_right_inverse * F.mse_loss(again, y)
    )


class Images(Dataset):
    """Decodes and resizes a picture at every access: (image (3, S, S) float32 in [-1, 1], labels (d,))."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int):
        self.paths, self.labels, self.size = paths, labels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.paths[index]) as image:
            image = image.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1, self.labels[index]
