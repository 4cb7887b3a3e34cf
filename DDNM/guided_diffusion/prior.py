"""Noise predictors ``eps(x_t, t)``: the network, and where its weights come from and how they are read.

B batch, H = W image size, k the pixel-unshuffle factor (1 for most priors).
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from checkpoints import HUB_ID, hub_file, read_weights, write_weights
from DDNM.guided_diffusion.schedule import Schedule
from utils import InputError, atomic_write, shown

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
SCHEDULER_NAME = "scheduler_config.json"  # diffusers' place for what a network predicts
PREDICTIONS = ("epsilon", "v_prediction")


class Prior(nn.Module):
    """A diffusion prior: predicts the noise in ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``.

    A U-Net with 3 k^2 input channels sees the image pixel-unshuffled by k: 12 channels at 32x32 are a 64x64 prior.
    Where it predicts twice its input channels (noise and variance), the first half is the noise.

    A network that predicts ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0`` (Salimans and Ho 2022, "Progressive
    Distillation", section 4) gives ``eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t``: where almost all is noise it need
    not learn to copy its input, so it draws well after far fewer steps.

    Args:
        unet: the network; its ``sample_size`` times k is the image size.
        autocast: run the network under autocast in this dtype (bf16, say); the result has the input's dtype.
        channels_last: memory format of the network and its input; faster convolutions on most hardware.
        prediction_type: "epsilon" or "v_prediction", what the network was trained to predict.
        schedule: the one it was trained with; v depends on it.

    Raises:
        ValueError: channel counts that are neither 3 k^2 nor their double, a U-Net without a square sample_size, or
            another prediction_type.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        prediction_type: str = "epsilon",
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"a prior's prediction_type must be one of {PREDICTIONS}, got {prediction_type!r}")
        self.prediction_type, self.schedule = prediction_type, schedule
        channels, predicted, size = unet.config.in_channels, unet.config.out_channels, unet.config.sample_size
        self.unshuffle = round((channels / 3) ** 0.5)
        if 3 * self.unshuffle**2 != channels or predicted not in (channels, 2 * channels):
            raise ValueError(
                f"a prior's U-Net needs 3 k^2 input channels and as many, or twice as many, output channels; "
                f"got {channels} and {predicted}"
            )
        if isinstance(size, Sequence) and len(set(size)) == 1:
            size = size[0]
        if not isinstance(size, int):
            raise ValueError(f"a prior's U-Net needs a square sample_size in its configuration, got {size}")
        self.unet = unet
        self.image_size = size * self.unshuffle
        self.autocast = autocast
        self.channels_last = channels_last
        if channels_last:
            unet.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise in ``x`` (B, 3, H, W) at the training-time step(s) ``t``, a number or a tensor of shape (B,) or ().

        Returns:
            eps, of x's shape and dtype.

        Raises:
            ValueError: as `predict`.
        """
        predicted = self.predict(x, t)
        if self.prediction_type == "epsilon":
            return predicted
        abar = self._abar(x, t)
        return abar.sqrt() * predicted + (1 - abar).sqrt() * x

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should give for ``x_t`` made of x0 and ``noise``, (B, 3, H, W) each; t is (B,)."""
        if self.prediction_type == "epsilon":
            return noise
        abar = self._abar(x0, t)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0

    def _abar(self, x: Tensor, t: Tensor | int) -> Tensor:
        abar = self.schedule.abar(t)
        return abar.to(x).reshape(-1, 1, 1, 1) if abar.ndim else abar  # (B, 1, 1, 1), or a number

    def predict(self, x: Tensor, t: Tensor | int) -> Tensor:
        """What the network itself predicts, eps or v, for ``x`` (B, 3, H, W) at ``t``, a number or (B,) or ().

        Returns:
            The prediction, of x's shape and dtype.

        Raises:
            ValueError: an image of another size or channel count than the prior's, or a ``t`` of another shape.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"this prior takes images of shape (B, 3, {self.image_size}, {self.image_size}), got {tuple(x.shape)}"
            )
        # a number is filled in there: a copy would wait for the GPU
        t = t.to(x.device) if isinstance(t, Tensor) else torch.full((), t, device=x.device)
        if t.ndim > 1 or t.ndim == 1 and len(t) not in (1, len(x)):
            raise ValueError(f"t must be a number or have shape ({len(x)},), got {tuple(t.shape)}")
        t = t.expand(len(x))  # (B,)
        h = x.to(self.unet.dtype)  # (B, 3, H, W)
        if self.unshuffle > 1:
            h = F.pixel_unshuffle(h, self.unshuffle)  # (B, 3 k^2, H / k, W / k)
        if self.channels_last:
            h = h.contiguous(memory_format=torch.channels_last)
        cast = nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)
        with cast:
            (h,) = self.unet(h, t, return_dict=False)  # (B, 3 k^2 or 6 k^2, H / k, W / k)
        h = h[:, : 3 * self.unshuffle**2].to(x.dtype)
        if self.unshuffle > 1:
            h = F.pixel_shuffle(h, self.unshuffle)
        return h.contiguous()  # (B, 3, H, W)


def small_unet(
    image_size: int,
    channels: Sequence[int] = (48, 96, 144),
    layers: int = 1,
    unshuffle: int = 2,
    attention_size: int = 8,
    norm_groups: int = 16,
) -> UNet2DModel:
    """A U-Net that a CPU can train: attention only where the feature map is ``attention_size`` or smaller.

    Args:
        image_size: H; the network itself works at H / unshuffle, halved at each further level.
        channels: width of each level, each divisible by ``norm_groups``.
        layers: residual blocks a level on the way down (one more on the way up).

    Raises:
        ValueError: a size or width that does not divide.
    """
    levels = len(channels)
    if levels == 0 or unshuffle < 1 or image_size % (unshuffle * 2 ** (levels - 1)) != 0:
        raise ValueError(
            f"image size {image_size} must be divisible by {unshuffle * 2 ** max(0, levels - 1)} "
            f"(unshuffle {unshuffle}, {levels} levels)"
        )
    if any(c <= 0 or c % norm_groups for c in channels):
        raise ValueError(f"channels {tuple(channels)} must be positive multiples of norm_groups ({norm_groups})")
    size = image_size // unshuffle
    attends = [size // 2**i <= attention_size for i in range(levels)]
    colours = 3 * unshuffle**2
    return UNet2DModel(
        sample_size=size,
        in_channels=colours,
        out_channels=colours,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=64 if all(c % 64 == 0 for c in channels) else None,  # None: one head
        norm_num_groups=norm_groups,
        add_attention=size // 2 ** (levels - 1) <= attention_size,
    )


# The published DDPM layout ----------------------------------------------------------------------------------------

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


def _ddpm_name(name: str, levels: int) -> str:
    """The published name of a tensor of a `UNet2DModel` with that many levels."""
    # the published code counts the levels of the way up from the finest, diffusers from the coarsest
    name = re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def ddpm_unet(model_config: Mapping, image_size: int) -> UNet2DModel:
    """The `UNet2DModel` that computes what the published ``Model`` of this configuration does, on the meta device.

    Raises:
        InputError: a configuration that lacks something, or makes no network.
    """
    if not isinstance(model_config, Mapping):
        raise InputError(f"the prior's model configuration must be a mapping, got {model_config!r}")
    needed = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "out_ch")
    if absent := [key for key in needed if key not in model_config]:
        raise InputError(f"the prior's model configuration lacks {', '.join(absent)}")
    if not model_config.get("resamp_with_conv", True):
        raise InputError("the prior's model configuration has resamp_with_conv: false, which is not supported")
    try:
        return _build_ddpm_unet(model_config, image_size)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the prior's model configuration makes no network: {str(error)[:300]}") from None


def _check_counts(config: Mapping, counts: Mapping[str, int], lists: Mapping[str, int]) -> None:
    """Refuse what no network has: a stranger's configuration must not cost hours or all memory to find out.

    Args:
        counts: key -> its largest value. lists: the same for lists of at most 16 whole numbers.

    Raises:
        ValueError: names the key.
    """
    for key, value in config.items():
        if key in lists:
            if not isinstance(value, (list, tuple)) or len(value) > 16:
                raise ValueError(f"{key} must be a list of at most 16 numbers")
        elif key not in counts:
            continue
        for item in value if key in lists else [value]:
            if type(item) is not int or not 1 <= item <= (counts | lists)[key]:
                raise ValueError(f"{key} must be whole, from 1 to {(counts | lists)[key]}, got {shown(item)}")


def _build_ddpm_unet(model_config: Mapping, image_size: int) -> UNet2DModel:
    counts = {"ch": 4096, "num_res_blocks": 32, "in_channels": 256, "out_ch": 512}
    _check_counts(model_config, counts, {"ch_mult": 64, "attn_resolutions": 4096})
    widths = tuple(model_config["ch"] * m for m in model_config["ch_mult"])
    attends = [image_size // 2**i in tuple(model_config["attn_resolutions"]) for i in range(len(widths))]
    coarsest = 2 ** (len(widths) - 1)
    if image_size % coarsest != 0:
        raise ValueError(f"image size {image_size} must be divisible by {coarsest} ({len(widths)} levels)")
    with torch.device("meta"):  # the weights come from the file: no random ones are drawn first
        return UNet2DModel(
            sample_size=image_size,
            in_channels=model_config["in_channels"],
            out_channels=model_config["out_ch"],
            block_out_channels=widths,
            layers_per_block=model_config["num_res_blocks"],
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            dropout=model_config.get("dropout", 0.0),
            # what follows has no trace in names or shapes: with any other value the weights load and compute nonsense
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            norm_num_groups=32,
        )


def prior_from_ddpm(
    state_dict: Mapping[str, Tensor],
    model_config: Mapping,
    image_size: int,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Prior:
    """A prior from weights in the published DDPM layout (``temb.dense.0``, ``down.i.block.j``, ...).

    Args:
        state_dict: every tensor must be used; the network keeps float32 tensors without copying them.
        model_config: ch, ch_mult, num_res_blocks, attn_resolutions, in_channels, out_ch, and maybe dropout and
            resamp_with_conv; other keys of the published configuration (type, var_type, ema ...) do not matter here.
        image_size: H, which decides the levels that attend.

    Raises:
        InputError: a missing or foreign tensor, or one of another shape, by its published name.
    """
    unet = ddpm_unet(model_config, image_size)
    levels = len(unet.config.block_out_channels)
    published = {name: _ddpm_name(name, levels) for name in unet.state_dict()}
    problems = {
        "missing": [name for name in published.values() if name not in state_dict],
        "unexpected": sorted(state_dict.keys() - set(published.values())),
    }
    if any(problems.values()):
        parts = (f"{kind} {', '.join(v[:3])} ({len(v)} in all)" for kind, v in problems.items() if v)
        raise InputError(f"the prior's weights do not fit its model configuration: {'; '.join(parts)}")
    weights = {}
    for name, own in unet.state_dict().items():
        tensor = state_dict[published[name]]
        if tensor.ndim == 4 and own.ndim == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # attention: 1x1 convolutions there, matrices here
        if tensor.shape != own.shape:
            raise InputError(
                f"the prior's {published[name]} has shape {list(state_dict[published[name]].shape)}, "
                f"its model configuration needs {list(own.shape)}"
            )
        weights[name] = tensor.float().contiguous()
    unet.load_state_dict(weights, strict=True, assign=True)
    return _frozen(Prior(unet, autocast, channels_last))


# Loading and saving -----------------------------------------------------------------------------------------------


def _frozen(prior: Prior) -> Prior:
    return prior.eval().requires_grad_(False)


def _from_diffusers(source: str | Path, local: bool) -> UNet2DModel:
    """A `UNet2DModel` in float32 from a folder or a hub id; safetensors only, and every tensor must fit."""
    if local:
        _check_size(Path(source))
    try:
        unet, report = UNet2DModel.from_pretrained(
            str(source),
            use_safetensors=True,  # the alternative would unpickle
            local_files_only=local,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and the hub client raise many kinds, few of them their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = f"it needs {CONFIG_NAME} and an undamaged {WEIGHTS_NAME}" if local else "no local file or folder either"
        raise InputError(f"prior {source}: cannot be loaded: {hint} ({reason[:200]})") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = [str(name) for name in report[kind]]
            raise InputError(f"prior {source}: {kind.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)} in all)")
    for name, parameter in unet.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"prior {source}: {name} holds NaN or infinity")
    return unet


def _check_size(folder: Path) -> None:
    """Refuse a configuration that asks for more numbers than the folder's weights have bytes."""
    file, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not (file.is_file() and weights.is_file()):
        return  # diffusers says what is missing
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        counts = {"layers_per_block": 32, "in_channels": 4096, "out_channels": 4096}
        _check_counts(said, counts, {"block_out_channels": 1 << 16})
        with torch.device("meta"):
            unet = UNet2DModel(**{k: v for k, v in said.items() if k in inspect.signature(UNet2DModel).parameters})
        asked = sum(p.numel() for p in unet.parameters())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"prior {folder}: cannot be loaded: {CONFIG_NAME} describes no network ({reason})") from None
    if asked > weights.stat().st_size:
        held = f"{WEIGHTS_NAME} has {weights.stat().st_size:,} bytes"
        raise InputError(f"prior {folder}: cannot be loaded: {CONFIG_NAME} asks for {asked:,} numbers, {held}")


