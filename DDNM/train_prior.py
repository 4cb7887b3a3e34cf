"""Train a small diffusion prior on a folder of images.

    python DDNM/train_prior.py --images faces/CelebA-HQ-img --out DDNM/exp/logs/faces/prior --img_size 64

The result is a diffusers folder (EMA weights) that ``prior.load_prior`` and ``UNet2DModel.from_pretrained`` read.
Beside it: settings.json, log.txt, metrics.csv, curves.png, samples/, and train_state.pth, from which ``--resume`` goes
on as if nothing had happened.

The loss is DDPM's simple one (Ho et al. 2020, equation 14):
``|eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t)|^2``.
"""

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs from any folder

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import DTYPES
from data_loader import find_images, grid, load_image, save_image, to_uint8
from DDNM.guided_diffusion.prior import PREDICTIONS, Prior, save_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule, time_pairs
from diagnostics import clip_gradients
from logger import MetricsTable, get_logger, plot_curves
from resume import (
    STATE_NAME,
    Stopped,
    check_settings,
    fitting,
    is_empty,
    load_state,
    locked,
    plain,
    restore_adam,
    save_state,
    stop_signals,
)
from utils import (
    LARGEST_BATCH,
    LARGEST_CREW,
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_WIDTH,
    InputError,
    number,
    remove_temporaries,
    resolve_device,
    run_command,
    seed_everything,
    shown,
    write_json,
)

METRICS_NAME, CURVE_NAME, SAMPLES_NAME = "metrics.csv", "curves.png", "samples"
SAMPLE_STEPS = 50  # of the pictures at each save
IN_MEMORY_BYTES = 4 << 30  # decoded images beyond this are read again for every batch
# a resumed run must be the run it resumes: these settings decide what a step computes
TRAJECTORY = (
    "img_size", "channels", "layers", "unshuffle", "attention_size", "norm_groups", "batch_size", "lr", "warmup",
    "decay", "ema_decay", "clip", "prediction", "noise_levels", "flip", "precision", "seed",
)  # fmt: skip
# what a training state holds, for `resume.check_parts`
STATE_PARTS = {
    "model": dict, "ema": dict, "optimizer": dict, "generator": Tensor, "step": int, "seconds": (int, float),
    "recent": [(tuple, list)], "rows": [dict],
}  # fmt: skip


class Images:
    """Every image under a folder, centre-cropped and resized; decoded once where memory allows.

    Raises:
        InputError: no image there, or one that cannot be read.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.paths, self.size = find_images(folder), size
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.pixels: Tensor | None = None  # (N, 3, S, S) uint8
        if len(self) * 3 * size * size < IN_MEMORY_BYTES:
            self.pixels = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
            decoded = self.pool.map(self._read, self.paths)
            bar = tqdm(decoded, total=len(self), desc="decoding", unit="image", disable=not sys.stderr.isatty())
            for i, image in enumerate(bar):
                self.pixels[i] = image

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, path: Path) -> Tensor:
        return to_uint8(load_image(path, self.size))

    def batch(self, indices: Tensor) -> Tensor:
        """Images at ``indices`` (B,): (B, 3, S, S) float32 in [-1, 1]."""
        if self.pixels is not None:
            chosen = self.pixels[indices]
        else:
            chosen = torch.stack(list(self.pool.map(self._read, [self.paths[i] for i in indices.tolist()])))
        return chosen.float() / 127.5 - 1


def learning_rate(progress: float, step: int, base: float, warmup: int, decay: str) -> float:
    """The learning rate of a step: linear warm-up, then ``decay`` with ``progress`` in [0, 1] to (nearly) zero."""
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[decay]
    return base * min(1.0, (step + 1) / (warmup + 1)) * max(shape, 1e-3)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """``ema <- d ema + (1 - d) model``, d = min(decay, (1 + step) / (10 + step)): forgets the random start."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for average, current in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(current, weight)


def draw_steps(schedule: Schedule, batch: int, noise_levels: str, generator: torch.Generator) -> Tensor:
    """The steps t, (B,), to train on.

    ``"uniform"`` takes all alike, as DDPM does. With linear betas half of them are next to pure noise, where little is
    to be learnt; ``"lognormal"`` draws the noise level instead, ``ln(sigma) ~ N(-0.8, 1.4^2)`` with
    ``sigma^2 = (1 - abar) / abar`` (Karras et al. 2022, "Elucidating the Design Space", section 5, where the
    normal is N(-1.2, 1.2^2)).

    The B draws are one uniform draw plus a grid (Kingma et al. 2021, "Variational Diffusion Models", I.1): each has the
    distribution, and the loss varies less than with independent ones.
    """
    steps = schedule.num_diffusion_timesteps
    u = (torch.rand((), generator=generator) + torch.arange(batch) / batch) % 1  # (B,)
    if noise_levels == "uniform":
        return (u * steps).long().clamp(max=steps - 1)
    log_sigma = -0.8 + 1.4 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))
    abar = schedule.abar(torch.arange(steps))
    return torch.searchsorted(((1 - abar) / abar).log() / 2, log_sigma).clamp(max=steps - 1)


