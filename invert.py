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
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import load_strictly, read_json, read_weights, write_weights
from DDNM.guided_diffusion.inputs import fingerprint
from DDNM.guided_diffusion.results import as_saved, contact_sheet, picture
from evaluate import mean_of
from images import grid, load_image, save_image
from inversion import Loss, MappingNet, invert, invert_through, train_mapping
from judge import load_judge
from logger import MetricsTable, format_table, get_logger, plot_curves
from loop import STATE_NAME, Loop, Run, check_settings, is_empty, open_run, to_json_values
from metrics import agreement, psnr
from stylegan import SPACES, Latents
from targets import (
    FACES,
    READY,
    Problems,
    Settings,
    Target,
    fixed_problems,
    load_targets,
    lpips_or_none,
    make_loss,
    named_images,
    outputs,
    problem_source,
    read_images,
    spnn_beside,
    starts,
)
from utils import (
    LARGEST_BATCH,
    LARGEST_WIDTH,
    InputError,
    atomic_write,
    json_values,
    nearest,
    option,
    parse,
    peak_gib,
    run_command,
    seed_everything,
    write_json,
)

SHEET_ROWS, SIDE = 6, 256  # of a sheet, and of its pictures
SEARCHES = "searches"  # folder of searches, whole or under way
FILES = {  # of a command's results; the first is there as soon as there is something to go on with
    "find": ("settings.json", "results.csv", "curves.csv", "curves.png", "sheet.png", "log.txt"),
    "train": (STATE_NAME, "theta.safetensors", "theta.json", "metrics.csv", "curves.png", "log.txt"),
    "eval": ("settings.json", "results.json", "results.csv", "curves.csv", "curves.png", "sheet.png", "log.txt"),
}
NETWORK = f"{', '.join(READY)}, or package.module:factory (is imported)"


@dataclass
class Find:
    """Of find."""

    network: str = option("stylegan", NETWORK)
    steps: int = option(1000, "in each space", 1)
    save_steps: int = option(100, "between two saves of a running search", 1)
    morph: tuple[Path, ...] | None = option(None, "two latents, to mix instead of finding one")
    frames: int = option(20, "from the first to the second", 1, 10_000)


@dataclass
class Train:
    """Of train."""

    network: str = option("g", NETWORK)
    buffers: int = option(24, "replay buffers; 500 in the paper", 1)
    samples: int = option(16, "inversions per buffer", 1, LARGEST_BATCH)
    steps: int = option(20, "steps of an inversion", 1)
    z_lr: float = option(0.1, "Adam on z", 1e-12)
    lr: float = option(1e-4, "AdamW on theta", 1e-12)
    weight_decay: float = option(0.1, "AdamW on theta", 0.0)
    updates: int | None = option(None, "of theta per buffer; default: one pass over it", 1)
    width: int = option(16, "channels of theta's first layer", 1, LARGEST_WIDTH)


@dataclass
class Eval:
    """Of eval."""

    network: str = option("g", NETWORK)
    theta: tuple[Path, ...] | None = option(None, "weights of mapping nets, of several seeds perhaps: a row each")
    steps: tuple[int, ...] = option((20, 200), "of plain optimisation: a row each, of the best that one search has by "
                                    "then", 1)  # fmt: skip
    theta_steps: int = option(20, "through the landscape", 1)
    save_steps: int = option(100, "between two saves of a running search", 1)
    judge: Path | None = option(None, "weights of the independent judge; default: the demo's if it fits")


# --- Files -----------------------------------------------------------------------------------------------------------


def check_folder(s: Settings, command: str) -> None:
    """Raise InputError if the content of a result folder would be lost."""
    begun = FILES[command][0]
    if s.resume and s.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if s.resume and not is_empty(s.out) and not (s.out / begun).is_file():
        raise InputError(f"--resume: {s.out} holds no run of this command; give another folder")
    if not s.resume and not s.overwrite and not is_empty(s.out):
        hint = ", --resume" if (s.out / begun).is_file() else ""
        raise InputError(f"--out {s.out}: not empty; give --overwrite{hint} or another folder")


def clear(out: Path, command: str) -> None:
    """Delete what an earlier run of the same command wrote, by name, and nothing else."""
    for path in (*(out / name for name in FILES[command]), *(out / SEARCHES).glob("*.safetensors")):
        path.unlink(missing_ok=True)


