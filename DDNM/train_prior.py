"""Train a small diffusion prior on a folder of images.

    python DDNM/train_prior.py --images faces/CelebA-HQ-img --out DDNM/exp/logs/faces/prior --img_size 64
    torchrun --nproc_per_node 4 DDNM/train_prior.py ...          # the same batches, shared by four processes

The result is a diffusers folder (EMA weights) that ``prior.load_prior`` and ``UNet2DModel.from_pretrained`` read.
Beside it: settings.json, log.txt, metrics.csv, curves.png, samples/, and train_state.pth, from which ``--resume`` goes
on as if nothing had happened.

The loss is DDPM's simple one (Ho et al. 2020, equation 14):
``|eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t)|^2``.
"""

import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command runs from any folder

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import DTYPES, load_strictly
from data_loader import augmented, split_indices
from DDNM.guided_diffusion.diffusion import image_generator, sample
from DDNM.guided_diffusion.prior import PREDICTIONS, Prior, load_prior, save_prior, small_unet
from DDNM.guided_diffusion.schedule import Schedule
from images import find_images, grid, listed, load_image, save_image, to_float, to_uint8
from loop import Ema, Loop, Run, adam, clip_gradients, open_run
from networks import compile_networks, warn_if_emulated
from utils import InputError, option, parse, run_command, seed_everything

SAMPLES_NAME = "samples"
SAMPLE_STEPS = 50  # of the pictures at each save
IN_MEMORY_BYTES = 4 << 30  # decoded images beyond this are read again for every batch


@dataclass(frozen=True)
class Training:
    """Network and training. A resumed run must have the same."""

    split: Literal["all", "train"] = option("all", "train: the first 80 % by number, as SPNN and judge see them")
    img_size: int = option(64, "image size; images are cropped in the middle and resized to it", 1, 4096)
    unshuffle: int = option(2, "pixel-unshuffle factor before the U-Net", 1)
    channels: tuple[int, ...] = option((48, 96, 144), "width of each level", 1)
    layers: int = option(1, "residual blocks per level", 1, 100)
    attention_size: int = option(8, "attention where the feature map is this small", 0)
    norm_groups: int = option(16, "groups of the normalisation", 1)
    batch_size: int = option(64, "images per step, over all processes", 1)
    lr: float = option(4e-4, "learning rate after warm-up; it falls to 0 as a cosine does", 0)
    warmup: int = option(100, "steps of linear warm-up", 0)
    ema_decay: float = option(0.999, "of the averaged weights, which are the result", 0, 1)
    prediction: str = option("v_prediction", "what the network predicts", choices=PREDICTIONS)
    clip: float = option(1.0, "largest norm of the gradients", 0)
    flip: bool = option(True, "mirror images at random")
    augment: float = option(
        0.0, "share of images that are shifted, scaled, turned and lit a little; none in the last fifth", 0, 1
    )
    dropout: float = option(0.0, "inside residual blocks", 0, 1)
    precision: Literal["float32", "bf16"] = option("float32", "of the network's arithmetic")
    seed: int = option(0, "of the weights and every draw", 0)
    init: str | None = option(None, "a prior of the same architecture, whose weights training begins with")


@dataclass(frozen=True)
class Machine:
    """Length, files and machine."""

    images: Path = option(..., "folder of images, flat or nested")
    out: Path = option(..., "result folder")
    resume: bool = option(False, "continue the run in OUT exactly where its last state is; begin it if there is none")
    overwrite: bool = option(False, "start anew in an OUT that is not empty")
    steps: int = option(2500, "optimiser steps", 1)
    minutes: float | None = option(None, "end by this many minutes of training, learning rate included", 0.01)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = option(os.cpu_count() or 1, "CPU threads, each with a part of the batch", 1, 1024)
    compile: bool = option(False, "translate the network with torch.compile; takes a minute at first")
    save_every: int = option(500, "steps between saved states", 1)
    log_every: int = option(25, "steps between rows of metrics.csv", 1)
    samples: int = option(16, "pictures in the sample grid of each save", 0, 10_000)
    save_dtype: Literal["float32", "float16"] = option("float32", "of the resulting weight file")


