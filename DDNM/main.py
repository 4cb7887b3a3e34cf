"""Reconstruct images from nothing but their attribute logits.

    python DDNM/main.py --ni --config faces.yml --path_y faces --image_folder demo
    python DDNM/main.py --ni --config celeba_hq.yml --path_y /path/to/portraits --image_folder results

Results go to DDNM/exp/image_samples/<image_folder>: the inputs, the reconstructions, sheet.png with both and their
attributes, results.csv, results.json, logits.csv and log.txt; progress.jsonl says which images are finished, and the
same command with --resume draws the others.
"""

import argparse
import hashlib
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the command runs from any folder

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoints import load_spnn, locate  # noqa: E402
from data_loader import ATTRIBUTES, find_images, load_image, save_image  # noqa: E402
from DDNM.guided_diffusion.compiled import compile_for_cpu  # noqa: E402
from DDNM.guided_diffusion.diffusion import evaluations, image_generator, sample  # noqa: E402
from DDNM.guided_diffusion.guidance import RuleSettings, Unguided  # noqa: E402
from DDNM.guided_diffusion.prior import Prior, load_prior  # noqa: E402
from DDNM.guided_diffusion.results import (  # noqa: E402
    SHEET_LIMIT,
    Figures,
    Finished,
    Progress,
    mean_figures,
    read_logits,
    write_logits,
    write_sheet,
    write_tables,
)
from distributed import World  # noqa: E402
from distributed import world as join_world  # noqa: E402
from judge import load_judge  # noqa: E402
from logger import get_logger  # noqa: E402
from metrics import agreement, prob_error, psnr  # noqa: E402
from models import SPNN  # noqa: E402
from operators import SPNNOperator  # noqa: E402
from performance import compile_networks, inner_networks, prepare_networks  # noqa: E402
from resume import is_empty, locked, plain, stop_signals  # noqa: E402
from utils import (  # noqa: E402
    LARGEST_BATCH,
    LARGEST_SEED,
    InputError,
    file_name,
    nearest,
    number,
    parse_with_config,
    remove_temporaries,
    run_command,
)

DDNM = ROOT / "DDNM"
SAMPLES = DDNM / "exp" / "image_samples"
# settings that only a config file has: the architecture of a prior in the published layout
CONFIG_ONLY = ("prior_model", "prior_image_size")
# what a resumed run may have otherwise: the weights are compared by what is in them, the inputs by their logits
FREE = ("config", "path_y", "image_folder", "ni", "overwrite", "resume", "spnn", "prior", "judge", "batch_size",
        "compile", "device", "strict")  # fmt: skip
PICTURES = ("input", "reconstruction", "unguided")  # folders of a result folder


# --- Command line ----------------------------------------------------------------------------------------------------


SWITCH = argparse.BooleanOptionalAction  # --no-... takes back what a config switches on


