"""Train a small StyleGAN v1 as the decoder of an autoencoder, with a discriminator in the second half.

    python experiments/train_stylegan.py --minutes 60 --out check_points/stylegan

A discriminator alone needs many more images than a CPU can draw from, or loses most kinds of faces; an autoencoder
keeps all kinds, but blurs. So the generator of stylegan.py decodes what an encoder makes of images (Kingma and Welling
2014, arXiv 1312.6114): differences of pixels and of their slopes, and --beta times the divergence of z, which comes in
over 300 steps. From --adversarial_from of the run on it is also trained against a discriminator, on decoded images and
on samples: non-saturating loss, R1 in every 16th step, minibatch standard deviation (Karras et al. 2019); no
progressive growing.

In training z is not normalised, and what the encoder makes of images is not quite a standard normal. Its mean and
covariance go into the mapping's first layer, so that for the weights that are written z is one, normalised as
StyleGAN's.

Writes stylegan.safetensors (the weights' moving average, float16), stylegan.json and a sheet of samples, and a state:
a run that was stopped goes on with --resume.
"""

import copy
import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import write_weights
from images import grid, save_image, to_float
from loop import DONE, Ema, Loop, Run, open_run
from procedural_faces import draw_face
from stylegan import SLOPE, Equalised, StyleGAN
from utils import InputError, option, parse, run_command, seed_everything, write_json

BF16, WEIGHTS = torch.bfloat16, "stylegan.safetensors"


