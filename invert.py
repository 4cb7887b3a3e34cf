"""Invert a network: by optimisation, through a learned landscape, and in closed form if it has one.

    python invert.py find --data portrait.png --out check_points/found           # its latent in StyleGAN
    python invert.py find --morph a.safetensors b.safetensors --out check_points/morph
    python invert.py train --data data/faces_1k --out check_points/landscape     # a landscape for later inversions
    python invert.py eval --data data/heldout --theta check_points/landscape/theta.safetensors --out check_points/table

The network, --network:

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import load_strictly, read_json, read_weights, write_weights
from DDNM.guided_diffusion.results import contact_sheet, picture
from images import grid, load_image, save_image, to_float, to_uint8
from inversion import Inversion, Loss, MappingNet, invert, invert_through, train_mapping
from judge import load_judge
from logger import MetricsTable, get_logger, plot_curves
from loop import STATE_NAME, Loop, Run, check_settings, is_empty, locked, open_run, to_json_values
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
    resolve_device,
    run_command,
    seed_everything,
    write_json,
)

SHEET_ROWS, SIDE = 6, 256  # of a sheet, and of its pictures
TRAIN_FILES = ("theta.safetensors", "theta.json", STATE_NAME, "metrics.csv", "curves.png", "log.txt")
EVAL_FILES = ("results.json", "results.csv", "curves.csv", "curves.png", "sheet.png", "log.txt")
FIND_FILES = ("settings.json", "results.csv", "state.safetensors", "curves.csv", "curves.png", "sheet.png", "log.txt")


@dataclass
class Find:
    """Of find."""

    network: str = option("stylegan", f"{', '.join(READY)}, or package.module:factory (is imported)")
    steps: int = option(1000, "in each space", 1)
    save_steps: int = option(100, "between two saves of the running search", 1)
    resume: bool = option(False, "go on with what is in --out")
    morph: tuple[Path, ...] | None = option(None, "two latents, to mix instead of finding one")
    frames: int = option(20, "from the first to the second", 1, 10_000)


@dataclass
class Train:
    """Of train."""

    network: str = option("g", f"{', '.join(READY)}, or package.module:factory (is imported)")
    buffers: int = option(24, "replay buffers; 500 in the paper", 1)
    samples: int = option(16, "inversions per buffer", 1, LARGEST_BATCH)
    steps: int = option(20, "steps of an inversion", 1)
    z_lr: float = option(0.1, "Adam on z", 1e-12)
    lr: float = option(1e-4, "AdamW on theta", 1e-12)
    weight_decay: float = option(0.1, "AdamW on theta", 0.0)
    updates: int | None = option(None, "of theta per buffer; default: one pass over it", 1)
    width: int = option(16, "channels of theta's first layer", 1, LARGEST_WIDTH)
    resume: bool = option(False, "go on with what is in --out")


@dataclass
class Eval:
    """Of eval."""

    network: str = option("g", f"{', '.join(READY)}, or package.module:factory (is imported)")
    theta: tuple[Path, ...] | None = option(None, "weights of mapping nets, of several seeds perhaps: a row each")
    steps: tuple[int, ...] = option((20, 200), "of plain optimisation, a row each", 1)
    theta_steps: int = option(20, "through the landscape", 1)
    judge: Path | None = option(None, "weights of the independent judge; default: the demo's if it fits")


# --- Files -----------------------------------------------------------------------------------------------------------


def check_folder(out: Path, overwrite: bool, resumes: str | None) -> None:
    """Raise InputError if the content of a result folder would be lost, or it is a file.

    Args:
        resumes: the file that a run to go on with has written; None: to begin anew.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if resumes is not None and not is_empty(out) and not (out / resumes).is_file():
        raise InputError(f"--resume: {out} holds no run of this command; give another folder")
    if resumes is None and not is_empty(out) and not overwrite:
        raise InputError(f"--out {out}: not empty; give --overwrite or another folder")


def clear(out: Path, own: Sequence[str]) -> None:
    """Delete what an earlier run of the same command wrote, by name, and nothing else."""
    for name in own:
        (out / name).unlink(missing_ok=True)