def _read_scheduler(source: str | Path, local: bool) -> tuple[str, Schedule]:
    """What a diffusers prior predicts, and its schedule: eps and DDPM's, unless its scheduler_config.json says so."""
    path = Path(source) / SCHEDULER_NAME if local else hub_file(str(source), SCHEDULER_NAME)
    if path is None or not path.is_file():
        return "epsilon", Schedule()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if (kind := said.get("beta_schedule", "linear")) != "linear":
            raise InputError(f"prior {source}: its beta_schedule is {kind!r}; only linear betas are supported")
        default = Schedule()
        schedule = Schedule(
            said.get("beta_start", default.beta_start),
            said.get("beta_end", default.beta_end),
            said.get("num_train_timesteps", default.num_diffusion_timesteps),
        )
        return said.get("prediction_type", "epsilon"), schedule
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"prior {path}: not a scheduler's configuration: {error}") from None


def load_prior(
    source: str | Path,
    model_config: Mapping | None = None,
    image_size: int | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Prior:
    """A frozen prior in float32, in eval mode, on the CPU.

    Args:
        source: a diffusers folder (what `save_prior` writes), a weight file in the published DDPM layout, or a hub id.
        model_config: needed for the published layout, as in `prior_from_ddpm`.
        image_size: H; needed for the published layout, else checked where given.

    Raises:
        InputError: nothing there, a damaged or foreign file, or a prior for another image size.
    """
    path = Path(source)
    if path.is_file():
        if model_config is None or image_size is None:
            raise InputError(f"prior {path}: a weight file needs a model configuration and an image size")
        try:
            prior = prior_from_ddpm(read_weights(path), model_config, image_size, autocast, channels_last)
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"prior {path}: {error}") from None
    elif path.is_dir() or HUB_ID.fullmatch(str(source)):
        unet = _from_diffusers(source, local=path.is_dir())
        prediction_type, schedule = _read_scheduler(source, local=path.is_dir())
        try:
            prior = _frozen(Prior(unet, autocast, channels_last, prediction_type, schedule))
        except ValueError as error:
            raise InputError(f"prior {source}: {error}") from None
    else:
        raise InputError(f"prior {source}: no such file or folder, and not a hub id like owner/repo")
    if image_size is not None and prior.image_size != image_size:
        raise InputError(f"prior {source}: draws {prior.image_size}x{prior.image_size} images, not {image_size}")
    return prior


def save_prior(prior: Prior, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a prior as a diffusers folder: config.json, the weights and scheduler_config.json, each atomically.

    Args:
        dtype: what the weights are stored as (float16 halves the file; `load_prior` goes back to float32).

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    write_weights(folder / WEIGHTS_NAME, prior.unet.state_dict(), dtype)
    with atomic_write(folder / CONFIG_NAME) as temporary:
        temporary.write_text(prior.unet.to_json_string(), encoding="utf-8")
    scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "beta_start": prior.schedule.beta_start,
        "beta_end": prior.schedule.beta_end,
        "num_train_timesteps": prior.schedule.num_diffusion_timesteps,
        "prediction_type": prior.prediction_type,
    }
    with atomic_write(folder / SCHEDULER_NAME) as temporary:
        temporary.write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")
