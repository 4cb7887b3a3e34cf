"""Reconstruct images from nothing but their attribute logits, or from another measurement of them.

    python DDNM/main.py --ni --config faces.yml --path_y faces --image_folder demo
    python DDNM/main.py --ni --config celeba_hq.yml --path_y /path/to/portraits --image_folder results
    python DDNM/main.py --ni --config faces.yml --path_y faces --operator sr4 --image_folder larger

Results go to DDNM/exp/image_samples/<image_folder>, or to --out: the inputs, the reconstructions, sheet.png with both
and their attributes, results.csv, results.json, logits.csv and log.txt; progress.jsonl says which images are finished,
and the same command with --resume draws the others. Every flag but --config may also stand in the preset.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs from any folder

import torch
from torch import Tensor, nn
from tqdm import tqdm

from DDNM.guided_diffusion import inputs, results
from DDNM.guided_diffusion.diffusion import evaluations, image_generator, sample
from DDNM.guided_diffusion.guidance import Guidance, RuleSettings, Unguided
from images import save_image
from logger import get_logger
from loop import World, join_world, locked, stop_signals
from operators import is_network
from utils import InputError, json_values, option, remove_temporaries, run_command
from utils import parse as parse_settings

SAMPLES = Path(__file__).parent.resolve() / "exp" / "image_samples"
# settings that a resumed run may have otherwise: the weights are told by what they hold, the inputs by their targets
FREE = set("spnn prior judge device compile checkpoint_activations path_y strict batch_size config image_folder out ni "
           "overwrite resume published_rule".split())  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Run."""

    config: Path = option(..., "preset: a file under DDNM/configs, or a path; flags given here win")
    image_folder: str = option("images", "folder under exp/image_samples")
    out: Path | None = option(None, "folder for the results, anywhere, instead of --image_folder")
    ni: bool = option(False, "non-interactive: never ask, refuse instead")
    overwrite: bool = option(False, "replace the results in a folder that has some")
    resume: bool = option(False, "keep the images that an interrupted run finished, and draw the others")
    steps: int = option(100, "T_sampling", 1, 1000)
    published_rule: bool = option(False, "--guidance nlbp --no-clip_x0 --max_move 0 --last_bp_step 0 --eta none")
    base_rate: bool = option(False, "also draw each image unguided from the same noise, and report its figures")
    lpips: bool = option(True, "measure LPIPS")


class Settings(NamedTuple):
    """All of a run's settings; `architecture` is what only a preset says, `inputs.PRESET_ONLY`."""

    run: Run
    networks: inputs.NetworkSettings
    targets: inputs.TargetSettings
    rule: RuleSettings
    walk: inputs.WalkSettings
    architecture: dict
    note: str = ""  # what the log should say of them

    def flat(self) -> dict:
        parts = (self.rule, self.walk, self.targets, self.networks, self.run)
        return {key: value for part in parts for key, value in asdict(part).items()} | self.architecture


def parse(argv: Sequence[str] | None = None) -> Settings:
    """The settings of a run. Raises InputError."""
    kinds = (Run, inputs.NetworkSettings, inputs.TargetSettings, RuleSettings, inputs.WalkSettings)
    s = Settings(*parse_settings(__doc__, *kinds, argv=argv, extra=inputs.PRESET_ONLY, presets=inputs.CONFIGS))
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    said, spec = s.rule.guidance, s.targets.operator
    if s.run.published_rule:
        own = {"--max_move", "--last_bp_step", "--eta", "--clip_x0"}
        own |= set() if said in ("none", "nlbp", "auto") else {"--guidance"}
        if asked := words & own:
            raise InputError(f"--published_rule: has its own {min(asked)}; leave out one of the two")
        rule = replace(s.rule, guidance="none" if said == "none" else "nlbp", max_move=0.0, last_bp_step=0)
        s = s._replace(rule=rule, walk=replace(s.walk, clip_x0=False, eta=None))
    # a preset's rule is for what the preset measures: attributes, or its own operator
    elif said == "auto" or "--operator" in words and "--guidance" not in words:
        rule = "nlbp" if spec is None or is_network(spec) else "linear"
        s = s._replace(rule=replace(s.rule, guidance=rule))
        if said not in ("auto", rule):
            s = s._replace(note=f"--operator {spec}: guidance {rule}, not {said}, which the preset has for what it "
                                "measures itself; --guidance decides")  # fmt: skip
    if s.rule.noise and (spec is None or s.walk.eta == 0):
        raise InputError("--noise: needs --operator, and steps that add noise: --eta above 0, or none")
    s.rule.build(s.run.steps)  # refuses what it does not know
    return s