def parser() -> argparse.ArgumentParser:
    """The command line; every flag but --config may also stand in the config file."""
    rule = RuleSettings()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--config", required=True, help="a file under DDNM/configs, or a path; flags given here win")
    p.add_argument("--path_y", help="input images: a name under exp/datasets, a folder or a file; or a "
                   "table of logits (.csv) as written to logits.csv")  # fmt: skip
    p.add_argument("--image_folder", default="images", help="folder under exp/image_samples (default %(default)s)")
    p.add_argument("--ni", action=SWITCH, default=False, help="non-interactive: never ask, refuse instead")
    p.add_argument("--overwrite", action=SWITCH, default=False, help="replace the results in a folder that has some")

    p.add_argument("--resume", action=SWITCH, default=False, help="keep the images that an interrupted run finished, "
                   "and draw the others")  # fmt: skip

    what = p.add_argument_group("weights and targets")
    what.add_argument("--spnn", help="SPNN weights: a file or a hub id")
    what.add_argument("--prior", help="diffusion prior: a diffusers folder, a DDPM weight file or a hub id")
    what.add_argument("--judge", help="weights of the independent judge (judge.py); none: no judge's figures")
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set an attribute of every "
                      "target; 0 or 1 for the typical logit without or with it, or a logit such as +4")  # fmt: skip

    nlbp = p.add_argument_group("non-linear back-projection")
    nlbp.add_argument("--guidance", default="nlbp", help="none: plain samples of the prior")
    for name in ("switch", "gradient_scale", "clean_scale", "mean_scale", "recurrences", "recur_from", "recur_to"):
        kind = type(getattr(rule, name))
        nlbp.add_argument(f"--{name}", type=number(kind, 0, 1000), default=getattr(rule, name))
    nlbp.add_argument("--min_bp_step", type=number(int, 0), default=rule.min_bp_step,
                      help="lambda2 at steps from here on, lambda1 below (default %(default)s)")  # fmt: skip
    nlbp.add_argument("--lambda1", type=number(float, 0), default=rule.lambda1, help="default %(default)s")
    nlbp.add_argument("--lambda2", type=number(float, 0), default=rule.lambda2, help="default %(default)s")
    nlbp.add_argument("--nlbp_stop_cond", type=number(float, 0, 1), default=rule.nlbp_stop_cond,
                      help="no back-projection below this mean attribute error (default %(default)s)")  # fmt: skip
    nlbp.add_argument("--clip_x0", action=argparse.BooleanOptionalAction, default=True,
                      help="keep x0 in [-1, 1]; --no-clip_x0 is the published rule (default: on)")  # fmt: skip
    nlbp.add_argument("--max_move", type=number(float, 0), default=rule.max_move,
                      help="largest root mean square move of a back-projection; 0: no limit, the published rule "
                      "(default %(default)s)")  # fmt: skip
    nlbp.add_argument("--last_bp_step", type=number(int, 0), default=rule.last_bp_step,
                      help="no back-projection below this step (default %(default)s)")  # fmt: skip
    nlbp.add_argument(
        "--published_rule", action=SWITCH, default=False, help="--no-clip_x0 --max_move 0 --last_bp_step 0"
    )

    sampler = p.add_argument_group("sampler")
    sampler.add_argument("--steps", type=number(int, 1, 1000), default=100, help="T_sampling (default %(default)s)")
    sampler.add_argument(
        "--travel_length", type=number(int, 1, 1000), default=1, help="time travel (default %(default)s)"
    )
    sampler.add_argument(
        "--travel_repeat", type=number(int, 1, 1000), default=1, help="time travel (default %(default)s)"
    )
    sampler.add_argument("--eta", type=number(float, 0, 1), help="DDIM's variance; not given: the published one")

    run = p.add_argument_group("run")
    run.add_argument(
        "--batch_size", type=number(int, 1, LARGEST_BATCH), default=1, help="images at once (default %(default)s)"
    )
    run.add_argument("--seed", type=number(int, 0, LARGEST_SEED), default=1234)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the prior's network")
    run.add_argument("--compile", action=SWITCH, default=False,
                     help="translate the networks with torch.compile, which takes minutes at first; on a CPU, "
                          "the prior with OpenVINO, which takes seconds")  # fmt: skip
    run.add_argument("--base_rate", action=argparse.BooleanOptionalAction, default=False,
                     help="also draw each image unguided from the same noise, and report its figures")  # fmt: skip
    run.add_argument("--lpips", action=argparse.BooleanOptionalAction, default=True, help="measure LPIPS")
    run.add_argument("--strict", action=SWITCH, default=False, help="refuse unreadable images instead of skipping them")
    return p


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The settings of a run, and what only its config file has (`CONFIG_ONLY`)."""
    p = parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    config = early.parse_known_args(argv)[0].config
    if config is not None:
        here, shipped = Path(config), DDNM / "configs" / config
        config = here if here.is_file() else shipped
        if not config.is_file():
            known = sorted(path.name for path in shipped.parent.glob("*.yml"))
            raise InputError(f"--config {here}: no such file, and none under {shipped.parent} ({', '.join(known)})")
    args, others = parse_with_config(p, config, argv, extra=CONFIG_ONLY)
    if args.path_y is None:
        raise InputError("--path_y: give the input images, here or in the config")
    args.config = str(config)
    if args.published_rule:
        args.clip_x0, args.max_move, args.last_bp_step = False, 0.0, 0
    size = others.get("prior_image_size", 1)
    if not isinstance(others.get("prior_model", {}), dict) or type(size) is not int or not 1 <= size <= 4096:
        raise InputError(f"config {config}: prior_model must be a mapping, prior_image_size a whole number to 4096")
    return args, others


def from_ddnm(source: str) -> str:
    """A path that is given relative to DDNM/, as the configs do, from wherever the command runs."""
    inside = DDNM / source
    return str(inside) if not Path(source).exists() and inside.exists() else source


# --- Inputs ----------------------------------------------------------------------------------------------------------


def input_path(path_y: str) -> Path:
    """What --path_y names: a path, or a name under exp/datasets."""
    for candidate in (Path(path_y), DDNM / "exp" / "datasets" / path_y):
        if candidate.exists():
            return candidate
    named = sorted(p.name for p in (DDNM / "exp" / "datasets").glob("*") if p.is_dir())
    raise InputError(f"--path_y {path_y}: no such file or folder, nor a name under exp/datasets ({', '.join(named)})")


def image_names(paths: Sequence[Path], top: Path) -> list[str]:
    """A name for each image's results: its path below ``top`` without suffix; with it, or a number, where two meet."""
    top = top if top.is_dir() else top.parent
    relative = [path.relative_to(top) for path in paths]
    names = [file_name("__".join(r.with_suffix("").parts)) for r in relative]
    count = Counter(names)
    names = [n if count[n] == 1 else file_name("__".join(r.parts)) for n, r in zip(names, relative, strict=True)]
    apart: dict[str, None] = {}  # a set that keeps its order
    for name in names:
        number = 1
        while (unique := name if number == 1 else f"{name}_{number}") in apart:
            number += 1
        apart[unique] = None
    return list(apart)


