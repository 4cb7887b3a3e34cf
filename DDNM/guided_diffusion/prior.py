"""Noise predictors ``eps(x_t, t)``: the network, and where its weights come from and how they are read.

B batch, H = W image size, k the pixel-unshuffle factor (1 for most priors).
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints import find, locate, read_weights, write_weights
from DDNM.guided_diffusion.ddpm_layout import build_unet, filled, unet_from_ddpm
from DDNM.guided_diffusion.schedule import Schedule
from utils import InputError, read_json, write_text

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = tuple(
    f"diffusion_pytorch_model{variant}.{kind}" for kind in ("safetensors", "bin") for variant in ("", ".fp16")
)
SCHEDULER_NAME = "scheduler_config.json"  # diffusers' place for the schedule and for what a network predicts
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Prior(nn.Module):
    """A diffusion prior: predicts the noise in ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``.

    A U-Net with 3 k^2 input channels sees the image pixel-unshuffled by k: 12 channels at 32x32 are a 64x64 prior.
    If it predicts twice its input channels (noise and variance), the first half is the noise.

    A network that predicts ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0`` (Salimans and Ho 2022, "Progressive
    Distillation", section 4) gives ``eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t``: where almost all is noise it need
    not learn to copy its input, so it draws well after far fewer steps. One that predicts x_0 itself ("sample") gives
    ``eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)``.

    Args:
        unet: the network; its ``sample_size`` times k is the image size.
        autocast: run the network under autocast in this dtype (bf16, say); the result has the input's dtype.
        channels_last: memory format of the network and its input; faster convolutions on most hardware.
        prediction_type: one of `PREDICTIONS`, what the network was trained to predict.
        schedule: the one it was trained with; all but eps depend on it.
        recompute: under autograd, keep little of the network's activations and compute them again for the gradient.

    Raises:
        ValueError: channel counts that are neither 3 k^2 nor their double, a U-Net that asks for a class, takes other
            inputs or has no square sample_size, or another prediction_type.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        prediction_type: str = "epsilon",
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"a prior's prediction_type must be one of {PREDICTIONS}, got {prediction_type!r}")
        c: Any = unet.config
        k, size = math.isqrt(c.in_channels // 3), c.sample_size
        size = size[0] if isinstance(size, Sequence) and len(set(size)) == 1 else size
        wrong = {  # an image is in [-1, 1] here, a step a whole number, and no class is known
            f"needs 3 k^2 input channels and as many, or twice as many, output channels, not {c.in_channels} and "
            f"{c.out_channels}": c.in_channels != 3 * k**2 or c.out_channels not in (c.in_channels, 2 * c.in_channels),
            f"needs a square sample_size, not {size}": not isinstance(size, int),
            "must not be class-conditional": c.class_embed_type is not None or c.num_class_embeds is not None,
            "must not centre its input": c.center_input_sample,
            "must take time steps, not noise levels (fourier embedding)": c.time_embedding_type == "fourier",
        }  # fmt: skip
        if any(wrong.values()):
            raise ValueError(f"a prior's U-Net {next(why for why, holds in wrong.items() if holds)}")
        self.unet, self.unshuffle, self.image_size = unet, k, size * k
        self.autocast, self.channels_last = autocast, channels_last
        self.prediction_type, self.schedule = prediction_type, schedule
        if channels_last:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        if recompute:  # not by diffusers' own switch, which older versions lack for this U-Net
            for module in unet.modules():
                if isinstance(module, (Attention, ResnetBlock2D)):
                    again = partial(checkpoint, module.forward, use_reentrant=False)
                    module.forward = again  # type: ignore[method-assign]

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
        if self.prediction_type == "sample":
            return (x - abar.sqrt() * predicted) / (1 - abar).sqrt()
        return abar.sqrt() * predicted + (1 - abar).sqrt() * x

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should give for ``x_t`` made of x0 and ``noise``, (B, 3, H, W) each; t is (B,)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        abar = self._abar(x0, t)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0

    def _abar(self, x: Tensor, t: Tensor | int) -> Tensor:
        abar = self.schedule.abar(t)
        # (B, 1, 1, 1), or a number, which stays on the CPU: no GPU is waited for
        return abar.to(x).reshape(-1, 1, 1, 1) if abar.ndim else abar.to(x.dtype)

    def predict(self, x: Tensor, t: Tensor | int) -> Tensor:
        """What the network itself predicts, eps or v, for ``x`` (B, 3, H, W) at ``t``, a number or (B,) or ().

        Returns:
            The prediction, of x's shape and dtype.

        Raises:
            ValueError: an image of another size or channel count than the prior's.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"this prior takes images of shape (B, 3, {self.image_size}, {self.image_size}), got {tuple(x.shape)}"
            )
        # a number is filled in there: a copy would wait for the GPU
        t = t.to(x.device) if isinstance(t, Tensor) else torch.full((), t, device=x.device)
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
    dropout: float = 0.0,
) -> UNet2DModel:
    """A U-Net that a CPU can train: attention only where the feature map is ``attention_size`` or smaller.

    Args:
        image_size: H; the network itself works at H / unshuffle, halved at each further level.
        channels: width of each level, each divisible by ``norm_groups``.
        layers: residual blocks per level on the way down (one more on the way up).
        dropout: inside residual blocks, in training.

    Raises:
        ValueError: a size that does not divide by ``unshuffle`` and the levels, or a width by ``norm_groups``.
    """
    levels = len(channels)
    if image_size % (whole := unshuffle * 2 ** (levels - 1)) != 0:
        raise ValueError(f"image size {image_size} must be divisible by {whole} ({unshuffle=}, {levels} levels)")
    size = image_size // unshuffle
    attends = [size // 2**i <= attention_size for i in range(levels)]
    return build_unet(
        size,
        channels,
        layers,
        attends,
        in_channels=3 * unshuffle**2,
        out_channels=3 * unshuffle**2,
        attention_head_dim=64 if all(c % 64 == 0 for c in channels) else None,  # None: one head
        norm_num_groups=norm_groups,
        dropout=dropout,
        add_attention=size // 2 ** (levels - 1) <= attention_size,
    )


# --- Loading and saving ----------------------------------------------------------------------------------------------


def prior_from_ddpm(
    state_dict: Mapping[str, Tensor], model_config: Mapping | None = None, image_size: int | None = None, **options: Any
) -> Prior:
    """A frozen prior from weights in the published DDPM layout: see `unet_from_ddpm`, and `Prior` for the options."""
    return Prior(unet_from_ddpm(state_dict, model_config, image_size), **options).eval().requires_grad_(False)


def _from_diffusers(source: str | Path, **hub: Any) -> tuple[UNet2DModel, str, Schedule]:
    """The network in a diffusers folder or repository, a U-Net's or a pipeline's, what it predicts and its schedule."""
    folder = Path(source)
    if folder.name == "unet" and (folder.parent / "model_index.json").is_file():
        folder = source = folder.parent  # the scheduler's settings lie beside the U-Net's folder
    one_of = partial(find, source, **hub)
    config = one_of((CONFIG_NAME, f"unet/{CONFIG_NAME}"))
    if config is None:
        raise InputError(f"has neither {CONFIG_NAME} nor unet/{CONFIG_NAME}")
    said = read_json(config)
    pipeline = config.parent.name == "unet" and config.parent != folder
    if pipeline and (index := one_of(["model_index.json"])) is not None and {"vae", "vqvae"} & read_json(index).keys():
        raise InputError("draws latents of another network, not images")
    if (kind := said.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise InputError(f"its network is a {kind}; a prior is a UNet2DModel")
    weights = one_of([f"unet/{name}" if pipeline else name for name in WEIGHTS_NAMES])
    if weights is None:
        raise InputError(f"has none of {', '.join(WEIGHTS_NAMES)}")
    names = SCHEDULER_NAME, f"scheduler/{SCHEDULER_NAME}"
    scheduler = one_of(names[1:] if pipeline else names if folder.is_dir() else names[:1])
    if scheduler is None and pipeline:
        raise InputError(f"has no scheduler/{SCHEDULER_NAME}, which says what its network predicts")
    try:
        with torch.device("meta"):
            unet = UNet2DModel.from_config(said)
    except Exception as error:  # diffusers checks little: whatever a wrong value leads to
        raise InputError(f"{config} describes no network: {' '.join(str(error).split())[:200]}") from None
    state = {re.sub(*_OLD_ATTENTION, name): tensor for name, tensor in read_weights(weights).items()}
    return filled(unet, state, weights), *read_scheduler(scheduler)


# of diffusers before 0.15, google/ddpm-ema-celebahq-256 among them
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\b", lambda m: m[1] + _OLD_NAMES[m[2]]


def read_scheduler(path: Path | None) -> tuple[str, Schedule]:
    """What a network predicts, and its schedule, from a diffusers scheduler_config.json; without one, eps and DDPM's.

    Raises:
        InputError: another kind of noise than ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``, or unknown betas.
        ValueError: betas outside (0, 1].
    """
    said = read_json(path) if path is not None else {}
    name = said.get("_class_name", "DDPMScheduler")
    try:
        if not name.endswith("Scheduler"):  # a file may name any class
            raise TypeError(f"{name} is no scheduler")
        scheduler = getattr(diffusers, name).from_config(said)  # some classes have other betas than DDPM's
        config = scheduler.config
    except Exception as error:  # of many classes, which check little: whatever a wrong value leads to
        raise InputError(f"{path}: no schedule: {' '.join(str(error).split())[:200]}") from None
    betas, abar = getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)
    known = betas is not None and abar is not None and torch.allclose((1 - betas).cumprod(0), abar)
    if not known or config.get("use_flow_sigmas"):
        raise InputError(f"{path}: a {name} is not known to add noise as DDPM does; such a prior is not supported")
    predicts, zero_snr = config.get("prediction_type", "epsilon"), config.get("rescale_betas_zero_snr", False)
    if len(betas) != config.num_train_timesteps:
        raise InputError(f"{path}: trained_betas are {len(betas)}, num_train_timesteps {config.num_train_timesteps}")
    if config.get("timestep_type") == "continuous" and predicts == "v_prediction":
        raise InputError(f"{path}: timestep_type continuous: such a network takes noise levels, not steps")
    if zero_snr and predicts == "epsilon":
        raise InputError(f"{path}: rescale_betas_zero_snr: the noise says nothing of a picture where all is noise")
    if config.get("beta_schedule") == "linear" and config.get("trained_betas") is None and not zero_snr:
        return predicts, Schedule(config.beta_start, config.beta_end, config.num_train_timesteps)  # in float64
    return predicts, Schedule(betas=betas)


def load_prior(
    source: str | Path,
    model_config: Mapping | None = None,
    image_size: int | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    recompute: bool = False,
    **hub: Any,
) -> Prior:
    """A frozen prior in float32, in eval mode, on the CPU.

    Args:
        source: a diffusers folder or hub id, of a `UNet2DModel` (what `save_prior` writes) or of a whole pipeline, or a
            weight file in the published DDPM layout.
        model_config: of a weight file, see `unet_from_ddpm`; None reads it off the weights.
        image_size: H; of a weight file, else checked if given.
        autocast, channels_last, recompute: see `Prior`.
        hub: for a hub id, what ``huggingface_hub.hf_hub_download`` takes: ``revision``, ``token``, ...

    Raises:
        InputError: nothing there, a damaged or foreign file, or a prior for another image size.
    """
    (source,) = locate(source, **hub)
    options: dict[str, Any] = {"autocast": autocast, "channels_last": channels_last, "recompute": recompute}
    try:
        if Path(source).is_file():
            prior = prior_from_ddpm(read_weights(source), model_config, image_size, **options)
        else:
            unet, predicts, schedule = _from_diffusers(source, **hub)
            prior = Prior(unet, prediction_type=predicts, schedule=schedule, **options).eval().requires_grad_(False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of a configuration that makes no network, too
        why = str(error) if isinstance(error, ValueError) else f"its configuration makes no network ({error!r})"
        raise InputError(f"prior {source}: {why}") from None
    if image_size is not None and prior.image_size != image_size:
        raise InputError(f"prior {source}: draws {prior.image_size}x{prior.image_size} images, not {image_size}")
    return prior


def save_prior(prior: Prior, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a prior as a diffusers folder: config.json, the weights and scheduler_config.json, each atomically.

    Args:
        dtype: what the weights are stored as (float16 halves the file; `load_prior` goes back to float32).

    Raises:
        InputError: the folder cannot be written, or ``dtype`` cannot hold a weight.
    """
    folder, schedule = Path(folder), prior.schedule
    write_weights(folder / WEIGHTS_NAMES[0], prior.unet.state_dict(), dtype)
    write_text(folder / CONFIG_NAME, prior.unet.to_json_string())
    scheduler = DDPMScheduler(
        schedule.num_diffusion_timesteps,
        schedule.beta_start,
        schedule.beta_end,
        trained_betas=None if schedule.linear else schedule.betas.tolist(),
        prediction_type=prior.prediction_type,
    )
    write_text(folder / SCHEDULER_NAME, scheduler.to_json_string())
