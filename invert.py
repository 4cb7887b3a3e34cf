"""Invert a network by optimisation, through a learned landscape, and in closed form where it has one.

    python invert.py train --data data/faces_1k --out check_points/landscape
    python invert.py eval --data data/heldout --out check_points/inversion \\
        --theta check_points/landscape/theta.safetensors

The network, --network:

    g                   an SPNN's classifier: an image from the logits of another one. The baseline of back-projection.
    pinv                its pseudo-inverse g': logits from an image.
    completion-inverse  its G^-1: logits and latents, as one vector, from an image.
    package.module:factory
                        any other: ``factory()`` returns an nn.Module with ``in_shape``, the shape of one input. This
                        imports, and so runs, that module.

Where the input is an image, starts are images of --data and wanted outputs those of other images. Where the output is
one, wanted outputs are images of --data and starts are zero. Otherwise wanted outputs are those of standard normal
inputs, starts are zero, and --data is not needed.
"""

import argparse
import csv
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import load_spnn, load_strictly, read_weights, write_weights
from data_loader import find_images, load_image, to_uint8
from DDNM.guided_diffusion.diffusion import Guidance, guide
from inversion import Loss, MappingNet, invert, invert_through, perceptual_loss, squared_error, train_mapping
from judge import load_judge
from logger import MetricsTable, get_logger, plot_curves
from metrics import agreement
from models import SPNN
from utils import (
    LARGEST_BATCH,
    LARGEST_SEED,
    LARGEST_WIDTH,
    InputError,
    atomic_write,
    nearest,
    number,
    resolve_device,
    run_command,
    seed_everything,
    write_json,
)

ROOT = Path(__file__).resolve().parent
FACES = ROOT / "DDNM" / "exp" / "logs" / "faces"
SHEET_ROWS = 6
SWITCH = argparse.BooleanOptionalAction


# --- The network that is inverted ------------------------------------------------------------------------------------


class PseudoInverse(nn.Module):
    """An SPNN's g', logits (B, d) -> images."""

    def __init__(self, model: SPNN):
        super().__init__()
        self.model = model
        self.in_shape = (model.num_classes,)

    def forward(self, y: Tensor) -> Tensor:
        return self.model.pinv(y)


class CompletionInverse(nn.Module):
    """An SPNN's G^-1 from logits and latents as one vector, (B, D) -> images; `encode` is G."""

    def __init__(self, model: SPNN):
        super().__init__()
        self.model = model
        with torch.no_grad():
            at_zero = model.complete(torch.zeros(1, *model.pinn.in_shape))
        self.shapes = [None if z is None else tuple(z.shape[1:]) for z in at_zero.z]
        self.in_shape = (self.encode(torch.zeros(1, *model.pinn.in_shape)).shape[1],)

    def encode(self, x: Tensor) -> Tensor:
        """``G(x)``, (B, D): the logits, then the latents in the order of the blocks."""
        with torch.no_grad():
            point = self.model.complete(x)
        return torch.cat([point.y, *(z.flatten(1) for z in point.z if z is not None)], dim=1)

    def forward(self, v: Tensor) -> Tensor:
        sizes = [self.model.num_classes, *(math.prod(s) for s in self.shapes if s is not None)]
        y, *flat = v.split(sizes, dim=1)
        parts = iter(flat)
        z = [None if s is None else next(parts).unflatten(1, s) for s in self.shapes]
        return self.model.pinv(y, latents=z)


