"""The networks that invert.py inverts, where searches in them start, and the losses they minimise."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from DDNM.guided_diffusion.guidance import guide
from DDNM.guided_diffusion.inputs import image_names, load_lpips
from images import find_images, load_image
from inversion import FeatureDistance, Loss, squared_error
from logger import get_logger
from models import SPNN, concatenated
from operators import SPNNOperator
from stylegan import SPACES, Latents, load_generator
from utils import LARGEST_BATCH, LARGEST_SEED, InputError, nearest, option

FACES = Path(__file__).resolve().parent / "DDNM" / "exp" / "logs" / "faces"
READY = ("g", "pinv", "completion-inverse", "stylegan")


@dataclass
class Settings:
    """Of every command. The functions here take a device that is one, no "auto"."""

    out: Path = option(..., "result folder")
    data: Path | None = option(None, "an image, or a folder of images, flat or nested")
    images: int | None = option(None, "take this many of them (eval without images: random problems, 100)", 1)
    spnn: Path = option(FACES / "spnn.safetensors", "the SPNN's weights")
    weights: str = option(str(FACES / "stylegan.safetensors"), "StyleGAN's: a file, a folder or a hub id")
    spaces: tuple[str, ...] = option(("w+",), "of StyleGAN's latents", choices=SPACES)
    noise: Literal["fixed", "new"] = option("fixed", "StyleGAN's: drawn once, or anew in every step")
    bf16: bool = option(False, "StyleGAN in bfloat16")
    start: Literal["zero", "average", "best"] = option("average", "best: of --draws random latents")
    draws: int = option(64, "random latents to choose the start from", 1)
    loss: Literal["auto", "mse", "lpips", "vgg"] = option(
        "auto", "with the squared error; auto: LPIPS if it can be had"
    )
    perceptual_weight: tuple[float, ...] = option((1.0,), "of LPIPS or VGG's features; one, or one for each layer", 0.0)
    vgg_layers: tuple[int, ...] = option((1, 3, 13, 20), "of VGG-16's features, compared after these", 0)
    x_lr: float | None = option(None, "step of Adam on x; default: by the network, or theta's", 1e-12)
    clip: float = option(10.0, "largest norm of a sample's gradient", 1e-12)
    batch_size: int = option(16, "samples at once", 1, LARGEST_BATCH)
    overwrite: bool = option(False, "replace the results in a folder that has some")
    resume: bool = option(False, "go on with what is in --out")
    seed: int = option(0, "of weights and draws", 0, LARGEST_SEED)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


# --- The network that is inverted ------------------------------------------------------------------------------------


class Inverse(nn.Module):
    """An SPNN's g', logits (B, d) -> images; ``completed`` its G^-1, from logits and latents as one vector, (B, D)."""

    def __init__(self, model: SPNN, completed: bool):
        super().__init__()
        self.model, self.latents = model, model.complete(torch.zeros(1, *model.in_shape)).z if completed else []
        self.sizes = [model.num_classes, *(z.numel() for z in self.latents if z is not None)]
        self.in_shape = (sum(self.sizes),)

    def forward(self, v: Tensor) -> Tensor:
        y, *flat = v.split(self.sizes, dim=1)
        parts = iter(flat)
        latents = [None if z is None else next(parts).unflatten(1, z.shape[1:]) for z in self.latents]
        return self.model.pinv(y, latents or None)


Closed = dict[str, Callable[[Tensor, Tensor], Tensor]]  # (y, x0) -> x, by name


@dataclass
class Target:
    """A network to invert, frozen, with what is known about it.

    Attributes:
        name: of the network, and of StyleGAN's space.
        x_lr: Adam's step on x.
        closed_form: inversions without optimisation.
        attributes: names of the logits if the judge can be asked.
        bounds: range of x; None: none.
        in_shape, out_shape: of one x, and of one f(x).
    """

    name: str
    f: nn.Module
    x_lr: float = 0.1
    closed_form: Closed = field(default_factory=dict)
    attributes: Sequence[str] | None = None
    bounds: tuple[float, float] | None = None
    in_shape: Sequence[int] = ()
    out_shape: Sequence[int] = ()

    @property
    def from_image(self) -> bool:
        """Whether x is an image, (3, S, S)."""
        return list(self.in_shape) == [3, *self.in_shape[-1:] * 2]

    @property
    def to_image(self) -> bool:
        """Whether only f(x) is an image."""
        return not self.from_image and list(self.out_shape) == [3, *self.out_shape[-1:] * 2]

    @property
    def img_size(self) -> int | None:
        """S of the images on either side."""
        return self.in_shape[1] if self.from_image else self.out_shape[1] if self.to_image else None


def imported(source: str) -> nn.Module:
    """What the factory at ``package.module:factory`` returns. Importing runs the module's code."""
    module_name, _, factory_name = source.partition(":")
    sys.path.insert(0, os.getcwd())
    f = getattr(importlib.import_module(module_name), factory_name)()
    if not isinstance(f, nn.Module) or not getattr(f, "in_shape", None):
        raise TypeError(f"must return an nn.Module with in_shape, (3, 64, 64) say; got {f!r:.200}")
    return f


