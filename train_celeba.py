"""Train an SPNN on CelebAMask-HQ: stage 1 trains g, stage 2 its r-networks.

    python train_celeba.py --dataset_path /path/to/CelebAMask-HQ --is_forward_train --is_r_opt
    python train_celeba.py --config configs/faces_64.yml --dataset_path /path/to/faces
    torchrun --nproc_per_node 4 train_celeba.py ...          # the same batches, shared by four processes

Penrose diagnostics run on the test split after each stage. Results go to --checkpoint_dir. A run that was stopped or
killed goes on where it was with the same command and --resume.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from blocks import MIXINGS
from checkpoints import load_spnn, save_spnn
from data_loader import ATTRIBUTES, FaceLoader, Loaders, download_dataset, grid, make_loaders, save_image
from diagnostics import diagnose, format_table
from distributed import World
from distributed import world as join_world
from logger import get_logger
from models import SPNN
from performance import (
    PRECISIONS,
    checkpoint_activations,
    compile_networks,
    has_tf32,
    inner_networks,
    networks_in,
    prepare_networks,
)
from resume import (
    ANOTHER_VERSION,
    STATE_NAME,
    Stopped,
    check_parts,
    check_settings,
    load_state,
    locked,
    outlive_stop_signals,
    plain,
    save_state,
    stop_signals,
)
from train import FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, STAGE_PARTS, CelebATrainer, Settings, typical_logits
from utils import (
    LARGEST_BATCH,
    LARGEST_CREW,
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_WIDTH,
    InputError,
    number,
    parse_with_config,
    remove_temporaries,
    run_command,
    seed_everything,
    shown,
    write_json,
)

SWITCH = argparse.BooleanOptionalAction  # --no-... takes back what a preset switches on
# what does not decide the weights: a resumed run may have it otherwise
FREE = ("config", "dataset_path", "workers", "strict", "no_cache", "checkpoint_dir", "overwrite", "resume",
        "save_every", "checkpoint_activations", "precision", "compile", "device", "diagnose_samples")  # fmt: skip
DIAGNOSTICS, NATURAL = "diagnostics_{}.json", "natural_{}.png"  # by stage
DONE = "done"  # in the state file of a run that has come to its end


def parser() -> argparse.ArgumentParser:
    """The command line; every flag may also stand in a --config file."""
    defaults = Settings()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--config", metavar="FILE", help="YAML preset; flags given on the command line win")
    data = p.add_argument_group("data")
    data.add_argument("--dataset_path", help="CelebAMask-HQ root (default: download through kagglehub)")
    data.add_argument(
        "--img_size",
        type=number(int, 1, LARGEST_SIDE),
        help="32, 64 or 256; any with layer_channels (default: 256; stage 2 alone: that of stage 1)",
    )
    data.add_argument("--batch_size", type=number(int, 1, LARGEST_BATCH), default=256)
    data.add_argument(
        "--workers", type=number(int, 0, LARGEST_CREW), default=2, help="loader processes (default %(default)s)"
    )
    data.add_argument("--strict", action=SWITCH, default=False, help="refuse unreadable images, do not skip them")
    data.add_argument("--no_cache", action=SWITCH, default=False, help="keep no resized copy of the images")
    model = p.add_argument_group("model")
    model.add_argument("--mix_type", choices=sorted(MIXINGS), default="cayley")
    model.add_argument(
        "--hidden", type=number(int, 1, LARGEST_WIDTH), default=128, help="width of a built-in architecture's networks"
    )
    model.add_argument("--scale_bound", type=number(float, 1e-6), default=2.0, help="bound of its log-scales")
    one = p.add_argument_group("stage 1")
    one.add_argument("--is_forward_train", action=SWITCH, default=False, help="run stage 1: train g")
    one.add_argument("--epoch", type=number(int, 1), default=defaults.epochs)
    one.add_argument("--lr", type=number(float, 0), default=defaults.lr)
    for name in ("lambda_bce", "lambda_right_inverse", "lambda_img_rec"):
        one.add_argument(f"--{name}", type=number(float, 0), default=getattr(defaults, name))
    one.add_argument("--warmup_steps", type=number(int, 0), default=defaults.warmup_steps)
    one.add_argument(
        "--reweight_every",
        type=number(int, 0),
        default=defaults.reweight_every,
        help="steps between two updates of the attribute weights; 0: all weigh the same (default %(default)s)",
    )
    two = p.add_argument_group("stage 2")
    two.add_argument("--is_r_opt", action=SWITCH, default=False, help="run stage 2: optimise the r-networks")
    two.add_argument("--r_epoch", type=number(int, 1), default=defaults.r_epochs)
    two.add_argument("--r_lr", type=number(float, 0), default=defaults.r_lr)
    for name in ("lambda_r_norm", "lambda_r_img_rec", "lambda_r_right_inverse"):
        two.add_argument(f"--{name}", type=number(float, 0), default=getattr(defaults, name))
    run = p.add_argument_group("run")
    run.add_argument("--checkpoint_dir", default="check_points/", help="default %(default)s")
    run.add_argument("--overwrite", action=SWITCH, default=False, help="train anew where a trained model is")
    run.add_argument("--resume", action=SWITCH, default=False,
                     help="continue the run in --checkpoint_dir exactly where its last saved state is; begin it where "
                     "there is none")  # fmt: skip
    run.add_argument("--save_every", type=number(int, 0), default=500,
                     help="steps between saved states; epoch ends are saved too (default %(default)s)")  # fmt: skip
    run.add_argument("--checkpoint_activations", action=SWITCH, default=False,
                     help="keep less for the backward pass and compute it again, block by block")  # fmt: skip
    run.add_argument("--precision", choices=PRECISIONS,
                     help="of the networks inside blocks; mixing and coupling are float32 (default: tf32 on a GPU that "
                     "has it, float32 elsewhere)")  # fmt: skip
    run.add_argument("--compile", action=SWITCH, default=False,
                     help="translate those networks with torch.compile; takes minutes at first")  # fmt: skip
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    run.add_argument("--seed", type=number(int, 0, LARGEST_SEED), default=0)
    run.add_argument("--diagnose_samples", type=number(int, 1), default=256, help="test images for the Penrose figures")
    return p


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list | None]:
    """Settings of a run, and the custom architecture of its config file, if any."""
    p = parser()
    config = p.parse_known_args(argv)[0].config
    args, others = parse_with_config(p, config, argv, extra=["layer_channels"])
    if not (args.is_forward_train or args.is_r_opt):
        raise InputError("nothing to do: give --is_forward_train (stage 1), --is_r_opt (stage 2), or both")
    return args, others.get("layer_channels")


def build_model(args: argparse.Namespace, layer_channels: list | None) -> SPNN:
    """A fresh SPNN. Raises InputError where the architecture does not fit."""
    try:
        return SPNN(
            img_ch=3,
            num_classes=len(ATTRIBUTES),
            hidden=args.hidden,
            scale_bound=args.scale_bound,
            img_size=256 if args.img_size is None else args.img_size,
            mix_type=args.mix_type,
            layer_channels=layer_channels,
        )
    except ValueError as error:
        raise InputError(f"architecture: {error}") from None


def until(stopped: Callable[[], int | None], batches: Iterable) -> Iterator:
    """The batches, until a signal comes: `resume.Stopped` then."""
    for batch in batches:
        if (signum := stopped()) is not None:
            raise Stopped(signum)
        yield batch


def report(
    model: SPNN, loader: FaceLoader, stopped: Callable[[], int | None], args: argparse.Namespace, device, folder: Path,
    stage: str,
) -> None:  # fmt: skip
    """Diagnostics after a stage: on screen, in the log, and as diagnostics_<stage>.json. And natural_<stage>.png, the
    loader's first faces above what g' makes of their logits.
    """
    measured = diagnose(model, until(stopped, loader), device, args.diagnose_samples, args.seed, attributes=ATTRIBUTES)
    get_logger("train_celeba", folder).info("test split after stage %s\n%s", stage, format_table(measured))
    write_json(folder / DIAGNOSTICS.format(stage), measured)
    x = next(iter(loader))[0][:8].to(device)
    with torch.no_grad():
        save_image(grid(torch.cat([x, model.pinv(model(x))]), columns=len(x)), folder / NATURAL.format(stage))


def find_state(folder: Path, resume: bool, overwrite: bool, run: dict) -> dict | None:
    """The state to go on from, None for a run that begins.

    Raises:
        InputError: a run that is not finished and neither asked for nor to be overwritten, or one of other settings.
    """
    path = folder / STATE_NAME
    if overwrite or not path.is_file():
        return None
    state = load_state(path, {"stage": str})
    if state["stage"] not in (*STAGE_PARTS, DONE):
        raise InputError(f"{path}: stage {shown(state['stage'])} is unknown; {ANOTHER_VERSION}")
    if state["stage"] == DONE and state["settings"] | run != state["settings"]:
        return None  # an earlier run, stage 1 perhaps, is no obstacle to the next
    if resume:
        check_settings(state["settings"], run, folder)
        check_parts(state, STAGE_PARTS.get(state["stage"], {}), path)
        return state
    if state["stage"] != DONE:
        raise InputError(f"{path}: a run that is not finished; give --resume to continue it or --overwrite")
    return None


def usual_precision(state: dict | None, device: torch.device) -> str:
    """What --precision is where it is not given: the resumed run's, if the device has it, else TF32 or float32."""
    earlier = None if state is None else state["settings"].get("precision")
    if earlier in ("float32", "bf16"):
        return earlier
    return "tf32" if has_tf32(device) else "float32"


