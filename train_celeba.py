"""Train an SPNN on CelebAMask-HQ: stage 1 trains g, stage 2 its r-networks.

    python train_celeba.py --dataset_path /path/to/CelebAMask-HQ --is_forward_train --is_r_opt
    python train_celeba.py --config configs/faces_64.yml --dataset_path /path/to/faces
    torchrun --nproc_per_node 4 train_celeba.py ...          # the same batches, shared by four processes

Penrose diagnostics run on the test split after each stage. Results go to --checkpoint_dir. A run that was stopped or
killed goes on where it was with the same command and --resume.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from blocks import MIXINGS
from checkpoints import save_spnn
from data_loader import ATTRIBUTES, FaceLoader, Loaders, download_dataset, make_loaders
from DDNM.guided_diffusion.edits import contradictions
from diagnostics import diagnose, format_table
from images import grid, save_image
from judge import Judge, load_judge
from logger import get_logger
from loop import DONE, Run, check_settings, open_run, outlive_stop_signals
from models import SPNN
from networks import (
    PRECISIONS,
    compile_networks,
    has_tf32,
    inner_networks,
    networks_in,
    prepare_networks,
)
from train import FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, CelebATrainer, Settings, labels_of, typical_logits
from utils import (
    LARGEST_BATCH,
    LARGEST_CREW,
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_WIDTH,
    InputError,
    option,
    parse,
    run_command,
    seed_everything,
    write_json,
)

DIAGNOSTICS, NATURAL = "diagnostics_{}.json", "natural_{}.png"  # by stage


@dataclass(frozen=True)
class Task:
    """What is trained."""

    is_forward_train: bool = option(False, "run stage 1: train g")
    is_r_opt: bool = option(False, "run stage 2: optimise the r-networks")
    img_size: int | None = option(
        None, "32, 64 or 256; any with layer_channels (default: 256; stage 2 alone: that of stage 1)", 1, LARGEST_SIDE
    )
    mix_type: str = option("cayley", "mixing layers", choices=sorted(MIXINGS))
    hidden: int = option(128, "width of a built-in architecture's networks", 1, LARGEST_WIDTH)
    scale_bound: float = option(2.0, "bound of its log-scales", 1e-6)
    batch_size: int = option(256, "images per step, over all processes", 1, LARGEST_BATCH)
    seed: int = option(0, "of weights, order and mirroring", 0, LARGEST_SEED)
    init: str | None = option(None, "weights that stage 1 begins with: a folder, a file or a hub id (default: random)")
    teachers: tuple[str, ...] = option((), "weights of classifiers of judge.py, from whose answers g learns as well")

    def build(self, layer_channels: list | None) -> SPNN:
        """The SPNN to train. Raises InputError if the architecture does not fit, attributes or ``init``."""
        try:
            size = 256 if self.img_size is None else self.img_size
            model = SPNN(3, len(ATTRIBUTES), self.hidden, self.scale_bound, size, self.mix_type, layer_channels)
            if len(model.out_shape) > 1:
                raise ValueError(
                    "attributes need a chain that ends at 1x1, it ends at {1}x{2}".format(*model.out_shape)
                )
        except ValueError as error:
            raise InputError(f"architecture: {error}") from None
        if self.init is not None:
            try:
                model.load_state_dict(SPNN.from_pretrained(self.init).state_dict())
            except RuntimeError:
                raise InputError(f"--init {self.init}: its architecture is not the one that is trained") from None
        return model


@dataclass(frozen=True)
class Machine:
    """Files and machine. A resumed run may have these otherwise."""

    dataset_path: Path | None = option(None, "CelebAMask-HQ root (default: download through kagglehub)")
    checkpoint_dir: str = option("check_points/", "where everything is saved")
    overwrite: bool = option(False, "train anew although a trained model is there")
    resume: bool = option(
        False, "continue the run in --checkpoint_dir exactly where its last state is; begin it if there is none"
    )
    save_every: int = option(500, "steps between saved states; epoch ends are saved too", 0)
    workers: int = option(2, "loader processes", 0, LARGEST_CREW)
    strict: bool = option(False, "refuse unreadable images, do not skip them")
    no_cache: bool = option(False, "keep no resized copy of the images")
    checkpoint_activations: bool = option(False, "keep less for the backward pass, compute it again block by block")
    precision: str | None = option(
        None, "of the networks inside blocks; mixing and coupling are float32 (default: tf32 on a GPU that has it)",
        choices=PRECISIONS,
    )  # fmt: skip
    compile: bool = option(False, "translate those networks with torch.compile; takes minutes at first")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    diagnose_samples: int = option(256, "test images for the Penrose figures", 1)


Command = tuple[Task, Settings, Machine, list | None]


def read_command(argv: Sequence[str] | None = None) -> Command:
    """The command line, and the custom architecture of its preset, if any. Raises InputError."""
    task, machine, settings, others = parse(__doc__, Task, Machine, Settings, argv=argv, extra=["layer_channels"])
    if not (task.is_forward_train or task.is_r_opt):
        raise InputError("nothing to do: give --is_forward_train (stage 1), --is_r_opt (stage 2), or both")
    return task, settings, machine, others.get("layer_channels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for, or what is left of them."""
    task, settings, machine, chain = read_command(argv)
    folder, began = Path(machine.checkpoint_dir), time.perf_counter()
    seed_everything(task.seed)
    with open_run(folder, machine.device, machine.save_every, task.seed) as run:
        identity = {**asdict(task), **asdict(settings), "layer_channels": chain}
        del identity["precision"]  # it may be another, as the device may
        run.find_state(identity, machine.resume, machine.overwrite)
        stage = None if run.state is None else run.state["stage"]
        if stage == DONE:
            print(f"{folder}: this run is finished")
            return 0
        settings = replace(settings, precision=machine.precision or usual_precision(run.state, run.device))
        forward = task.is_forward_train and stage in (None, "forward")
        model, teachers, loaders = prepare(task, settings, machine, chain, run, forward)
        splits = {f"images in its {name} split": len(each.dataset) for name, each in loaders._asdict().items()}
        if run.state is not None:
            check_settings(run.state["settings"], splits, folder)
        run.settings |= {**splits, "precision": settings.precision}
        stale = [FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, "config.json", "diagnostics_*.json", "natural_*.png"]
        every = {**asdict(task), **asdict(settings), **asdict(machine), "layer_channels": chain}
        log = run.begin("train_celeba", every, stale if forward else ())
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        log.info("SPNN with %.2f M parameters; %d training images", parameters, len(loaders.train.dataset))

        def trainer(model: SPNN, **notes) -> CelebATrainer:
            prepare_networks(model, run.device)
            if machine.checkpoint_activations:
                model.pinn.checkpoint_activations = True
            if machine.compile:
                compile_networks(inner_networks(model), run.device)
            return CelebATrainer(model, loaders.train, loaders.val, settings, run, ATTRIBUTES, notes, teachers)

        if forward:
            log.info("stage 1: %d epochs of %d steps on %s", settings.epoch, len(loaders.train), run.device)
            best = trainer(model).train_forward()
            if run.world.leads:  # the others wait: it takes as long as an epoch's validation
                model = SPNN.from_pretrained(best).to(run.device)
                model.notes["typical_logits"] = typical_logits(model, run.until_stopped(loaders.val), run.device)
                model.notes["contradictions"] = contradictions(labels_of(loaders.train), ATTRIBUTES)
                save_spnn(best, model)
                report(run, model, loaders.test, machine.diagnose_samples, "forward")
            run.world.wait()
        if task.is_r_opt:
            model = SPNN.from_pretrained(folder / FORWARD_CHECKPOINT)
            log.info("stage 2: %d epochs of %d steps on %s", settings.r_epoch, len(loaders.train), run.device)
            kept = {name: model.notes.get(name) for name in ("typical_logits", "contradictions")}
            best = trainer(model, **kept).optimise_r()
            if run.world.leads:
                report(run, SPNN.from_pretrained(best), loaders.test, machine.diagnose_samples, "r_opt")
            run.world.wait()
        run.finish()
        log.info("done in %.1f min; %s", (time.perf_counter() - began) / 60, best)
    return 0