def settings_of(*settings, without: Sequence[str] = ()) -> dict:
    """The flags as JSON values, in the order of the command's dataclasses."""
    return to_json_values({key: of for each in settings for key, of in vars(each).items() if key not in without})


def begin(command: str, s: Settings, own, target: Target, free: Sequence[str]):
    """Write settings.json and give the log. A run to go on with must be one of the same settings but for ``free``.

    Raises:
        InputError: it is another one; nothing is deleted.
    """
    file = s.out / "settings.json"
    given = {"command": command, "weights of the network": fingerprint(target.f), **settings_of(s, own)}
    if s.resume and file.is_file():
        free = ("out", "device", "resume", "overwrite", "save_steps", *free)
        check_settings(read_json(file), {key: value for key, value in given.items() if key not in free}, s.out)
    else:
        clear(s.out, command)
    write_json(file, given)
    return get_logger("invert", s.out)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], notes: dict) -> None:
    """Write tensors with ``notes``, JSON values, as the file's metadata."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={key: json.dumps(value) for key, value in notes.items()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_tensors` wrote. Raises InputError if it is no such file."""
    try:
        with safe_open(path, "pt") as file:
            notes = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            return {name: file.get_tensor(name) for name in file.keys()}, notes
    except Exception as error:  # of safetensors' own types, or the system's
        raise InputError(f"{path}: not a latent or a damaged one: {error}") from None