def starts_with_forward(args: argparse.Namespace, state: dict | None) -> bool:
    """Whether stage 1 is the next to run."""
    return args.is_forward_train and (state is None or state["stage"] == "forward")


def main(argv: list[str] | None = None) -> int:
    args, layer_channels = parse(argv)
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    folder = Path(args.checkpoint_dir)
    seed_everything(args.seed)
    with join_world(args.device) as (world, device), locked(folder) if world.leads else nullcontext():
        run = {key: value for key, value in vars(args).items() if key not in FREE} | {"layer_channels": layer_channels}
        state = find_state(folder, args.resume, args.overwrite, plain(run))
        if args.precision is None:
            args.precision = usual_precision(state, device)
        if state is not None and state["stage"] == DONE:
            print(f"{folder}: this run is finished")
            return 0
        model, loaders = prepare(args, layer_channels, device, folder, state, world)
        run |= {f"images in its {split} split": len(loader.dataset) for split, loader in loaders._asdict().items()}
        if state is not None:
            check_settings(state["settings"], run, folder)
        run["precision"] = args.precision  # for the next --resume; it may be another, as the device may
        with stop_signals() as stopped:
            try:
                train(args, layer_channels, device, folder, model, loaders, plain(run), state, stopped, world)
            except Stopped as signal:
                get_logger("train_celeba").info("%s: saved; continue with --resume", signal)
                return signal.status
    return 0