@dataclasses.dataclass
class Settings:
    """Settings."""

    out: Path = option(Path("check_points/stylegan"), "result folder")
    count: int = option(40_000, "procedural faces, drawn first", 2)
    size: int = option(64, "side of the images, a power of two", 16, 1024)
    minutes: float = option(60.0, "of training, images apart", 0.0)
    steps: int = option(1_000_000, "stop after this many steps", 1)
    channels: tuple[int, ...] = option((128, 128, 96, 64, 32), "of the generator's blocks, from 4x4 on", 1)
    dim: int = option(128, "of z and w", 1)
    depth: int = option(3, "layers of the mapping", 1)
    width: int = option(128, "channels of encoder and discriminator, half of it at first", 2)
    batch_size: int = option(16, "a multiple of 8: half of it are samples, compared in fours", 8)
    lr: float = option(3e-3, "peak learning rate of all networks", 1e-9)
    mapping_lr: float = option(30.0, "of the mapping, whose weights are a hundred times as large: times --lr", 1e-9)
    decay: float = option(0.99, "of the moving average of the weights", 0.0, 1.0)
    beta: float = option(1.0, "weight of the divergence, in nats per number of an image", 0.0)
    adversarial: float = option(0.03, "weight of the generator's adversarial loss; 0: no discriminator", 0.0)
    adversarial_from: float = option(0.5, "share of the run after which the discriminator comes", 0.0, 1.0)
    gamma: float = option(0.5, "weight of R1", 0.0)
    bf16: bool = option(True, "networks in bfloat16")
    save_every: int = option(500, "steps between two states", 1)
    resume: bool = option(False, "go on with the run in --out")
    overwrite: bool = option(False, "start anew, and replace what the run in --out has made")
    seed: int = option(0, "", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


# --- Images ----------------------------------------------------------------------------------------------------------


def kept_faces(s: Settings) -> Tensor:
    """Procedural faces as bytes, (N, 3, size, size), drawn once, and kept in --out."""
    path = s.out / f"faces_{s.count}_{s.size}_{s.seed}.safetensors"  # all that decides which they are
    if not path.is_file():
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            faces = pool.map(partial(draw_face, s.seed, size=s.size), range(s.count), chunksize=32)
            images = [np.asarray(image.convert("RGB")) for image, _ in tqdm(faces, "faces", s.count, disable=None)]
        write_weights(path, {"images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)})
    return load_file(path)["images"]


# --- Networks --------------------------------------------------------------------------------------------------------


class ResidualDown(nn.Module):
    """(B, C_in, r, r) -> (B, C_out, r/2, r/2)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv0 = Equalised((c_in, c_in, 3, 3), math.sqrt(2))
        self.conv1 = Equalised((c_out, c_in, 3, 3), math.sqrt(2))
        self.skip = Equalised((c_out, c_in, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(F.avg_pool2d(x, 2))
        x = F.leaky_relu(self.conv0(x), 0.2)
        x = F.leaky_relu(F.avg_pool2d(self.conv1(x), 2), 0.2)
        return (x + skip) * math.sqrt(0.5)


class Classifier(nn.Module):
    """Images (B, 3, R, R) -> numbers (B, out): an encoder, or with ``compares`` a discriminator.

    Args:
        compares: it is told how much an image's features differ from those of others, see `spread_in_groups`.
    """

    def __init__(self, resolution: int, width: int, out: int, compares: bool):
        super().__init__()
        sizes = [width // 2, width * 3 // 4, *[width] * (int(math.log2(resolution)) - 4)]  # from R / 2 down to 4
        self.first, self.compares = Equalised((sizes[0], 12, 3, 3), math.sqrt(2)), compares
        self.blocks = nn.Sequential(*(ResidualDown(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))
        self.conv = Equalised((sizes[-1], sizes[-1] + compares, 3, 3), math.sqrt(2))
        self.dense = Equalised((2 * width, sizes[-1] * 16), math.sqrt(2))
        self.out = Equalised((out, 2 * width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(F.pixel_unshuffle(x, 2)), 0.2)  # (B, C, R/2, R/2)
        x = self.blocks(x)  # (B, C, 4, 4)
        if self.compares:
            x = torch.cat([x, spread_in_groups(x)], dim=1)
        x = F.leaky_relu(self.conv(x), 0.2)
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)
        return self.out(x).float()


def spread_in_groups(x: Tensor) -> Tensor:
    """Minibatch standard deviation (arXiv 1710.10196, section 3), in groups of 4: (B, C, h, w) -> (B, 1, h, w)."""
    groups = x.float().unflatten(0, (4, -1))  # (4, B / 4, C, h, w)
    spread = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (B / 4,)
    return spread.repeat(4)[:, None, None, None].expand(-1, 1, *x.shape[2:]).to(x.dtype)


class Gaussian(nn.Module):
    """The normal distribution that the encoder makes of the images: ``z = mean + root e`` of standard normal e."""

    mean: Tensor
    root: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("root", torch.eye(dim))  # of the covariance, lower triangular

    def fit(self, mean: Tensor, log_variance: Tensor) -> None:
        """To the normal distributions of N images, (N, d) each."""
        mean, variance = mean.double().cpu(), log_variance.double().cpu().exp()  # where float64 can be had
        self.mean.copy_(mean.mean(0))
        self.root.copy_(torch.linalg.cholesky(mean.T.cov() + variance.mean(0).diag()))

    def draw(self, count: int) -> Tensor:
        """Samples of z, (count, d)."""
        return self.mean + torch.randn(count, len(self.mean), device=self.mean.device) @ self.root.T


def encoded(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, R, R) -> mean and logarithm of the variance of z, (B, d) each."""
    mean, log_variance = encoder(images).chunk(2, dim=1)
    return mean, log_variance.clamp(-12, 4)


def mapped(g: StyleGAN, z: Tensor) -> Tensor:
    """z (B, d) -> w+ (B, L, d), without the normalisation of z, which would bend what the encoder says."""
    for dense in g.g_mapping.values():
        z = F.leaky_relu(dense(z), SLOPE)
    return g.spread(z)


@torch.no_grad()
def standardised(g: StyleGAN, of: Gaussian) -> StyleGAN:
    """The generator for standard normal z: ``W (mean + root z) + b`` in the mapping's first layer."""
    new = copy.deepcopy(g)
    first, old = new.g_mapping["dense0"], g.g_mapping["dense0"]
    first.weight.copy_(old.weight @ of.root)
    first.bias.copy_(old.bias + old.scaled() @ of.mean / old.lr)
    return new


# --- Training --------------------------------------------------------------------------------------------------------


class Autoencoder:
    """Generator, encoder and discriminator, and a step of their training.

    Attributes:
        parts: all that changes, for `loop.Loop`; its "model" is what the weights' average is of.
    """

    R1_EVERY = 16  # steps
    FIT_EVERY, FITTED = 100, 1500  # steps, images

    def __init__(self, s: Settings, images: Tensor, run: Run):
        self.s, self.run, self.images = s, run, images.to(run.device)
        self.g = StyleGAN(s.size, s.channels, s.dim, s.depth).to(run.device)
        self.encoder = Classifier(s.size, s.width, 2 * s.dim, False).to(run.device)
        self.d = Classifier(s.size, s.width, 1, True).to(run.device)
        self.both = nn.ModuleDict({"g": self.g, "encoder": self.encoder})  # averaged together, as they fit each other
        self.ema, self.gaussian = Ema(self.both, s.decay), Gaussian(s.dim).to(run.device)
        self.precision = partial(torch.autocast, run.device.type, BF16, enabled=s.bf16)
        even = [*self.g.g_synthesis.parameters(), *self.encoder.parameters()]
        groups = [{"params": even, "times": 1.0},
                  {"params": list(self.g.g_mapping.parameters()), "times": s.mapping_lr}]  # fmt: skip
        self.parts = {"model": self.both, "d": self.d, "ema": self.ema.model,
                      "gaussian": self.gaussian, "optimizer": torch.optim.Adam(groups, betas=(0.5, 0.99)),
                      "d_optimizer": torch.optim.Adam(self.d.parameters(), betas=(0.0, 0.99))}  # fmt: skip

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor, clipped: Iterable[nn.Parameter] = ()) -> None:
        """One step down the loss; gradients of ``clipped`` have a norm of 5 at most."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clipped, 5.0)
        for group in optimizer.param_groups:  # the loop sets one rate for all
            group["lr"] *= group.get("times", 1.0)
        optimizer.step()

    @torch.no_grad()
    def fit(self, gaussian: Gaussian, encoder: nn.Module) -> Gaussian:
        """Fitted to what the encoder says of evenly spaced images."""
        some = self.images[:: max(1, len(self.images) // self.FITTED)]
        with self.precision():
            said = [encoded(encoder, to_float(part)) for part in some.split(100)]
        gaussian.fit(*map(torch.cat, zip(*said, strict=True)))
        return gaussian

    def step(self, done: int, progress: float) -> dict[str, Tensor]:
        """One update of all networks."""
        s, device = self.s, self.run.device
        opposed = s.adversarial > 0 and progress >= s.adversarial_from
        begins = opposed and not self.parts["d_optimizer"].state
        if begins or opposed and done % self.FIT_EVERY == 0:
            self.fit(self.gaussian, self.encoder)
        if begins:  # with what the encoder sees
            mine = self.d.state_dict()
            alike = {n: p for n, p in self.encoder.state_dict().items() if p.shape == mine[n].shape}
            self.d.load_state_dict(mine | alike)
        drawn = self.gaussian.draw(s.batch_size // 2 if opposed else 0)
        real = to_float(self.images[torch.randint(len(self.images), (s.batch_size,), device=device)])
        with self.precision():
            mean, log_variance = encoded(self.encoder, real)  # (B, d) each
            z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            made = self.g.synthesis(mapped(self.g, torch.cat([z, drawn]))).float()
        again = made[: s.batch_size]
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        l1, slopes = (again - real).abs().mean(), slope_difference(again, real)
        loss = l1 + slopes + s.beta * min(1.0, 0.05 + done / 300) * divergence / real[0].numel()
        said = {"l1": l1, "slopes": slopes, "divergence": divergence}
        if opposed:
            fake = torch.cat([again[: s.batch_size // 2], made[s.batch_size :]])
            said |= self.oppose(real, fake.detach(), done)
            self.d.requires_grad_(False)
            with self.precision():
                g_loss = F.softplus(-self.d(fake)).mean()
            loss = loss + s.adversarial * min(1.0, (progress - s.adversarial_from) / 0.05) * g_loss
        self.update(self.parts["optimizer"], loss, self.g.parameters())
        self.d.requires_grad_(True)
        self.ema.update(self.both, done)
        return {"loss": loss, **said}

    def oppose(self, real: Tensor, fake: Tensor, done: int) -> dict[str, Tensor]:
        """One update of the discriminator, at the generator's rate."""
        for group in self.parts["d_optimizer"].param_groups:
            group["lr"] = self.parts["optimizer"].param_groups[0]["lr"]
        with self.precision():
            d_real, d_fake = self.d(real), self.d(fake)
        d_loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
        self.update(self.parts["d_optimizer"], d_loss)
        if done % self.R1_EVERY == 0 and self.s.gamma > 0:
            real = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.d(real).sum(), real, create_graph=True)
            r1 = slope.square().sum((1, 2, 3)).mean()
            self.update(self.parts["d_optimizer"], r1 * (self.s.gamma / 2 * self.R1_EVERY))
        return {"d_loss": d_loss, "real_known": (d_real > 0).float().mean()}


def slope_difference(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the differences between neighbouring pixels, both ways added."""
    return sum((x.diff(dim=dim) - y.diff(dim=dim)).abs().mean() for dim in (2, 3))


# --- The command -----------------------------------------------------------------------------------------------------


def save(s: Settings, g: StyleGAN, notes: dict) -> None:
    """The weights in float16, what made them, and samples from always the same z."""
    write_weights(s.out / WEIGHTS, g.state_dict(), torch.float16)
    write_json(s.out / "stylegan.json", {**notes, "settings": dataclasses.asdict(s)})
    draws = torch.Generator().manual_seed(s.seed + 1)
    z, noise = torch.randn(64, g.dim, generator=draws), g.draw_noise(64, draws)
    with torch.no_grad():
        images = g(z.to(noise[0]), noise=noise).float().cpu().clamp(-1, 1)
    save_image(grid(images), s.out / "samples.png")


def train(s: Settings, run: Run) -> None:
    """Train to the end of the minutes, or of the steps."""
    without = ("out", "save_every", "resume", "overwrite", "device")
    own = {name: value for name, value in dataclasses.asdict(s).items() if name not in without}
    run.find_state(own, s.resume, s.overwrite, s.out / WEIGHTS)
    if run.stage == DONE:
        print(f"{s.out}: this training is finished")
        return
    if s.batch_size % 8:
        raise InputError(f"--batch_size {s.batch_size}: no multiple of 8")
    seed_everything(s.seed)
    model = Autoencoder(s, kept_faces(s), run)
    print(f"{len(model.images):,} images, generator {sum(p.numel() for p in model.g.parameters()):,} parameters, on "
          f"{run.device}", flush=True)  # fmt: skip

    def batches(done: int) -> Iterator[tuple[tuple, tuple]]:
        while True:
            yield (), (loop.done, loop.progress())

    def saved(_) -> None:
        average = model.ema.model
        gaussian = model.fit(Gaussian(s.dim).to(run.device), average["encoder"])
        save(s, standardised(average["g"], gaussian), {"steps": loop.done, "seconds": loop.seconds})

    def rate(done: int, progress: float) -> float:
        return s.lr * min(1.0, (done + 1) / 100) * min(1.0, max(0.05, (1 - progress) / 0.3))

    loop = Loop(run, "", step=model.step, batches=batches, steps=s.steps, minutes=s.minutes, row_every=50, axis="step",
                parts=model.parts, rate=rate, saved=saved)  # fmt: skip
    loop.train()
    run.finish()


def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    s, _ = parse(__doc__, Settings, argv=argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with open_run(s.out, s.device, s.save_every, s.seed) as run:
        train(s, run)
    return 0


if __name__ == "__main__":
    run_command(main)