def result_folder(run: Run) -> Path:
    """The folder for results: --out, or one inside exp/image_samples. Raises InputError for one outside."""
    root = SAMPLES.resolve()
    folder = (root / run.image_folder).resolve() if run.out is None else run.out.resolve()
    if run.out is None and root not in folder.parents:
        raise InputError(f"--image_folder {run.image_folder}: must be inside {SAMPLES}; --out takes any folder")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    s = parse(argv)
    folder = result_folder(s.run)
    with join_world(s.networks.device) as (world, device), locked(folder) if world.leads else nullcontext():
        if world.leads:
            results.check_results(folder, s.run.resume, s.run.overwrite, ask=not s.run.ni)
        return reconstruct(s, folder, world, device)


class Drawing(NamedTuple):
    """What every batch of a run has in common."""

    settings: Settings
    networks: inputs.Networks
    targets: inputs.Targets
    lpips: nn.Module | None
    log: logging.Logger
    shown: bool


def reconstruct(s: Settings, folder: Path, world: World, device: torch.device) -> int:
    """Draw what is not finished yet, and write the results of all that is; the exit status."""
    guidance = s.rule.build(s.run.steps)
    networks = inputs.load_networks(s.networks, s.architecture, device, s.targets.operator)
    targets = inputs.read_targets(s.targets, networks, s.walk.batch_size, world)
    targets.add_noise(s.rule.noise, s.walk.seed)
    count = networks.evaluations(guidance, targets, s.run.steps, s.walk)
    deciding = {key: value for key, value in s.flat().items() if key not in FREE}
    progress = results.Progress(folder, json_values(deciding | networks.fingerprints()))
    done = finished_before(s, progress, targets, world)
    log = get_logger("reconstruct", folder)
    for line in [s.note] * bool(s.note) + [f"skipped: {line}" for line in targets.skipped]:
        log.warning(line)
    if targets.followed:
        log.info("--set takes with it, for what contradicts it: %s", targets.followed)
    log.info("%d targets, %d steps, guidance %s, on %s", len(done), count, s.rule.guidance, device)
    if s.rule.through_the_prior:
        log.info("gradients pass through the prior, whose activations are kept%s%s",
                 "" if s.networks.checkpoint_activations else " (--checkpoint_activations recomputes them)",
                 "; --compile cannot help there" if s.networks.compile else "")  # fmt: skip
    if kept := sum(entry is not None for entry in done):
        log.info("resumed: %d are finished", kept)
    lpips = inputs.load_lpips(device, log, networks.image_size) if s.run.lpips and targets.files is not None else None
    d = Drawing(s, networks, targets, lpips, log, shown=world.leads)
    rules = {"reconstruction": guidance}
    if s.run.base_rate and s.rule.guidance != "none":
        rules["unguided"] = Unguided()
    size = s.walk.batch_size
    parts = [slice(i, i + size) for i in range(0, len(done), size)]
    with stop_signals() as stopped:
        # whole, also if some of it is finished: rounding depends on what an image shares its batch with
        for index, part in world.share([(i, part) for i, part in enumerate(parts) if not all(done[part])]):
            if stopped() is not None:
                break
            given, counter = targets.inputs(part, networks.image_size), f"batch {index + 1}/{len(parts)}"
            drawn = {kind: draw(d, rule, part, given, f"{counter}, {kind}") for kind, rule in rules.items()}
            if targets.files is None or networks.measures is not None:  # in the place of the input, or beside it
                seen, _ = results.as_saved(networks.shown(targets.logits[part].to(device)))
                drawn["natural" if networks.measures is None else "measured"] = seen.cpu(), [], None
            new = {i: save(folder, i - part.start, drawn, given) for i in range(len(done))[part] if done[i] is None}
            for i, entry in new.items():
                done[i] = entry
            progress.add([(entry, targets.logits[i]) for i, entry in new.items()])
        signum = int(world.largest(stopped() or 0))
    done = [next(filter(None, entries), None) for entries in zip(*world.gather(done), strict=True)]
    ready = [i for i, entry in enumerate(done) if entry is not None]
    if not ready:
        log.info("stopped before the first batch was finished")
        return 128 + signum
    if world.leads:
        settings = json_values(s.flat() | {"device": str(device), "guidance_rule": asdict(guidance)})
        entries, size = [done[i] for i in ready], networks.image_size
        results.write_results(folder, settings, entries, targets.logits[ready], networks.attributes, size, log)
    if signum and len(ready) < len(done):
        log.info("stopped: %d of %d images are finished; draw the others with --resume", len(ready), len(done))
        return 128 + signum
    return 0


