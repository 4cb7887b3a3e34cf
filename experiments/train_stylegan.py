"""Train a small StyleGAN v1 against a discriminator, and give one that has lost most kinds of faces another mapping.

    python experiments/train_stylegan.py --minutes 60 --out check_points/adversarial
    python experiments/train_stylegan.py --objective components --start check_points/adversarial/stylegan.safetensors \
        --out check_points/stylegan

The generator is stylegan.py's. Objectives:

    components   A new mapping for the generator of --start, whose own has lost most kinds of faces: --count faces are
                 inverted in w+, and w becomes their principal components, normal as z is. Nothing else is trained.
    adversarial  Any images: non-saturating loss, R1 in every 16th step, style mixing, minibatch standard deviation
                 (Karras et al. 2019, 2020) against a small residual network; no progressive growing.

Writes stylegan.safetensors (the weights' moving average, float16), stylegan.json and a sheet of samples, and a state:
a run that was stopped goes on with --resume.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import write_weights
from images import find_images, grid, load_image, save_image, to_float, to_uint8
from inversion import invert
from loop import DONE, Ema, Loop, Run, open_run
from procedural_faces import draw_face
from stylegan import SLOPE, Equalised, Latents, StyleGAN, load_generator
from utils import InputError, option, parse, resolve_device, run_command, seed_everything, write_json

BF16, WEIGHTS = torch.bfloat16, "stylegan.safetensors"


@dataclasses.dataclass
class Settings:
    """Settings."""

    out: Path = option(Path("check_points/stylegan"), "result folder")
    objective: Literal["adversarial", "components"] = option("adversarial", "see above")
    data: Path | None = option(None, "folder of images; none: procedural faces, drawn first")
    start: Path | None = option(None, "weights whose mapping is replaced (components)")
    inversion_steps: int = option(60, "for each face (components)", 1)
    count: int = option(40_000, "procedural faces to draw, or the most images to read", 2)
    size: int = option(64, "side of the images, a power of two", 16, 1024)
    minutes: float = option(60.0, "of training, images apart", 0.0)
    steps: int = option(1_000_000, "stop after this many steps", 1)
    channels: tuple[int, ...] = option((256, 256, 192, 96, 48), "of the generator's blocks, from 4x4 on", 1)
    dim: int = option(128, "of z and w", 1)
    depth: int = option(4, "layers of the mapping", 1)
    batch_size: int = option(64, "", 2)
    lr: float = option(4e-3, "peak learning rate of the generator, and of the discriminator", 1e-9)
    mapping_lr: float = option(30.0, "of the mapping, whose weights are a hundred times as large: times --lr", 1e-9)
    decay: float = option(0.999, "of the moving average of the weights", 0.0, 1.0)
    width: int = option(128, "channels of the discriminator, half of it at the full resolution", 2)
    gamma: float = option(1.0, "weight of R1", 0.0)
    mixing: float = option(0.9, "share of fakes with two styles", 0.0, 1.0)
    bf16: bool = option(True, "networks in bfloat16")
    save_every: int = option(500, "steps between two states", 1)
    measure: Path | None = option(None, "weights: train nothing, and hold their samples against drawn faces")
    samples: int = option(500, "to measure, and as many faces", 2)
    resume: bool = option(False, "go on with the run in --out")
    overwrite: bool = option(False, "start anew, and replace what the run in --out has made")
    seed: int = option(0, "", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


# --- Images ----------------------------------------------------------------------------------------------------------


def drawn(count: int, size: int, seed: int) -> Tensor:
    """Procedural faces as bytes, (N, 3, size, size)."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        faces = pool.map(partial(draw_face, seed, size=size), range(count), chunksize=32)
        images = [np.asarray(image.convert("RGB")) for image, _ in tqdm(faces, "faces", count, disable=None)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def kept_faces(s: Settings) -> Tensor:
    """Procedural faces, drawn once, and kept in --out."""
    path = s.out / f"faces_{s.count}_{s.size}_{s.seed}.safetensors"  # all that decides which they are
    if not path.is_file():
        write_weights(path, {"images": drawn(s.count, s.size, s.seed)})
    return load_file(path)["images"]


def read(folder: Path, s: Settings) -> Tensor:
    """The images of a folder as bytes, (N, 3, S, S)."""
    paths = find_images(folder)[: s.count]
    if len(paths) < 2:
        raise InputError(f"--data {folder}: {len(paths)} image, too few to train on")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda path: to_uint8(load_image(path, s.size)), paths)
        return torch.stack(list(tqdm(images, "images", len(paths), disable=None)))