def of_spnn(network: str, s: Settings) -> Target:
    """One of an SPNN's networks."""
    model = SPNN.from_pretrained(s.spnn)
    attributes = model.notes.get("attributes")
    if network == "pinv":
        closed = {"closed form g(y)": lambda y, x0: model(y)}
        return Target(network, Inverse(model, completed=False), 1.0, closed, attributes)
    if network == "completion-inverse":
        closed = {"closed form G(y)": lambda y, x0: concatenated([(point := model.complete(y)).y, *point.z])}
        return Target(network, Inverse(model, completed=True), 0.1, closed, attributes)

    def in_moves(y: Tensor, x0: Tensor) -> Tensor:
        move, far = SPNNOperator(model).towards(y), x0.new_ones(len(x0), dtype=torch.bool)
        for _ in range(20):
            x0 = guide(move(x0), x0, far, 1.0, max_move=0.15)
        return x0

    closed = {
        "closed form g'(y)": lambda y, x0: model.pinv(y),
        "NLBP": lambda y, x0: model.back_project(x0, y),
        "NLBP in 20 short moves": in_moves,
    }
    return Target(network, model, 0.03, closed, attributes)


def load_targets(network: str, s: Settings) -> list[Target]:
    """The network called ``network`` (see invert.py): one target, or one for each space of StyleGAN's.

    Raises InputError: an unknown name, weights that cannot be read, or a network that does not take its own in_shape.
    """
    if ":" not in network and network not in READY:
        hint = nearest(network, READY)
        raise InputError(f"--network {network}: expected {', '.join(READY)} or package.module:factory{hint}")
    try:
        if network == "stylegan":
            generator = load_generator(s.weights).to(s.device)
            noise = generator.draw_noise(1, torch.Generator().manual_seed(s.seed)) if s.noise == "fixed" else None
            targets = [Target(f"stylegan {space}", Latents(generator, space, noise, s.bf16)) for space in s.spaces]
        else:
            targets = [of_spnn(network, s) if network in READY else Target(network, imported(network))]
        for target in targets:
            target.f, target.in_shape = target.f.to(s.device).eval().requires_grad_(False), tuple(target.f.in_shape)
            (output,) = outputs(target.f, torch.zeros(1, *target.in_shape), s)
            target.out_shape = output.shape
            if target.from_image:
                target.bounds, target.x_lr = (-1.0, 1.0), min(target.x_lr, 0.03)
            target.x_lr = target.x_lr if s.x_lr is None else s.x_lr
    except InputError:
        raise
    except Exception as error:  # somebody else's code: anything may come
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"--network {network}: cannot be had, or run on an input of its in_shape: {why}") from error
    return targets


def spnn_beside(target: Target, s: Settings) -> Closed:
    """What an SPNN of the same size makes of an image's own logits, as images, for latents of StyleGAN."""
    if not isinstance(target.f, Latents):
        return {}
    model = SPNN.from_pretrained(s.spnn).to(s.device).requires_grad_(False)
    if tuple(model.in_shape) != tuple(target.out_shape):
        return {}
    return {
        "SPNN, g'(g(x))": lambda y, x0: model.pinv(model(y)),
        "SPNN, NLBP of the start": lambda y, x0: model.back_project(target.f(x0), model(y)),
    }


# --- Problems: wanted outputs and starts -----------------------------------------------------------------------------


@torch.no_grad()
def outputs(f: nn.Module, x: Tensor, s: Settings) -> Tensor:
    """f of every input, (N, ...), on the CPU."""
    return torch.cat([f(batch.to(s.device)).cpu() for batch in x.split(s.batch_size)])


@torch.no_grad()
def starts(target: Target, y: Tensor, s: Settings, loss: Loss) -> Tensor:
    """Where searches for the images y (B, 3, S, S) begin, (B, ...), on the CPU; zero if there are no latents."""
    latents, draws = isinstance(target.f, Latents), torch.Generator().manual_seed(s.seed)
    if s.start == "average" and latents:
        return target.f.average().cpu().repeat(len(y), 1)
    if s.start != "best":
        return torch.zeros(len(y), *target.in_shape)
    drawn = target.f.draw(s.draws, draws).cpu() if latents else torch.randn(s.draws, *target.in_shape, generator=draws)
    pictures = outputs(target.f, drawn, s).split(s.batch_size)
    losses = [torch.cat([loss(p.to(s.device), one.to(s.device).expand_as(p)).cpu() for p in pictures]) for one in y]
    return drawn[torch.stack(losses).argmin(1)]