def prepare(
    args: argparse.Namespace, layer_channels: list | None, device, folder: Path, state: dict | None, world: World
) -> tuple[SPNN, Loaders]:
    """The model of the stage to begin with, and the data. Raises InputError where a stage cannot run in ``folder``."""
    forward = starts_with_forward(args, state)
    if state is None and forward and (folder / FORWARD_CHECKPOINT).exists() and not args.overwrite:
        raise InputError(f"{folder / FORWARD_CHECKPOINT} exists; give --overwrite or another --checkpoint_dir")
    if not forward and not (folder / FORWARD_CHECKPOINT).is_file():
        raise InputError(f"{folder / FORWARD_CHECKPOINT}: no such file; run stage 1 first (--is_forward_train)")

    # before the data: a chain that does not fit should say so at once, and so should a precision
    with networks_in(args.precision, device):
        pass
    model = build_model(args, layer_channels) if forward else load_spnn(folder / FORWARD_CHECKPOINT)[0]
    if args.img_size not in (None, model.img_size):
        file, size = folder / FORWARD_CHECKPOINT, model.img_size
        raise InputError(f"{file} takes {size}x{size} images, but --img_size is {args.img_size}")
    with world.leader_first():  # it downloads, and builds the cache
        loaders = make_loaders(
            args.dataset_path if args.dataset_path is not None else download_dataset(),
            model.img_size,
            args.batch_size,
            args.workers,
            args.seed,
            strict=args.strict,
            cache=not args.no_cache,
            device=device,
            share=(world.rank, world.size),
        )
    for loader in loaders:
        loader.worker_init_fn = outlive_stop_signals
    return model, loaders