def settings_of(*settings, without: Sequence[str] = ()) -> dict:
    """The flags as JSON values, in the order of the command's dataclasses."""
    merged = {key: value for each in settings for key, value in vars(each).items() if key not in without}
    return to_json_values(merged)


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
    load_strictly(theta, state, path)
    return theta.eval().requires_grad_(False), notes


# --- train -----------------------------------------------------------------------------------------------------------


def train(s: Settings, own: Train, run: Run) -> int:
    """Train theta, and write it with its table and curves."""
    target = load_targets(own.network, s, run.device)[-1]
    _, images = read_images(s.data, target.img_size, s.images)
    seed_everything(s.seed)
    x_lr = s.x_lr if s.x_lr is not None else target.x_lr
    try:
        theta = MappingNet(target.in_shape, own.width, x_lr / own.z_lr, target.bounds).to(run.device)
    except ValueError as error:
        raise InputError(f"--network {target.name}: {error}") from None
    given = settings_of(s, own, without=("out", "resume", "overwrite", "buffers", "device"))
    run.find_state(given, own.resume, s.overwrite)
    if run.state is None:
        clear(s.out, TRAIN_FILES)
    log = get_logger("invert", s.out)
    loss = make_loss(target, s, run.device)
    draw = problem_source(target, images, s, loss, run.device)
    count = sum(p.numel() for p in theta.parameters())
    log.info("inverting %s, theta has %s parameters, on %s", target.name, f"{count:,}", run.device)
    peak_gib(run.device, reset=True)

    def saved(loop: Loop) -> None:
        notes = {"network": target.name, "settings": settings_of(s, own), "theta": theta.config(), "buffers": loop.done}
        notes |= {"seconds": loop.seconds, "peak_gib": peak_gib(run.device)}
        write_weights(s.out / "theta.safetensors", theta.state_dict())
        write_json(s.out / "theta.json", notes)

    names = ("buffers", "samples", "steps", "z_lr", "lr", "weight_decay", "updates")
    rows = train_mapping(theta, target.f, draw, loss, run=run, **{name: getattr(own, name) for name in names},
                         clip=s.clip, batch_size=s.batch_size, saved=saved)  # fmt: skip
    first, last = rows[0], rows[-1]
    log.info("best loss of a trajectory: %.4g in the first buffer, %.4g in the last; %.1f min, at most %.2f GiB; %s",
             first["end_loss"], last["end_loss"], last["seconds"] / 60, peak_gib(run.device), s.out)  # fmt: skip
    return 0


