"""Invert a network: by optimisation, through a learned landscape, and in closed form if it has one.

    python invert.py find --data portrait.png --out check_points/found           # its latent in StyleGAN
    python invert.py find --morph a.safetensors b.safetensors --out check_points/morph
    python invert.py train --data data/faces_1k --out check_points/landscape     # a landscape for later inversions
    python invert.py eval --data data/heldout --theta check_points/landscape/theta.safetensors --out check_points/table

Each goes on with --resume where it was stopped. The network, --network:

    stylegan            StyleGAN v1's generator (--weights): an image from a latent in one of --spaces, z, w or w+.
    g                   an SPNN's classifier: an image from the logits of another one. The baseline of back-projection.
    pinv                its pseudo-inverse g': logits from an image.
    completion-inverse  its G^-1: logits and latents, as one vector, from an image.
    package.module:factory
                        any other: ``factory()`` returns an nn.Module with ``in_shape``, the shape of one input. This
                        imports, and so runs, that module.

If the input is an image, starts are images of --data and wanted outputs those of other images. If the output is one,
wanted outputs are images of --data and starts are --start. Otherwise wanted outputs are those of standard normal
inputs, starts are zero, and --data is not needed.
"""

import dataclasses
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import load_strictly, read_weights, write_weights
from DDNM.guided_diffusion.guidance import guide
from DDNM.guided_diffusion.inputs import fingerprint, image_names, load_lpips
from DDNM.guided_diffusion.results import as_saved, contact_sheet, contents, picture, write_csv
from images import find_images, grid, load_image, save_image
from inversion import FeatureDistance, Inversion, Loss, MappingNet, invert, invert_through, squared_error, train_mapping
from judge import load_judge
from logger import MetricsTable, format_table, get_logger, plot_curves
from loop import START_ANEW, STATE_NAME, Loop, Run, check_settings, load_state, open_run, save_state
from metrics import agreement, mean_of, psnr
from models import SPNN, concatenated
from operators import SPNNOperator
from stylegan import SPACES, Latents, load_generator
from utils import (
    InputError,
    clock,
    json_values,
    nearest,
    option,
    parse,
    peak_gib,
    read_json,
    run_command,
    seed_everything,
    write_json,
)

FACES = Path(__file__).resolve().parent / "DDNM" / "exp" / "logs" / "faces"
READY = ("g", "pinv", "completion-inverse", "stylegan")
SHEET_ROWS, SIDE = 6, 256  # of a sheet, and of its pictures
SEARCHES = "searches"  # folder of searches, whole or under way
SAVE_STEPS = 100  # between two saves of a running search
FREE = {"out", "device", "resume", "overwrite", "spnn", "weights"}  # a run may go on with others; `identity` decides
STALE = ("results.json", "curves.*", "sheet.png", "metrics.csv", "frame_[0-9]*.png", "log.txt", f"{SEARCHES}/*.pth")
Batch = tuple[Sequence[str], Tensor, Tensor]  # names, wanted outputs and starts, on the device of the search
Found = tuple[Inversion | None, float]  # a search, and the seconds it took
Thetas = Mapping[str, tuple[MappingNet, dict]]  # with their notes, by a name for the table
NETWORK = f"{', '.join(READY)}, or package.module:factory (is imported)"


