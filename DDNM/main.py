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
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs from any folder

import torch
from torch import Tensor, nn

from DDNM.guided_diffusion import inputs, results
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
        s = s._replace(rule=replace(s.rule, guidance="nlbp" if spec is None or is_network(spec) else "linear"))
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


@dataclass
class Drawing:
    """What every batch of a run has in common."""

    settings: Settings
    rules: dict[str, Guidance]  # by the kind of picture that they draw
    networks: inputs.Networks
    targets: inputs.Targets
    lpips: nn.Module | None
    log: logging.Logger
    shown: bool

    def draw(self, kind: str, part: slice, given: Sequence[Tensor | None]) -> tuple[Tensor, list[dict], list]:
        """Pictures of a part of the targets, (B, 3, S, S) on the CPU, as they are saved; their figures and logits."""
        s, n, names, rule = self.settings, self.networks, self.targets.names[part], self.rules[kind]
        target = self.targets.logits[part].to(n.device)
        judged = None if self.targets.judged is None else self.targets.judged[part].to(n.device)
        label = f"images {part.start + 1} to {part.stop} of {len(self.targets.names)}, {kind}"
        images, costs = results.draw(n, names, target, rule, s.run.steps, s.walk, label, self.shown, self.log)
        figures, logits = results.measure(names, images, given, n.operator, target, n.judge, judged, self.lpips,
                                          seed=s.walk.seed, **costs)  # fmt: skip
        return results.as_saved(images)[0].cpu(), figures, logits

    def batch(self, part: slice, wanted: Sequence[int], content: Sequence[str], folder: Path) -> list[dict]:
        """Draw a part of the targets, and write the pictures of those that are wanted; their lines of the progress."""
        n = self.networks
        given = self.targets.inputs(part, n.image_size)
        drawn = {kind: self.draw(kind, part, given) for kind in self.rules}
        pictures: dict[str, Sequence[Tensor | None]] = {kind: images for kind, (images, _, _) in drawn.items()}
        if self.targets.files is not None:
            pictures["input"] = given
        if self.targets.files is None or n.measures is not None:  # in the place of the input, or beside it
            seen, _ = results.as_saved(n.shown(self.targets.logits[part].to(n.device)))
            pictures["natural" if n.measures is None else "measured"] = seen.cpu()
        _, figures, logits = drawn["reconstruction"]
        lines = []
        for i in wanted:
            at, name = i - part.start, self.targets.names[i]
            for kind, images in pictures.items():
                save_image(images[at], folder / kind / f"{name}.png")
            unguided = drawn["unguided"][1][at] if "unguided" in drawn else None
            lines.append({"name": name, "content": content[i], "pictures": list(pictures), "figures": figures[at],
                          "unguided": unguided, "logits": logits[at]})  # fmt: skip
        return lines


def reconstruct(s: Settings, folder: Path, world: World, device: torch.device) -> int:
    """Draw what is not finished yet, and write the results of all that is; the exit status."""
    guidance = s.rule.build(s.run.steps)
    networks = inputs.load_networks(s.networks, s.architecture, device, s.targets.operator)
    targets = inputs.read_targets(s.targets, networks, s.walk.batch_size, world)
    content = world.gather(results.contents(targets.files, targets.logits) if world.leads else [])[0]
    targets.add_noise(s.rule.noise, s.walk.seed)
    count = networks.evaluations(guidance, targets, s.run.steps, s.walk)
    deciding = {key: value for key, value in s.flat().items() if key not in FREE}
    progress = results.Progress(folder, json_values(deciding | networks.fingerprints()))
    done = finished_before(s.run, progress, targets.names, content, world)
    log = get_logger("reconstruct", folder)
    for line in targets.skipped:
        log.warning("skipped: %s", line)
    if targets.followed:
        log.info("--set takes with it, for what contradicts it: %s", targets.followed)
    log.info("%d targets, %d steps, guidance %s, on %s", len(done), count, s.rule.guidance, device)
    if s.rule.through_the_prior:
        log.info("gradients pass through the prior, whose activations are kept%s%s",
                 "" if s.networks.checkpoint_activations else " (--checkpoint_activations recomputes them)",
                 "; --compile cannot help there" if s.networks.compile else "")  # fmt: skip
    if kept := sum(entry is not None for entry in done):
        log.info("resumed: %d are finished", kept)
    rules = {"reconstruction": guidance}
    if s.run.base_rate and s.rule.guidance != "none":
        rules["unguided"] = Unguided()
    lpips = inputs.load_lpips(device, log, networks.image_size) if s.run.lpips and targets.files is not None else None
    drawing = Drawing(s, rules, networks, targets, lpips, log, shown=world.leads)
    parts = [slice(i, min(i + s.walk.batch_size, len(done))) for i in range(0, len(done), s.walk.batch_size)]
    with stop_signals() as stopped:
        for part in world.share([part for part in parts if not all(done[part])]):
            if stopped() is not None:
                break
            # whole, also if some of it is finished: rounding depends on what an image shares its batch with
            wanted = [i for i in range(part.start, part.stop) if done[i] is None]
            new = drawing.batch(part, wanted, content, folder)
            progress.append(new)
            for i, line in zip(wanted, new, strict=True):
                done[i] = line
        signum = int(world.largest(stopped() or 0))
    done = [next(filter(None, entries), None) for entries in zip(*world.gather(done), strict=True)]
    ready = [i for i, entry in enumerate(done) if entry is not None]
    if world.leads and ready:
        settings = json_values(s.flat() | {"device": str(device), "guidance_rule": asdict(guidance)})
        entries, size = [done[i] for i in ready], networks.image_size
        results.write_results(folder, settings, entries, targets.logits[ready], networks.attributes, size, log)
    if signum and len(ready) < len(done):
        log.info("stopped: %d of %d images are finished; draw the others with --resume", len(ready), len(done))
        return 128 + signum
    return 0


def finished_before(
    run: Run, progress: results.Progress, names: Sequence[str], content: Sequence[str], world: World
) -> list[dict | None]:
    """For each target what an earlier run finished, if --resume is given; else the folder is cleared."""
    done: list[dict | None] = [None] * len(names)
    if world.leads:
        if run.resume and progress.path.is_file():
            done = progress.finished(names, content)
        else:
            results.clear_results(progress.folder)  # nothing can be refused any more
            progress.begin([])
        for kind in (".", *results.PICTURES):
            remove_temporaries(progress.folder / kind)
    else:
        logging.disable(logging.INFO)
    return world.gather(done)[0]  # and not before: the others write into the folder from here on


if __name__ == "__main__":
    run_command(main)