def diffusion_loss(prior: Prior, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The loss on images x0 (B, 3, H, W) in [-1, 1] with noise of the same shape at the steps t, (B,)."""
    predicted = prior.predict(schedule.add_noise(x0, noise, t), t)  # (B, 3, H, W)
    return (predicted - prior.target(x0, noise, t)).square().mean()


@torch.no_grad()
def ddim_sample(prior: Prior, schedule: Schedule, noise: Tensor, steps: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] from ``noise``: deterministic DDIM (Song et al. 2021, equation 12, sigma = 0)."""
    x = noise
    for t, t_next in time_pairs(schedule.num_diffusion_timesteps, steps):
        abar, abar_next = schedule.abar(t).item(), schedule.abar(t_next).item()
        eps = prior(x, t)  # (B, 3, H, W)
        x0 = ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).clamp(-1, 1)
        eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5  # the noise that belongs to the clamped x0
        x = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
    return x


class Trainer:
    """Everything that changes while training, and how it is saved and restored."""

    def __init__(self, args: argparse.Namespace, images: Images, device: torch.device) -> None:
        self.args, self.images, self.device = args, images, device
        self.schedule = Schedule()
        seed_everything(args.seed)  # the initial weights; every later draw comes from the generator
        self.generator = torch.Generator().manual_seed(args.seed)
        try:
            unet = small_unet(
                args.img_size, args.channels, args.layers, args.unshuffle, args.attention_size, args.norm_groups
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        autocast = torch.bfloat16 if args.precision == "bf16" else None
        self.prior = Prior(unet.to(device), autocast, True, args.prediction, self.schedule)
        self.ema = copy.deepcopy(self.prior).eval().requires_grad_(False)
        try:
            self.optimizer = torch.optim.Adam(self.prior.parameters(), lr=args.lr, fused=True)
        except RuntimeError:  # a device without the fused kernel
            self.optimizer = torch.optim.Adam(self.prior.parameters(), lr=args.lr)
        self.workers = None
        if device.type == "cpu" and args.threads > 1:
            self.workers = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.step = 0  # steps done
        self.seconds = 0.0  # spent training, over all runs
        self.recent: list[tuple[float, float]] = []  # losses and gradient norms since the last row of metrics.csv
        self.table: MetricsTable | None = None
        self.run = plain({**{key: getattr(args, key) for key in TRAJECTORY}, "images": len(images)})

    # What is on disk -------------------------------------------------------------------------------------------

    def begin(self, state: dict | None) -> None:
        """Continue from a training state; None begins at step 0. Either way the state is on disk from here on."""
        rows = []
        if state is not None:
            for key, take in (("model", self.prior.unet.load_state_dict), ("ema", self.ema.unet.load_state_dict),
                              ("optimizer", partial(restore_adam, self.optimizer)),
                              ("generator", self.generator.set_state)):  # fmt: skip
                with fitting(self.args.out / STATE_NAME, key):
                    take(state[key])
            self.step, self.seconds, rows = state["step"], state["seconds"], state["rows"]
            self.recent = [tuple(pair) for pair in state["recent"]]
        self.table = MetricsTable(self.args.out / METRICS_NAME, rows)
        if state is None:
            self.save_state()

    def save_state(self) -> None:
        """Write the state file.

        Raises:
            InputError: a weight is not finite: such a state replaces none.
        """
        for name, weight in self.prior.unet.named_parameters():
            if not weight.isfinite().all():
                raise InputError(f"step {self.step}: not a finite number in weight {name}; try a smaller --lr")
        state = {
            "settings": self.run,
            "model": self.prior.unet.state_dict(),
            "ema": self.ema.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "recent": self.recent,
            "rows": self.table.rows,
        }
        save_state(self.args.out / STATE_NAME, state)

    def save(self, samples: bool = True) -> None:
        """Write the state first, then what can be made from it: curves, EMA weights, samples."""
        out = self.args.out
        self.save_state()
        save_prior(self.ema, out, DTYPES[self.args.save_dtype])
        if self.table.rows:
            plot_curves(self.table.path, out / CURVE_NAME)
        if samples and self.args.samples > 0:
            # its own generator, always the same: pictures of one run differ by training alone
            fixed = torch.Generator().manual_seed(self.args.seed)
            size = self.args.img_size
            noise = torch.randn(self.args.samples, 3, size, size, generator=fixed).to(self.device)
            pictures = ddim_sample(self.ema, self.schedule, noise, SAMPLE_STEPS)
            save_image(grid(pictures), out / SAMPLES_NAME / f"step_{self.step:06d}.png")

    # Training --------------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """How far the run is, in [0, 1]: by steps, or by the clock where ``--minutes`` is given and the clock leads."""
        done = self.step / self.args.steps
        if self.args.minutes is not None:
            done = max(done, self.seconds / (60 * self.args.minutes))
        return min(done, 1.0)

    def train_step(self) -> tuple[float, float]:
        """One step of the optimiser: its loss and gradient norm.

        Raises:
            InputError: the loss or its gradient is not finite; nothing has been applied.
        """
        args = self.args
        indices = torch.randint(len(self.images), (args.batch_size,), generator=self.generator)
        x0 = self.images.batch(indices)  # (B, 3, H, W) in [-1, 1]
        if args.flip:
            mirrored = torch.rand(args.batch_size, generator=self.generator) < 0.5
            x0[mirrored] = x0[mirrored].flip(-1)
        rate = learning_rate(self.progress(), self.step, args.lr, args.warmup, args.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        t = draw_steps(self.schedule, args.batch_size, args.noise_levels, self.generator)
        noise = torch.randn(x0.shape, generator=self.generator)
        value = self._gradients(*(part.to(self.device) for part in (x0, noise, t)))
        try:
            norm = clip_gradients(self.prior.unet, args.clip, value).item()
        except FloatingPointError as error:
            raise InputError(
                f"step {self.step + 1} ({self._names(indices)}): the loss is {value}; not a finite number in {error}; "
                "try a smaller --lr"
            ) from None
        self.optimizer.step()
        update_ema(self.ema, self.prior, self.step, args.ema_decay)
        self.step += 1
        return value, norm

    def _gradients(self, *batch: Tensor) -> float:
        """Set the parameters' gradients to those of the mean loss of a batch (x0, noise, t); returns that loss.

        On a CPU every thread takes a part of the batch through the whole network: on small feature maps that is much
        faster than all threads sharing every operation.
        """
        parameters = list(self.prior.parameters())

        def part_of(part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
            share = len(part[0]) / len(batch[0])
            loss = share * diffusion_loss(self.prior, self.schedule, *part)
            return loss.item(), torch.autograd.grad(loss, parameters)

        chunks = 1 if self.workers is None else self.args.threads
        parts = list(zip(*(tensor.chunk(chunks) for tensor in batch), strict=True))
        results = list(self.workers.map(part_of, parts)) if self.workers is not None else [part_of(parts[0])]
        for index, parameter in enumerate(parameters):
            parameter.grad = sum(gradients[index] for _, gradients in results)
        return sum(loss for loss, _ in results)

    def _names(self, indices: Tensor) -> str:
        names = [self.images.paths[i].name for i in indices.tolist()]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    def train(self, stopped: Callable[[], int | None]) -> None:
        """Train to the end.

        Raises:
            Stopped: ``stopped`` told of a signal; the state is saved.
        """
        args, log = self.args, get_logger("train_prior")
        with tqdm(total=args.steps, initial=self.step, unit="step", disable=not sys.stderr.isatty()) as bar:
            while self.progress() < 1:
                if (signum := stopped()) is not None:
                    self.save(samples=False)
                    raise Stopped(signum)
                began = time.perf_counter()
                self.recent.append(self.train_step())
                self.seconds += time.perf_counter() - began
                bar.update()
                finished = self.progress() >= 1
                if self.step % args.log_every == 0 or finished:
                    loss, norm = (sum(part) / len(self.recent) for part in zip(*self.recent, strict=True))
                    rate = self.optimizer.param_groups[0]["lr"]
                    self.table.append(
                        {"step": self.step, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": self.seconds}
                    )
                    bar.set_postfix(loss=f"{loss:.6f}")
                    log.info("step %d/%d: loss %.6f, lr %.3e, gradient norm %.4f, %.2f s a step", self.step, args.steps,
                             loss, rate, norm, self.seconds / self.step)  # fmt: skip
                    self.recent = []
                if self.step % args.save_every == 0 and not finished:
                    self.save()
            self.save()


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(number(int, 1, LARGEST_WIDTH), text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of widths like 64,128,192: {error}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small diffusion prior on a folder of images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    positive, count = number(int, 1), number(int, 0)
    add("--images", type=Path, required=True, help="folder of images, flat or nested")
    add("--out", type=Path, required=True, help="result folder")
    add(
        "--resume",
        action="store_true",
        help="continue the run in OUT exactly where its last saved state is; begin it where there is none",
    )
    add("--overwrite", action="store_true", help="start anew in an OUT that is not empty")
    network = parser.add_argument_group("network")
    add = network.add_argument
    add(
        "--img_size",
        type=number(int, 1, LARGEST_SIDE),
        default=64,
        help="image size; images are centre-cropped and resized to it",
    )
    add("--unshuffle", type=positive, default=2, help="pixel-unshuffle factor before the U-Net")
    add("--channels", type=_widths, default="48,96,144", help="width of each level, comma-separated")
    add("--layers", type=number(int, 1, 100), default=1, help="residual blocks a level")
    add("--attention_size", type=count, default=8, help="attention where the feature map is this small")
    add("--norm_groups", type=positive, default=16, help="groups of the normalisation")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=positive, default=2500, help="optimiser steps")
    add("--minutes", type=number(float, 0.01), help="end by this many minutes of training, learning rate included")
    add("--batch_size", type=number(int, 1, LARGEST_BATCH), default=64, help="images a step")
    add("--lr", type=number(float, 0), default=4e-4, help="learning rate after warm-up")
    add("--warmup", type=count, default=100, help="steps of linear warm-up")
    add("--decay", choices=("cosine", "linear", "constant"), default="cosine", help="of the learning rate, to the end")
    add("--ema_decay", type=number(float, 0, 1), default=0.999, help="of the averaged weights, which are the result")
    add("--prediction", choices=PREDICTIONS, default="v_prediction", help="what the network predicts")
    add("--noise_levels", choices=("lognormal", "uniform"), default="lognormal", help="which steps are trained on")
    add("--clip", type=number(float, 0), default=1.0, help="gradient norm limit")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random")
    add("--seed", type=number(int, 0, LARGEST_SEED), default=0, help="of the weights and every draw")
    machine = parser.add_argument_group("machine and files")
    add = machine.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add(
        "--threads",
        type=number(int, 1, LARGEST_CREW),
        default=os.cpu_count() or 1,
        help="CPU threads, each with a part of the batch",
    )
    add("--precision", choices=("float32", "bf16"), default="float32", help="of the network's arithmetic")
    add("--save_every", type=positive, default=500, help="steps between saved states")
    add("--log_every", type=positive, default=25, help="steps between rows of metrics.csv")
    add("--samples", type=number(int, 0, 10_000), default=16, help="pictures in the sample grid of each save")
    add("--save_dtype", choices=("float32", "float16"), default="float32", help="of the resulting weight file")
    return parser


def find_state(out: Path, resume: bool, overwrite: bool) -> dict | None:
    """The state to go on from, None for a run that begins.

    Raises:
        InputError: results that would be lost and neither was asked for, or a state that cannot be read.
    """
    if resume and (out / STATE_NAME).is_file():
        return load_state(out / STATE_NAME, STATE_PARTS)
    if not is_empty(out) and not overwrite:
        raise InputError(f"--out {out}: not empty; give --resume to continue that run or --overwrite to start anew")
    return None


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device, out = resolve_device(args.device), args.out
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    torch.set_num_threads(args.threads)
    with locked(out):  # a mistake below leaves no folder behind
        if (out / SAMPLES_NAME).is_symlink():  # pictures written, or deleted, through it would be somebody else's
            raise InputError(f"{out / SAMPLES_NAME} is a link; results are written inside --out only")
        state = find_state(out, args.resume, args.overwrite)
        images = Images(args.images, args.img_size)
        trainer = Trainer(args, images, device)
        if state is not None:
            check_settings(state["settings"], trainer.run, out)
        remove_temporaries(out)
        if state is None:  # what an earlier run of this command left, by name: nothing else is touched
            for path in (out / STATE_NAME, out / METRICS_NAME, out / CURVE_NAME, out / "log.txt",
                         *(out / SAMPLES_NAME).glob("step_*.png")):  # fmt: skip
                path.unlink(missing_ok=True)
        with stop_signals() as stopped:
            try:
                trainer.begin(state)  # a fresh run's first file: killed from here on, it is resumed
                log = get_logger("train_prior", out)
                write_json(out / "settings.json", plain(vars(args)))
                parameters = sum(p.numel() for p in trainer.prior.parameters())
                log.info("%d images, %s parameters, %s, torch %s", len(images), f"{parameters:,}", device,
                         torch.__version__)  # fmt: skip
                if state is not None:
                    log.info("resumed at step %d", trainer.step)
                trainer.train(stopped)
            except Stopped as signal:
                log.info("%s: saved at step %d; continue with --resume", signal, trainer.step)
                return signal.status
        log.info("done: %d steps, %.1f minutes; %s", trainer.step, trainer.seconds / 60, out)
        return 0


if __name__ == "__main__":
    run_command(main)