@torch.no_grad()
def read_targets(
    path: Path, networks: Sequence[nn.Module], size: int, batch_size: int, device: torch.device, strict: bool
) -> tuple[list[str], list[Path], list[Tensor], list[str]]:
    """What the networks see in the images of a folder or file. The images are not kept: there may be many.

    Returns:
        Names and files of the readable images, for each network its logits (N, d), and a line for each image that
        cannot be read (refused if strict).
    """
    paths = find_images(path)
    names, files, skipped = [], [], []
    waiting: list[Tensor] = []
    logits: list[list[Tensor]] = [[] for _ in networks]

    def look() -> None:
        batch = torch.stack(waiting).to(device)  # (B, 3, S, S)
        for network, found in zip(networks, logits, strict=True):
            found.append(network(batch).cpu())
        waiting.clear()

    for name, file in zip(image_names(paths, path), paths, strict=True):
        try:
            waiting.append(load_image(file, size))
        except InputError as error:
            if strict:
                raise
            skipped.append(str(error))
            continue
        names.append(name)
        files.append(file)
        if len(waiting) == batch_size:
            look()
    if not names:
        raise InputError(f"{path}: none of its {len(paths)} images can be read")
    if waiting:
        look()
    return names, files, [torch.cat(found) for found in logits], skipped


def parse_set(
    assignments: Sequence[str], attributes: Sequence[str], typical: Sequence | None
) -> dict[int, tuple[float, bool]]:
    """Attribute index -> its logit and whether it should be present, from ``NAME=VALUE`` strings.

    Args:
        typical: for each attribute its typical logits (without, with), from config.json; None where it has none.

    Raises:
        InputError: an attribute that does not exist (with the nearest match), or a value that is no number.
    """
    logits = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: expected NAME=VALUE, such as Eyeglasses=1")
        if name not in attributes:
            raise InputError(f"--set {assignment}: no attribute {name!r}{nearest(name, attributes)}")
        index = list(attributes).index(name)
        if value in ("0", "1"):
            if typical is None:
                raise InputError(f"--set {assignment}: these weights record no typical logits; give one: {name}=+4")
            logits[index] = float(typical[index][int(value)]), value == "1"
        else:
            try:
                logit = float(value)
            except ValueError:
                logit = math.nan
            if not torch.tensor(logit).isfinite():  # in float32: 1e99 is none
                raise InputError(f"--set {assignment}: {value!r} is neither 0, 1 nor a logit such as +4")
            logits[index] = logit, logit > 0
    return logits


# --- Networks --------------------------------------------------------------------------------------------------------


def find_weights(args: argparse.Namespace) -> list[str]:
    """The SPNN's and the prior's weights: paths, or hub ids.

    Raises:
        InputError: one message for all that is missing: addresses, and where to put the files.
    """
    for flag in ("spnn", "prior"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag}: give the weights, here or in the config")
    return locate(from_ddnm(args.spnn), from_ddnm(args.prior))


