"""Train an SPNN on CelebAMask-HQ: stage 1 trains g, stage 2 its r-networks.

    python train_celeba.py --dataset_path /path/to/CelebAMask-HQ --is_forward_train --is_r_opt
    python train_celeba.py --config configs/faces_64.yml --dataset_path /path/to/faces
    torchrun --nproc_per_node 4 train_celeba.py ...          # the same batches, shared by four processes

Penrose diagnostics run on the test split after each stage. Results go to --checkpoint_dir. A run that was stopped or
killed goes on where it was with the same command and --resume.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from blocks import MIXINGS
from checkpoints import load_strictly, save_spnn
from data_loader import ATTRIBUTES, Loaders, download_dataset, make_loaders
from DDNM.guided_diffusion.edits import contradictions, effects_of_states
from diagnostics import diagnose, format_report
from images import grid, save_image
from judge import Judge, load_judge
from logger import get_logger
from loop import DONE, Run, open_run
from metrics import predict
from models import SPNN
from networks import PRECISIONS, compile_networks, has_tf32, inner_networks, networks_in, prepare_networks
from train import FORWARD_CHECKPOINT, R_OPT_CHECKPOINT, CelebATrainer, Settings, typical_logits
from utils import InputError, option, parse, run_command, seed_everything, write_json


@dataclass(frozen=True)
class Task:
    """What is trained."""

    is_forward_train: bool = option(False, "run stage 1: train g")
    is_r_opt: bool = option(False, "run stage 2: optimise the r-networks")
    img_size: int | None = option(
        None, "32, 64 or 256; any with layer_channels (default: 256; stage 2 alone: that of stage 1)", 1, 4096
    )
    mix_type: str = option("cayley", "mixing layers", choices=sorted(MIXINGS))
    hidden: int = option(128, "width of a built-in architecture's networks", 1, 1 << 16)
    scale_bound: float = option(2.0, "bound of its log-scales", 1e-6)
    batch_size: int = option(256, "images per step, over all processes", 1, 100_000)
    seed: int = option(0, "of weights, order and mirroring", 0)
    init: str | None = option(None, "weights that stage 1 begins with: a folder, a file or a hub id (default: random)")
    teachers: tuple[str, ...] = option((), "weights of classifiers of judge.py, from whose answers g learns as well")

    def build(self, layer_channels: list | None) -> SPNN:
        """The SPNN to train. Raises InputError if the architecture does not fit, attributes or ``init``."""
        try:
            size = 256 if self.img_size is None else self.img_size
            model = SPNN(3, len(ATTRIBUTES), self.hidden, self.scale_bound, size, self.mix_type, layer_channels)
            if len(model.out_shape) > 1:
                _, h, w = model.out_shape
                raise ValueError(f"attributes need a chain that ends at 1x1, it ends at {h}x{w}")
        except ValueError as error:
            raise InputError(f"architecture: {error}") from None
        if self.init is not None:
            load_strictly(model, SPNN.from_pretrained(self.init).state_dict(), self.init)
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
    workers: int = option(2, "threads that read ahead; 0: none", 0, 1024)
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


def read_command(argv: Sequence[str] | None = None) -> tuple[Task, Settings, Machine, list | None]:
    """The command line, and the custom architecture of its preset, if any. Raises InputError."""
    task, machine, settings, others = parse(__doc__, Task, Machine, Settings, argv=argv, extra=["layer_channels"])
    if not (task.is_forward_train or task.is_r_opt):
        raise InputError("nothing to do: give --is_forward_train (stage 1), --is_r_opt (stage 2), or both")
    return task, settings, machine, others.get("layer_channels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for, or what is left of them."""
    task, settings, machine, chain = read_command(argv)
    folder = Path(machine.checkpoint_dir)
    seed_everything(task.seed)
    with open_run(folder, machine.device, machine.save_every, task.seed) as run:
        identity = {**asdict(task), **asdict(settings), "layer_channels": chain}
        del identity["precision"]  # it may be another, as the device may
        result = FORWARD_CHECKPOINT if task.is_forward_train else R_OPT_CHECKPOINT
        run.find_state(identity, machine.resume, machine.overwrite, folder / result)
        if run.stage == DONE:
            print(f"{folder}: this run is finished")
            return 0
        usual = "tf32" if has_tf32(run.device) else "float32"
        settings = replace(settings, precision=machine.precision or usual)
        forward = task.is_forward_train and run.stage in (None, "forward")
        model, teachers, loaders = prepare(task, settings, machine, chain, run, forward)
        run.add_settings({f"images in its {name} split": len(of.dataset) for name, of in loaders._asdict().items()})
        stale = [R_OPT_CHECKPOINT, "diagnostics_r_opt.json", "natural_r_opt.png"]
        if forward:
            stale += [FORWARD_CHECKPOINT, "config.json", "diagnostics_forward.json", "natural_forward.png"]
        every = {**asdict(task), **asdict(settings), **asdict(machine), "layer_channels": chain}
        log = run.begin("train_celeba", every, stale)
        log.info("SPNN with %.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)

        def trainer(model: SPNN) -> CelebATrainer:
            prepare_networks(model, run.device)
            model.pinn.checkpoint_activations = machine.checkpoint_activations
            if machine.compile:
                compile_networks(inner_networks(model), run.device)
            return CelebATrainer(model, loaders.train, loaders.val, settings, run, ATTRIBUTES, teachers)

        if forward:
            log.info("stage 1: %d epochs of %d steps on %s", settings.epoch, len(loaders.train), run.device)
            best = trainer(model).train_forward()
            report(run, best, loaders, machine.diagnose_samples, "forward")
        if task.is_r_opt:
            model = SPNN.from_pretrained(folder / FORWARD_CHECKPOINT)
            log.info("stage 2: %d epochs of %d steps on %s", settings.r_epoch, len(loaders.train), run.device)
            best = trainer(model).optimise_r()
            report(run, best, loaders, machine.diagnose_samples, "r_opt")
        run.finish()
        log.info("done; %s", best)
    return 0


def prepare(
    task: Task, settings: Settings, machine: Machine, chain: list | None, run: Run, forward: bool
) -> tuple[SPNN, list[Judge], Loaders]:
    """The model of the stage to begin with, its teachers, and the data.

    Raises InputError if a stage cannot run in the folder.
    """
    file = run.folder / FORWARD_CHECKPOINT
    if not forward and not file.is_file():
        raise InputError(f"{file}: no such file; run stage 1 first (--is_forward_train)")
    # before the data: a chain that does not fit should say so at once, and so should a precision
    with networks_in(settings.precision, run.device):
        pass
    model = task.build(chain) if forward else SPNN.from_pretrained(file)
    size, classes = model.img_size, model.num_classes
    if task.img_size not in (None, size):
        raise InputError(f"{file} takes {size}x{size} images, but --img_size is {task.img_size}")
    teachers = [load_judge(teacher).requires_grad_(False) for teacher in task.teachers if forward]
    for teacher, judge in zip(task.teachers, teachers, strict=False):
        if (judge.img_size, tuple(judge.attributes)) != (size, ATTRIBUTES):
            raise InputError(f"--teachers {teacher}: not of the {classes} attributes of {size}x{size} images")
        judge.to(run.device, memory_format=torch.channels_last)
    how = {"strict": machine.strict, "cache": not machine.no_cache, "device": run.device}
    how["share"] = run.world.rank, run.world.size
    with run.world.leader_first():  # it downloads, and builds the cache
        root = machine.dataset_path if machine.dataset_path is not None else download_dataset()
        return model, teachers, make_loaders(root, size, task.batch_size, machine.workers, task.seed, **how)


def report(run: Run, best: Path, loaders: Loaders, samples: int, stage: str) -> None:
    """What the leading process says of a stage's best model, which the others wait for.

    After stage 1 what edits need goes into its config.json. Diagnostics go to the screen, the log and
    diagnostics_<stage>.json; the first test faces, above what g' makes of their logits, to natural_<stage>.png.
    """
    if run.world.leads:
        model = SPNN.from_pretrained(best).to(run.device)
        if stage == "forward":
            logits, labels = predict(model, run.until_stopped(loaders.val), run.device)
            model.notes["typical_logits"] = typical_logits(logits, labels)
            model.notes["effects"] = effects_of_states(logits).double().round(decimals=3).tolist()
            model.notes["contradictions"] = contradictions(loaders.train.dataset.labels, ATTRIBUTES)
            save_spnn(best, model)
        test = run.until_stopped(loaders.test)
        measured = diagnose(model, test, run.device, samples, run.seed, attributes=ATTRIBUTES)
        get_logger("train_celeba").info("test split after stage %s\n%s", stage, format_report(measured))
        write_json(run.folder / f"diagnostics_{stage}.json", measured)
        x = next(iter(loaders.test))[0][:8].to(run.device)
        with torch.no_grad():
            save_image(grid(torch.cat([x, model.pinv(model(x))]), len(x)), run.folder / f"natural_{stage}.png")
    run.world.wait()  # it takes as long as an epoch's validation


if __name__ == "__main__":
    run_command(main)
