"""Train a small StyleGAN v1 on a folder of images, or on procedural faces, for a number of minutes.

    python experiments/train_stylegan.py --data data/faces_20k --minutes 10 --out check_points/stylegan

The generator is stylegan.py's; the discriminator is a small residual network. Non-saturating loss, R1 in every 16th
step, style mixing, minibatch standard deviation, and an exponential moving average of the generator (Karras et al.
2019, 2020); no progressive growing. All images lie on the device, as bytes. Every minute, and at the end or at Ctrl-C,
it writes stylegan.safetensors (the average, float16), stylegan.json and a sheet of samples.
"""

import copy
import dataclasses
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from images import find_images, grid, load_image, save_image, to_uint8
from procedural_faces import draw_face
from stylegan import Equalised, StyleGAN
from utils import InputError, atomic_write, option, parse, resolve_device, run_command, seed_everything, write_json

BF16 = torch.bfloat16


@dataclasses.dataclass
class Settings:
    """Settings."""

    out: Path = option(..., "result folder")
    data: Path | None = option(None, "folder of images; none: procedural faces, drawn first")
    count: int = option(20_000, "procedural faces to draw, or the most images to read", 2)
    size: int = option(64, "side of the images, a power of two", 16, 1024)
    minutes: float = option(10.0, "of training, images apart", 0.0)
    steps: int | None = option(None, "stop after this many steps", 1)
    channels: tuple[int, ...] = option((192, 192, 192, 128, 96), "of the generator's blocks, from 4x4 on", 1)
    dim: int = option(256, "of z and w", 1)
    depth: int = option(4, "layers of the mapping", 1)
    width: int = option(128, "of the discriminator, half of it at the full resolution", 2)
    batch_size: int = option(64, "", 2)
    lr: float = option(2.5e-3, "of both networks; the mapping learns at a hundredth", 1e-9)
    gamma: float = option(1.0, "weight of R1", 0.0)
    r1_every: int = option(16, "steps", 1)
    mixing: float = option(0.9, "share of images with two styles", 0.0, 1.0)
    ema_images: int = option(20_000, "images in which the average forgets half", 1)
    bf16: bool = option(True, "networks in bfloat16 (CUDA)")
    mirror: bool = option(True, "mirror half of the images")
    save_seconds: float = option(60.0, "between two saves", 1.0)
    seed: int = option(0, "", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


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


class Discriminator(nn.Module):
    """Images (B, 3, R, R) -> logits (B,), high for real ones."""

    def __init__(self, resolution: int, width: int):
        super().__init__()
        halvings = int(math.log2(resolution)) - 2
        sizes = [width // 2] + [width] * halvings
        self.from_rgb = Equalised((sizes[0], 3, 1, 1), math.sqrt(2))
        self.blocks = nn.Sequential(*(ResidualDown(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))
        self.conv = Equalised((width, sizes[-1] + 1, 3, 3), math.sqrt(2))
        self.dense = Equalised((width, width * 16), math.sqrt(2))
        self.out = Equalised((1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.leaky_relu(self.from_rgb(x), 0.2))  # (B, C, 4, 4)
        x = torch.cat([x, spread_in_groups(x)], dim=1)
        x = F.leaky_relu(self.conv(x), 0.2)
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)
        return self.out(x).float()[:, 0]


def spread_in_groups(x: Tensor, most: int = 4) -> Tensor:
    """Minibatch standard deviation (arXiv 1710.10196, section 3), in groups of 4: (B, C, h, w) -> (B, 1, h, w)."""
    batch, _, h, w = x.shape
    size = next(n for n in range(most, 0, -1) if batch % n == 0)
    groups = x.float().unflatten(0, (size, -1))  # (size, B / size, C, h, w)
    spread = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (B / size,)
    return spread.repeat(size)[:, None, None, None].expand(-1, 1, h, w).to(x.dtype)


def mixed_styles(g: StyleGAN, batch: int, share: float, device: torch.device) -> Tensor:
    """w+ (B, L, d) of random z; for a share of them a second w from a random layer on."""
    w = g.mapping(torch.randn(2 * batch, g.dim, device=device))
    first, second = w.chunk(2)
    cut = torch.randint(1, g.layers, (batch,), device=device)
    cut = torch.where(torch.rand(batch, device=device) < share, cut, g.layers)
    own = torch.arange(g.layers, device=device) < cut[:, None]
    return torch.where(own[..., None], first[:, None], second[:, None])


# --- Images ----------------------------------------------------------------------------------------------------------


def _drawn(index: int, size: int, seed: int) -> np.ndarray:
    return np.asarray(draw_face(seed, index, size)[0].convert("RGB"))


def read_images(s: Settings) -> Tensor:
    """All images as bytes, (N, 3, S, S)."""
    workers = os.cpu_count() or 1
    if s.data is None:
        with ProcessPoolExecutor(workers) as pool:
            faces = pool.map(partial(_drawn, size=s.size, seed=s.seed), range(s.count), chunksize=32)
            faces = list(tqdm(faces, "faces", s.count, disable=None))
        return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).contiguous()
    paths = find_images(s.data)[: s.count]
    if len(paths) < 2:
        raise InputError(f"--data {s.data}: {len(paths)} image, too few to train on")
    with ThreadPoolExecutor(workers) as pool:
        images = pool.map(lambda path: to_uint8(load_image(path, s.size)), paths)
        return torch.stack(list(tqdm(images, "images", len(paths), disable=None)))


# --- Training --------------------------------------------------------------------------------------------------------


class Trainer:
    """Both networks, their optimisers, the average and the images."""

    def __init__(self, s: Settings, images: Tensor, device: torch.device):
        self.s, self.device, self.seen = s, device, 0
        self.images = images.to(device)
        self.g = StyleGAN(s.size, s.channels, s.dim, s.depth).to(device, memory_format=torch.channels_last)
        self.d = Discriminator(s.size, s.width).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self.g_opt = torch.optim.Adam(self.g.parameters(), lr=s.lr, betas=(0.0, 0.99))
        lazy = s.r1_every / (s.r1_every + 1)  # as many updates an R1 step less, each that much smaller
        self.d_opt = torch.optim.Adam(self.d.parameters(), lr=s.lr * lazy, betas=(0.0, 0.99**lazy))
        self.precision = partial(torch.autocast, device.type, BF16, enabled=s.bf16 and device.type == "cuda")
        self.z = torch.randn(64, s.dim, device=device)
        self.noise = self.ema.draw_noise(64)

    def real(self) -> Tensor:
        """A batch of images in [-1, 1], half of them mirrored."""
        chosen = torch.randint(len(self.images), (self.s.batch_size,), device=self.device)
        x = self.images[chosen].to(memory_format=torch.channels_last).float() / 127.5 - 1
        if self.s.mirror:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=self.device) < 0.5, x, x.flip(3))
        return x

    def step(self, number: int) -> Tensor:
        """One update of both networks on the same fakes. Returns (loss of d, of g, share of real ones known), on the
        device."""
        s, real = self.s, self.real()
        with self.precision():
            fake = self.g.synthesis(mixed_styles(self.g, s.batch_size, s.mixing, self.device))
            d_real, d_fake = self.d(real), self.d(fake.detach())
        d_loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
        self.d_opt.zero_grad(set_to_none=True)
        d_loss.backward()
        self.d_opt.step()
        if number % s.r1_every == 0 and s.gamma > 0:
            real.requires_grad_()
            (slope,) = torch.autograd.grad(self.d(real).sum(), real, create_graph=True)
            penalty = slope.square().sum((1, 2, 3)).mean() * (s.gamma / 2 * s.r1_every)
            self.d_opt.zero_grad(set_to_none=True)
            penalty.backward()
            self.d_opt.step()

        self.d.requires_grad_(False)
        with self.precision():
            g_loss = F.softplus(-self.d(fake)).mean()
        self.g_opt.zero_grad(set_to_none=True)
        g_loss.backward()
        self.g_opt.step()
        self.d.requires_grad_(True)

        self.seen += s.batch_size
        keep = 0.5 ** (s.batch_size / max(1, min(s.ema_images, 0.05 * self.seen)))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.g.parameters()), 1 - keep)
        return torch.stack([d_loss.detach(), g_loss.detach(), (d_real > 0).float().mean()])

    @torch.no_grad()
    def save(self, notes: dict, psi: float = 1.0, sheet: str = "samples.png") -> None:
        """The average's weights in float16, what made them, and 64 samples from always the same z."""
        tensors = {n: t.half().contiguous(memory_format=torch.contiguous_format).cpu()
                   for n, t in self.ema.state_dict().items()}  # fmt: skip
        with atomic_write(self.s.out / "stylegan.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self.s).items()}
        write_json(self.s.out / "stylegan.json", {**notes, "images_seen": self.seen, "settings": settings})
        save_image(grid(self.ema(self.z, psi, noise=self.noise).float().cpu().clamp(-1, 1)), self.s.out / sheet)


def train(s: Settings, trainer: Trainer) -> dict:
    """Train until the minutes are over, or the steps. Returns what the last save noted."""
    started = saved = time.monotonic()
    losses, step, notes = [], 0, {}
    with tqdm(unit="step", dynamic_ncols=True, disable=None) as bar:
        try:
            while time.monotonic() - started < 60 * s.minutes and (s.steps is None or step < s.steps):
                losses.append(trainer.step(step))
                step += 1
                bar.update()
                if len(losses) == 50:  # the only place where the host waits for the device
                    d, g, known = torch.stack(losses).mean(0).tolist()
                    losses.clear()
                    notes = {"step": step, "seconds": round(time.monotonic() - started, 1), "d_loss": d, "g_loss": g,
                             "real_known": known}  # fmt: skip
                    bar.set_description(f"d {d:.3f}, g {g:.3f}, real known {known:.2f}")
                    if not math.isfinite(d + g):
                        raise InputError(f"step {step}: the losses are not finite; lower --lr")
                    if time.monotonic() - saved > s.save_seconds:
                        trainer.save(notes, sheet=f"samples_{step:06d}.png")
                        saved = time.monotonic()
                        print(notes, flush=True)
        except KeyboardInterrupt:
            print("stopped", flush=True)
    notes |= {"step": step, "seconds": round(time.monotonic() - started, 1)}
    trainer.save(notes, 0.7, "samples_psi_0.7.png")
    trainer.save(notes)
    return notes


def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    s, _ = parse(__doc__, Settings, argv=argv)
    device = resolve_device(s.device)
    seed_everything(s.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    images = read_images(s)
    try:
        trainer = Trainer(s, images, device)
    except ValueError as error:
        raise InputError(f"--size, --channels: {error}") from None
    s.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(images):,} images, generator {sum(p.numel() for p in trainer.g.parameters()):,} parameters, "
          f"discriminator {sum(p.numel() for p in trainer.d.parameters()):,}, on {device}", flush=True)  # fmt: skip
    print(train(s, trainer))
    return 0


if __name__ == "__main__":
    run_command(main)