def load_networks(
    args: argparse.Namespace, others: dict, device: torch.device
) -> tuple[SPNN, dict, Prior, nn.Module | None]:
    """The SPNN with its config.json, the prior and the judge, in eval mode on ``device``, sizes checked."""
    spnn_source, prior_source = find_weights(args)
    model, notes = load_spnn(spnn_source)
    image_size = others.get("prior_image_size", model.img_size)
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    prior = load_prior(prior_source, others.get("prior_model"), image_size, autocast, channels_last=True)
    if prior.image_size != model.img_size:
        raise InputError(
            f"the SPNN takes {model.img_size}x{model.img_size} images, the prior draws "
            f"{prior.image_size}x{prior.image_size}: use weights for one size"
        )
    if args.steps > prior.schedule.num_diffusion_timesteps:
        raise InputError(f"--steps {args.steps}: the prior was trained with {prior.schedule.num_diffusion_timesteps}")
    judge = None
    if args.judge is not None:
        judge = load_judge(from_ddnm(args.judge)).to(device).eval()
        if judge.img_size != model.img_size:
            raise InputError(f"the judge takes {judge.img_size}x{judge.img_size} images, not {model.img_size}")
    model, prior = prepare_networks(model, device).eval().requires_grad_(False), prior.to(device)
    if args.compile and device.type == "cpu":
        compile_for_cpu(prior)  # torch.compile makes it slower there
    elif args.compile:
        compile_networks([prior.unet, *inner_networks(model)], device)
    return model, notes, prior, judge


def fingerprint(network: nn.Module) -> str:
    """What tells these weights from others, whatever their file is called."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_lpips(device: torch.device, log) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018, AlexNet), or None where its weights cannot be had."""
    try:
        import lpips

        return lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as error:  # torchvision fetches AlexNet's weights: any network error may come
        log.warning("no LPIPS: its weights cannot be had (%s)", " ".join(str(error).split())[:120])
        return None


# --- The run ---------------------------------------------------------------------------------------------------------


def result_folder(name: str) -> Path:
    """The folder for results, inside exp/image_samples. Raises InputError for one outside, or a file."""
    root = SAMPLES.resolve()
    folder = (root / name).resolve()
    if root not in folder.parents:
        raise InputError(f"--image_folder {name}: must be inside {SAMPLES}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--image_folder {name}: {folder} is a file")
    for link in (folder / kind for kind in PICTURES):
        if link.is_symlink():  # pictures written, or deleted, through it would be somebody else's
            raise InputError(f"{link} is a link; results are written inside {SAMPLES} only")
    return folder


def check_results(folder: Path, resume: bool, overwrite: bool, ask: bool) -> None:
    """Raises InputError where ``folder`` has results that may neither be replaced nor continued."""
    if is_empty(folder) or overwrite or resume and Progress.file(folder).is_file():
        return
    if ask and sys.stdin.isatty():
        if input(f"{folder} has results. Replace them? [y/N] ").strip().lower() in ("y", "yes"):
            return
    hint = " or --resume" if Progress.file(folder).is_file() else ""
    raise InputError(f"{folder} is not empty; give --overwrite{hint} or another --image_folder")


def clear_results(folder: Path) -> None:
    """Delete what an earlier run wrote into its result folder, and nothing else."""
    pictures = [f"{kind}/*.png" for kind in PICTURES]
    files = ("sheet*.png", "results.json", "results.csv", "logits.csv", "log.txt")
    for pattern in (Progress.file(folder).name, *files, *pictures):
        for file in folder.glob(pattern):
            file.unlink()


@torch.no_grad()
def measure(
    names: Sequence[str],
    images: Tensor,
    inputs: Sequence[Tensor | None],
    targets: Tensor,
    model: SPNN,
    judge: nn.Module | None,
    judge_targets: Tensor | None,
    lpips: nn.Module | None,
    **common,
) -> tuple[list[Figures], Tensor]:
    """The figures of images (B, 3, H, W), and their logits by g, (B, d)."""
    logits = model(images)
    by_g, error = agreement(logits, targets), prob_error(logits, targets)
    by_judge = agreement(judge(images), judge_targets) if judge is not None and judge_targets is not None else None
    figures = []
    for i, name in enumerate(names):
        f = Figures(name, by_g[i].item(), prob_error=error[i].item(), **common)
        if by_judge is not None:
            f = replace(f, judge_agreement=by_judge[i].item())
        if inputs[i] is not None:
            original = inputs[i][None].to(images.device)
            f = replace(f, psnr=psnr(images[i : i + 1], original).item())
            if lpips is not None:
                f = replace(f, lpips=lpips(images[i : i + 1].clamp(-1, 1), original).item())
        figures.append(f)
    return figures, logits


