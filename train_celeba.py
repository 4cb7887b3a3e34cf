"""Train an SPNN on CelebAMask-HQ: stage 1 trains g, stage 2 its r-networks.

    python train_celeba.py --dataset_path /path/to/CelebAMask-HQ --is_forward_train --is_r_opt
    python train_celeba.py --config configs/faces_64.yml --dataset_path /path/to/faces

Penrose diagnostics run on the test split after each stage. Results go to --checkpoint_dir.
"""

import argparse
import time
from pathlib import Path

from checkpoints import load_spnn, save_spnn
from data_loader import ATTRIBUTES, Loaders, download_dataset, make_loaders
from diagnostics import diagnose, format_table
from logger import get_logger
from models import MIXINGS, SPNN
from train import FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, CelebATrainer, Settings, typical_logits
from utils import (
    LARGEST_SEED,
    InputError,
    number,
    parse_with_config,
    resolve_device,
    run_command,
    seed_everything,
    write_json,
)

SWITCH = argparse.BooleanOptionalAction  # --no-... takes back what a preset switches on


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
        type=number(int, 1),
        help="32, 64 or 256; any with layer_channels (default: 256; stage 2 alone: that of stage 1)",
    )
    data.add_argument("--batch_size", type=number(int, 1), default=256)
    data.add_argument("--workers", type=number(int, 0), default=2, help="loader processes (default %(default)s)")
    data.add_argument("--strict", action=SWITCH, default=False, help="refuse unreadable images, do not skip them")
    data.add_argument("--no_cache", action=SWITCH, default=False, help="keep no resized copy of the images")
    model = p.add_argument_group("model")
    model.add_argument("--mix_type", choices=sorted(MIXINGS), default="cayley")
    model.add_argument("--hidden", type=number(int, 1), default=128, help="width of a built-in architecture's networks")
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


def report(model: SPNN, loaders: Loaders, args: argparse.Namespace, device, folder: Path, stage: str) -> None:
    """Diagnostics after a stage: on screen, in the log, and as diagnostics_<stage>.json."""
    measured = diagnose(model, loaders.test, device, args.diagnose_samples, args.seed, attributes=ATTRIBUTES)
    get_logger("train_celeba", folder).info("test split after stage %s\n%s", stage, format_table(measured))
    write_json(folder / f"diagnostics_{stage}.json", measured)


def main(argv: list[str] | None = None) -> int:
    args, layer_channels = parse(argv)
    started = time.perf_counter()
    device, folder = resolve_device(args.device), Path(args.checkpoint_dir)
    seed_everything(args.seed)
    if args.is_forward_train and (folder / FORWARD_CHECKPOINT).exists() and not args.overwrite:
        raise InputError(f"{folder / FORWARD_CHECKPOINT} exists; give --overwrite or another --checkpoint_dir")
    if not args.is_forward_train and not (folder / FORWARD_CHECKPOINT).is_file():
        raise InputError(f"{folder / FORWARD_CHECKPOINT}: no such file; run stage 1 first (--is_forward_train)")

    # before the data: a chain that does not fit should say so at once
    model = build_model(args, layer_channels) if args.is_forward_train else load_spnn(folder / FORWARD_CHECKPOINT)[0]
    if args.img_size not in (None, model.img_size):
        file, size = folder / FORWARD_CHECKPOINT, model.img_size
        raise InputError(f"{file} takes {size}x{size} images, but --img_size is {args.img_size}")
    loaders = make_loaders(
        args.dataset_path if args.dataset_path is not None else download_dataset(),
        model.img_size,
        args.batch_size,
        args.workers,
        args.seed,
        strict=args.strict,
        cache=not args.no_cache,
        pin_memory=device.type == "cuda",
    )
    log = get_logger("train_celeba", folder)
    if args.is_forward_train:  # what an earlier run left must not stand beside this one's files
        for name in (FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, "config.json"):
            (folder / name).unlink(missing_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("SPNN with %.2f M parameters; %d training images", parameters / 1e6, len(loaders.train.dataset))
    write_json(folder / "settings.json", {**vars(args), "layer_channels": layer_channels})
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
        return CelebATrainer(
            model.to(device), loaders.train, loaders.val, settings, folder, device, ATTRIBUTES, dict(notes)
        )

    if args.is_forward_train:
        best = trainer(model).train_forward()
        model, notes = load_spnn(best)
        model.to(device)
        notes.pop("model")
        save_spnn(best, model, {**notes, "typical_logits": typical_logits(model, loaders.val, device)})
        report(model, loaders, args, device, folder, "forward")
    if args.is_r_opt:
        model, notes = load_spnn(folder / FORWARD_CHECKPOINT)
        best = trainer(model, typical_logits=notes.get("typical_logits")).optimise_r()
        model, _ = load_spnn(best)
        report(model.to(device), loaders, args, device, folder, "r_opt")
    log.info("done in %.1f min; %s", (time.perf_counter() - started) / 60, best)
    return 0


if __name__ == "__main__":
    run_command(main)
