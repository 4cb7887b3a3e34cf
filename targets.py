"""The networks that invert.py inverts, where searches in them start, and the losses they minimise."""

import functools
import importlib
import math
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
from inversion import FeatureDistance, Loss, perceptual_loss, squared_error
from logger import get_logger
from models import SPNN, concatenated
from operators import SPNNOperator
from stylegan import SPACES, Latents, load_generator
from utils import LARGEST_BATCH, LARGEST_SEED, InputError, nearest, option

FACES = Path(__file__).resolve().parent / "DDNM" / "exp" / "logs" / "faces"
READY = ("g", "pinv", "completion-inverse", "stylegan")


@dataclass
class Settings:
    """Of every command."""

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


class PseudoInverse(nn.Module):
    """An SPNN's g', logits (B, d) -> images."""

    def __init__(self, model: SPNN):
        super().__init__()
        self.model, self.in_shape = model, (model.num_classes,)

    def forward(self, y: Tensor) -> Tensor:
        return self.model.pinv(y)


class CompletionInverse(nn.Module):
    """An SPNN's G^-1 from logits and latents as one vector, (B, D) -> images; `encode` is G."""

    def __init__(self, model: SPNN):
        super().__init__()
        self.model, self.in_shape = model, (math.prod(model.in_shape),)
        at_zero = model.complete(torch.zeros(1, *model.in_shape))
        self.shapes = [None if z is None else z.shape[1:] for z in at_zero.z]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """``G(x)``, (B, D): the logits, then the latents in the order of the blocks."""
        point = self.model.complete(x)
        return concatenated([point.y, *point.z])

    def forward(self, v: Tensor) -> Tensor:
        sizes = [self.model.num_classes, *(shape.numel() for shape in self.shapes if shape is not None)]
        y, *flat = v.split(sizes, dim=1)
        parts = iter(flat)
        return self.model.pinv(y, [None if shape is None else next(parts).unflatten(1, shape) for shape in self.shapes])


def is_image(shape: Sequence[int]) -> bool:
    """Whether this is the shape of a square image with three channels."""
    return len(shape) == 3 and shape[0] == 3 and shape[1] == shape[2]


Closed = dict[str, Callable[[Tensor, Tensor], Tensor]]  # (y, x0) -> x, by name


@dataclass
class Target:
    """A network to invert, with what is known about it.

    Attributes:
        name: of the network, and of StyleGAN's space.
        f: the network, frozen, in eval mode.
        x_lr: Adam's step on x.
        closed_form: inversions without optimisation.
        attributes: names of the logits if the judge can be asked.
        bounds: range of x; None: none.
    """

    name: str
    f: nn.Module
    x_lr: float = 0.1
    closed_form: Closed = field(default_factory=dict)
    attributes: Sequence[str] | None = None
    bounds: tuple[float, float] | None = None
    in_shape: tuple[int, ...] = ()
    out_shape: tuple[int, ...] = ()

    @property
    def from_image(self) -> bool:
        """Whether x is an image."""
        return is_image(self.in_shape)

    @property
    def to_image(self) -> bool:
        """Whether only f(x) is an image."""
        return not self.from_image and is_image(self.out_shape)

    @property
    def img_size(self) -> int | None:
        """S of the images on either side."""
        return self.in_shape[1] if self.from_image else self.out_shape[1] if self.to_image else None


def imported(source: str) -> nn.Module:
    """What the factory at ``package.module:factory`` returns. Importing runs the module's code.

    Raises:
        InputError: it cannot be imported or called, or returns no module with an ``in_shape``.
    """
    module_name, _, factory_name = source.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        f = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # somebody else's code: anything may come
        raise InputError(f"--network {source}: {type(error).__name__}: {error}") from error
    if not isinstance(f, nn.Module) or not getattr(f, "in_shape", None):
        raise InputError(f"--network {source}: must return an nn.Module with in_shape, (3, 64, 64) say; got {f!r:.200}")
    return f


def of_spnn(network: str, s: Settings, device: torch.device) -> Target:
    """One of an SPNN's networks."""
    model = SPNN.from_pretrained(s.spnn).requires_grad_(False)
    attributes = model.notes.get("attributes")
    if network == "pinv":
        f = PseudoInverse(model.to(device))
        return Target(network, f, 1.0, {"closed form g(y)": lambda y, x0: model(y)}, attributes)
    if network == "completion-inverse":
        f = CompletionInverse(model).to(device)
        return Target(network, f, 0.1, {"closed form G(y)": lambda y, x0: f.encode(y)}, attributes)

    def in_moves(y: Tensor, x0: Tensor) -> Tensor:
        move, far = SPNNOperator(model).towards(y), x0.new_ones(len(x0), dtype=torch.bool)
        for _ in range(20):
            x0 = guide(move(x0), x0, far, 1.0, max_move=0.15)
        return x0

    closed: Closed = {
        "closed form g'(y)": lambda y, x0: model.pinv(y),
        "NLBP": lambda y, x0: model.back_project(x0, y),
        "NLBP in 20 short moves": in_moves,
    }
    return Target(network, model.to(device), 0.03, closed, attributes)