def finished_before(
    s: Settings, progress: results.Progress, targets: inputs.Targets, world: World
) -> list[results.Finished | None]:
    """For each target what an earlier run finished, if --resume is given; else the folder is cleared."""
    done: list[results.Finished | None] = [None] * len(targets.names)
    if world.leads:
        if s.run.resume and progress.path.is_file():
            done = progress.finished(targets.names, targets.logits)
        else:
            results.clear_results(progress.folder)  # nothing can be refused any more
            progress.begin([])
        for kind in (".", *results.PICTURES):
            remove_temporaries(progress.folder / kind)
    else:
        logging.disable(logging.INFO)
    return world.gather(done)[0]  # and not before: the others write into the folder from here on


def draw(d: Drawing, rule: Guidance, part: slice, given: Sequence[Tensor | None], label: str):
    """Pictures of a part of the targets, (B, 3, S, S) on the CPU, as they are saved; their figures and logits."""
    s, n, names = d.settings, d.networks, d.targets.names[part]
    target = d.targets.logits[part].to(n.device)
    judged = None if d.targets.judged is None else d.targets.judged[part].to(n.device)
    walk = s.walk.travel | {"steps": s.run.steps}
    count, started = evaluations(n.prior, rule, **walk), time.perf_counter()
    with tqdm(total=count, desc=label, unit="step", leave=False, dynamic_ncols=True, disable=not d.shown) as bar:
        images = sample(
            n.prior, [image_generator(s.walk.seed, name) for name in names], n.device, n.operator, target, rule,
            eta=s.walk.eta, clip_x0=s.walk.clip_x0, on_step=lambda *_: bar.update(), **walk,
        )  # fmt: skip
    seconds = (time.perf_counter() - started) / len(images)
    figures, logits = results.measure(names, images, given, n.operator, target, n.judge, judged, d.lpips,
                              seconds=seconds, steps=count, seed=s.walk.seed)  # fmt: skip
    pictures, finite = results.as_saved(images)
    if broken := [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]:
        d.log.warning("not finite: %s; --clip_x0 and --max_move keep images in range", ", ".join(broken))
    return pictures.cpu(), figures, logits.cpu()


def save(folder: Path, i: int, drawn: dict, given: Sequence[Tensor | None]) -> results.Finished:
    """Write the pictures of the i-th image of a batch."""
    pictures = {kind: images[i] for kind, (images, _, _) in drawn.items()}
    if given[i] is not None:
        pictures["input"] = given[i]
    _, figures, logits = drawn["reconstruction"]
    for kind, picture in pictures.items():
        save_image(picture, folder / kind / f"{figures[i].name}.png")
    unguided = drawn["unguided"][1][i] if "unguided" in drawn else None
    return results.Finished(figures[i].name, figures[i], unguided, logits[i], tuple(pictures))


if __name__ == "__main__":
    run_command(main)