# --- Objectives ------------------------------------------------------------------------------------------------------


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
        sizes = [width // 2] + [width] * (int(math.log2(resolution)) - 2)
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
    first, second = g.mapping(torch.randn(2 * batch, g.dim, device=device)).chunk(2)
    cut = torch.randint(1, g.layers, (batch,), device=device)
    cut = torch.where(torch.rand(batch, device=device) < share, cut, g.layers)
    own = torch.arange(g.layers, device=device) < cut[:, None]
    return torch.where(own[..., None], first[:, None], second[:, None])


class Adversarial:
    """A generator whose G(z) passes for one of the images, and a step of its training.

    Attributes:
        parts: all that changes, for `loop.Loop`; its "model" is what the weights' average is of.
    """

    R1_EVERY = 16  # steps

    def __init__(self, s: Settings, images: Tensor, run: Run):
        self.s, self.run, self.images = s, run, images.to(run.device)
        self.g = StyleGAN(s.size, s.channels, s.dim, s.depth).to(run.device)
        self.d = Discriminator(s.size, s.width).to(run.device)
        self.ema = Ema(self.g, s.decay)
        self.precision = partial(torch.autocast, run.device.type, BF16, enabled=s.bf16)
        lazy = self.R1_EVERY / (self.R1_EVERY + 1)  # as many updates an R1 step less, each that much smaller
        groups = [{"params": list(self.g.g_synthesis.parameters()), "times": 1.0},
                  {"params": list(self.g.g_mapping.parameters()), "times": s.mapping_lr}]  # fmt: skip
        optimizer = torch.optim.Adam(groups, betas=(0.0, 0.99))
        self.d_optimizer = torch.optim.Adam(self.d.parameters(), lr=s.lr * lazy, betas=(0.0, 0.99**lazy))
        self.parts = {"model": self.g, "ema": self.ema.model, "optimizer": optimizer, "d": self.d,
                      "d_optimizer": self.d_optimizer}  # fmt: skip

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:  # the loop sets one rate for all
            group["lr"] *= group.get("times", 1.0)
        optimizer.step()

    def step(self, done: int, progress: float) -> dict[str, Tensor]:
        """One update of both networks on the same fakes."""
        s, device = self.s, self.run.device
        real = to_float(self.images[torch.randint(len(self.images), (s.batch_size,), device=device)])
        real = torch.where(torch.rand(len(real), 1, 1, 1, device=device) < 0.5, real, real.flip(3))
        with self.precision():
            fake = self.g.synthesis(mixed_styles(self.g, s.batch_size, s.mixing, device))
            d_real, d_fake = self.d(real), self.d(fake.detach())
        d_loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
        self.update(self.d_optimizer, d_loss)
        if done % self.R1_EVERY == 0 and s.gamma > 0:
            real.requires_grad_()
            (slope,) = torch.autograd.grad(self.d(real).sum(), real, create_graph=True)
            self.update(self.d_optimizer, slope.square().sum((1, 2, 3)).mean() * (s.gamma / 2 * self.R1_EVERY))
        self.d.requires_grad_(False)
        with self.precision():
            g_loss = F.softplus(-self.d(fake)).mean()
        self.update(self.parts["optimizer"], g_loss)
        self.d.requires_grad_(True)
        self.ema.update(self.g, done)
        return {"loss": g_loss, "d_loss": d_loss, "real_known": (d_real > 0).float().mean()}


# --- A new mapping ---------------------------------------------------------------------------------------------------


def with_components(g: StyleGAN, w_plus: Tensor, dim: int) -> StyleGAN:
    """The generator with a mapping from z to the principal components of some w+ (N, L, d).

    What was w+ is normal then, with their mean and covariance: every style is an affine function of it, so the
    components go into the styles' weights, and the mapping is one layer, whose units come in pairs: those of t and -t
    after a leaky ReLU of slope a differ by (1 + a) t. Units beyond the 2 (N - 1) are 0 for every z; in w and w+ they
    move a layer's styles in directions that no component has, the strongest first.

    Args:
        dim: of the new z and w, at least 2 (N - 1).
    """
    flat = w_plus.flatten(1).double()
    _, spread, basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    count = len(flat) - 1  # one is lost to the mean
    basis = basis[:count] * spread[:count, None] / count**0.5  # (N - 1, L d), for coordinates of variance 1
    mean, basis = (x.unflatten(-1, w_plus.shape[1:]).float() for x in (flat.mean(0), basis))
    new = StyleGAN(g.resolution, g.channels, dim, depth=1)
    with torch.no_grad():
        for block, old in zip(new.g_synthesis["blocks"].values(), g.g_synthesis["blocks"].values(), strict=True):
            block.load_state_dict(old.state_dict() | {n: p for n, p in block.state_dict().items() if ".lin." in n})
        new.g_synthesis["torgb"].load_state_dict(g.g_synthesis["torgb"].state_dict())
        dense = new.g_mapping["dense0"]
        eye = torch.eye(count, dim) / dense.scale
        dense.weight.copy_(torch.cat([eye, -eye, torch.zeros(dim - 2 * count, dim)]))
        for layer, (lin, old) in enumerate(zip(_styles(new), _styles(g), strict=True)):
            moved = old.scaled() @ basis[:, layer].T / (1 + SLOPE)  # (2 C, N - 1)
            outside = torch.linalg.svd(basis[:, layer])[2][count:]  # (d - N + 1, d), orthonormal
            strongest = torch.linalg.svd(old.scaled() @ outside.T, full_matrices=False)[2] @ outside
            rest = (old.scaled() @ strongest.T)[:, : dim - 2 * count]
            rest = F.pad(rest, (0, dim - 2 * count - rest.shape[1]))
            lin.weight.copy_(torch.cat([moved, -moved, rest], dim=1) / lin.scale)
            lin.bias.copy_(old.bias + old.scaled() @ mean[layer])
    return new.eval()


def _styles(g: StyleGAN) -> list[Equalised]:
    blocks = g.g_synthesis["blocks"].values()
    return [epilogue.style_mod["lin"] for block in blocks for epilogue in (block.epi1, block.epi2)]


def invert_all(g: StyleGAN, images: Tensor, s: Settings, run: Run) -> Tensor:
    """w+ (N, L, d) of images, by ``--inversion_steps`` from the average latent."""
    f = Latents(g.requires_grad_(False), "w+", g.draw_noise(1, torch.Generator().manual_seed(s.seed)), s.bf16)
    found = []
    for part in run.until_stopped(tqdm(images.split(s.batch_size), "inverting", unit="batch", disable=None)):
        x0 = f.average().repeat(len(part), 1)
        found.append(invert(f, to_float(part.to(x0)), x0, steps=s.inversion_steps).x)
    return f.w_plus(torch.cat(found))


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
    without = ("out", "save_every", "measure", "samples", "resume", "overwrite", "device")
    own = {name: value for name, value in dataclasses.asdict(s).items() if name not in without}
    run.find_state(own, s.resume, s.overwrite, s.out / WEIGHTS)
    if run.state is not None and run.state["stage"] == DONE:
        print(f"{s.out}: this training is finished")
        return
    seed_everything(s.seed)
    images = kept_faces(s) if s.data is None else read(s.data, s)
    if s.objective == "components":
        if s.start is None:
            raise InputError("--objective components: give the generator's weights by --start")
        g, dim = load_generator(s.start, s.size).to(run.device), max(s.dim, 2 * len(images) - 2)
        save(s, with_components(g, invert_all(g, images, s, run), dim).to(run.device), {"faces": len(images)})
        return
    objective = Adversarial(s, images, run)
    print(f"{len(images):,} images, generator {sum(p.numel() for p in objective.g.parameters()):,} parameters, on "
          f"{run.device}", flush=True)  # fmt: skip

    def batches(done: int) -> Iterator[tuple[tuple, tuple]]:
        while True:
            yield (), (loop.done, loop.progress())

    loop = Loop(run, "", step=objective.step, batches=batches, steps=s.steps, minutes=s.minutes, row_every=50,
                axis="step", parts=objective.parts, rate=lambda done, progress: s.lr * min(1.0, (done + 1) / 100),
                saved=lambda _: save(s, objective.ema.model, {"steps": loop.done, "seconds": loop.seconds})
                )  # fmt: skip
    loop.train()
    run.finish()


@torch.no_grad()
def measure(s: Settings) -> dict:
    """How samples differ from as many faces that are drawn anew, as the independent judge sees them.

    The kernel distance of its features, and how often it sees each attribute; both for two sets of drawn faces as well.
    """
    from evaluate import JudgeFeatures, kid, seen
    from judge import load_judge
    from targets import FACES

    device = resolve_device(s.device)
    judge = load_judge(FACES / "judge.safetensors").to(device)
    g, draws = load_generator(s.measure, judge.img_size).to(device), torch.Generator().manual_seed(s.seed)
    faces = to_float(drawn(2 * s.samples, judge.img_size, s.seed))
    z = torch.randn(s.samples, g.dim, generator=draws)
    made = torch.cat([g(part.to(device), noise=g.draw_noise(len(part), draws)).cpu() for part in z.split(50)])
    sets = (to_float(to_uint8(made)), *faces.chunk(2))
    features = [seen(JudgeFeatures(judge), images, device) for images in sets]
    said = [(seen(judge, images, device) > 0).float().mean(0) for images in sets]
    found: dict = {}
    for name, i in (("samples", 0), ("drawn", 1)):
        distance, apart = kid(features[i], features[2])(torch.arange(s.samples)), (said[i] - said[2]).abs().mean()
        found |= {f"{name}_kid": distance, f"{name}_attributes_apart": apart.item()}
    shares = torch.stack([said[0], said[2]], 1).round(decimals=3).tolist()
    return {**found, "shares_in_samples_and_drawn": dict(zip(judge.attributes, shares, strict=True))}


def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    s, _ = parse(__doc__, Settings, argv=argv)
    if s.measure is not None:
        print(json.dumps(measure(s), indent=1))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with open_run(s.out, s.device, s.save_every, s.seed) as run:
        train(s, run)
    return 0


if __name__ == "__main__":
    run_command(main)