@dataclass
class Target:
    """A network to invert, with what is known about it.

    Attributes:
        f: the network, frozen, in eval mode.
        in_shape, out_shape: of one input and one output.
        x_lr: Adam's default step on x.
        closed_form: inversions without optimisation, (y, x0) -> x, by name.
        bounds: range of x; None: none.
        attributes: names of the logits where the judge can be asked.
    """

    name: str
    f: nn.Module
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    x_lr: float
    closed_form: dict[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    bounds: tuple[float, float] | None = None
    attributes: Sequence[str] | None = None

    @staticmethod
    def _is_image(shape: tuple[int, ...]) -> bool:
        return len(shape) == 3 and shape[0] == 3 and shape[1] == shape[2]

    @property
    def from_image(self) -> bool:
        """Whether x is an image."""
        return self._is_image(self.in_shape)

    @property
    def to_image(self) -> bool:
        """Whether only f(x) is an image."""
        return not self.from_image and self._is_image(self.out_shape)

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
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        f = factory()
    except Exception as error:  # somebody else's code: anything may come
        raise InputError(f"--network {source}: {type(error).__name__}: {error}") from error
    shape = getattr(f, "in_shape", None)
    if not isinstance(f, nn.Module) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(
            f"--network {source}: the factory must return an nn.Module with in_shape, the shape of one input "
            f"such as (3, 64, 64); got a {type(f).__name__} with in_shape {shape!r}"
        )
    return f


READY = ("g", "pinv", "completion-inverse")


def load_target(network: str, spnn: str | Path, device: torch.device) -> Target:
    """The network called ``network`` (see the module's text), frozen, on ``device``.

    Raises:
        InputError: an unknown name, weights that cannot be read, or a network that does not run on its own in_shape.
    """
    if ":" in network:
        f, attributes, x_lr, closed = imported(network), None, None, {}
    elif network not in READY:
        hint = nearest(network, READY)
        raise InputError(f"--network {network}: expected {', '.join(READY)} or package.module:factory{hint}")
    else:
        model, notes = load_spnn(spnn)
        model.to(device).requires_grad_(False)
        attributes = notes.get("attributes")
        if network == "g":
            model.in_shape = model.pinn.in_shape
            f, x_lr = model, 0.03

            def in_moves(y: Tensor, x0: Tensor) -> Tensor:
                goal, rule = model.natural(y), Guidance(nlbp_stop_cond=0.0)
                for _ in range(20):
                    x0 = guide(model, x0, goal, 1.0, rule)
                return x0

            closed = {
                "closed form g'(y)": lambda y, x0: model.pinv(y),
                "NLBP": lambda y, x0: model.back_project(x0, y),
                "NLBP in 20 short moves": in_moves,
            }
        elif network == "pinv":
            f, x_lr, closed = PseudoInverse(model), 1.0, {"closed form g(y)": lambda y, x0: model(y)}
        else:
            f = CompletionInverse(model.cpu()).to(device)
            x_lr, closed = 0.1, {"closed form G(y)": lambda y, x0: f.encode(y)}
    f = f.to(device).eval().requires_grad_(False)
    in_shape = tuple(f.in_shape)
    try:
        with torch.no_grad():
            output = f(torch.zeros(2, *in_shape, device=device))
        if output.shape[0] != 2:
            raise ValueError(f"2 inputs gave an output of shape {tuple(output.shape)}")
    except Exception as error:
        raise InputError(f"--network {network}: does not take inputs of shape {in_shape}: {error}") from error
    target = Target(network, f, in_shape, tuple(output.shape[1:]), x_lr or 0.1, closed, None, attributes)
    if target.from_image:
        target.bounds, target.x_lr = (-1.0, 1.0), x_lr or 0.03
    return target


# --- Problems: wanted outputs and starts -----------------------------------------------------------------------------


def read_images(data: Path | None, size: int | None, count: int | None) -> tuple[list[str], Tensor | None]:
    """Names and images (N, 3, S, S) in [-1, 1] of a folder; none where the network has no image on either side.

    Raises:
        InputError: no folder given, nothing in it, or an image that cannot be read.
    """
    if size is None:
        return [], None
    if data is None:
        raise InputError("--data: this network needs a folder of images")
    paths = find_images(data)[:count]
    images = [load_image(path, size) for path in tqdm(paths, desc="images", unit="image", leave=False, disable=None)]
    return [path.stem for path in paths], torch.stack(images)


@torch.no_grad()
def outputs(f: nn.Module, x: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """f of every input, (N, ...), on the CPU."""
    return torch.cat([f(batch.to(device)).cpu() for batch in x.split(batch_size)])


def problem_source(
    target: Target, images: Tensor | None, batch_size: int, device: torch.device
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """What `inversion.train_mapping` draws from: (y, x0) of random pairs of images, or of random inputs."""
    goals = outputs(target.f, images, batch_size, device) if target.from_image else images

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if goals is None:
            x = torch.randn(count, *target.in_shape, generator=generator).to(device)
            with torch.no_grad():
                return target.f(x), torch.zeros_like(x)
        chosen = torch.randint(len(goals), (count,), generator=generator)
        if target.from_image:
            start = images[torch.randint(len(images), (count,), generator=generator)]
        else:
            start = torch.zeros(count, *target.in_shape)
        return goals[chosen].to(device), start.to(device)

    return draw


@dataclass
class Problems:
    """N inversions to measure: wanted outputs y and starts x0, and the images (or inputs) the outputs belong to."""

    names: list[str]
    y: Tensor
    x0: Tensor
    wanted: Tensor


def fixed_problems(
    target: Target, names: list[str], images: Tensor | None, count: int, seed: int, batch_size: int, device
) -> Problems:
    """The problems of an evaluation: each image is moved to the output of the one that follows in a random order."""
    generator = torch.Generator().manual_seed(seed)
    if images is None:
        wanted = torch.randn(count, *target.in_shape, generator=generator)
        y = outputs(target.f, wanted, batch_size, device)
        return Problems([str(i) for i in range(count)], y, torch.zeros_like(wanted), wanted)
    if target.to_image:
        return Problems(names, images, torch.zeros(len(images), *target.in_shape), images)
    if len(images) < 2:
        raise InputError("--data: one image has no other one to be moved to; two are enough")
    order = torch.randperm(len(images), generator=generator)
    following = torch.empty_like(order)
    following[order] = order.roll(-1)  # a cycle, so nobody gets its own
    wanted = images[following]
    return Problems(names, outputs(target.f, wanted, batch_size, device), images, wanted)


# --- Files -----------------------------------------------------------------------------------------------------------

TRAIN_FILES = ("theta.safetensors", "theta.json", "metrics.csv", "curves.png", "log.txt")
EVAL_FILES = ("results.json", "results.csv", "images.csv", "curves.csv", "curves.png", "sheet.png", "log.txt")


def check_folder(out: Path, overwrite: bool) -> None:
    """Raise InputError where the content of a result folder would be lost, or it is a file."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"--out {out}: not empty; give --overwrite or another folder")


def clear(out: Path, own: Sequence[str]) -> None:
    """Delete what an earlier run of the same command wrote, by name, and nothing else."""
    try:
        for name in own:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None


def settings_of(args: argparse.Namespace) -> dict:
    """The flags as JSON values."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items() if key != "run"}


def save_theta(path: Path, theta: MappingNet, notes: dict) -> None:
    """Write theta's weights, and its architecture with ``notes`` beside them as JSON."""
    write_json(path.with_suffix(".json"), {"theta": theta.config(), **notes})
    write_weights(path, theta.state_dict())


def load_theta(path: Path, target: Target) -> tuple[MappingNet, dict]:
    """The theta at ``path`` and its notes. Raises InputError where it is damaged or belongs to another network."""
    file = path.with_suffix(".json")
    state = read_weights(path)
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
        settings = notes["theta"]
        theta = MappingNet(**{**settings, "shape": tuple(settings["shape"])})
    except OSError as error:
        raise InputError(f"--theta {path}: cannot read its architecture {file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--theta {path}: {file} holds no architecture of a theta: {error!r}") from None
    if theta.shape != target.in_shape or notes.get("network") != target.name:
        raise InputError(
            f"--theta {path}: trained for {notes.get('network')} with inputs of shape {theta.shape}, "
            f"not for {target.name} with {target.in_shape}"
        )
    load_strictly(theta, state, path)
    return theta.eval().requires_grad_(False), notes


def make_loss(target: Target, use_lpips: bool, device: torch.device, log) -> Loss:
    """Mean squared error; for images plus LPIPS (Zhang et al. 2018) where wanted and its weights can be had."""
    if not target.to_image or not use_lpips:
        return squared_error
    from DDNM.main import load_lpips  # imports much, and only this needs it

    lpips = load_lpips(device, log)  # says so in one line where there is none
    if lpips is None:
        return squared_error
    return perceptual_loss(lpips.requires_grad_(False))


# --- train -----------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Train theta, and write it with its table and curves."""
    device = resolve_device(args.device)
    check_folder(args.out, args.overwrite)
    target = load_target(args.network, args.spnn, device)
    _, images = read_images(args.data, target.img_size, args.images)
    seed_everything(args.seed)
    x_lr = args.x_lr if args.x_lr is not None else target.x_lr
    try:
        theta = MappingNet(target.in_shape, args.width, x_lr / args.z_lr, target.bounds).to(device)
    except ValueError as error:
        raise InputError(f"--network {target.name}: {error}") from None
    clear(args.out, TRAIN_FILES)
    log = get_logger("invert", args.out)
    loss = make_loss(target, args.lpips, device, log)
    draw = problem_source(target, images, args.batch_size, device)
    count = sum(p.numel() for p in theta.parameters())
    log.info("inverting %s, theta has %s parameters, on %s", target.name, f"{count:,}", device)

    updates = args.updates or math.ceil((args.steps + 1) * args.samples / args.batch_size)
    table = MetricsTable(args.out / "metrics.csv")
    notes = {"network": target.name, "settings": settings_of(args)}
    started = time.perf_counter()
    with tqdm(total=args.buffers * (args.steps + updates), unit="step", dynamic_ncols=True, disable=None) as bar:
        history = train_mapping(
            theta,
            target.f,
            draw,
            loss,
            buffers=args.buffers,
            samples=args.samples,
            steps=args.steps,
            z_lr=args.z_lr,
            clip=args.clip,
            lr=args.lr,
            weight_decay=args.weight_decay,
            batch_size=args.batch_size,
            updates=updates,
            seed=args.seed,
            on_step=bar.update,
        )
        for row in history:
            seconds = time.perf_counter() - started
            bar.set_description(f"buffer {row['buffer']}, best loss {row['end_loss']:.3g}")
            table.append({"step": row["buffer"], **{k: v for k, v in row.items() if k != "buffer"}})
            save_theta(args.out / "theta.safetensors", theta, {**notes, "buffers": row["buffer"], "seconds": seconds})
    plot_curves(table.path, args.out / "curves.png")
    log.info("best loss of a trajectory: %.4g in the first buffer, %.4g in the last; %.1f minutes; %s",
             float(table.rows[0]["end_loss"]), float(table.rows[-1]["end_loss"]), seconds / 60, args.out)  # fmt: skip
    return 0


# --- eval ------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One method on all problems.

    Attributes:
        x: (N, ...).
        seconds: an image.
        curve: mean loss after each number of steps, over the samples that stay finite; None without steps.
        stopped: a line for each sample whose search ended early.
    """

    x: Tensor
    seconds: float
    curve: list[float] | None = None
    stopped: list[str] = field(default_factory=list)


def run_method(method: Callable, problems: Problems, batch_size: int, device: torch.device, label: str) -> Result:
    """Run a method over all problems in batches. It takes (y, x0) and returns x or an `inversion.Inversion`."""
    xs, curves, stopped, seconds = [], [], [], 0.0
    starts = range(0, len(problems.y), batch_size)
    for start in tqdm(starts, desc=label, unit="batch", leave=False, dynamic_ncols=True, disable=None):
        part = slice(start, start + batch_size)
        y, x0 = problems.y[part].to(device), problems.x0[part].to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        found = method(y, x0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        if isinstance(found, Tensor):
            xs.append(found.detach().cpu())
            continue
        xs.append(found.x.cpu())
        curves.append(found.curve.cpu())
        named = zip(problems.names[part], found.stopped.tolist(), strict=True)
        stopped += [f"{name}: loss or gradient not finite at step {step}" for name, step in named if step >= 0]
    curve = None
    if curves:
        whole = torch.cat(curves, dim=1)  # (T + 1, N)
        whole = whole[:, whole.isfinite().all(0)]
        curve = whole.mean(1).tolist() if whole.shape[1] else None
    return Result(torch.cat(xs), seconds / len(problems.y), curve, stopped)


def as_picture(images: Tensor) -> Tensor:
    """Images as they come back from a file: 8 bits, in [-1, 1]."""
    return to_uint8(images).float() / 127.5 - 1


@torch.no_grad()
def measure(target: Target, problems: Problems, x: Tensor, judge: nn.Module | None, batch_size: int, device) -> dict:
    """The figures of each sample: name -> N numbers.

    ``error`` is mean |f(x) - y|, ``picture_error`` the same once x is an 8-bit picture, ``distance`` the root mean
    square of x - x0, ``judge`` the share of attributes on which the judge says the same of the picture (x, or f(x)) and
    of the one that y belongs to.
    """
    output = outputs(target.f, x, batch_size, device)
    found = {
        "error": (output - problems.y).abs().flatten(1).mean(1),
        "distance": (x - problems.x0).square().flatten(1).mean(1).sqrt(),
    }
    if target.from_image:
        rounded = outputs(target.f, as_picture(x), batch_size, device)
        found["picture_error"] = (rounded - problems.y).abs().flatten(1).mean(1)
    if judge is not None:
        picture = as_picture(x if target.from_image else output)
        said, wanted = (outputs(judge, images, batch_size, device) for images in (picture, problems.wanted))
        found["judge"] = agreement(said, wanted)
    return {name: values.tolist() for name, values in found.items()}


COLUMNS = {
    "error": ("error", ".3g"),
    "picture_error": ("as a picture", ".3g"),
    "distance": ("distance", ".3f"),
    "judge": ("judge", ".3f"),
    "seconds": ("s/image", ".3f"),
}


def mean(values: Sequence[float]) -> float | None:
    """Of the finite ones; None where there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def format_table(rows: Sequence[dict]) -> str:
    """The means as a Markdown table, without the columns that nobody has."""
    used = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| method | " + " | ".join(COLUMNS[key][0] for key in used) + " |", "|---" * (len(used) + 1) + "|"]
    for row in rows:
        cells = ["-" if row.get(key) is None else format(row[key], COLUMNS[key][1]) for key in used]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_sheet(path: Path, rows: Sequence[Sequence[Tensor]], headings: Sequence[str], captions) -> None:
    """A row a problem, a picture (3, S, S) a column with its caption below, whatever lies outside [-1, 1] clipped."""
    side, gap, top, below = 128, 8, 40, 26
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (gap + (side + gap) * len(headings), top + (side + below) * len(rows) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.multiline_text((gap + column * (side + gap), 6), heading, "black", font, spacing=2)
    for line, (pictures, texts) in enumerate(zip(rows, captions, strict=True)):
        for column, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            left, upper = gap + column * (side + gap), top + line * (side + below)
            pixels = Image.fromarray(to_uint8(picture).permute(1, 2, 0).contiguous().numpy())
            even = side % pixels.width == 0  # whole pixels stay sharp, and compress well
            resample = Image.Resampling.NEAREST if even else Image.Resampling.BICUBIC
            sheet.paste(pixels.resize((side, side), resample), (left, upper))
            draw.text((left, upper + side + 1), text, "black", font)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def find_judge(args: argparse.Namespace, target: Target, device: torch.device, log) -> nn.Module | None:
    """The judge for the network's images; the demo's where it fits and none is given.

    Raises:
        InputError: the given one does not fit.
    """
    if target.img_size is None:
        if args.judge is not None:
            raise InputError(f"--judge {args.judge}: {target.name} has no image to judge")
        return None
    judge = load_judge(args.judge if args.judge is not None else FACES / "judge.safetensors")
    reason = None
    if judge.img_size != target.img_size:
        reason = f"takes {judge.img_size}x{judge.img_size} images, not {target.img_size}x{target.img_size}"
    elif target.attributes is not None and list(judge.attributes) != list(target.attributes):
        reason = "knows other attributes than the network"
    if reason is None:
        return judge.to(device).requires_grad_(False)
    if args.judge is not None:
        raise InputError(f"--judge {args.judge}: {reason}")
    log.info("no judge: the demo's %s", reason)
    return None


def evaluate(args: argparse.Namespace) -> int:
    """Measure every way of inverting the network, and write tables, curves and pictures."""
    device = resolve_device(args.device)
    check_folder(args.out, args.overwrite)
    target = load_target(args.network, args.spnn, device)
    theta, notes = load_theta(args.theta, target) if args.theta is not None else (None, {})
    trained = notes.get("settings", {})
    if theta is not None:
        theta.to(device)
    judge = find_judge(args, target, device, get_logger("invert"))
    names, images = read_images(args.data, target.img_size, args.images)
    count = args.images if args.images is not None else 100
    problems = fixed_problems(target, names, images, count, args.seed, args.batch_size, device)
    clear(args.out, EVAL_FILES)
    log = get_logger("invert", args.out)
    loss = make_loss(target, args.lpips, device, log)
    z_lr, clip = float(trained.get("z_lr", 0.1)), float(trained.get("clip", args.clip))
    x_lr = args.x_lr if args.x_lr is not None else theta.scale * z_lr if theta is not None else target.x_lr

    def optimise(steps: int) -> Callable:
        return lambda y, x0: invert(target.f, y, x0, loss, steps=steps, lr=x_lr, clip=args.clip, bounds=target.bounds)

    def frozen(closed: Callable) -> Callable:
        return torch.no_grad()(closed)

    methods: dict[str, Callable] = {"start": lambda y, x0: x0}
    methods |= {name: frozen(closed) for name, closed in target.closed_form.items()}
    methods |= {f"optimisation, {steps} steps": optimise(steps) for steps in args.steps}
    if theta is not None:
        methods[f"landscape, {args.theta_steps} steps"] = lambda y, x0: invert_through(
            theta, target.f, y, x0, loss, steps=args.theta_steps, lr=z_lr, clip=clip
        )

    results = {name: run_method(method, problems, args.batch_size, device, name) for name, method in methods.items()}
    rows, by_image = [], []
    for name, result in results.items():
        for line in result.stopped:
            log.warning("%s: %s", name, line)
        figures = measure(target, problems, result.x, judge, args.batch_size, device)
        seconds = None if name == "start" else result.seconds
        rows.append({"method": name, **{key: mean(values) for key, values in figures.items()}, "seconds": seconds})
        for i, image in enumerate(problems.names):
            values = {key: v[i] if math.isfinite(v[i]) else None for key, v in figures.items()}
            by_image.append({"method": name, "image": image, **values})

    write_json(args.out / "results.json", {"settings": {**settings_of(args), "x_lr": x_lr, "device": str(device)},
                                           "theta": notes, "methods": rows, "images": by_image})  # fmt: skip
    for file, content in (("results.csv", rows), ("images.csv", by_image)):
        with atomic_write(args.out / file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(content[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(content)
    curves = {name: result.curve for name, result in results.items() if result.curve is not None}
    # a shorter plain run is the beginning of the longest one
    plain = max((name for name in curves if name.startswith("optimisation")), key=lambda n: len(curves[n]), default="")
    curves = {name: curve for name, curve in curves.items() if name == plain or not name.startswith("optimisation")}
    if curves:
        table = MetricsTable(args.out / "curves.csv")
        labels = {name: "loss_" + name.split(",")[0] for name in curves}
        for step in range(max(map(len, curves.values()))):
            table.append({"step": step, **{labels[n]: c[step] for n, c in curves.items() if step < len(c)}})
        plot_curves(table.path, args.out / "curves.png")
    if target.img_size is not None:
        draw_results(args.out / "sheet.png", target, problems, results, by_image, args.batch_size, device)
    print(format_table(rows))
    log.info("%d problems, %s, on %s; %s", len(problems.y), target.name, device, args.out)
    return 0


def draw_results(
    path: Path,
    target: Target,
    problems: Problems,
    results: dict[str, Result],
    by_image: Sequence[dict],
    batch_size: int,
    device: torch.device,
) -> None:
    """The sheet: the start where it is an image, every method, and the image that the wanted output belongs to."""
    count = min(SHEET_ROWS, len(problems.y))
    shown = {name: r for name, r in results.items() if target.from_image or name != "start"}
    headings = [name.replace(", ", ",\n").replace(" g'", "\ng'").replace("NLBP in ", "NLBP in\n") for name in shown]
    headings.append("face whose\noutput is wanted" if target.from_image else "wanted")
    columns = []
    for result in shown.values():
        x = result.x[:count]
        columns.append(x if target.from_image else outputs(target.f, x, batch_size, device))
    columns.append(problems.wanted[:count])
    told = {(row["method"], row["image"]): row.get("judge") for row in by_image}
    captions = []
    for name in problems.names[:count]:
        values = [told[method, name] for method in shown]
        captions.append([*("" if v is None else f"judge {v:.2f}" for v in values), ""])
    write_sheet(path, [[column[i] for column in columns] for i in range(count)], headings, captions)


# --- Command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = p.add_subparsers(dest="command", required=True)
    whole, positive = number(int, 1), number(float, 1e-12)
    for name, run, text in (
        ("train", train, "train a mapping net theta, so that later inversions converge in few steps"),
        ("eval", evaluate, "invert with every method, and measure"),
    ):
        c = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        c.set_defaults(run=run)
        c.add_argument("--network", default="g", help=f"{', '.join(READY)}, or package.module:factory (is imported)")
        c.add_argument("--spnn", type=Path, default=FACES / "spnn.safetensors", help="the SPNN's weights")
        c.add_argument("--data", type=Path, help="folder of images, flat or nested")
        c.add_argument(
            "--images", type=whole, help="take this many of them (eval without images: random problems, 100)"
        )
        c.add_argument("--out", type=Path, required=True, help="result folder")
        c.add_argument("--overwrite", action="store_true", help="replace the results in a folder that has some")
        c.add_argument("--x_lr", type=positive, help="step of Adam on x; default: by the network, or theta's")
        c.add_argument("--clip", type=positive, default=10.0, help="largest norm of a sample's gradient")
        c.add_argument("--batch_size", type=number(int, 1, LARGEST_BATCH), default=16, help="samples at once")
        c.add_argument("--lpips", action=SWITCH, default=True, help="LPIPS in the loss where outputs are images")
        c.add_argument("--seed", type=number(int, 0, LARGEST_SEED), default=0, help="of weights and draws")
        c.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
        if name == "train":
            c.add_argument("--buffers", type=whole, default=24, help="replay buffers; 500 in the paper")
            c.add_argument("--samples", type=number(int, 1, LARGEST_BATCH), default=16, help="inversions a buffer")
            c.add_argument("--steps", type=whole, default=20, help="steps of an inversion")
            c.add_argument("--z_lr", type=positive, default=0.1, help="Adam on z")
            c.add_argument("--lr", type=positive, default=1e-4, help="AdamW on theta")
            c.add_argument("--weight_decay", type=number(float, 0), default=0.1, help="AdamW on theta")
            c.add_argument("--updates", type=whole, help="of theta, a buffer; default: one pass over it")
            c.add_argument(
                "--width", type=number(int, 1, LARGEST_WIDTH), default=16, help="channels of theta's first layer"
            )
        else:
            c.add_argument("--theta", type=Path, help="weights of a trained mapping net; none: no landscape's row")
            c.add_argument(
                "--steps", type=whole, nargs="+", default=[20, 200], help="of plain optimisation, a row each"
            )
            c.add_argument("--theta_steps", type=whole, default=20, help="through the landscape")
            c.add_argument(
                "--judge", type=Path, help="weights of the independent judge; default: the demo's if it fits"
            )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run_command(main)