def main(argv: Sequence[str] | None = None) -> int:
    args, others = parse(argv)
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    source = input_path(args.path_y)
    folder = result_folder(args.image_folder)
    with join_world(args.device) as (world, device), locked(folder) if world.leads else nullcontext():
        if world.leads:
            check_results(folder, args.resume, args.overwrite, ask=not args.ni)
        return reconstruct(args, others, device, source, folder, world)


def reconstruct(
    args: argparse.Namespace, others: dict, device: torch.device, source: Path, folder: Path, world: World
) -> int:
    """Draw what is not finished yet, and write the results of all that is; the exit status."""
    rule = {field.name: getattr(args, field.name) for field in fields(RuleSettings)}
    guidance = RuleSettings(**rule).build()
    model, notes, prior, judge = load_networks(args, others, device)
    operator = SPNNOperator(model)
    attributes = notes.get("attributes") or (ATTRIBUTES if model.num_classes == len(ATTRIBUTES) else None)
    if attributes is None or len(attributes) != model.num_classes:
        raise InputError(f"{args.spnn}: config.json does not name its {model.num_classes} attributes")
    if judge is not None and list(judge.attributes) != list(attributes):
        raise InputError(f"the judge's {judge.num_classes} attributes are not the SPNN's {model.num_classes}")
    edits = parse_set(args.set, attributes, notes.get("typical_logits"))

    files: list[Path] | None = None  # of the inputs; a table of logits has none
    skipped: list[str] = []
    judge_targets: Tensor | None = None
    if source.suffix.lower() == ".csv":
        names, targets = read_logits(source, attributes)
        judge_targets = targets.clone()
    else:
        networks = [model] if judge is None else [model, judge]
        names, files, (targets, *judged), skipped = read_targets(
            source, networks, model.img_size, args.batch_size, device, args.strict
        )
        judge_targets = judged[0] if judged else None
    for index, (logit, present) in edits.items():
        targets[:, index] = logit
        if judge_targets is not None:  # for the judge only the sign counts, that of what was asked for
            judge_targets[:, index] = 1.0 if present else -1.0

    same = {key: value for key, value in vars(args).items() if key not in FREE} | others
    same |= {f"{name} weights": None if network is None else fingerprint(network)
             for name, network in (("spnn", model), ("prior", prior.unet), ("judge", judge))}  # fmt: skip
    progress = Progress(folder, plain(same))
    done: list[Finished | None] = [None] * len(names)
    if world.leads:
        if args.resume and progress.path.is_file():
            done = progress.read(names, targets)
        else:
            clear_results(folder)  # nothing can be refused any more
        for kind in (".", *PICTURES):
            remove_temporaries(folder / kind)
        progress.begin(done)
    else:
        logging.disable(logging.INFO)
    done = world.gather(done)[0]  # and not before: the others write into the folder from here on
    log = get_logger("reconstruct", folder)
    for line in skipped:
        log.warning("skipped: %s", line)

    lpips = load_lpips(device, log) if args.lpips and files is not None else None
    walk = {"steps": args.steps, "travel_length": args.travel_length, "travel_repeat": args.travel_repeat}
    count = evaluations(prior, guidance, **walk)
    log.info("%d targets, %d steps, guidance %s, on %s", len(names), count, args.guidance, device)
    if kept := sum(entry is not None for entry in done):
        log.info("resumed: %d are finished", kept)

    def draw(part: slice, inputs: Sequence[Tensor | None], guided: bool, label: str):
        """Images of a part of the targets, on the CPU, their figures and logits."""
        target = targets[part].to(device)
        rule = guidance if guided else Unguided()
        count = evaluations(prior, rule, **walk)
        bar = tqdm(total=count, desc=label, unit="step", leave=False, dynamic_ncols=True, disable=not world.leads)
        started = time.perf_counter()
        with bar:
            images = sample(
                prior,
                [image_generator(args.seed, name) for name in names[part]],
                device,
                operator,
                target,
                rule,
                eta=args.eta,
                clip_x0=args.clip_x0,
                on_step=lambda *_: bar.update(),
                **walk,
            )
        seconds = (time.perf_counter() - started) / len(images)
        judged = None if judge_targets is None else judge_targets[part].to(device)
        figures, logits = measure(names[part], images, inputs, target, model, judge, judged, lpips,
                                  seconds=seconds, steps=count, seed=args.seed)  # fmt: skip
        broken = [name for name, ok in zip(names[part], images.isfinite().flatten(1).all(1), strict=True) if not ok]
        if broken:
            log.warning("not finite: %s; --clip_x0 and --max_move keep images in range", ", ".join(broken))
        return images.nan_to_num(0.0, 1.0, -1.0).cpu(), figures, logits.cpu()

    parts = [slice(i, i + args.batch_size) for i in range(0, len(names), args.batch_size)]
    with stop_signals() as stopped:
        for index, part in world.share([(i, part) for i, part in enumerate(parts) if not all(done[part])]):
            if stopped() is not None:
                break
            # Whole, also where some of it is finished: rounding depends on what an image shares its batch with.
            size = model.img_size
            inputs = [None] * len(names[part]) if files is None else [load_image(file, size) for file in files[part]]
            counter = f"batch {index + 1}/{len(parts)}"
            drawn = {"reconstruction": draw(part, inputs, args.guidance != "none", counter)}
            if args.base_rate and args.guidance != "none":
                drawn["unguided"] = draw(part, inputs, False, f"{counter}, unguided")
            new = []
            for i, name in enumerate(names[part]):
                if done[part][i] is not None:
                    continue
                pictures = {kind: images[i] for kind, (images, _, _) in drawn.items()}
                if inputs[i] is not None:
                    pictures["input"] = inputs[i]
                for kind, picture in pictures.items():
                    save_image(picture, folder / kind / f"{name}.png")
                figures = {kind: of[i] for kind, (_, of, _) in drawn.items()}
                _, _, logits = drawn["reconstruction"]
                entry = Finished(name, figures["reconstruction"], figures.get("unguided"), logits[i], tuple(pictures))
                done[part.start + i] = entry
                new.append((entry, targets[part.start + i]))
            progress.append(new)
        signum = world.agreed(stopped)()
    done = [
        next((entry for entry in drawn if entry is not None), None) for drawn in zip(*world.gather(done), strict=True)
    ]
    ready = [i for i, entry in enumerate(done) if entry is not None]
    if not ready:
        log.info("stopped before the first batch was finished")
        return 128 + signum
    if world.leads:
        settings = {**vars(args), **others, "device": str(device), "guidance_rule": asdict(guidance)}
        write_results(folder, settings, [done[i] for i in ready], targets[ready], attributes, model.img_size, log)
    if signum is not None and len(ready) < len(names):
        log.info("stopped: %d of %d images are finished; draw the others with --resume", len(ready), len(names))
        return 128 + signum
    return 0


