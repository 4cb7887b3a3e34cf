"""Train a small diffusion prior on a folder of images.

    python DDNM/train_prior.py --images faces/CelebA-HQ-img --out DDNM/exp/logs/faces/prior --img_size 64

The result is a diffusers folder (EMA weights) that ``prior.load_prior`` and ``UNet2DModel.from_pretrained`` read.
Beside it: settings.json, train.log, metrics.csv, loss.png, samples/, and train_state.pth, from which ``--resume`` goes
on as if nothing had happened.

The loss is DDPM's simple one (Ho et al. 2020, equation 14):
``|eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t)|^2``.
"""

import argparse
import copy
import csv
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs from any folder

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_loader import find_images, load_image, save_image, to_uint8
from DDNM.guided_diffusion.prior import PREDICTIONS, Prior, save_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule, time_pairs
from utils import InputError, atomic_write, number, resolve_device, run_command, seed_everything
from weights import DTYPES

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt  # noqa: E402

log = logging.getLogger("train_prior")

STATE_NAME, METRICS_NAME, LOG_NAME, SETTINGS_NAME, CURVE_NAME = (
    "train_state.pth", "metrics.csv", "train.log", "settings.json", "loss.png",
)  # fmt: skip
METRICS = ("step", "loss", "lr", "grad_norm", "seconds")
SAMPLE_STEPS = 50  # of the pictures at each save
IN_MEMORY_BYTES = 4 << 30  # decoded images beyond this are read again for every batch
# a resumed run must be the run it resumes: these settings decide what a step computes
TRAJECTORY = (
    "img_size", "channels", "layers", "unshuffle", "attention_size", "norm_groups", "batch_size", "lr", "warmup",
    "decay", "ema_decay", "clip", "prediction", "noise_levels", "flip", "precision", "seed",
)  # fmt: skip


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


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Images (B, 3, H, W) side by side as one: (3, rows * H, columns * W); empty places are white."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    filled = torch.cat([images, blank]).unflatten(0, (rows, columns))  # (rows, columns, 3, H, W)
    return filled.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def plot_loss(rows: Sequence[dict], path: Path) -> None:
    """Write the loss curve as a picture."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows])
    axes.set(xlabel="step", ylabel="noise prediction error", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Turn SIGINT and SIGTERM into a question: the yielded function says which came. A second one acts at once."""
    received: list[int] = []
    previous = {}

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.getsignal(signum)
        signal.signal(signum, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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
        self.rows: list[dict] = []  # of metrics.csv

    # What is on disk -------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Continue from OUT/train_state.pth.

        Raises:
            InputError: no such file, a damaged one, or one of a run with other settings or images.
        """
        path = self.args.out / STATE_NAME
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings, count = state["settings"], state["images"]
        except Exception as error:  # a damaged file can raise almost anything
            raise InputError(f"--resume: {path}: damaged, or not a training state ({type(error).__name__})") from None
        for key in TRAJECTORY:
            if settings.get(key) != _plain(getattr(self.args, key)):
                raise InputError(
                    f"--resume: the run in {self.args.out} has {key} {settings.get(key)}, not "
                    f"{_plain(getattr(self.args, key))}; give the same, or start anew with --overwrite"
                )
        if count != len(self.images):
            raise InputError(f"--resume: the run in {self.args.out} saw {count} images, {self.args.images} has "
                             f"{len(self.images)}")  # fmt: skip
        self.prior.unet.load_state_dict(state["model"])
        self.ema.unet.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]
        metrics = self.args.out / METRICS_NAME
        if metrics.is_file():
            with open(metrics, newline="", encoding="utf-8") as file:  # a killed run wrote rows beyond its last state
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.step]

    def save(self, samples: bool = True) -> None:
        """Write the state first, then what can be made from it: metrics, curve, EMA weights, samples."""
        out = self.args.out
        state = {
            "settings": _settings(self.args),
            "images": len(self.images),
            "model": self.prior.unet.state_dict(),
            "ema": self.ema.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with atomic_write(out / STATE_NAME) as temporary:
            torch.save(state, temporary)
        self.write_metrics()
        save_prior(self.ema, out, DTYPES[self.args.save_dtype])
        if self.rows:
            plot_loss(self.rows, out / CURVE_NAME)
        if samples and self.args.samples > 0:
            # its own generator, always the same: pictures of one run differ by training alone
            fixed = torch.Generator().manual_seed(self.args.seed)
            size = self.args.img_size
            noise = torch.randn(self.args.samples, 3, size, size, generator=fixed).to(self.device)
            pictures = ddim_sample(self.ema, self.schedule, noise, SAMPLE_STEPS)
            save_image(grid(pictures), out / "samples" / f"step_{self.step:06d}.png")

    def write_metrics(self) -> None:
        with atomic_write(self.args.out / METRICS_NAME) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, METRICS)
            writer.writeheader()
            writer.writerows(self.rows)

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
            InputError: the loss is not finite.
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
        norm = nn.utils.clip_grad_norm_(self.prior.parameters(), args.clip).item()
        if not math.isfinite(value) or not math.isfinite(norm):
            raise InputError(f"step {self.step + 1}: the loss is {value}, its gradient norm {norm}; try a smaller --lr")
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

    def train(self) -> int | None:
        """Train to the end, or until a signal: its number then, with the state saved."""
        args, losses, norms = self.args, [], []
        saved_at = self.step
        with (
            stop_signals() as stopped,
            tqdm(total=args.steps, initial=self.step, unit="step", disable=not sys.stderr.isatty()) as bar,
        ):
            while self.progress() < 1 and stopped() is None:
                began = time.perf_counter()
                loss, norm = self.train_step()
                self.seconds += time.perf_counter() - began
                losses.append(loss)
                norms.append(norm)
                bar.update()
                finished = self.progress() >= 1
                if self.step % args.log_every == 0 or finished:
                    row = {
                        "step": self.step,
                        "loss": f"{sum(losses) / len(losses):.6f}",
                        "lr": f"{self.optimizer.param_groups[0]['lr']:.3e}",
                        "grad_norm": f"{sum(norms) / len(norms):.4f}",
                        "seconds": f"{self.seconds:.1f}",
                    }
                    self.rows.append(row)
                    self.write_metrics()
                    bar.set_postfix(loss=row["loss"])
                    log.info("step %d/%d: loss %s, lr %s, gradient norm %s, %.2f s a step", self.step, args.steps,
                             row["loss"], row["lr"], row["grad_norm"], self.seconds / self.step)  # fmt: skip
                    losses, norms = [], []
                if self.step % args.save_every == 0 and not finished:
                    self.save()
                    saved_at = self.step
            signum = stopped()
            if signum is None:
                self.save()
            elif self.step > saved_at:
                self.save(samples=False)
        return signum


def _plain(value: object) -> object:
    """A setting as JSON and a weights-only checkpoint hold it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _settings(args: argparse.Namespace) -> dict:
    return {key: _plain(value) for key, value in vars(args).items()}


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of widths like 64,128,192") from None
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: widths must be positive")
    return widths


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small diffusion prior on a folder of images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    positive, count = number(int, 1), number(int, 0)
    add("--images", type=Path, required=True, help="folder of images, flat or nested")
    add("--out", type=Path, required=True, help="result folder")
    add("--resume", action="store_true", help="continue the run in OUT exactly where its last saved state is")
    add("--overwrite", action="store_true", help="start anew in an OUT that is not empty")
    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--img_size", type=positive, default=64, help="image size; images are centre-cropped and resized to it")
    add("--unshuffle", type=positive, default=2, help="pixel-unshuffle factor before the U-Net")
    add("--channels", type=_widths, default="48,96,144", help="width of each level, comma-separated")
    add("--layers", type=positive, default=1, help="residual blocks a level")
    add("--attention_size", type=count, default=8, help="attention where the feature map is this small")
    add("--norm_groups", type=positive, default=16, help="groups of the normalisation")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=positive, default=2500, help="optimiser steps")
    add("--minutes", type=number(float, 0.01), help="end by this many minutes of training, learning rate included")
    add("--batch_size", type=positive, default=64, help="images a step")
    add("--lr", type=number(float, 0), default=4e-4, help="learning rate after warm-up")
    add("--warmup", type=count, default=100, help="steps of linear warm-up")
    add("--decay", choices=("cosine", "linear", "constant"), default="cosine", help="of the learning rate, to the end")
    add("--ema_decay", type=number(float, 0, 1), default=0.999, help="of the averaged weights, which are the result")
    add("--prediction", choices=PREDICTIONS, default="v_prediction", help="what the network predicts")
    add("--noise_levels", choices=("lognormal", "uniform"), default="lognormal", help="which steps are trained on")
    add("--clip", type=number(float, 0), default=1.0, help="gradient norm limit")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random")
    add("--seed", type=count, default=0, help="of the weights and every draw")
    machine = parser.add_argument_group("machine and files")
    add = machine.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="CPU threads, each with a part of the batch")
    add("--precision", choices=("float32", "bf16"), default="float32", help="of the network's arithmetic")
    add("--save_every", type=positive, default=500, help="steps between saved states")
    add("--log_every", type=positive, default=25, help="steps between rows of metrics.csv")
    add("--samples", type=count, default=16, help="pictures in the sample grid of each save")
    add("--save_dtype", choices=("float32", "float16"), default="float32", help="of the resulting weight file")
    return parser


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a result folder that would lose something, before anything is written or computed.

    Raises:
        InputError: not empty and neither was asked for, both were, nothing to resume, or not a folder.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    if resume and not (out / STATE_NAME).is_file():
        raise InputError(f"--resume: {out / STATE_NAME}: no such file")
    if out.is_dir() and any(out.iterdir()) and not resume and not overwrite:
        raise InputError(f"--out {out}: not empty; give --resume to continue that run or --overwrite to start anew")


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Make ``out``; with ``overwrite`` it loses what an earlier run of this command wrote.

    Raises:
        InputError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if overwrite:  # by name: nothing that this command did not write is touched
            own = [out / name for name in (STATE_NAME, METRICS_NAME, LOG_NAME, CURVE_NAME)]
            for path in [*own, *(out / "samples").glob("step_*.png")]:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    check_folder(args.out, args.resume, args.overwrite)
    torch.set_num_threads(args.threads)
    images = Images(args.images, args.img_size)
    trainer = Trainer(args, images, device)
    if args.resume:
        trainer.restore()
    prepare_folder(args.out, args.overwrite)  # only now: a mistake above leaves no folder behind
    handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(args.out / LOG_NAME, encoding="utf-8")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with atomic_write(args.out / SETTINGS_NAME) as temporary:
            temporary.write_text(json.dumps(_settings(args), indent=2) + "\n", encoding="utf-8")
        parameters = sum(p.numel() for p in trainer.prior.parameters())
        log.info("%d images, %s parameters, %s, torch %s", len(images), f"{parameters:,}", device, torch.__version__)
        if args.resume:
            log.info("resumed at step %d", trainer.step)
        signum = trainer.train()
        if signum is not None:
            log.info("%s: saved at step %d; continue with --resume", signal.Signals(signum).name, trainer.step)
            return 128 + signum
        log.info("done: %d steps, %.1f minutes; %s", trainer.step, trainer.seconds / 60, args.out)
        return 0
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    run_command(main)