def load_targets(network: str, s: Settings, device: torch.device) -> list[Target]:
    """The network called ``network`` (see invert.py), frozen, on ``device``: one target, or one for each space of
    StyleGAN's.

    Raises:
        InputError: an unknown name, weights that cannot be read, or a network that does not run on its own in_shape.
    """
    if ":" in network:
        targets = [Target(network, imported(network))]
    elif network not in READY:
        hint = nearest(network, READY)
        raise InputError(f"--network {network}: expected {', '.join(READY)} or package.module:factory{hint}")
    elif network == "stylegan":
        generator = load_generator(s.weights).to(device)
        noise = generator.draw_noise(1, torch.Generator().manual_seed(s.seed)) if s.noise == "fixed" else None
        targets = [Target(f"stylegan {space}", Latents(generator, space, noise, s.bf16)) for space in s.spaces]
    else:
        targets = [of_spnn(network, s, device)]
    for target in targets:
        target.f, target.in_shape = target.f.to(device).eval().requires_grad_(False), tuple(target.f.in_shape)
        try:
            with torch.no_grad():
                count, *out_shape = target.f(torch.zeros(2, *target.in_shape, device=device)).shape
            if count != 2:
                raise ValueError(f"2 inputs gave an output of shape {(count, *out_shape)}")
        except Exception as error:
            shape = target.in_shape
            raise InputError(f"--network {network}: does not take inputs of shape {shape}: {error}") from error
        target.out_shape = tuple(out_shape)
        if target.from_image:
            target.bounds, target.x_lr = (-1.0, 1.0), min(target.x_lr, 0.03)
        target.x_lr = target.x_lr if s.x_lr is None else s.x_lr
    return targets


def spnn_beside(target: Target, s: Settings, device: torch.device) -> Closed:
    """What an SPNN of the same size makes of an image's own logits, as images, for latents of StyleGAN."""
    try:
        model = SPNN.from_pretrained(s.spnn).to(device).requires_grad_(False)
    except InputError:
        return {}
    if not isinstance(target.f, Latents) or tuple(model.in_shape) != target.out_shape:
        return {}
    return {
        "SPNN, g'(g(x))": lambda y, x0: model.pinv(model(y)),
        "SPNN, NLBP of the start": lambda y, x0: model.back_project(target.f(x0), model(y)),
    }


# --- Starts ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(f: nn.Module, x: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """f of every input, (N, ...), on the CPU."""
    return torch.cat([f(batch.to(device)).cpu() for batch in x.split(batch_size)])


@torch.no_grad()
def starts(target: Target, y: Tensor, s: Settings, loss: Loss, device: torch.device) -> Tensor:
    """Where searches for the images y (B, 3, S, S) begin, (B, ...), on the CPU; zero if there are no latents."""
    latents, draws = isinstance(target.f, Latents), torch.Generator().manual_seed(s.seed)
    if s.start == "average" and latents:
        return target.f.average().cpu().repeat(len(y), 1)
    if s.start != "best":
        return torch.zeros(len(y), *target.in_shape)
    drawn = target.f.draw(s.draws, draws).cpu() if latents else torch.randn(s.draws, *target.in_shape, generator=draws)
    pictures = outputs(target.f, drawn, s.batch_size, device).split(s.batch_size)
    losses = [torch.cat([loss(p.to(device), one.to(device).expand_as(p)).cpu() for p in pictures]) for one in y]
    return drawn[torch.stack(losses).argmin(1)]


# --- Problems: wanted outputs and starts -----------------------------------------------------------------------------


def named_images(data: Path | None, count: int | None) -> dict[str, Path]:
    """``count`` images of a folder or file, or all, by a name for their results. Raises InputError: there are none."""
    if data is None:
        raise InputError("--data: this network needs an image or a folder of images")
    paths = find_images(data)[:count]
    return dict(zip(image_names(paths, data), paths, strict=True))


