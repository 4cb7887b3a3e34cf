"""Pictures that training did not see, made of those it has: for small data sets."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augmented(x: Tensor, strength: float, share: float = 1.0) -> Tensor:
    """Shift, scale and turn pictures a little, and change their light; each its own way.

    At ``strength`` 1 a picture moves by up to 6 % of its side, grows or shrinks by up to 8 %, turns by up to 6 degrees,
    its contrast changes by up to 10 % and its brightness by up to 5 % of the range; all uniform, and in proportion to
    ``strength``. What comes in at the borders is the picture mirrored there. The draws are torch's global ones of x's
    device.

    Args:
        x: (B, C, H, W) in [-1, 1].
        share: of the pictures that change; the others stay as they are, but for interpolation's rounding.

    Returns:
        (B, C, H, W) in [-1, 1].
    """
    if strength == 0:
        return x
    changed = torch.rand(len(x), 1, device=x.device) < share
    draws = (2 * torch.rand(len(x), 6, device=x.device) - 1) * strength * changed  # (B, 6) in [-strength, strength]
    scale, angle = torch.exp(0.08 * draws[:, 0]), math.radians(6) * draws[:, 1]
    cos, sin, dx, dy = scale * angle.cos(), scale * angle.sin(), 0.12 * draws[:, 2], 0.12 * draws[:, 3]
    affine = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)  # a side is 2 long
    where = F.affine_grid(affine.to(x.dtype), list(x.shape), align_corners=False)  # (B, H, W, 2)
    x = F.grid_sample(x, where, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast, light = 1 + 0.1 * draws[:, 4], 0.1 * draws[:, 5]
    return (x * contrast.view(-1, 1, 1, 1) + light.view(-1, 1, 1, 1)).clamp(-1, 1)
