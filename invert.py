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
from functools import partial
from pathlib import Path

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
from inversion import Inversion, Loss, MappingNet, invert, invert_through, train_mapping
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
SEARCHES = "searches"  # folder of eval's searches, whole or under way
FILES = {  # of a command's results; the first is there as soon as there is something to go on with
    "find": ("settings.json", "results.csv", "state.safetensors", "curves.csv", "curves.png", "sheet.png", "log.txt"),
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
    merged = {key: value for each in settings for key, value in vars(each).items() if key not in without}
    return to_json_values(merged)


def begin(command: str, s: Settings, own: Find | Eval, target: Target, free: Sequence[str]):
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
        theta = MappingNet(**{**notes["theta"], "shape": tuple(notes["theta"]["shape"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--theta {path}: {file} holds no architecture of a theta: {error!r}") from None
    if theta.shape != target.in_shape or notes.get("network") != target.name:
        raise InputError(
            f"--theta {path}: trained for {notes.get('network')} with inputs of shape {theta.shape}, "
            f"not for {target.name} with {target.in_shape}"
        )
    if notes.get("weights of the network", here := fingerprint(target.f)) != here:
        raise InputError(f"--theta {path}: trained for {target.name} with other weights")
    load_strictly(theta, state, path)
    return theta.eval().requires_grad_(False), notes


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
        notes = {"network": target.name, **weights, "settings": settings_of(s, own), "theta": theta.config()}
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


def clock(device: torch.device) -> float:
    """Seconds, with all that the device has been given done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def descend(
    target: Target, y: Tensor, x: Tensor, loss: Loss, s: Settings, steps: int, every: int,
    state: Mapping[str, Tensor] | None, bar: tqdm, seed: int = 0,
) -> Iterator[tuple[Inversion, float]]:  # fmt: skip
    """`invert` in parts of ``every`` steps to ``steps`` in all, each with its seconds; it can go on from each one.

    What a part draws, StyleGAN's noise say, is of its own seed, so that a search that is resumed finds the same.
    """
    done = 0 if state is None else len(state["curve"]) - 1
    while True:
        began, end = clock(y.device), min(steps, done + every)
        seed_everything(s.seed + seed + done)
        found = invert(target.f, y, x, loss, end, target.x_lr, s.clip, target.bounds,
                       on_step=lambda _: bar.update(), state=state)  # fmt: skip
        yield found, clock(y.device) - began
        if end == steps:
            return
        done, state = end, found.state


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


@dataclass
class Found:
    """What a method found, of a batch or of all problems.

    Attributes:
        x: (B, ...).
        seconds: altogether.
        curve: the loss after each number of steps, (T + 1, B); None without steps.
        stopped: the step at which a sample's search ended early, (B,); -1: none. None without steps.
    """

    x: Tensor
    seconds: float
    curve: Tensor | None = None
    stopped: Tensor | None = None


@dataclass
class Method:
    """A way of inverting f: ``run(y, x0, batch)`` yields names with what it found, batch by batch of the problems."""

    f: nn.Module
    x0: Tensor
    run: Callable[[Tensor, Tensor, slice], Iterator[tuple[str, Found]]]


def together(parts: Sequence[Found]) -> Found:
    """Of all batches, on the CPU."""
    x = torch.cat([part.x for part in parts]).detach().cpu()
    seconds = sum(part.seconds for part in parts)
    if parts[0].curve is None:
        return Found(x, seconds)
    curves, stopped = [part.curve.cpu() for part in parts], [part.stopped.cpu() for part in parts]  # some from files
    return Found(x, seconds, torch.cat(curves, 1), torch.cat(stopped))


class Evaluation:
    """Ways of inverting the targets, on the same problems: all that they share."""

    def __init__(self, targets: Sequence[Target], problems: Problems, s: Settings, own: Eval, run: Run, loss: Loss):
        self.targets, self.target, self.problems, self.loss = targets, targets[-1], problems, loss
        self.s, self.own, self.run, self.device = s, own, run, run.device
        self.batches = [slice(i, i + s.batch_size) for i in range(0, len(problems.y), s.batch_size)]

    def methods(self, thetas: Mapping[str, tuple[MappingNet, dict]], bar: tqdm) -> Iterator[Method]:
        """In the order of the table; through ``thetas`` the last target alone."""
        for number, target in enumerate(self.targets):
            f, x0 = target.f, self.problems.x0
            label = f"{target.name.partition(' ')[2]}, " if isinstance(f, Latents) else ""
            x0 = x0 if x0 is not None else starts(target, self.problems.y, self.s, self.loss, self.device)
            yield Method(f, x0, partial(self.closed, f"{label}start", lambda y, x: x))
            yield from (Method(f, x0, partial(self.closed, *form)) for form in target.closed_form.items())
            if target is self.target:
                beside = spnn_beside(target, self.s, self.device)
                yield from (Method(nn.Identity(), x0, partial(self.closed, *form)) for form in beside.items())
            yield Method(f, x0, partial(self.plain, number, label, bar))
        for name, (theta, notes) in thetas.items():
            yield Method(f, x0, partial(self.through, f"{label}{name}", theta, notes["settings"], bar))

    def closed(self, name: str, form: Callable, y: Tensor, x0: Tensor, batch: slice) -> Iterator[tuple[str, Found]]:
        """A closed form."""
        began = clock(self.device)
        with torch.no_grad():
            x = form(y, x0)
        yield name, Found(x, clock(self.device) - began)

    def plain(
        self, number: int, label: str, bar: tqdm, y: Tensor, x0: Tensor, batch: slice
    ) -> Iterator[tuple[str, Found]]:
        """Optimisation: one search, of which the best is kept at each of ``--steps``, and from which it goes on."""
        file = self.s.out / SEARCHES / f"{number}_{batch.start}.safetensors"
        tensors, notes = read_tensors(file) if file.is_file() else ({}, {})
        if notes.get("names") != self.problems.names:
            tensors, notes = {}, {"names": self.problems.names, "spent": 0.0}
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith("x at ")}
        state = {name: tensor for name, tensor in tensors.items() if name not in kept} or None
        reached = len(state["curve"]) - 1 if state else 0
        if any(steps < reached and f"x at {steps}" not in kept for steps in self.own.steps):
            kept, state, reached, notes["spent"] = {}, None, 0, 0.0  # it has gone past what is asked for
        bar.update(min(reached, max(self.own.steps)))
        for steps in sorted(set(self.own.steps)):
            at = f"x at {steps}"
            parts = descend(self.targets[number], y, x0, self.loss, self.s, steps, self.own.save_steps, state, bar)
            for found, seconds in parts if at not in kept else ():
                state = found.state
                notes["spent"] += seconds
                if len(found.curve) > steps:
                    kept[at], notes[at] = found.x, notes["spent"]
                save_tensors(file, {**state, **kept}, notes)
                self.run.stop_if_asked()
            curve, stopped = state["curve"][: steps + 1], state["stopped"]
            ended = torch.where(stopped <= steps, stopped, -1)
            yield f"{label}optimisation, {steps} steps", Found(kept[at].to(y), notes[at], curve, ended)

    def through(
        self, name: str, theta: MappingNet, trained: dict, bar: tqdm, y: Tensor, x0: Tensor, batch: slice
    ) -> Iterator[tuple[str, Found]]:
        """A landscape, with the steps that it was trained for."""
        seed_everything(self.s.seed)
        began, steps = clock(self.device), self.own.theta_steps
        found = invert_through(theta, self.target.f, y, x0, self.loss, steps=steps, lr=float(trained["z_lr"]),
                               clip=float(trained["clip"]), on_step=lambda _: bar.update())  # fmt: skip
        yield f"{name}, {steps} steps", Found(found.x, clock(self.device) - began, found.curve, found.stopped)

    def measured(self, method: Method, judge: nn.Module | None) -> Iterator[tuple[str, Found, Tensor, dict]]:
        """Names with what a method found for all problems, f of it, and the figures of each sample."""
        parts: dict[str, list[Found]] = {}
        for batch in self.run.until_stopped(self.batches):
            y, x0 = (tensor[batch].to(self.device) for tensor in (self.problems.y, method.x0))
            for name, found in method.run(y, x0, batch):
                parts.setdefault(name, []).append(found)
        for name, found in ((name, together(of)) for name, of in parts.items()):
            seed_everything(self.s.seed)  # noise drawn anew is the same for all methods, and after a resume
            output = outputs(method.f, found.x, self.s.batch_size, self.device)
            yield name, found, output, self.figures(found.x, method.x0, output, judge)

    @torch.no_grad()
    def figures(self, x: Tensor, x0: Tensor, output: Tensor, judge: nn.Module | None) -> dict[str, Tensor]:
        """The figures of each sample: name -> (N,).

        ``error`` is mean |f(x) - y|, ``picture_error`` the same once x is an 8-bit picture, ``distance`` the root mean
        square of x - x0, ``judge`` the share of attributes on which the judge says the same of the picture (x, or f(x))
        and of the one that y belongs to. Of pictures f(x) there are ``psnr`` in dB, and ``lpips`` if it can be had.
        """
        target, s, y = self.target, self.s, self.problems.y
        found = {"error": (output - y).abs().flatten(1).mean(1)}
        shown, _ = as_saved(x if target.from_image else output)
        if target.from_image:
            rounded = outputs(target.f, shown, s.batch_size, self.device)
            found["picture_error"] = (rounded - y).abs().flatten(1).mean(1)
        if target.to_image:
            found |= picture_figures(shown, y, s, self.device)
        else:
            found["distance"] = (x - x0).square().flatten(1).mean(1).sqrt()
        if judge is not None:
            said, wanted = (outputs(judge, i, s.batch_size, self.device) for i in (shown, self.problems.wanted))
            found["judge"] = agreement(said, wanted)
        return found


def find_judge(path: Path | None, target: Target, device: torch.device, log) -> nn.Module | None:
    """The judge for the network's images; the demo's if it fits and none is given.

    Raises:
        InputError: the given one does not fit.
    """
    if target.img_size is None:
        if path is not None:
            raise InputError(f"--judge {path}: {target.name} has no image to judge")
        return None
    judge = load_judge(path if path is not None else FACES / "judge.safetensors")
    if judge.img_size != target.img_size:
        reason = f"takes {judge.img_size}x{judge.img_size} images, not {target.img_size}x{target.img_size}"
    elif target.attributes is not None and list(judge.attributes) != list(target.attributes):
        reason = "knows other attributes than the network"
    else:
        return judge.to(device).requires_grad_(False)
    if path is not None:
        raise InputError(f"--judge {path}: {reason}")
    log.info("no judge: the demo's %s", reason)
    return None


def mean(values: Sequence[float]) -> float | None:
    """Of the finite ones; None if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def with_intervals(figures: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Means of figures (N,) over the finite ones, and 95 % intervals of those that samples differ in."""
    row = {name: mean(values.tolist()) for name, values in figures.items()}
    for name in figures.keys() & {"psnr", "lpips", "judge"}:
        finite = figures[name][figures[name].isfinite()]
        if len(finite) > 1:
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
    evaluation = Evaluation(targets, problems, s, own, run, loss)
    rows, by_image, curves, shown = [], [], {}, {}
    steps = len(evaluation.batches) * (len(targets) * max(own.steps) + len(thetas) * own.theta_steps)
    with tqdm(total=steps, unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:
        for method in evaluation.methods(thetas, bar):
            for name, found, output, figures in evaluation.measured(method, judge):
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
                    for image, step in zip(problems.names, found.stopped.tolist(), strict=True):
                        if step >= 0:
                            log.warning("%s: %s: loss or gradient not finite at step %d", name, image, step)
    told = [compared(name, curve, curves[name.partition("landscape")[0] + "optimisation"])
            for name, curve in curves.items() if "landscape" in name]  # fmt: skip
    if len(told) > 1:
        means = {key: None if None in (of := [one[key] for one in told]) else mean(of) for key in LANDSCAPES}
        told.append({"theta": f"mean of {len(told)} seeds", **means})
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


def search(
    targets: Sequence[Target], names: Sequence[str], y: Tensor, loss: Loss, s: Settings, own: Find, run: Run, bar: tqdm
) -> tuple[Inversion, Tensor, float]:
    """Find inputs for a batch, space by space, each from the best of the one before.

    Every ``own.save_steps`` the state goes to state.safetensors, from which a resumed run goes on; there it stops if it
    is asked to.

    Returns:
        The inversion in the last space, the losses of all spaces one after another, and the seconds.
    """
    file, stage, spent, before = s.out / "state.safetensors", 0, 0.0, {}
    state, notes = read_tensors(file) if s.resume and file.is_file() else ({}, {})
    if notes.get("names") == list(names):
        stage, spent = notes["stage"], notes["seconds"]
        before = {"before": state.pop("before")} if "before" in state else {}
        x = state["x"].to(y)
        bar.update(len(before.get("before", ())) + len(state["curve"]) - 1)
    else:
        state, x = None, starts(targets[0], y.cpu(), s, loss, run.device).to(y)
    for number, target in enumerate(targets[stage:], start=stage):
        for found, seconds in descend(target, y, x, loss, s, own.steps, own.save_steps, state, bar, 1000 * number):
            spent += seconds
            bar.set_postfix_str(f"{target.name}, loss {found.loss.mean().item():.4g}")
            notes = {"names": list(names), "stage": number, "seconds": spent}
            save_tensors(file, {**found.state, **before}, notes)
            run.stop_if_asked()
        before = {"before": torch.cat([*before.values(), found.curve.cpu()])}
        if target is not targets[-1]:
            x, state = targets[number + 1].f.enter(target.f.w_plus(found.x)).detach(), None
    return found, before["before"], spent


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
    paths, size = named_images(s.data, s.images), target.img_size
    loss = make_loss(target, s, device)
    log = begin("find", s, own, target, free=("images",))
    table = MetricsTable(s.out / "results.csv")
    done = {row["image"] for row in table.rows}
    left = [name for name in paths if name not in done]
    steps = len(targets) * own.steps * math.ceil(len(left) / s.batch_size)
    with tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None) as bar:
        for start in range(0, len(left), s.batch_size):
            chosen = left[start : start + s.batch_size]
            y = torch.stack([load_image(paths[name], size) for name in chosen])
            found, curves, seconds = search(targets, chosen, y.to(device), loss, s, own, run, bar)
            for line in found.problems():
                log.warning("%s, batch of %s: %s", target.name, chosen[0], line)
            for row in keep(target, chosen, y, found, curves, s, device):
                table.append({**row, "seconds": seconds / len(chosen)})
            (s.out / "state.safetensors").unlink(missing_ok=True)
    curves = {name: read_tensors(s.out / f"{name}.safetensors")[0]["curve"].tolist() for name in paths}
    if len(curves) > 10:
        curves = {"mean": torch.tensor(list(curves.values())).mean(0).tolist()}
    write_curves(s.out, curves)
    pairs = [(load_image(path, size), load_image(s.out / f"{n}.png")) for n, path in list(paths.items())[:SHEET_ROWS]]
    rows = [[picture(one, SIDE) for one in (wanted, got, (got - wanted).abs() - 1)] for wanted, got in pairs]
    contact_sheet(s.out / "sheet.png", ("input", "found", "difference"), rows, list(paths)[:SHEET_ROWS])
    print(format_table([row for row in table.rows if row["image"] in paths], "image", COLUMNS))
    return 0


@torch.no_grad()
def keep(
    target: Target, names: Sequence[str], wanted: Tensor, found: Inversion, curves: Tensor, s: Settings, device
) -> list[dict]:
    """Write each image and latent that was found; a row of figures for each."""
    pictures, _ = as_saved(outputs(target.f, found.x, s.batch_size, device))
    figures = picture_figures(pictures, wanted, s, device)
    rows = []
    for i, name in enumerate(names):
        row = {"image": name, "loss": found.loss[i].item(), **{key: v[i].item() for key, v in figures.items()}}
        latent = {"x": found.x[i], "curve": curves[:, i]}
        if isinstance(target.f, Latents):
            latent["w_plus"] = target.f.w_plus(found.x[i : i + 1])[0]
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
    ends = []
    for path in own.morph:
        w_plus = read_tensors(path)[0].get("w_plus")
        shape = (target.f.generator.layers, target.f.generator.dim)
        if w_plus is None or tuple(w_plus.shape) != shape:
            got = "no w_plus" if w_plus is None else f"a w_plus of shape {tuple(w_plus.shape)}"
            raise InputError(f"--morph {path}: {got}, the generator needs {shape}")
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