@dataclass
class Settings:
    """Of every command. The functions here take a device that is one, no "auto"."""

    out: Path = option(..., "result folder")
    data: Path | None = option(None, "an image, or a folder of images, flat or nested")
    images: int | None = option(None, "take this many of them, or of eval's random problems (all; 100)", 1)
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
    batch_size: int = option(16, "samples at once", 1)
    overwrite: bool = option(False, "replace the results in a folder that has some")
    resume: bool = option(False, "go on with what is in --out")
    seed: int = option(0, "of weights and draws", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


@dataclass
class Find:
    """Of find."""

    network: str = option("stylegan", NETWORK)
    steps: int = option(1000, "in each space", 1)
    morph: tuple[Path, ...] | None = option(None, "two latents, to mix instead of finding one")
    frames: int = option(20, "from the first to the second", 1, 10_000)


@dataclass
class Train:
    """Of train."""

    network: str = option("g", NETWORK)
    buffers: int = option(24, "replay buffers; 500 in the paper", 1)
    samples: int = option(16, "inversions per buffer", 1, 100_000)
    steps: int = option(20, "steps of an inversion", 1)
    z_lr: float = option(0.1, "Adam on z", 1e-12)
    lr: float = option(1e-4, "AdamW on theta", 1e-12)
    weight_decay: float = option(0.1, "AdamW on theta", 0.0)
    width: int = option(16, "channels of theta's first layer", 1, 1 << 16)


@dataclass
class Eval:
    """Of eval."""

    network: str = option("g", NETWORK)
    theta: tuple[Path, ...] | None = option(None, "weights of mapping nets, of several seeds perhaps: a row each")
    steps: tuple[int, ...] = option((20, 200), "of plain optimisation: a row each, of the best that one search has by "
                                    "then", 1)  # fmt: skip
    theta_steps: int = option(20, "through the landscape", 1)
    judge: Path | None = option(None, "weights of the independent judge; default: the demo's if it fits")


# --- The network that is inverted ------------------------------------------------------------------------------------


class Inverse(nn.Module):
    """An SPNN's g', logits (B, d) -> images; ``completed`` its G^-1, from logits and latents as one vector, (B, D)."""

    def __init__(self, model: SPNN, completed: bool):
        super().__init__()
        self.model, self.latents = model, model.complete(torch.zeros(1, *model.in_shape)).z if completed else []
        self.sizes = [model.num_classes, *(0 if z is None else z.numel() for z in self.latents)]
        self.in_shape = (sum(self.sizes),)

    def forward(self, v: Tensor) -> Tensor:
        y, *flat = v.split(self.sizes, dim=1)
        pairs = zip(flat, self.latents, strict=True)
        return self.model.pinv(y, [None if z is None else part.unflatten(1, z.shape[1:]) for part, z in pairs] or None)


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
    if s.start == "zero" or not isinstance(target.f, Latents):
        return torch.zeros(len(y), *target.in_shape)
    if s.start == "average":
        return target.f.average().cpu().repeat(len(y), 1)
    drawn = target.f.draw(s.draws, torch.Generator().manual_seed(s.seed)).cpu()
    pictures = outputs(target.f, drawn, s).split(s.batch_size)
    losses = [torch.cat([loss(p.to(s.device), one.to(s.device).expand_as(p)).cpu() for p in pictures]) for one in y]
    return drawn[torch.stack(losses).argmin(1)]


def named_images(data: Path | None, count: int | None) -> dict[str, Path]:
    """``count`` images of a folder or file, or all, by a name for their results. Raises InputError: there are none."""
    if data is None:
        raise InputError("--data: this network needs an image or a folder of images")
    paths = find_images(data)[:count]
    return dict(zip(image_names(paths, data), paths, strict=True))


class Problems(NamedTuple):
    """N inversions.

    Attributes:
        files: of the images that they come from, by name.
        y: wanted outputs, and ``wanted``, the images (or inputs) that they belong to.
        x0: starts; None if the network's outputs are images.
    """

    names: list[str]
    files: Mapping[str, Path]
    y: Tensor
    wanted: Tensor
    x0: Tensor | None = None


def load_problems(target: Target, s: Settings) -> Problems:
    """What --data asks for: each image moved to the output of the one that follows in a random order, or found.

    Raises InputError: no images, or one where another one is needed.
    """
    generator = torch.Generator().manual_seed(s.seed)
    if target.img_size is None:
        wanted = torch.randn(s.images if s.images is not None else 100, *target.in_shape, generator=generator)
        return Problems(list(map(str, range(len(wanted)))), {}, outputs(target.f, wanted, s), wanted, wanted * 0)
    named = named_images(s.data, s.images)
    paths = tqdm(named.values(), desc="images", unit="image", leave=False, disable=None)
    names, images = list(named), torch.stack([load_image(path, target.img_size) for path in paths])
    if target.to_image:
        return Problems(names, named, images, images)
    if len(images) < 2:
        raise InputError("--data: one image has no other one to be moved to; two are enough")
    order = torch.randperm(len(images), generator=generator)
    following = torch.empty_like(order)
    following[order] = order.roll(-1)  # a cycle, so nobody gets its own
    wanted = images[following]
    return Problems(names, named, outputs(target.f, wanted, s), wanted, images)


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


# --- Files -----------------------------------------------------------------------------------------------------------


def identity(target: Target) -> dict[str, str | None]:
    """What tells a network from others."""
    return {"network": target.name, "weights of the network": fingerprint(target.f)}


def begin(s: Settings, own, target: Target, run: Run, files: Mapping[str, Path], result: str, *free: str) -> None:
    """Write settings.json. What an earlier run wrote goes, unless it goes on with these settings.

    Raises InputError: the folder holds something else, or a run that differs in more than `FREE` and ``free`` settings,
    or in what one of the ``files`` holds.
    """
    given = {"command": type(own).__name__.lower(), **identity(target), **vars(s), **vars(own)}
    decisive = {key: value for key, value in given.items() if key not in (*FREE, *free)}
    run.find_state(decisive, s.resume, s.overwrite, s.out / result, alone=True)
    known = {} if run.state is None else run.state["settings"].get("contents", {})
    told = dict(zip(files, contents(files.values()), strict=True))
    if changed := [name for name in told if known.get(name, told[name]) != told[name]]:
        raise InputError(f"{files[changed[0]]}: not what the run in {s.out} found of that name; {START_ANEW}")
    run.settings["contents"] = known | told
    run.begin("invert", given, (result, *STALE))
    if run.state is None or not isinstance(own, Train):
        save_state(s.out / STATE_NAME, {"settings": run.settings, "stage": given["command"]})


def load_thetas(paths: Sequence[Path], target: Target, device: torch.device) -> Thetas:
    """The thetas at ``paths``. Raises InputError: one is damaged, of another network, or there twice."""
    thetas = {}
    for path in paths:
        state, notes = read_weights(path), read_json(path.with_suffix(".json"))
        check_settings(notes, identity(target), path, "another --theta")
        theta = MappingNet(**notes["theta"])
        load_strictly(theta, state, path)
        name = "landscape" if len(paths) == 1 else f"landscape of seed {notes['settings']['seed']}"
        if name in thetas:
            raise InputError(f"--theta {path}: {name} is there twice")
        thetas[name] = theta.to(device).eval().requires_grad_(False), notes
    return thetas


# --- train -----------------------------------------------------------------------------------------------------------


def train(s: Settings, own: Train, run: Run) -> None:
    """Train theta, and write it with its table and curves."""
    target = load_targets(own.network, s)[-1]
    loss, problems = make_loss(target, s), load_problems(target, s)
    seed_everything(s.seed)
    theta = MappingNet(target.in_shape, own.width, target.x_lr / own.z_lr, target.bounds).to(run.device)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        if target.img_size is None:  # anew: what eval measures are the fixed ones
            x = torch.randn(count, *target.in_shape)
            return outputs(target.f, x, s).to(run.device), torch.zeros_like(x, device=run.device)
        goals, others = torch.randint(len(problems.y), (2, count))
        y = problems.y[goals]
        x0 = starts(target, y, s, loss) if problems.x0 is None else problems.x0[others]
        return y.to(run.device), x0.to(run.device)

    begin(s, own, target, run, problems.files, "theta.safetensors", "buffers")
    peak_gib(run.device, reset=True)

    def saved(loop: Loop) -> None:
        notes = {**identity(target), "settings": {**vars(s), **vars(own)}, "theta": theta.config}
        notes |= {"buffers": loop.done, "seconds": loop.seconds, "peak_gib": peak_gib(run.device)}
        write_weights(s.out / "theta.safetensors", theta.state_dict())
        write_json(s.out / "theta.json", notes)

    settings = {name: value for name, value in vars(own).items() if name not in ("network", "width")}
    train_mapping(theta, target.f, draw, loss, run=run, clip=s.clip, batch_size=s.batch_size, saved=saved, **settings)


# --- Searches and their figures --------------------------------------------------------------------------------------


def warn(method: str, names: Sequence[str], search: Inversion) -> None:
    """A line for each sample that ended early."""
    for name, curve in zip(names, search.curve.unbind(1), strict=True):
        if broken := (~curve.isfinite()).nonzero().flatten().tolist():
            get_logger("invert").warning("%s: %s: loss or gradient not finite at step %d", method, name, broken[0])


@dataclass
class Searches:
    """Searches by optimisation. Each is saved every `SAVE_STEPS`, and goes on from there after a resume."""

    s: Settings
    run: Run
    loss: Loss

    def __call__(self, name: str, target: Target, batch: Batch, steps: int, after: Found = (None, 0)) -> Found:
        """Search for a batch's wanted outputs from its starts, or go on ``after`` fewer steps.

        What a part draws, StyleGAN's noise say, is of its own seed, so that a search that is resumed finds the same.

        Args:
            name: of its file, beside the steps. A file of another batch counts as none.
        """
        problems, y, x0 = batch
        file, (search, seconds) = self.s.out / SEARCHES / f"{name}_{steps}.pth", after
        saved = load_state(file) if file.is_file() else {}
        if saved.get("problems") == list(problems):
            search, seconds = Inversion(**saved["search"]), saved["seconds"]
        done = 0 if search is None else len(search.curve) - 1
        with tqdm(total=steps, initial=done, desc=target.name, unit="step", leave=False, disable=None) as bar:
            while done < steps:
                began, end = clock(y.device), min(done + SAVE_STEPS, steps)
                seed_everything(self.s.seed + done)
                search = invert(target.f, y, x0, self.loss, end, target.x_lr, self.s.clip, target.bounds,
                                on_step=lambda _: bar.update(), after=search)  # fmt: skip
                seconds, done = seconds + clock(y.device) - began, end
                bar.set_postfix_str(f"loss {search.loss.mean().item():.4g}")
                save_state(file, {"problems": list(problems), "seconds": seconds, "search": search.tensors()})
                self.run.stop_if_asked()
        warn(f"{target.name}, {steps} steps", problems, search)
        return search, seconds


def picture_figures(pictures: Tensor, wanted: Tensor, s: Settings) -> dict[str, Tensor]:
    """PSNR in dB of images (N, 3, S, S) to others, and LPIPS if it can be had."""
    found, lpips = {"psnr": psnr(pictures, wanted)}, lpips_or_none(s.device, pictures.shape[-1])
    if lpips is not None:
        pairs = zip(pictures.split(s.batch_size), wanted.split(s.batch_size), strict=True)
        with torch.no_grad():
            found["lpips"] = torch.cat([lpips(a.to(s.device), b.to(s.device)).flatten().cpu() for a, b in pairs])
    return found


COLUMNS = {
    "loss": ("loss", ".4f"),
    "error": ("error", ".3g"),
    "psnr": ("PSNR", ".1f"),
    "lpips": ("LPIPS", ".3f"),
    "picture_error": ("as a picture", ".3g"),
    "distance": ("distance", ".3f"),
    "judge": ("judge", ".3f"),
    "seconds": ("s/image", ".3f"),
}
LANDSCAPES = {
    "steps": ("steps", ".0f"),
    "loss": ("loss", ".4g"),
    "plain_steps": ("plain steps to it", ".0f"),
}


def write_curves(out: Path, curves: dict[str, Sequence[float]]) -> None:
    """curves.csv and curves.png: losses after each number of steps, by name."""
    rows = enumerate(itertools.zip_longest(*curves.values()))
    columns = ("step", *(f"loss_{name}" for name in curves))
    write_csv(out / "curves.csv", [dict(zip(columns, (step, *row), strict=True)) for step, row in rows])
    plot_curves(out / "curves.csv", out / "curves.png")


def draw_sheet(out: Path, columns: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> None:
    """sheet.png: the first of the images (N, 3, S, S) of each column, under its name."""
    rows = [[picture(image, SIDE) for image in row] for row in list(zip(*columns.values(), strict=True))[:SHEET_ROWS]]
    contact_sheet(out / "sheet.png", list(columns), rows, names[:SHEET_ROWS])


# --- eval ------------------------------------------------------------------------------------------------------------


def find_judge(path: Path | None, target: Target, device: torch.device) -> nn.Module | None:
    """The given judge, or the demo's if it fits. Raises InputError if the given one does not."""
    judge = load_judge(path or FACES / "judge.safetensors")
    if judge.img_size == target.img_size and target.attributes in (None, list(judge.attributes)):
        return judge.to(device).requires_grad_(False)
    if path is not None:
        sees = f"{judge.img_size}x{judge.img_size} images, {target.name} has {target.img_size}"
        raise InputError(f"--judge {path}: sees {sees}; or they know other attributes")
    return None


def ways(
    targets: Sequence[Target], problems: Problems, thetas: Thetas, beside: Closed, own: Eval, search: Searches
) -> Iterator[tuple]:
    """Every way of inverting the targets; through ``thetas`` and ``beside`` (`spnn_beside`) the last one alone.

    Yields:
        Its name in the table; what makes outputs of what it finds; where it starts, x0, and what it finds, x, (N, ...)
        on the CPU; the seconds it took; the losses of a search, (T + 1, N), or None.
    """
    s, device = search.s, search.run.device

    def joined(found: Sequence[Found]) -> tuple[Tensor, float, Tensor]:
        x, curve = [one.x.cpu() for one, _ in found], [one.curve.cpu() for one, _ in found]
        return torch.cat(x), sum(seconds for _, seconds in found), torch.cat(curve, dim=1)

    for place, target in enumerate(targets):
        f, label = target.f, f"{target.f.space}, " if isinstance(target.f, Latents) else ""
        seed_everything(s.seed)  # the best start depends on noise drawn anew
        x0 = problems.x0 if problems.x0 is not None else starts(target, problems.y, s, search.loss)
        yield f"{label}start", f, x0, x0, None, None
        parts = [slice(i, i + s.batch_size) for i in range(0, len(x0), s.batch_size)]
        batches = [(problems.names[part], problems.y[part].to(device), x0[part].to(device)) for part in parts]
        forms = [(name, f, form) for name, form in target.closed_form.items()]
        if target is targets[-1]:
            forms += [(name, nn.Identity(), form) for name, form in beside.items()]
        for name, of_x, form in forms:
            began = clock(device)
            with torch.no_grad():
                x = torch.cat([form(y, start).cpu() for _, y, start in batches])
            yield name, of_x, x0, x, clock(device) - began, None
        found: list[Found] = [(None, 0.0)] * len(batches)
        for steps in sorted(set(own.steps)):
            found = [search(f"{place}_{i}", target, batch, steps, found[i]) for i, batch in enumerate(batches)]
            yield f"{label}optimisation, {steps} steps", f, x0, *joined(found)
    for name, (theta, notes) in thetas.items():
        seed_everything(s.seed)
        found, method = [], f"{label}{name}, {own.theta_steps} steps"
        z_lr, clip = (float(notes["settings"][key]) for key in ("z_lr", "clip"))
        for names, y, start in tqdm(batches, name, leave=False, disable=None):
            began = clock(device)
            through = invert_through(theta, f, y, start, search.loss, own.theta_steps, z_lr, clip)
            found.append((through, clock(device) - began))
            warn(method, names, through)
        yield method, f, x0, *joined(found)


@torch.no_grad()
def figures_of(
    target: Target, problems: Problems, x: Tensor, x0: Tensor, output: Tensor, judge: nn.Module | None, s: Settings
) -> dict[str, Tensor]:
    """The figures of each sample: name -> (N,).

    ``error`` is mean |f(x) - y|, ``picture_error`` the same once x is an 8-bit picture, ``distance`` the root mean
    square of x - x0, ``judge`` the share of attributes on which the judge says the same of the picture (x, or f(x))
    and of the one that y belongs to. Of pictures f(x) there are ``psnr`` in dB, and ``lpips`` if it can be had.
    """
    y = problems.y
    found = {"error": (output - y).abs().flatten(1).mean(1)}
    shown, _ = as_saved(x if target.from_image else output)
    if target.from_image:
        found["picture_error"] = (outputs(target.f, shown, s) - y).abs().flatten(1).mean(1)
    if target.to_image:
        found |= picture_figures(shown, y, s)
    else:
        found["distance"] = (x - x0).square().flatten(1).mean(1).sqrt()
    if judge is not None:
        found["judge"] = agreement(outputs(judge, shown, s), outputs(judge, problems.wanted, s))
    return found


def means(figures: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Means of figures (N,) over the finite ones, and 95 % intervals of those that samples differ in."""
    row: dict[str, float | None] = {}
    for name, values in figures.items():
        finite = values[values.isfinite()].double()
        row[name] = finite.mean().item() if len(finite) else None
        if name in ("psnr", "lpips", "judge"):
            row[f"{name}_low"], row[f"{name}_high"] = mean_of(finite)[1:] if len(finite) > 1 else (None, None)
    return row


def compared(curves: Mapping[str, Sequence[float]]) -> list[dict]:
    """For each landscape, from mean losses by step: what it reaches, and how many plain steps reach that."""
    told = []
    for name, through in curves.items():
        if "landscape" in name:
            plain = curves.get(name.partition("landscape")[0] + "optimisation", ())
            steps = next((step for step, loss in enumerate(plain) if loss <= min(through)), None)
            told.append({"theta": name, "steps": len(through) - 1, "loss": min(through), "plain_steps": steps})
    return told


def evaluate(s: Settings, own: Eval, run: Run) -> None:
    """Measure every way of inverting the network, and write tables, curves and pictures."""
    targets = load_targets(own.network, s)
    target = targets[-1]
    thetas = load_thetas(own.theta or (), target, run.device)
    judge = find_judge(own.judge, target, run.device)
    search, problems = Searches(s, run, make_loss(target, s)), load_problems(target, s)
    beside = spnn_beside(target, s)
    begin(s, own, target, run, problems.files, "results.csv", "steps", "theta", "theta_steps", "judge")
    rows, images, curves, shown = [], [], {}, {}
    for method, f, x0, x, seconds, curve in ways(targets, problems, thetas, beside, own, search):
        seed_everything(s.seed)  # noise drawn anew is the same for all ways, and after a resume
        output = outputs(f, x, s)
        figures = figures_of(target, problems, x, x0, output, judge, s)
        rows.append({"method": method, **means(figures), "seconds": seconds and seconds / len(x)})
        images += [{"method": method, "image": image, **{key: of[i].item() for key, of in figures.items()}}
                   for i, image in enumerate(problems.names)]  # fmt: skip
        shown[method] = x if target.from_image else output
        if curve is not None and (whole := curve.isfinite().all(0)).any():
            # a shorter plain run is the beginning of the next, which takes its place
            curves[method.rpartition(",")[0]] = curve[:, whole].mean(1).tolist()
    told = compared(curves)
    record = {"settings": {**vars(s), **vars(own)}, "thetas": [notes for _, notes in thetas.values()]}
    write_json(s.out / "results.json", json_values({**record, "landscapes": told, "methods": rows, "images": images}))
    write_csv(s.out / "results.csv", rows)
    if curves:
        write_curves(s.out, curves)
    if target.img_size is not None:
        columns = {name: of for name, of in shown.items() if target.from_image or not name.endswith("start")}
        columns["whose output is wanted" if target.from_image else "wanted"] = problems.wanted
        draw_sheet(s.out, columns, problems.names)
    print(format_table(rows, "method", COLUMNS) + (f"\n\n{format_table(told, 'theta', LANDSCAPES)}" if told else ""))


# --- find ------------------------------------------------------------------------------------------------------------


def find(s: Settings, own: Find, run: Run) -> None:
    """Find the inputs of images, one batch after another, and write each with its picture."""
    if own.morph is not None:
        return morph(s, own, run)
    if list(s.spaces) != sorted(set(s.spaces), key=SPACES.index):
        raise InputError(f"--spaces {' '.join(s.spaces)}: a search can only go on from z to w to w+")
    targets = load_targets(own.network, s)
    target = targets[-1]
    if not target.to_image:
        raise InputError(f"--network {own.network}: gives no image; use eval")
    paths, loss = named_images(s.data, s.images), make_loss(target, s)
    begin(s, own, target, run, paths, "results.csv", "images")
    table, search = MetricsTable(s.out / "results.csv"), Searches(s, run, loss)
    left = [name for name in paths if name not in {row["image"] for row in table.rows}]
    for start in tqdm(range(0, len(left), s.batch_size), "batches", disable=None):
        chosen = left[start : start + s.batch_size]
        y = torch.stack([load_image(paths[name], target.img_size) for name in chosen])
        seed_everything(s.seed)  # the best start depends on noise drawn anew
        x, parts = starts(targets[0], y, s, loss).to(run.device), []
        for number, of in enumerate(targets):  # space by space, each from the best of the one before
            if parts:
                x = of.f.enter(targets[number - 1].f.w_plus(parts[-1][0].x.to(run.device))).detach()
            parts.append(search(str(number), of, (chosen, y.to(run.device), x), own.steps))
        keep(target, chosen, y, parts, s, table)
    curves = {name: load_file(s.out / f"{name}.safetensors")["curve"].tolist() for name in paths}
    if len(curves) > 10:
        curves = {"mean": torch.tensor(list(curves.values())).nanmean(0).tolist()}
    write_curves(s.out, curves)
    names = list(paths)[:SHEET_ROWS]
    wanted, got = ([load_image(file(name), target.img_size) for name in names]
                   for file in (paths.get, lambda name: s.out / f"{name}.png"))  # fmt: skip
    apart = [(a - b).abs() - 1 for a, b in zip(wanted, got, strict=True)]
    draw_sheet(s.out, {"input": wanted, "found": got, "difference": apart}, names)
    print(format_table([row for row in table.rows if row["image"] in paths], "image", COLUMNS))


@torch.no_grad()
def keep(
    target: Target, names: Sequence[str], wanted: Tensor, parts: Sequence[Found], s: Settings, table: MetricsTable
) -> None:
    """Write each image and latent that was found, with the losses of all spaces, and a row of figures."""
    last, curves = parts[-1][0], torch.cat([search.curve.cpu() for search, _ in parts])
    x = last.x.cpu()
    pictures, _ = as_saved(outputs(target.f, x, s))
    figures = {"loss": last.loss.cpu(), **picture_figures(pictures, wanted, s)}
    for i, name in enumerate(names):
        row = {"image": name, **{key: of[i].item() for key, of in figures.items()}}
        latent = {"x": x[i], "curve": curves[:, i]}
        if isinstance(target.f, Latents):
            latent["w_plus"] = target.f.w_plus(x[i : i + 1].to(s.device))[0]
        save_image(pictures[i], s.out / f"{name}.png")
        write_weights(s.out / f"{name}.safetensors", latent)
        table.append({**row, "seconds": sum(seconds for _, seconds in parts) / len(names)})


@torch.no_grad()
def morph(s: Settings, own: Find, run: Run) -> None:
    """Write the frames between two latents that `find` found, the mix of their w+ going from 0 to 1, and all as one."""
    if len(own.morph) != 2:
        raise InputError(f"--morph: takes two latents, got {len(own.morph)}")
    target = load_targets("stylegan", dataclasses.replace(s, spaces=("w+",)))[0]
    ends, shape = [], (target.f.generator.layers, target.f.generator.dim)
    for path in own.morph:
        w_plus = read_weights(path).get("w_plus", torch.empty(0))
        if tuple(w_plus.shape) != shape:
            raise InputError(f"--morph {path}: its w_plus has shape {tuple(w_plus.shape)}, the generator needs {shape}")
        ends.append(w_plus.float().flatten())
    begin(s, own, target, run, {}, "frames.png")
    mixes = torch.stack([ends[0].lerp(ends[1], i / own.frames) for i in range(own.frames + 1)])
    pictures = outputs(target.f, mixes, s).clamp(-1, 1)
    for i, frame in enumerate(pictures):
        save_image(frame, s.out / f"frame_{i:04d}.png")
    save_image(grid(pictures, 7), s.out / "frames.png")


# --- Command line ----------------------------------------------------------------------------------------------------

COMMANDS = {"find": (find, Find), "train": (train, Train), "eval": (evaluate, Eval)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(f"usage: invert.py {{{','.join(COMMANDS)}}} [--help] ...\n\n{__doc__}")
        return 0
    if command not in COMMANDS:
        raise InputError(f"{command or 'no command'}: expected {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    perform, kind = COMMANDS[command]
    s, own, _ = parse(f"invert.py {command}\n\n{__doc__}", Settings, kind, argv=argv[1:])
    with open_run(s.out, s.device, save_every=1, seed=s.seed) as run:
        perform(dataclasses.replace(s, device=str(run.device)), own, run)
        if perform is not train:  # which may always go on, with more buffers
            run.finish()
    return 0


if __name__ == "__main__":
    run_command(main)