def named_images(data: Path | None, count: int | None) -> dict[str, Path]:
    """``count`` images of a folder or file, or all, by a name for their results. Raises InputError: there are none."""
    if data is None:
        raise InputError("--data: this network needs an image or a folder of images")
    paths = find_images(data)[:count]
    return dict(zip(image_names(paths, data), paths, strict=True))


def read_images(target: Target, s: Settings) -> tuple[list[str], Tensor | None]:
    """Names and images (N, 3, S, S) in [-1, 1] of --data; none if the network has no image on either side."""
    if target.img_size is None:
        return [], None
    named = named_images(s.data, s.images)
    paths = tqdm(named.values(), desc="images", unit="image", leave=False, disable=None)
    return list(named), torch.stack([load_image(path, target.img_size) for path in paths])


def problem_source(
    target: Target, images: Tensor | None, s: Settings, loss: Loss
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """What `inversion.train_mapping` draws from: (y, x0) of random pairs of images, or of random inputs."""
    goals = outputs(target.f, images, s) if target.from_image else images

    def draw(count: int) -> tuple[Tensor, Tensor]:
        if goals is None:
            x = torch.randn(count, *target.in_shape)
            return outputs(target.f, x, s).to(s.device), torch.zeros_like(x, device=s.device)
        y, others = goals[torch.randint(len(goals), (count,))], torch.randint(len(goals), (count,))
        x0 = images[others] if target.from_image else starts(target, y, s, loss)
        return y.to(s.device), x0.to(s.device)

    return draw


class Problems(NamedTuple):
    """N inversions to measure.

    Attributes:
        y: wanted outputs, and ``wanted``, the images (or inputs) that they belong to.
        x0: starts; None if the network's outputs are images.
    """

    names: list[str]
    y: Tensor
    wanted: Tensor
    x0: Tensor | None = None


def fixed_problems(target: Target, names: list[str], images: Tensor | None, s: Settings) -> Problems:
    """The problems of an evaluation: each image is moved to the output of the one that follows in a random order."""
    generator = torch.Generator().manual_seed(s.seed)
    if images is None:
        wanted = torch.randn(s.images if s.images is not None else 100, *target.in_shape, generator=generator)
        return Problems(list(map(str, range(len(wanted)))), outputs(target.f, wanted, s), wanted, wanted * 0)
    if target.to_image:
        return Problems(names, images, images)
    if len(images) < 2:
        raise InputError("--data: one image has no other one to be moved to; two are enough")
    order = torch.randperm(len(images), generator=generator)
    following = torch.empty_like(order)
    following[order] = order.roll(-1)  # a cycle, so nobody gets its own
    wanted = images[following]
    return Problems(names, outputs(target.f, wanted, s), wanted, images)


# --- Losses ----------------------------------------------------------------------------------------------------------


@functools.cache
def lpips_or_none(device: str, size: int) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018), or None, said in one line, if its weights cannot be had or images are too small."""
    lpips = load_lpips(torch.device(device), get_logger("invert"), size)
    return None if lpips is None else lpips.requires_grad_(False)


def load_vgg() -> nn.Sequential:
    """VGG-16's convolutions with ImageNet's weights. Raises InputError if they cannot be had."""
    import torchvision

    try:
        return torchvision.models.vgg16(weights="IMAGENET1K_V1").features.eval().requires_grad_(False)
    except Exception as error:  # torch.hub fetches them: any network error may come
        file = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
        raise InputError(f"--loss vgg: VGG-16's weights cannot be had ({error}); put them at {file}") from None


def make_loss(target: Target, s: Settings) -> Loss:
    """Mean squared error, for images plus what --loss says. Raises InputError if its weights cannot be had."""
    weights = s.perceptual_weight
    if not target.to_image and s.loss in ("lpips", "vgg"):
        raise InputError(f"--loss {s.loss}: compares images, and {target.name} gives none from something else")
    if len(weights) not in (1, len(s.vgg_layers) if s.loss == "vgg" else 1):
        raise InputError("--perceptual_weight: one, or one for each layer of --loss vgg")
    if not target.to_image or s.loss == "mse":
        return squared_error
    if s.loss == "vgg":
        vgg = load_vgg().to(s.device)
        if not s.vgg_layers or max(s.vgg_layers) >= len(vgg):
            raise InputError(f"--vgg_layers: must be of 0 to {len(vgg) - 1}")
        each = weights if len(weights) > 1 else weights * len(s.vgg_layers)
        return FeatureDistance(vgg, dict(zip(s.vgg_layers, each, strict=True)))
    lpips = lpips_or_none(s.device, target.img_size)
    if lpips is not None:
        return lambda output, y: squared_error(output, y) + weights[0] * lpips(output, y).flatten()
    if s.loss == "lpips":
        raise InputError("--loss lpips: cannot be had, see above; use --loss mse, or auto, which goes on without")
    return squared_error
