"""Weights in the published DDPM layout (``temb.dense.0``, ``down.i.block.j``, ...), celeba_hq.ckpt's, for diffusers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from checkpoints import load_strictly
from utils import InputError

_RENAMED = (  # UNet2DModel's name -> the published one, applied in this order
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^down_blocks\.", "down."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def ddpm_name(name: str, levels: int) -> str:
    """The published name of a tensor of a `UNet2DModel` with that many levels."""
    # the published code counts the levels of the way up from the finest, diffusers from the coarsest
    name = re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def build_unet(size: int, widths: Sequence[int], layers: int, attends: Sequence[bool], **options: Any) -> UNet2DModel:
    """A U-Net on maps of ``size``, halved at each level, with attention at some of them; diffusers has the options."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        **options,
    )


def ddpm_unet(model_config: Mapping, image_size: int) -> UNet2DModel:
    """The `UNet2DModel` that computes what the published ``Model`` of this configuration does, on the meta device."""
    widths = tuple(model_config["ch"] * m for m in model_config["ch_mult"])
    attends = [image_size // 2**i in model_config["attn_resolutions"] for i in range(len(widths))]
    if image_size % (coarsest := 2 ** (len(widths) - 1)) != 0:
        raise ValueError(f"image size {image_size} must be divisible by {coarsest} ({len(widths)} levels)")
    with torch.device("meta"):  # the weights come from the file: no random ones are drawn first
        return build_unet(
            image_size,
            widths,
            model_config["num_res_blocks"],
            attends,
            in_channels=model_config["in_channels"],
            out_channels=model_config["out_ch"],
            # what follows has no trace in names or shapes: with any other value the weights load and compute nonsense
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            norm_num_groups=32,
        )


def ddpm_config(state_dict: Mapping[str, Tensor], image_size: int | None = None) -> tuple[dict, int]:
    """The model configuration that weights in the published DDPM layout belong to, and H.

    Args:
        image_size: H. It is in no weight; None takes the published habit, attention at 16x16, for granted.

    Raises:
        InputError: another layout, or no level that attends to tell H by.
    """
    if absent := {"temb.dense.0.weight", "conv_in.weight", "conv_out.weight"} - state_dict.keys():
        raise InputError(f"these are no weights in the published DDPM layout: there is no {min(absent)}")
    ch = state_dict["temb.dense.0.weight"].shape[1]
    levels = len({name.split(".")[1] for name in state_dict if name.startswith("down.")})
    widths = [state_dict[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attends = [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in state_dict]
    if image_size is None and not attends:
        raise InputError("these weights do not tell the image size: give image_size")
    size = image_size if image_size is not None else 16 << attends[0]
    config = {
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": len({name.split(".")[3] for name in state_dict if name.startswith("down.0.block.")}),
        "attn_resolutions": [size >> i for i in attends],
        "in_channels": state_dict["conv_in.weight"].shape[1],
        "out_ch": state_dict["conv_out.weight"].shape[0],
    }
    return config, size


def unet_from_ddpm(
    state_dict: Mapping[str, Tensor], model_config: Mapping | None = None, image_size: int | None = None
) -> UNet2DModel:
    """The network of weights in this layout, in float32; every tensor must be used and fit.

    Args:
        state_dict: the network keeps float32 tensors without copying them.
        model_config: ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, out_ch; other keys of the published
            configuration (type, var_type, ema, ...) do not matter here. None reads it off the weights.
        image_size: H, which decides the levels that attend; see `ddpm_config` for None.

    Raises:
        InputError: a missing or foreign tensor, or one of another shape. ValueError, KeyError, ...: a configuration
            that makes no network.
    """
    if model_config is None or image_size is None:
        model_config, image_size = ddpm_config(state_dict, image_size)
    unet = ddpm_unet(model_config, image_size)
    levels = len(unet.config["block_out_channels"])
    own = {ddpm_name(name, levels): name for name in unet.state_dict()}
    matrices = {name for name, tensor in unet.state_dict().items() if tensor.ndim == 2}
    state = {own.get(name, name): tensor for name, tensor in state_dict.items()}
    # attention: 1x1 convolutions there, matrices here
    state = {k: v[:, :, 0, 0] if k in matrices and v.shape[2:] == (1, 1) else v for k, v in state.items()}
    return filled(unet, state, "in the DDPM layout")


def filled(unet: UNet2DModel, state: Mapping[str, Tensor], path: object) -> UNet2DModel:
    """A U-Net on the meta device with these weights, in float32. Raises InputError, as `load_strictly`."""
    load_strictly(unet, state, str(path))
    unet.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, assign=True)
    return unet