# --- eval ------------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """A way of inverting f: ``run(y, x0)`` yields names with an x (B, ...) or an `inversion.Inversion`, each of which
    may go on from the one before."""

    f: nn.Module
    x0: Tensor
    run: Callable[[Tensor, Tensor], Iterator[tuple[str, Tensor | Inversion]]]


@dataclass
class Result:
    """What a method found on all problems.

    Attributes:
        x: (N, ...).
        output: f(x).
        seconds: an image.
        curve: mean loss after each number of steps, over the samples that stay finite; None without steps.
        stopped: a line for each sample whose search ended early.
    """

    x: Tensor
    x0: Tensor
    output: Tensor
    seconds: float
    curve: list[float] | None = None
    stopped: list[str] = field(default_factory=list)


def run_method(method: Method, problems: Problems, batch_size: int, device: torch.device) -> dict[str, Result]:
    """Run a method over all problems in batches."""
    parts: dict[str, list] = {}
    seconds: dict[str, float] = {}
    for start in range(0, len(problems.y), batch_size):
        part = slice(start, start + batch_size)
        search = method.run(problems.y[part].to(device), method.x0[part].to(device))
        spent = 0.0
        while True:
            began = time.perf_counter()
            name, found = next(search, (None, None))
            if name is None:
                break
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent += time.perf_counter() - began
            parts.setdefault(name, []).append(found)
            seconds[name] = seconds.get(name, 0.0) + spent
    results = {}
    for name, found in parts.items():
        x = torch.cat([f.x if isinstance(f, Inversion) else f for f in found]).detach().cpu()
        result = Result(x, method.x0, outputs(method.f, x, batch_size, device), seconds[name] / len(x))
        if isinstance(found[0], Inversion):
            curve = torch.cat([f.curve for f in found], dim=1).cpu()  # (T + 1, N)
            curve = curve[:, curve.isfinite().all(0)]
            result.curve = curve.mean(1).tolist() if curve.shape[1] else None
            ends = zip(problems.names, torch.cat([f.stopped for f in found]).tolist(), strict=True)
            result.stopped = [f"{n}: loss or gradient not finite at step {step}" for n, step in ends if step >= 0]
        results[name] = result
    return results


def methods_of(
    targets: Sequence[Target], problems: Problems, thetas: dict[str, tuple[MappingNet, dict]], s: Settings, own: Eval,
    loss: Loss, device: torch.device,
) -> list[Method]:  # fmt: skip
    """Every way of inverting the targets, in the order of the table; through ``thetas`` the last one alone."""
    methods = []
    for target in targets:
        f, last = target.f, target is targets[-1]
        label = f"{target.name.partition(' ')[2]}, " if target.to_image and isinstance(f, Latents) else ""
        x0 = problems.x0 if problems.x0 is not None else starts(target, problems.y, s, loss, device)

        def once(name: str, closed: Callable, f: nn.Module = f, x0: Tensor = x0) -> Method:
            def run(y: Tensor, x: Tensor) -> Iterator[tuple[str, Tensor]]:
                yield name, torch.no_grad()(closed)(y, x)

            return Method(f, x0, run)

        def plain(y: Tensor, x: Tensor, target: Target = target, label: str = label):
            found, x_lr = None, target.x_lr if s.x_lr is None else s.x_lr
            for steps in sorted(own.steps):
                state = None if found is None else found.state
                found = invert(target.f, y, x, loss, steps, x_lr, s.clip, target.bounds, state=state)
                yield f"{label}optimisation, {steps} steps", found

        def through(name: str, theta: MappingNet, trained: dict, f: nn.Module = f, x0: Tensor = x0) -> Method:
            def run(y: Tensor, x: Tensor) -> Iterator[tuple[str, Inversion]]:
                lr, clip = float(trained["z_lr"]), float(trained["clip"])
                yield name, invert_through(theta, f, y, x, loss, steps=own.theta_steps, lr=lr, clip=clip)

            return Method(f, x0, run)

        methods.append(once(f"{label}start", lambda y, x: x))
        methods += [once(name, closed) for name, closed in target.closed_form.items()]
        if last:
            methods += [once(n, c, nn.Identity()) for n, c in spnn_beside(target, s, device).items()]
        methods.append(Method(f, x0, plain))
        if last:
            named = ((f"{label}{name}, {own.theta_steps} steps", *theta) for name, theta in thetas.items())
            methods += [through(name, theta, notes["settings"]) for name, theta, notes in named]
    return methods


def as_picture(images: Tensor) -> Tensor:
    """Images as they come back from a file: 8 bits, in [-1, 1]."""
    return to_float(to_uint8(images))


@torch.no_grad()
def measure(
    target: Target, problems: Problems, result: Result, judge: nn.Module | None, s: Settings, device: torch.device
) -> dict[str, list[float]]:
    """The figures of each sample: name -> N numbers.

    ``error`` is mean |f(x) - y|, ``picture_error`` the same once x is an 8-bit picture, ``distance`` the root mean
    square of x - x0, ``judge`` the share of attributes on which the judge says the same of the picture (x, or f(x)) and
    of the one that y belongs to. Of pictures f(x) there is their ``psnr`` in dB, and ``lpips`` if it can be had.
    """
    found = {"error": (result.output - problems.y).abs().flatten(1).mean(1)}
    shown = as_picture(result.x if target.from_image else result.output)
    if target.from_image:
        rounded = outputs(target.f, shown, s.batch_size, device)
        found["picture_error"] = (rounded - problems.y).abs().flatten(1).mean(1)
    if target.to_image:
        found |= picture_figures(shown, problems.y, s, device)
    elif result.x.shape == result.x0.shape:
        found["distance"] = (result.x - result.x0).square().flatten(1).mean(1).sqrt()
    if judge is not None:
        said, wanted = (outputs(judge, images, s.batch_size, device) for images in (shown, problems.wanted))
        found["judge"] = agreement(said, wanted)
    return {name: values.tolist() for name, values in found.items()}


def picture_figures(picture: Tensor, wanted: Tensor, s: Settings, device: torch.device) -> dict[str, Tensor]:
    """PSNR in dB of images (N, 3, S, S) to others, and LPIPS unless only the squared error is asked for."""
    found = {"psnr": psnr(picture, wanted)}
    lpips = lpips_or_none(device, picture.shape[-1]) if s.loss != "mse" else None
    if lpips is not None:
        pairs = zip(picture.split(s.batch_size), wanted.split(s.batch_size), strict=True)
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


def mean(values: Sequence[float]) -> float | None:
    """Of the finite ones; None if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def format_table(rows: Sequence[dict], first: str = "method") -> str:
    """Figures as a Markdown table, without the columns that nobody has."""
    used = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [f"| {first} | " + " | ".join(COLUMNS[key][0] for key in used) + " |", "|---" * (len(used) + 1) + "|"]
    for row in rows:
        cells = ["-" if row.get(key) is None else format(float(row[key]), COLUMNS[key][1]) for key in used]
        lines.append(f"| {row[first]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    reason = None
    if judge.img_size != target.img_size:
        reason = f"takes {judge.img_size}x{judge.img_size} images, not {target.img_size}x{target.img_size}"
    elif target.attributes is not None and list(judge.attributes) != list(target.attributes):
        reason = "knows other attributes than the network"
    if reason is None:
        return judge.to(device).requires_grad_(False)
    if path is not None:
        raise InputError(f"--judge {path}: {reason}")
    log.info("no judge: the demo's %s", reason)
    return None


def compared(name: str, through: Sequence[float], plain: Sequence[float]) -> dict:
    """Of mean losses after each number of steps: what a landscape reaches and the plain steps to it, and vice versa."""

    def steps(curve: Sequence[float], goal: float) -> int | None:
        return next((step for step, value in enumerate(curve) if value <= goal), None)

    last = len(through) - 1
    goal, met = min(through), min(plain[: last + 1])
    return {"theta": name, "steps": last, "loss": goal, "plain_steps": steps(plain, goal), "plain_loss": met,
            "steps_to_plain_loss": steps(through, met)}  # fmt: skip


def evaluate(s: Settings, own: Eval, device: torch.device) -> int:
    """Measure every way of inverting the network, and write tables, curves and pictures."""
    targets = load_targets(own.network, s, device)
    target = targets[-1]
    thetas = {}
    for path in own.theta or ():
        theta, notes = load_theta(path, target)
        one = "landscape" if len(own.theta) == 1 else f"landscape of seed {notes['settings']['seed']}"
        if one in thetas:
            raise InputError(f"--theta {path}: {one} is there twice")
        thetas[one] = theta.to(device), notes
    judge = find_judge(own.judge, target, device, get_logger("invert"))
    names, images = read_images(s.data, target.img_size, s.images)
    problems = fixed_problems(target, names, images, s.images if s.images is not None else 100, s, device)
    loss = make_loss(target, s, device)
    clear(s.out, EVAL_FILES)
    log = get_logger("invert", s.out)
    results: dict[str, Result] = {}
    methods = methods_of(targets, problems, thetas, s, own, loss, device)
    for method in tqdm(methods, unit="method", leave=False, dynamic_ncols=True, disable=None):
        results |= run_method(method, problems, s.batch_size, device)

    rows, by_image = [], []
    for name, result in results.items():
        for line in result.stopped:
            log.warning("%s: %s", name, line)
        figures = measure(target, problems, result, judge, s, device)
        seconds = None if name.split(", ")[-1] == "start" else result.seconds
        rows.append({"method": name, **{key: mean(values) for key, values in figures.items()}, "seconds": seconds})
        for i, image in enumerate(problems.names):
            by_image.append({"method": name, "image": image, **{key: v[i] for key, v in figures.items()}})
    # a shorter plain run is the beginning of the next one, which takes its place
    curves = {name.rpartition(",")[0]: r.curve for name, r in results.items() if r.curve is not None}
    told = [compared(n, curve, curves[n.partition("landscape")[0] + "optimisation"])
            for n, curve in curves.items() if "landscape" in n]  # fmt: skip
    for one in told:
        log.info("%(theta)s: a loss of %(loss).4g after %(steps)d steps, plain after %(plain_steps)s; plain ones then "
                 "have %(plain_loss).4g, which it has after %(steps_to_plain_loss)s", one)  # fmt: skip
    record = {"settings": {**settings_of(s, own), "device": str(device)}, "landscapes": told}
    record |= {"thetas": [notes for _, notes in thetas.values()], "methods": rows, "images": by_image}
    write_json(s.out / "results.json", json_values(record))
    table = MetricsTable(s.out / "results.csv", rows=[])
    for row in rows:
        table.append({key: value for key, value in row.items() if value is not None})
    if curves:
        write_curves(s.out, curves)
    if target.img_size is not None:
        draw_results(s.out / "sheet.png", target, problems, results, by_image)
    print(format_table(rows))
    log.info("%d problems, %s, on %s; %s", len(problems.y), target.name, device, s.out)
    return 0


def write_curves(out: Path, curves: dict[str, Sequence[float]]) -> None:
    """curves.csv and curves.png: losses after each number of steps, by name."""
    table = MetricsTable(out / "curves.csv", rows=[])
    for step in range(max(map(len, curves.values()))):
        table.append({"step": step, **{f"loss_{n}": curve[step] for n, curve in curves.items() if step < len(curve)}})
    plot_curves(table.path, out / "curves.png")


def draw_results(path: Path, target: Target, problems: Problems, results: dict[str, Result], by_image) -> None:
    """The sheet: the start if it is an image, every method, and the image that the wanted output belongs to."""
    shown = {name: r for name, r in results.items() if target.from_image or name.split(", ")[-1] != "start"}
    last = "whose output is wanted" if target.from_image else "wanted"
    columns = [*(r.x if target.from_image else r.output for r in shown.values()), problems.wanted]
    names = problems.names[:SHEET_ROWS]
    told = {(row["method"], row["image"]): row.get("judge") for row in by_image}
    said = [[told[method, name] for method in shown] for name in names]
    captions = [
        f"{name}: judge {', '.join(f'{v:.2f}' for v in row)}" if None not in row else name
        for name, row in zip(names, said, strict=True)
    ]
    rows = [[picture(column[i], SIDE) for column in columns] for i in range(len(names))]
    contact_sheet(path, [*shown, last], rows, captions)


# --- find ------------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor], notes: dict) -> None:
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


def search(
    targets: Sequence[Target], names: Sequence[str], y: Tensor, loss: Loss, s: Settings, own: Find, run: Run, bar: tqdm
) -> tuple[Inversion, Tensor, float]:
    """Find inputs for a batch, space by space, each from the best of the one before.

    Every ``own.save_steps`` the state goes to state.safetensors, from which a resumed run goes on; there it stops if it
    is asked to.

    Returns:
        The inversion in the last space, the losses of all spaces one after another, and the seconds.
    """
    file, device = s.out / "state.safetensors", y.device
    stage, seconds, state, before, x = 0, 0.0, None, [], None
    if own.resume and file.is_file():
        tensors, notes = read_tensors(file)
        if notes.get("names") == list(names):
            stage, seconds = notes["stage"], notes["seconds"]
            before = [tensors.pop("before")] if "before" in tensors else []
            state, x = tensors, tensors["x"].to(device)
            bar.update(sum(map(len, before)) + len(state["curve"]) - 1)
    if x is None:
        x = starts(targets[0], y.cpu(), s, loss, device).to(device)
    for number, target in enumerate(targets[stage:], start=stage):
        lr = s.x_lr if s.x_lr is not None else target.x_lr
        while True:
            done = 0 if state is None else len(state["curve"]) - 1
            began = time.perf_counter()
            seed_everything(s.seed + 1000 * number + done)  # new noise is the same after a resume
            found = invert(target.f, y, x, loss, min(own.steps, done + own.save_steps), lr, s.clip, target.bounds,
                           on_step=lambda step, done=done: bar.update(step > done), state=state)  # fmt: skip
            state = found.state
            seconds += time.perf_counter() - began
            bar.set_postfix_str(f"{target.name}, loss {found.loss.mean().item():.4g}")
            tensors = {**state, **({"before": torch.cat(before)} if before else {})}
            save_tensors(file, tensors, {"names": list(names), "stage": number, "seconds": seconds})
            run.stop_if_asked()
            if len(state["curve"]) > own.steps:
                break
        before.append(found.curve.cpu())
        if target is not targets[-1]:
            x, state = targets[number + 1].f.enter(target.f.w_plus(found.x)).detach(), None
    return found, torch.cat(before), seconds


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
    settings, file = settings_of(s, own), s.out / "settings.json"
    if own.resume and file.is_file():
        without = ("out", "resume", "overwrite", "device", "images", "save_steps")
        check_settings(read_json(file), settings_of(s, own, without=without), s.out)
    else:
        clear(s.out, FIND_FILES)
    write_json(file, settings)
    log = get_logger("invert", s.out)
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
    print(format_table([row for row in table.rows if row["image"] in paths], "image"))
    return 0


@torch.no_grad()
def keep(
    target: Target, names: Sequence[str], wanted: Tensor, found: Inversion, curves: Tensor, s: Settings, device
) -> list[dict]:
    """Write each image and latent that was found; a row of figures for each."""
    pictures = outputs(target.f, found.x, s.batch_size, device)
    figures = picture_figures(as_picture(pictures), wanted, s, device)
    rows = []
    for i, name in enumerate(names):
        row = {"image": name, "loss": found.loss[i].item(), **{key: v[i].item() for key, v in figures.items()}}
        latent = {"x": found.x[i], "curve": curves[:, i]}
        if isinstance(target.f, Latents):
            latent["w_plus"] = target.f.w_plus(found.x[i : i + 1])[0]
        save_image(pictures[i].clamp(-1, 1), s.out / f"{name}.png")
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
    mixes = torch.stack([ends[0].lerp(ends[1], i / own.frames) for i in range(own.frames + 1)])
    pictures = outputs(target.f, mixes, s.batch_size, device).clamp(-1, 1)
    for i, frame in enumerate(pictures):
        save_image(frame, s.out / f"frame_{i:04d}.png")
    save_image(grid(pictures, 7), s.out / "frames.png")
    return 0


# --- Command line ----------------------------------------------------------------------------------------------------

COMMANDS = {"find": (find, Find), "train": (train, Train), "eval": (evaluate, Eval)}
BEGUN = {"find": "settings.json", "train": STATE_NAME}  # what a run writes first


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(f"usage: invert.py {{{','.join(COMMANDS)}}} [--help] ...\n\n{__doc__}")
        return 0
    if command not in COMMANDS:
        raise InputError(f"{command or 'no command'}: expected {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    run, kind = COMMANDS[command]
    s, own, _ = parse(f"invert.py {command}\n\n{__doc__}", Settings, kind, argv=argv[1:])
    check_folder(s.out, s.overwrite, BEGUN[command] if getattr(own, "resume", False) else None)
    if kind is Eval:  # nothing of it is saved half way: a signal ends it at once
        with locked(s.out):
            return evaluate(s, own, resolve_device(s.device))
    with open_run(s.out, s.device, save_every=1, seed=s.seed) as opened:
        return run(s, own, opened)


if __name__ == "__main__":
    run_command(main)