class Images:
    """Every image under a folder, cropped in the middle and resized; decoded once if memory allows.

    Args:
        device: where batches are wanted. A GPU keeps the pixels itself, if they take at most a quarter of what is free.

    Raises:
        InputError: no image there, or one that cannot be read.
    """

    def __init__(self, folder: Path, size: int, device: torch.device, split: str = "all") -> None:
        paths, self.size, self.device = find_images(folder), size, device
        self.paths = [paths[i] for i in split_indices(len(paths), split)]
        if not self.paths:
            raise InputError(f"--split {split}: that is none of the images in {folder}; there are {len(paths)}")
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.pixels: Tensor | None = None  # (N, 3, S, S) uint8
        in_memory = len(self) * 3 * size * size
        if in_memory < IN_MEMORY_BYTES:
            pixels = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
            decoded = self.pool.map(self._read, self.paths)
            for i, image in enumerate(tqdm(decoded, "decoding", len(self), unit="image", disable=None)):
                pixels[i] = image
            fits = device.type == "cuda" and 4 * in_memory < torch.cuda.mem_get_info(device)[0]
            self.pixels = pixels.to(device) if fits else pixels

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, path: Path) -> Tensor:
        return to_uint8(load_image(path, self.size))

    def draw(self, count: int) -> Tensor:
        """Positions of ``count`` images, where their pixels are."""
        return torch.randint(len(self), (count,), device="cpu" if self.pixels is None else self.pixels.device)

    def batch(self, indices: Tensor) -> Tensor:
        """Images at ``indices`` (B,): (B, 3, S, S) float32 in [-1, 1], on the device."""
        if self.pixels is not None:
            chosen = self.pixels[indices]
        else:
            chosen = torch.stack(list(self.pool.map(self._read, [self.paths[i] for i in indices.tolist()])))
        return to_float(chosen.to(self.device, non_blocking=True))