def train(
    args: argparse.Namespace,
    layer_channels: list | None,
    device,
    folder: Path,
    model: SPNN,
    loaders: Loaders,
    run: dict,
    state: dict | None,
    stopped: Callable[[], int | None],
    world: World,
) -> None:
    """Run the stages that are asked for, or what is left of them.

    Raises:
        Stopped: ``stopped`` told of a signal; the state is saved.
    """
    started, forward = time.perf_counter(), starts_with_forward(args, state)
    log = get_logger("train_celeba", folder)
    if world.leads:
        remove_temporaries(folder)
        if state is None:
            (folder / STATE_NAME).unlink(missing_ok=True)
            if forward:  # what an earlier run left must not stand beside this one's files
                reports = [name.format(stage) for name in (DIAGNOSTICS, NATURAL) for stage in STAGE_PARTS]
                for name in (FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, "config.json", *reports):
                    (folder / name).unlink(missing_ok=True)
        write_json(folder / "settings.json", {**vars(args), "layer_channels": layer_channels})
    else:
        logging.disable(logging.INFO)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("SPNN with %.2f M parameters; %d training images", parameters / 1e6, len(loaders.train.dataset))
    settings = Settings(
        epochs=args.epoch,
        r_epochs=args.r_epoch,
        **{
            name: getattr(args, name)
            for name in Settings.__dataclass_fields__
            if name not in ("epochs", "r_epochs") and hasattr(args, name)
        },
    )

    def trainer(model: SPNN, **notes) -> CelebATrainer:
        prepare_networks(model, device)
        if args.checkpoint_activations:
            checkpoint_activations(model)
        if args.compile:
            compile_networks(inner_networks(model), device)
        return CelebATrainer(
            model, loaders.train, loaders.val, settings, folder, device, ATTRIBUTES, dict(notes),
            run, args.save_every, world.agreed(stopped), state, world,
        )  # fmt: skip

    if forward:
        best = trainer(model).train_forward()
        state = None
        if world.leads:
            model, notes = load_spnn(best)
            model.to(device)
            notes.pop("model")
            typical = typical_logits(model, until(stopped, loaders.val), device)
            save_spnn(best, model, {**notes, "typical_logits": typical})
            report(model, loaders.test, stopped, args, device, folder, "forward")
        world.wait()
    if args.is_r_opt:
        model, notes = load_spnn(folder / FORWARD_CHECKPOINT)
        best = trainer(model, typical_logits=notes.get("typical_logits")).optimise_r()
        if world.leads:
            model, _ = load_spnn(best)
            report(model.to(device), loaders.test, stopped, args, device, folder, "r_opt")
        world.wait()
    if world.leads:
        save_state(folder / STATE_NAME, {"settings": run, "stage": DONE})  # what training held is not needed any more
    log.info("done in %.1f min; %s", (time.perf_counter() - started) / 60, best)


if __name__ == "__main__":
    run_command(main)