def load_theta(path: Path, target: Target) -> tuple[MappingNet, dict]:
    """The theta at ``path`` and its notes. Raises InputError if it is damaged or belongs to another network."""
    file = path.with_suffix(".json")
    state, notes = read_weights(path), read_json(file)
    try:
        theta = MappingNet(**notes["theta"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--theta {path}: {file} holds no architecture of a theta: {error!r}") from None
    if theta.shape != target.in_shape or notes.get("network") != target.name:
        trained, here = (f"{name} with inputs of shape {shape}" for name, shape in
                         ((notes.get("network"), theta.shape), (target.name, target.in_shape)))  # fmt: skip
        raise InputError(f"--theta {path}: trained for {trained}, not for {here}")
    if notes.get("weights of the network") != fingerprint(target.f):
        raise InputError(f"--theta {path}: trained for {target.name} with other weights")
    load_strictly(theta, state, path)
    return theta.eval().requires_grad_(False), notes


def load_thetas(paths: Sequence[Path], target: Target, device: torch.device) -> dict[str, tuple[MappingNet, dict]]:
    """Thetas with their notes, by a name for the table. Raises InputError, also if one is there twice."""
    thetas = {}
    for path in paths:
        theta, notes = load_theta(path, target)
        name = "landscape" if len(paths) == 1 else f"landscape of seed {notes['settings']['seed']}"
        if name in thetas:
            raise InputError(f"--theta {path}: {name} is there twice")
        thetas[name] = theta.to(device), notes
    return thetas


# --- train -----------------------------------------------------------------------------------------------------------


def train(s: Settings, own: Train, run: Run) -> int:
    """Train theta, and write it with its table and curves."""
    target = load_targets(own.network, s, run.device)[-1]
    _, images = read_images(s.data, target.img_size, s.images)
    seed_everything(s.seed)
    try:
        theta = MappingNet(target.in_shape, own.width, target.x_lr / own.z_lr, target.bounds).to(run.device)
    except ValueError as error:
        raise InputError(f"--network {target.name}: {error}") from None
    weights = {"weights of the network": fingerprint(target.f)}
    given = settings_of(s, own, without=("out", "resume", "overwrite", "buffers", "device"))
    loss = make_loss(target, s, run.device)
    draw = problem_source(target, images, s, loss, run.device)
    run.find_state(given | weights, s.resume, s.overwrite)
    if run.state is None:  # and nothing can be refused any more
        clear(s.out, "train")
    log = get_logger("invert", s.out)
    count = sum(p.numel() for p in theta.parameters())
    log.info("inverting %s, theta has %s parameters, on %s", target.name, f"{count:,}", run.device)
    peak_gib(run.device, reset=True)

    def saved(loop: Loop) -> None:
        notes = {"network": target.name, **weights, "settings": settings_of(s, own), "theta": theta.config}
        notes |= {"buffers": loop.done, "seconds": loop.seconds, "peak_gib": peak_gib(run.device)}
        write_weights(s.out / "theta.safetensors", theta.state_dict())
        write_json(s.out / "theta.json", notes)

    names = ("buffers", "samples", "steps", "z_lr", "lr", "weight_decay", "updates")
    rows = train_mapping(theta, target.f, draw, loss, run=run, **{name: getattr(own, name) for name in names},
                         clip=s.clip, batch_size=s.batch_size, saved=saved)  # fmt: skip
    first, last = rows[0], rows[-1]
    log.info("best loss of a trajectory: %.4g in the first buffer, %.4g in the last; %.1f min, at most %.2f GiB; %s",
             first["end_loss"], last["end_loss"], last["seconds"] / 60, peak_gib(run.device), s.out)  # fmt: skip
    return 0


# --- Searches and their figures --------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a method found.

    Attributes:
        x: (N, ...).
        seconds: altogether.
        curve: the loss after each number of steps, (T + 1, N); None without steps.
        stopped: the step at which a sample's search ended early, (N,); -1: none. None without steps.
    """

    x: Tensor
    seconds: float
    curve: Tensor | None = None
    stopped: Tensor | None = None


def clock(device: torch.device) -> float:
    """Seconds, with all that the device has been given done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Searches:
    """Searches by optimisation. Each is saved every ``every`` steps, and goes on from there after a resume."""

    s: Settings
    run: Run
    loss: Loss
    every: int
    bar: tqdm

    def __call__(
        self, name: str, target: Target, problems: Sequence[str], y: Tensor, x: Tensor, steps: Sequence[int]
    ) -> dict[int, Found]:
        """The best inputs that one search for y from x has met by each of ``steps``.

        What a part draws, StyleGAN's noise say, is of its own seed, so that a search that is resumed finds the same.

        Args:
            name: of its file. A file of other ``problems`` counts as none.
        """
        file, marks = self.s.out / SEARCHES / f"{name}.safetensors", sorted(set(steps))
        tensors, notes = read_tensors(file) if file.is_file() else ({}, {})
        if notes.get("problems") != list(problems):
            tensors, notes = {}, {"problems": list(problems), "seconds": 0.0}
        kept = {int(key): x for key, x in tensors.items() if key.isdecimal()}
        state = {key: tensor for key, tensor in tensors.items() if not key.isdecimal()}
        done = len(state["curve"]) - 1 if state else 0
        if any(mark <= done and mark not in kept for mark in marks):  # it has gone past what is wanted
            state, kept, done, notes["seconds"] = {}, {}, 0, 0.0
        self.bar.update(min(done, marks[-1]))
        while done < marks[-1]:
            began, end = clock(y.device), min(done + self.every, *(mark for mark in marks if mark > done))
            seed_everything(self.s.seed + done)
            found = invert(target.f, y, x, self.loss, end, target.x_lr, self.s.clip, target.bounds,
                           on_step=lambda _: self.bar.update(), state=state or None)  # fmt: skip
            state, done = found.state, end
            notes["seconds"] += clock(y.device) - began
            self.bar.set_postfix_str(f"{target.name}, loss {found.loss.mean().item():.4g}")
            if done in marks:
                kept[done], notes[str(done)] = found.x, notes["seconds"]
            save_tensors(file, {**state, **{str(mark): at for mark, at in kept.items()}}, notes)
            self.run.stop_if_asked()
        stopped, curve = state["stopped"].cpu(), state["curve"].cpu()
        return {mark: Found(kept[mark].cpu(), notes[str(mark)], curve[: mark + 1],
                            torch.where(stopped <= mark, stopped, -1)) for mark in marks}  # fmt: skip


def warn(log, method: str, problems: Sequence[str], found: Found) -> None:
    """A line for each search that ended early."""
    for name, step in zip(problems, found.stopped.tolist(), strict=True):
        if step >= 0:
            log.warning("%s: %s: loss or gradient not finite at step %d", method, name, step)


def picture_figures(pictures: Tensor, wanted: Tensor, s: Settings, device: torch.device) -> dict[str, Tensor]:
    """PSNR in dB of images (N, 3, S, S) to others, and LPIPS if it can be had."""
    found, lpips = {"psnr": psnr(pictures, wanted)}, lpips_or_none(device, pictures.shape[-1])
    if lpips is not None:
        pairs = zip(pictures.split(s.batch_size), wanted.split(s.batch_size), strict=True)
        found["lpips"] = torch.cat([lpips(a.to(device), b.to(device)).flatten().cpu() for a, b in pairs])
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
    "plain_steps": ("plain steps to it", ".1f"),
    "plain_loss": ("plain loss then", ".4g"),
    "steps_to_plain_loss": ("its steps to that", ".1f"),
}


def write_curves(out: Path, curves: dict[str, Sequence[float]]) -> None:
    """curves.csv and curves.png: losses after each number of steps, by name."""
    table = MetricsTable(out / "curves.csv", rows=[])
    for step in range(max(map(len, curves.values()))):
        table.append({"step": step, **{f"loss_{n}": curve[step] for n, curve in curves.items() if step < len(curve)}})
    plot_curves(table.path, out / "curves.png")


# --- eval ------------------------------------------------------------------------------------------------------------

Ways = Iterator[tuple[nn.Module, Tensor, Callable[[Tensor, Tensor, slice], dict[str, Found]]]]


def ways(
    targets: Sequence[Target], problems: Problems, thetas: Mapping[str, tuple[MappingNet, dict]], own: Eval,
    search: Searches,
) -> Ways:  # fmt: skip
    """Ways of inverting the targets, in the order of the table; through ``thetas`` the last one alone.

    Yields:
        f; where all begin; what finds inputs for a batch of the problems, from y, starts and the batch, by name.
    """
    s, device = search.s, search.run.device

    def closed(name: str, form: Callable[[Tensor, Tensor], Tensor]):
        def run(y: Tensor, x0: Tensor, batch: slice) -> dict[str, Found]:
            began = clock(device)
            with torch.no_grad():
                x = form(y, x0)
            return {name: Found(x, clock(device) - began)}

        return run

    def plain(number: int, label: str):
        def run(y: Tensor, x0: Tensor, batch: slice) -> dict[str, Found]:
            name, names = f"{number}_{batch.start}", problems.names[batch]
            found = search(name, targets[number], names, y, x0, own.steps)
            return {f"{label}optimisation, {steps} steps": of for steps, of in found.items()}

        return run

    def through(name: str, theta: MappingNet, trained: dict):
        def run(y: Tensor, x0: Tensor, batch: slice) -> dict[str, Found]:
            seed_everything(s.seed)
            began, settings = clock(device), {"lr": float(trained["z_lr"]), "clip": float(trained["clip"])}
            found = invert_through(theta, f, y, x0, search.loss, steps=own.theta_steps,
                                   on_step=lambda _: search.bar.update(), **settings)  # fmt: skip
            of = Found(found.x, clock(device) - began, found.curve, found.stopped)
            return {f"{name}, {own.theta_steps} steps": of}

        return run

    for number, target in enumerate(targets):
        f, x0, label = target.f, problems.x0, ""
        if isinstance(f, Latents):
            label = f"{f.space}, "
        if x0 is None:
            x0 = starts(target, problems.y, s, search.loss, device)
        yield f, x0, closed(f"{label}start", lambda y, x: x)
        yield from ((f, x0, closed(*form)) for form in target.closed_form.items())
        if target is targets[-1]:
            yield from ((nn.Identity(), x0, closed(*form)) for form in spnn_beside(target, s, device).items())
        yield f, x0, plain(number, label)
    yield from ((f, x0, through(f"{label}{name}", theta, of["settings"])) for name, (theta, of) in thetas.items())


def together(parts: Sequence[Found]) -> Found:
    """Of all batches, on the CPU."""
    x, seconds, curves, stopped = zip(*parts, strict=True)
    x = torch.cat(x).detach().cpu()
    if curves[0] is None:
        return Found(x, sum(seconds))
    return Found(x, sum(seconds), *(torch.cat([t.cpu() for t in of], -1) for of in (curves, stopped)))


@torch.no_grad()
def figures_of(
    target: Target, problems: Problems, x: Tensor, x0: Tensor, output: Tensor, judge: nn.Module | None, s: Settings,
    device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    """The figures of each sample: name -> (N,).

    ``error`` is mean |f(x) - y|, ``picture_error`` the same once x is an 8-bit picture, ``distance`` the root mean
    square of x - x0, ``judge`` the share of attributes on which the judge says the same of the picture (x, or f(x))
    and of the one that y belongs to. Of pictures f(x) there are ``psnr`` in dB, and ``lpips`` if it can be had.
    """
    y = problems.y
    found = {"error": (output - y).abs().flatten(1).mean(1)}
    shown, _ = as_saved(x if target.from_image else output)
    if target.from_image:
        rounded = outputs(target.f, shown, s.batch_size, device)
        found["picture_error"] = (rounded - y).abs().flatten(1).mean(1)
    if target.to_image:
        found |= picture_figures(shown, y, s, device)
    else:
        found["distance"] = (x - x0).square().flatten(1).mean(1).sqrt()
    if judge is not None:
        said, wanted = (outputs(judge, images, s.batch_size, device) for images in (shown, problems.wanted))
        found["judge"] = agreement(said, wanted)
    return found


def find_judge(path: Path | None, target: Target, device: torch.device, log) -> nn.Module | None:
    """The judge for the network's images; the demo's if it fits and none is given.

    Raises:
        InputError: the given one does not fit.
    """
    if target.img_size is None and path is None:
        return None
    judge = load_judge(path if path is not None else FACES / "judge.safetensors")
    if judge.img_size != target.img_size:
        has = "none" if (size := target.img_size) is None else f"{size}x{size}"
        reason = f"takes {judge.img_size}x{judge.img_size} images, {target.name} has {has}"
    elif target.attributes is not None and list(judge.attributes) != list(target.attributes):
        reason = "knows other attributes than the network"
    else:
        return judge.to(device).requires_grad_(False)
    if path is not None:
        raise InputError(f"--judge {path}: {reason}")
    log.info("no judge: the demo's %s", reason)
    return None


def with_intervals(figures: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Means of figures (N,) over the finite ones, and 95 % intervals of those that samples differ in."""
    row: dict[str, float | None] = {}
    for name, values in figures.items():
        finite = values[values.isfinite()]
        row[name] = finite.double().mean().item() if len(finite) else None
        if name in ("psnr", "lpips", "judge") and len(finite) > 1:
            _, row[f"{name}_low"], row[f"{name}_high"] = mean_of(finite)
    return row


def compared(name: str, through: Sequence[float], plain: Sequence[float]) -> dict:
    """Of mean losses after each number of steps: what a landscape reaches and the plain steps to it, and vice versa."""

    def steps(curve: Sequence[float], goal: float) -> int | None:
        return next((step for step, value in enumerate(curve) if value <= goal), None)

    last = len(through) - 1
    goal, met = min(through), min(plain[: last + 1])
    return {"theta": name, "steps": last, "loss": goal, "plain_steps": steps(plain, goal), "plain_loss": met,
            "steps_to_plain_loss": steps(through, met)}  # fmt: skip


def compare_all(curves: Mapping[str, Sequence[float]]) -> list[dict]:
    """`compared` for each landscape, and the mean of several seeds."""
    told = [compared(name, curve, curves[name.partition("landscape")[0] + "optimisation"])
            for name, curve in curves.items() if "landscape" in name]  # fmt: skip
    if len(told) > 1:
        of = {key: [one[key] for one in told] for key in LANDSCAPES}
        means = {key: None if None in values else fmean(values) for key, values in of.items()}
        told.append({"theta": f"mean of {len(told)} seeds", **means})
    return told


def evaluate(s: Settings, own: Eval, run: Run) -> int:
    """Measure every way of inverting the network, and write tables, curves and pictures."""
    targets = load_targets(own.network, s, run.device)
    target = targets[-1]
    thetas = load_thetas(own.theta or (), target, run.device)
    judge = find_judge(own.judge, target, run.device, get_logger("invert"))
    names, images = read_images(s.data, target.img_size, s.images)
    problems = fixed_problems(target, names, images, s.images if s.images is not None else 100, s, run.device)
    loss = make_loss(target, s, run.device)
    log = begin("eval", s, own, target, free=("steps", "theta", "theta_steps", "judge"))
    batches = [slice(i, i + s.batch_size) for i in range(0, len(problems.y), s.batch_size)]
    rows, by_image, curves, shown = [], [], {}, {}
    steps = len(batches) * (len(targets) * max(own.steps) + len(thetas) * own.theta_steps)
    with tqdm(total=steps, unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:
        for f, x0, way in ways(targets, problems, thetas, own, Searches(s, run, loss, own.save_steps, bar)):
            each = [way(problems.y[b].to(run.device), x0[b].to(run.device), b) for b in run.until_stopped(batches)]
            for name in each[0]:
                found = together([of[name] for of in each])
                seed_everything(s.seed)  # noise drawn anew is the same for all methods, and after a resume
                output = outputs(f, found.x, s.batch_size, run.device)
                figures = figures_of(target, problems, found.x, x0, output, judge, s, run.device)
                start = name.rpartition(", ")[2] == "start"
                seconds = None if start else found.seconds / len(found.x)
                rows.append({"method": name, **with_intervals(figures), "seconds": seconds})
                by_image += [{"method": name, "image": image, **{key: of[i].item() for key, of in figures.items()}}
                             for i, image in enumerate(problems.names)]  # fmt: skip
                if not start or target.from_image:
                    shown[name] = (found.x if target.from_image else output)[:SHEET_ROWS]
                if found.curve is not None:  # a shorter plain run is the beginning of the next, which takes its place
                    curve = found.curve[:, found.curve.isfinite().all(0)]
                    curves |= {name.rpartition(",")[0]: curve.mean(1).tolist()} if curve.shape[1] else {}
                    warn(log, name, problems.names, found)
    told = compare_all(curves)
    record = {"settings": {**settings_of(s, own), "device": str(run.device)}, "landscapes": told}
    record |= {"thetas": [notes for _, notes in thetas.values()], "methods": rows, "images": by_image}
    write_json(s.out / "results.json", json_values(record))
    table = MetricsTable(s.out / "results.csv", rows=[])
    for row in rows:
        table.append({key: value for key, value in row.items() if value is not None})
    if curves:
        write_curves(s.out, curves)
    if target.img_size is not None:
        draw_results(s.out / "sheet.png", target, problems, shown, by_image)
    print(format_table(rows, "method", COLUMNS) + (f"\n\n{format_table(told, 'theta', LANDSCAPES)}" if told else ""))
    log.info("%d problems, %s, on %s; %s", len(problems.y), target.name, run.device, s.out)
    return 0


def draw_results(
    path: Path, target: Target, problems: Problems, shown: Mapping[str, Tensor], by_image: Sequence[dict]
) -> None:
    """The sheet: the images of every method by name, and those that the wanted outputs belong to."""
    names, captions = problems.names[:SHEET_ROWS], []
    for name in names:
        said = [row.get("judge") for row in by_image if row["image"] == name and row["method"] in shown]
        captions.append(name if None in said else f"{name}: judge {', '.join(f'{v:.2f}' for v in said)}")
    columns = [*shown.values(), problems.wanted]
    rows = [[picture(column[i], SIDE) for column in columns] for i in range(len(names))]
    contact_sheet(path, [*shown, "whose output is wanted" if target.from_image else "wanted"], rows, captions)


# --- find ------------------------------------------------------------------------------------------------------------


def find(s: Settings, own: Find, run: Run) -> int:
    """Find the inputs of images, one batch after another, and write each with its picture."""
    device = run.device
    if own.morph is not None:
        return morph(s, own, device)
    if list(s.spaces) != sorted(set(s.spaces), key=SPACES.index):
        raise InputError(f"--spaces {' '.join(s.spaces)}: a search can only go on from z to w to w+")
    targets = load_targets(own.network, s, device)
    target = targets[-1]
    if not target.to_image:
        raise InputError(f"--network {own.network}: gives no image; use eval")
    paths, loss = named_images(s.data, s.images), make_loss(target, s, device)
    log = begin("find", s, own, target, free=("images",))
    table = MetricsTable(s.out / "results.csv")
    done = {row["image"] for row in table.rows}
    left = [name for name in paths if name not in done]
    steps = len(targets) * own.steps * math.ceil(len(left) / s.batch_size)
    with tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None) as bar:
        search = Searches(s, run, loss, own.save_steps, bar)
        for start in range(0, len(left), s.batch_size):
            chosen = left[start : start + s.batch_size]
            y = torch.stack([load_image(paths[name], target.img_size) for name in chosen])
            x, parts = starts(targets[0], y, s, loss, device), []
            for number, of in enumerate(targets):  # space by space, each from the best of the one before
                if parts:
                    x = of.f.enter(targets[number - 1].f.w_plus(parts[-1].x.to(device))).detach()
                parts.append(search(str(number), of, chosen, y.to(device), x.to(device), [own.steps])[own.steps])
            warn(log, target.name, chosen, parts[-1])
            for row in keep(target, chosen, y, parts, s, device):
                table.append({**row, "seconds": sum(part.seconds for part in parts) / len(chosen)})
    curves = {name: read_tensors(s.out / f"{name}.safetensors")[0]["curve"].tolist() for name in paths}
    if len(curves) > 10:
        curves = {"mean": torch.tensor(list(curves.values())).mean(0).tolist()}
    write_curves(s.out, curves)
    shown = list(paths)[:SHEET_ROWS]
    pairs = [(load_image(paths[name], target.img_size), load_image(s.out / f"{name}.png")) for name in shown]
    rows = [[picture(one, SIDE) for one in (wanted, got, (got - wanted).abs() - 1)] for wanted, got in pairs]
    contact_sheet(s.out / "sheet.png", ("input", "found", "difference"), rows, shown)
    print(format_table([row for row in table.rows if row["image"] in paths], "image", COLUMNS))
    return 0


@torch.no_grad()
def keep(
    target: Target, names: Sequence[str], wanted: Tensor, parts: Sequence[Found], s: Settings, device: torch.device
) -> list[dict]:
    """Write each image and latent that was found, with the losses of all spaces; a row of figures for each."""
    x, losses = parts[-1].x.to(device), parts[-1].curve.amin(0)
    pictures, _ = as_saved(outputs(target.f, x, s.batch_size, device))
    figures = {"loss": losses, **picture_figures(pictures, wanted, s, device)}
    rows, curves = [], torch.cat([part.curve for part in parts])
    for i, name in enumerate(names):
        row = {"image": name, **{key: of[i].item() for key, of in figures.items()}}
        latent = {"x": x[i], "curve": curves[:, i]}
        if isinstance(target.f, Latents):
            latent["w_plus"] = target.f.w_plus(x[i : i + 1])[0]
        save_image(pictures[i], s.out / f"{name}.png")
        notes = {**row, "network": target.name, "weights": s.weights, "noise": s.noise, "seed": s.seed}
        save_tensors(s.out / f"{name}.safetensors", latent, notes)
        rows.append(row)
    return rows


@torch.no_grad()
def morph(s: Settings, own: Find, device: torch.device) -> int:
    """Write the frames between two latents that `find` found, the mix of their w+ going from 0 to 1, and all as one."""
    if len(own.morph) != 2:
        raise InputError(f"--morph: takes two latents, got {len(own.morph)}")
    target = load_targets("stylegan", dataclasses.replace(s, spaces=("w+",)), device)[0]
    ends, shape = [], (target.f.generator.layers, target.f.generator.dim)
    for path in own.morph:
        w_plus = read_tensors(path)[0].get("w_plus", torch.empty(0))
        if tuple(w_plus.shape) != shape:
            raise InputError(f"--morph {path}: its w_plus has shape {tuple(w_plus.shape)}, the generator needs {shape}")
        ends.append(w_plus.float().flatten())
    for frame in s.out.glob("frame_[0-9][0-9][0-9][0-9].png"):  # of an earlier one, longer perhaps
        frame.unlink()
    mixes = torch.stack([ends[0].lerp(ends[1], i / own.frames) for i in range(own.frames + 1)])
    pictures = outputs(target.f, mixes, s.batch_size, device).clamp(-1, 1)
    for i, frame in enumerate(pictures):
        save_image(frame, s.out / f"frame_{i:04d}.png")
    save_image(grid(pictures, 7), s.out / "frames.png")
    return 0


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
    check_folder(s, command)
    with open_run(s.out, s.device, save_every=1, seed=s.seed) as run:
        return perform(s, own, run)


if __name__ == "__main__":
    run_command(main)