def learning_rate(progress: float, step: int, base: float, warmup: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine with ``progress`` in [0, 1] to (nearly) zero."""
    return base * min(1.0, (step + 1) / (warmup + 1)) * max(0.5 * (1 + math.cos(math.pi * progress)), 1e-3)


def draw_steps(abar: Tensor, batch: int) -> Tensor:
    """The steps t, (B,), to train on.

    With linear betas half of all steps are next to pure noise, where little is to be learnt. So the noise level is
    drawn instead, ``ln(sigma) ~ N(-0.8, 1.4^2)`` with ``sigma^2 = (1 - abar) / abar`` (Karras et al. 2022, "Elucidating
    the Design Space", section 5, where the normal is N(-1.2, 1.2^2)).

    The B draws are one uniform draw plus a grid (Kingma et al. 2021, "Variational Diffusion Models", I.1): each has the
    distribution, and the loss varies less than with independent ones.

    Args:
        abar: of every step, (T,).
    """
    u = (torch.rand((), device=abar.device) + torch.arange(batch, device=abar.device) / batch) % 1  # (B,)
    log_sigma = -0.8 + 1.4 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))
    return torch.searchsorted(((1 - abar) / abar).log() / 2, log_sigma).clamp(max=len(abar) - 1)


def diffusion_loss(prior: Prior, abar: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The loss on images x0 (B, 3, H, W) in [-1, 1] with noise of the same shape at the steps t, (B,); abar is (T,)."""
    abar = abar[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise  # (B, 3, H, W)
    return (prior.predict(x_t, t) - prior.target(x0, noise, t)).square().mean()


class Trainer:
    """A prior in training: the network, its averaged weights, its optimiser, and a step."""

    def __init__(self, settings: Training, machine: Machine, images: Images, run: Run) -> None:
        self.settings, self.machine, self.images, self.run = settings, machine, images, run
        s, device = settings, run.device
        schedule = Schedule()
        self.abar = schedule.abar(torch.arange(schedule.num_diffusion_timesteps)).to(device)  # (T,)
        seed_everything(s.seed)  # the initial weights; every later draw belongs to a step
        try:
            unet = small_unet(s.img_size, s.channels, s.layers, s.unshuffle, s.attention_size, s.norm_groups, s.dropout)
            if s.init is not None:
                load_strictly(unet, load_prior(s.init).unet.state_dict(), s.init)
        except ValueError as error:
            raise InputError(str(error)) from None
        autocast = torch.bfloat16 if s.precision == "bf16" else None
        if autocast is not None:
            warn_if_emulated(device)
        self.prior = Prior(unet.to(device), autocast, True, s.prediction, schedule)
        self.ema = Ema(self.prior, s.ema_decay)
        self.optimizer = adam(self.prior.parameters(), s.lr, device)
        if machine.compile:
            compile_networks([unet], device)
        self.parallel = run.world.parallel(self.prior, self._loss)
        draws = s.dropout > 0  # in an order that threads do not keep
        self.threads = machine.threads if device.type == "cpu" and run.world.size == 1 and not draws else 1
        self.workers = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.loop = Loop(
            run,
            "",
            step=self.step,
            batches=lambda done: repeat((None, ())),  # a step draws its own
            steps=machine.steps,
            minutes=machine.minutes,
            row_every=machine.log_every,
            parts={"model": self.prior.unet, "optimizer": self.optimizer, "ema": self.ema.model},
            rate=lambda done, progress: learning_rate(progress, done, s.lr, s.warmup),
            axis="step",
            saved=self.save,
            images=self._names,
        )

    def step(self) -> dict[str, Tensor]:
        """One step of the optimiser: its loss and gradient norm.

        Raises:
            FloatingPointError: on a CPU, where to ask costs nothing: one is not finite, and nothing has been applied.
        """
        s, device, share = self.settings, self.run.device, self.run.world.share
        self.drawn = self.images.draw(s.batch_size)  # (B,), of all processes
        t = draw_steps(self.abar, s.batch_size)
        mirrored = torch.rand(s.batch_size, device=device) < (0.5 if s.flip else 0.0)
        noise = torch.randn(s.batch_size, 3, s.img_size, s.img_size, device=device)

        x0 = self.images.batch(share(self.drawn))  # (B, 3, H, W) in [-1, 1]
        x0 = torch.where(share(mirrored)[:, None, None, None], x0.flip(-1), x0)
        if s.augment:  # what is drawn at last is as the images are
            x0 = augmented(x0, 0.5, s.augment * max(0.0, 1 - self.loop.progress() / 0.8))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(x0, share(noise), share(t))
        norm = clip_gradients(self.prior.unet, s.clip, loss if device.type == "cpu" else None)
        self.optimizer.step()
        self.ema.update(self.prior, self.loop.done)
        return {"loss": loss, "grad_norm": norm}

    def _loss(self, *batch: Tensor) -> dict[str, Tensor]:
        return {"loss": diffusion_loss(self.prior, self.abar, *batch)}

    def _gradients(self, *batch: Tensor) -> Tensor:
        """Set the parameters' gradients to those of the mean loss of a batch (x0, noise, t); returns that loss.

        On a CPU every thread takes a part of the batch through the whole network: on small feature maps that is much
        faster than all threads sharing every operation.
        """
        if self.threads == 1:
            loss = self.parallel(*batch)["loss"]
            loss.backward()
            return loss.detach()
        parameters = list(self.prior.parameters())

        def of_part(part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = len(part[0]) / len(batch[0]) * self._loss(*part)["loss"]
            return loss.detach(), torch.autograd.grad(loss, parameters)

        results = list(self.workers.map(of_part, zip(*(each.chunk(self.threads) for each in batch), strict=True)))
        for index, parameter in enumerate(parameters):
            parameter.grad = sum(gradients[index] for _, gradients in results)
        return sum(loss for loss, _ in results)

    def _names(self, *_) -> str:
        return listed([self.images.paths[i].name for i in self.drawn.tolist()])

    def save(self, goes_on: bool) -> None:
        """Write the averaged weights, and unless a signal stops the run, pictures."""
        machine, s = self.machine, self.settings
        save_prior(self.ema.model, machine.out, DTYPES[machine.save_dtype])
        if goes_on and machine.samples > 0:
            # their generators are always the same: pictures of one run differ by training alone
            generators = [image_generator(s.seed, str(i)) for i in range(machine.samples)]
            pictures = sample(self.ema.model, generators, self.run.device, steps=SAMPLE_STEPS, eta=0.0)
            save_image(grid(pictures), machine.out / SAMPLES_NAME / f"step_{self.loop.done:06d}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``."""
    settings, machine, _ = parse(__doc__, Training, Machine, argv=argv)
    out, size = machine.out, settings.batch_size
    torch.set_num_threads(machine.threads)
    with open_run(out, machine.device, machine.save_every, settings.seed) as run:  # a mistake leaves no folder behind
        run.find_state(asdict(settings), machine.resume, machine.overwrite, alone=True)
        if size % run.world.size:
            raise InputError(f"a batch of {size} cannot be shared evenly by {run.world.size} processes")
        images = Images(machine.images, settings.img_size, run.device, settings.split)
        run.add_settings({"images": len(images)})
        trainer = Trainer(settings, machine, images, run)
        stale = ("metrics.csv", "curves.png", "log.txt", f"{SAMPLES_NAME}/step_*.png")
        log = run.begin("train_prior", asdict(settings) | asdict(machine), stale)
        parameters = sum(p.numel() for p in trainer.prior.parameters()) / 1e6
        log.info("%d images, %.2f M parameters, %s, torch %s", len(images), parameters, run.device, torch.__version__)
        trainer.loop.train()
        log.info("done: %d steps, %.1f minutes; %s", trainer.loop.done, trainer.loop.seconds / 60, out)
    return 0


if __name__ == "__main__":
    run_command(main)