def read_images(data: Path | None, size: int | None, count: int | None) -> tuple[list[str], Tensor | None]:
    """Names and images (N, 3, S, S) in [-1, 1] of a folder or file; none if the network has no image on either side."""
    if size is None:
        return [], None
    named = named_images(data, count)
    paths = tqdm(named.values(), desc="images", unit="image", leave=False, disable=None)
    return list(named), torch.stack([load_image(path, size) for path in paths])


def problem_source(
    target: Target, images: Tensor | None, s: Settings, loss: Loss, device: torch.device
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """What `inversion.train_mapping` draws from: (y, x0) of random pairs of images, or of random inputs."""
    goals = outputs(target.f, images, s.batch_size, device) if target.from_image else images

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if goals is None:
            x = torch.randn(count, *target.in_shape, generator=generator).to(device)
            with torch.no_grad():
                return target.f(x), torch.zeros_like(x)
        y = goals[torch.randint(len(goals), (count,), generator=generator)]
        if target.from_image:
            start = images[torch.randint(len(images), (count,), generator=generator)]
        else:
            start = starts(target, y, s, loss, device)
        return y.to(device), start.to(device)

    return draw


class Problems(NamedTuple):
    """N inversions to measure.

    Attributes:
        y: wanted outputs, and ``wanted``, the images (or inputs) that they belong to.
        x0: starts; None if the network's outputs are images.
    """

    names: list[str]
    y: Tensor
    x0: Tensor | None
    wanted: Tensor


def fixed_problems(
    target: Target, names: list[str], images: Tensor | None, count: int, s: Settings, device: torch.device
) -> Problems:
    """The problems of an evaluation: each image is moved to the output of the one that follows in a random order."""
    generator = torch.Generator().manual_seed(s.seed)
    if images is None:
        wanted = torch.randn(count, *target.in_shape, generator=generator)
        y = outputs(target.f, wanted, s.batch_size, device)
        return Problems([str(i) for i in range(count)], y, torch.zeros_like(wanted), wanted)
    if target.to_image:
        return Problems(names, images, None, images)
    if len(images) < 2:
        raise InputError("--data: one image has no other one to be moved to; two are enough")
    order = torch.randperm(len(images), generator=generator)
    following = torch.empty_like(order)
    following[order] = order.roll(-1)  # a cycle, so nobody gets its own
    wanted = images[following]
    return Problems(names, outputs(target.f, wanted, s.batch_size, device), images, wanted)


# --- Losses ----------------------------------------------------------------------------------------------------------


@functools.cache
def lpips_or_none(device: torch.device, size: int) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018), or None, said in one line, if its weights cannot be had or images are too small."""
    lpips = load_lpips(device, get_logger("invert"), size)
    return None if lpips is None else lpips.requires_grad_(False)


def load_vgg(device: torch.device) -> nn.Sequential:
    """VGG-16's convolutions with ImageNet's weights. Raises InputError if they cannot be had."""
    import torchvision

    try:
        vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1")
    except Exception as error:  # torch.hub fetches them: any network error may come
        file = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
        raise InputError(f"--loss vgg: VGG-16's weights cannot be had ({error}); put them at {file}") from None
    return vgg.features.eval().requires_grad_(False).to(device)


def make_loss(target: Target, s: Settings, device: torch.device) -> Loss:
    """Mean squared error; for images plus LPIPS, or VGG's features as Image2StyleGAN has them, by ``--loss``.

    Raises:
        InputError: weights that were asked for cannot be had.
    """
    if not target.to_image and s.loss in ("lpips", "vgg"):
        raise InputError(f"--loss {s.loss}: compares images, and {target.name} gives none from something else")
    if len(s.perceptual_weight) not in (1, len(s.vgg_layers) if s.loss == "vgg" else 1):
        raise InputError("--perceptual_weight: one, or one for each layer of --loss vgg")
    if not target.to_image or s.loss == "mse":
        return squared_error
    if s.loss == "vgg":
        vgg = load_vgg(device)
        if not s.vgg_layers or max(s.vgg_layers) >= len(vgg):
            raise InputError(f"--vgg_layers: must be of 0 to {len(vgg) - 1}")
        weights = s.perceptual_weight * (len(s.vgg_layers) if len(s.perceptual_weight) == 1 else 1)
        return FeatureDistance(vgg, dict(zip(s.vgg_layers, weights, strict=True)))
    lpips = lpips_or_none(device, target.img_size)
    if lpips is None and s.loss == "lpips":
        raise InputError("--loss lpips: cannot be had, see above; use --loss mse, or auto, which goes on without")
    return squared_error if lpips is None else perceptual_loss(lpips, s.perceptual_weight[0])