def write_results(
    folder: Path, settings: dict, done: Sequence[Finished], targets: Tensor, attributes: Sequence[str], size: int, log
) -> None:
    """The tables of the finished images, whose targets are (N, d), and the sheet of the first `SHEET_LIMIT`."""
    figures = [entry.figures for entry in done]
    unguided = [entry.unguided for entry in done if entry.unguided is not None] or None
    record = write_tables(folder, settings, figures, unguided)
    write_logits(folder / "logits.csv", [entry.name for entry in done], attributes, targets)

    def picture(kind: str, entry: Finished) -> Tensor | None:
        return load_image(folder / kind / f"{entry.name}.png", size) if kind in entry.pictures else None

    shown = done[:SHEET_LIMIT]
    pages = write_sheet(
        folder,
        attributes,
        [entry.name for entry in shown],
        [picture("input", entry) for entry in shown],
        targets[: len(shown)],
        torch.stack([picture("reconstruction", entry) for entry in shown]),
        torch.stack([entry.logits for entry in shown]),
        [caption(entry.figures) for entry in shown],
    )
    log.info("mean: %s", caption(Figures("", **mean_figures(figures))))
    if unguided is not None:
        log.info("unguided, same noise: %s", caption(Figures("", **record["unguided"]["mean"])))
    if len(done) > len(shown):
        log.info("the sheet shows the first %d of %d images", len(shown), len(done))
    log.info("%s", ", ".join(str(page) for page in pages))


def caption(f: Figures) -> str:
    """A line of figures, those that there are."""
    shown = {
        "agreement by g": (f.agreement, ".2f"),
        "by the judge": (f.judge_agreement, ".2f"),
        "probability error": (f.prob_error, ".3f"),
        "PSNR": (f.psnr, ".1f"),
        "LPIPS": (f.lpips, ".3f"),
        "seconds": (f.seconds, ".1f"),
    }
    return ", ".join(f"{key} {value:{form}}" for key, (value, form) in shown.items() if value is not None)


if __name__ == "__main__":
    run_command(main)