def usual_precision(state: dict | None, device: torch.device) -> str:
    """What --precision is if it is not given: the resumed run's if the device has it, else TF32 or float32."""
    earlier = None if state is None else state["settings"].get("precision")
    return earlier if earlier in ("float32", "bf16") else "tf32" if has_tf32(device) else "float32"


def prepare(
    task: Task, settings: Settings, machine: Machine, chain: list | None, run: Run, forward: bool
) -> tuple[SPNN, list[Judge], Loaders]:
    """The model of the stage to begin with, its teachers, and the data.

    Raises InputError if a stage cannot run in the folder.
    """
    file = run.folder / FORWARD_CHECKPOINT
    if run.state is None and forward and file.exists() and not machine.overwrite:
        raise InputError(f"{file} exists; give --overwrite or another --checkpoint_dir")
    if not forward and not file.is_file():
        raise InputError(f"{file}: no such file; run stage 1 first (--is_forward_train)")
    # before the data: a chain that does not fit should say so at once, and so should a precision
    with networks_in(settings.precision, run.device):
        pass
    model = task.build(chain) if forward else SPNN.from_pretrained(file)
    if task.img_size not in (None, model.img_size):
        raise InputError(f"{file} takes {model.img_size}x{model.img_size} images, but --img_size is {task.img_size}")
    teachers = load_teachers(task.teachers, model, run.device) if forward else []
    with run.world.leader_first():  # it downloads, and builds the cache
        loaders = make_loaders(
            machine.dataset_path if machine.dataset_path is not None else download_dataset(),
            model.img_size,
            task.batch_size,
            machine.workers,
            task.seed,
            strict=machine.strict,
            cache=not machine.no_cache,
            device=run.device,
            share=(run.world.rank, run.world.size),
        )
    for loader in loaders:
        loader.worker_init_fn = outlive_stop_signals
    return model, teachers, loaders


def load_teachers(files: Sequence[str], model: SPNN, device: torch.device) -> list[Judge]:
    """Classifiers of the model's pictures and attributes. Raises InputError if one is missing or of others."""
    teachers = [load_judge(file).requires_grad_(False) for file in files]
    for file, teacher in zip(files, teachers, strict=True):
        if (teacher.img_size, teacher.num_classes) != (model.img_size, model.num_classes):
            raise InputError(
                f"--teachers {file}: tells {teacher.num_classes} attributes of {teacher.img_size}x{teacher.img_size} "
                f"images, but {model.num_classes} of {model.img_size}x{model.img_size} are trained"
            )
    return [teacher.to(device, memory_format=torch.channels_last) for teacher in teachers]


def report(run: Run, model: SPNN, loader: FaceLoader, samples: int, stage: str) -> None:
    """Diagnostics after a stage: on screen, in the log, and as diagnostics_<stage>.json. And natural_<stage>.png, the
    loader's first faces above what g' makes of their logits.
    """
    model.to(run.device)
    measured = diagnose(model, run.until_stopped(loader), run.device, samples, run.seed, attributes=ATTRIBUTES)
    get_logger("train_celeba").info("test split after stage %s\n%s", stage, format_table(measured))
    write_json(run.folder / DIAGNOSTICS.format(stage), measured)
    x = next(iter(loader))[0][:8].to(run.device)
    with torch.no_grad():
        save_image(grid(torch.cat([x, model.pinv(model(x))]), columns=len(x)), run.folder / NATURAL.format(stage))


if __name__ == "__main__":
    run_command(main)
