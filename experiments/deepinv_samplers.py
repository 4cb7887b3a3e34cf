r"""Operators and a prior of this project in deepinv's samplers, beside its own, on the same images: a table each.

    pip install -r requirements-deepinv.txt
    python experiments/deepinv_samplers.py --images DDNM/exp/datasets/faces --out check_points/restored
    python experiments/deepinv_samplers.py --prior exp/logs/celeba64/prior --judge exp/logs/celeba64/judge.safetensors \
        --images FOLDER --start 8550 --count 48 --precision bf16 --operators sr4 grey inpaint:mask.png \
        --methods A+ linear DDRM DiffPIR DPIR --out check_points/restored

Each operator (see ``operators.make_operator``) measures the images; each method restores them from that. ``linear`` is
DDNM in the sampler of this project, with ``--noise`` DDNM+ (``untold``: DDNM, not told of the noise); DDRM (Kawar et
al. 2022), DiffPIR (Zhu et al. 2023), DPS (Chung et al. 2023) and DPIR (Zhang et al. 2021), a plug-and-play optimiser,
are deepinv's. All have the same prior. ``A+`` is what was measured, and nothing else.

The folder gets one for each operator, with table.md, table.json and sheet.png. |A x - y| is the root mean square over
what was measured, noise aside, of images in [-1, 1] before they have 8 bits; PSNR and LPIPS are of the pictures; judge
is the share of attributes on which an independent judge says of them what it says of the originals; seconds are the
processor's on a CPU. 95 % intervals of the means come of the bootstrap.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from deepinv.optim import DPIR, L2
from deepinv.physics import GaussianNoise, Physics
from deepinv.sampling import DDRM, DPS, DiffPIR
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from DDNM.guided_diffusion.diffusion import reconstruct
from DDNM.guided_diffusion.guidance import Linear
from DDNM.guided_diffusion.inputs import from_ddnm, image_names, load_lpips
from DDNM.guided_diffusion.prior import Prior, load_prior
from DDNM.guided_diffusion.results import as_saved, compare, write_report
from deepinv_bridge import as_denoiser, as_physics
from images import find_images, load_image
from judge import load_judge
from logger import get_logger
from operators import LinearChain, make_operator
from utils import clock, file_name, option, parse, resolve_device, run_command

NAMES = "A+", "linear", "untold", "DDRM", "DiffPIR", "DPS", "DPIR"


@dataclass
class Common:
    """Images and prior."""

    images: Path = option(..., "folder of originals")
    out: Path = option(..., "folder for tables and sheets")
    prior: str = option("exp/logs/faces/prior", "diffusion prior, as of DDNM/main.py")
    start: int = option(0, "leave out the first so many images", 0)
    count: int = option(9, "images", 1)
    steps: int = option(50, "of each sampler; DPIR has 8", 2, 1000)
    eta: float | None = option(0.85, "linear: DDIM's variance; none: the published one", 0, 1)
    precision: str = option("float32", "of the prior's network", choices=("float32", "bf16"))
    seed: int = option(0, "of the noise", 0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")

    def load(self) -> tuple[Prior, list[str], Tensor]:
        """The prior, and the images with their names, (N, 3, H, W)."""
        device, autocast = resolve_device(self.device), torch.bfloat16 if self.precision == "bf16" else None
        prior = load_prior(from_ddnm(self.prior), autocast=autocast, channels_last=True).to(device)
        files = find_images(self.images)[self.start : self.start + self.count]
        x = torch.stack([load_image(file, prior.image_size) for file in files]).to(device)
        self.out.mkdir(parents=True, exist_ok=True)
        return prior, image_names(files, self.images), x


@dataclass
class Settings(Common):
    """What is restored, and how."""

    judge: str | None = option("exp/logs/faces/judge.safetensors", "weights of the judge; none: no such column")
    operators: tuple[str, ...] = option(("sr4", "grey"), "what is measured")
    methods: tuple[str, ...] = option(("A+", "linear", "DDRM", "DiffPIR"), "how it is restored", choices=NAMES)
    noise: float = option(0.0, "in what is measured: its deviation, for images in [-1, 1]", 0, 10)
    batch_size: int = option(16, "images at once", 1)


@dataclass
class Problem:
    """What a method is given: measurements y of images in [0, 1], (B, *out_shape)."""

    s: Settings
    operator: LinearChain
    physics: Physics
    prior: Prior
    names: list[str]
    y: Tensor


def ddnm(p: Problem, noise: float) -> Tensor:
    # y is linear in images of [0, 1]; the sampler's have twice the range, and the middle at 0
    target = 2 * p.y - p.operator.A(torch.ones(1, *p.operator.in_shape).to(p.y))
    walk = {"steps": p.s.steps, "eta": p.s.eta, "seed": p.s.seed, "names": p.names}
    return (reconstruct(p.operator, p.prior, target, guidance=Linear(noise), **walk) + 1) / 2


def diffpir(p: Problem) -> Tensor:
    physics = as_physics(p.operator, noise_model=GaussianNoise(max(p.s.noise / 2, 0.01)))  # it divides by the noise
    return DiffPIR(as_denoiser(p.prior), L2(), max_iter=p.s.steps, device=p.y.device)(p.y, physics.to(p.y.device))


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "A+": lambda p: p.physics.A_dagger(p.y),
    "linear": lambda p: ddnm(p, p.s.noise),
    "untold": lambda p: ddnm(p, 0.0),
    "DDRM": lambda p: DDRM(as_denoiser(p.prior), sigmas=np.linspace(1, 0, p.s.steps))(p.y, p.physics),
    "DiffPIR": diffpir,
    "DPS": lambda p: DPS(as_denoiser(p.prior), num_steps=p.s.steps, dtype=torch.float32, device=p.y.device)(
        p.y, p.physics),
    "DPIR": lambda p: DPIR(sigma=max(p.s.noise / 2, 0.03), denoiser=as_denoiser(p.prior), device=p.y.device)(
        p.y, p.physics),
}  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    (s, _) = parse(__doc__, Settings, argv=argv)
    prior, names, x = s.load()
    device, shape = x.device, tuple(x.shape[1:])
    judge = None if s.judge is None else load_judge(from_ddnm(s.judge)).to(device)
    lpips = load_lpips(device, get_logger("deepinv_samplers"), shape[-1])
    for spec, operator in {spec: make_operator(spec, shape) for spec in s.operators}.items():
        torch.manual_seed(s.seed)
        physics = as_physics(operator, noise_model=GaussianNoise(s.noise / 2)).to(device)  # of images in [0, 1]
        pictures, errors, seconds, measured = {}, {}, {}, physics((x + 1) / 2)
        for method in s.methods:
            torch.manual_seed(s.seed)  # deepinv's samplers draw from the global generator
            started, restored = clock(device, own=True), []
            for i in range(0, len(x), s.batch_size):
                part = slice(i, i + s.batch_size)
                problem = Problem(s, operator, physics, prior, names[part], measured[part])
                restored.append(2 * METHODS[method](problem) - 1)
            seconds[method], drawn = (clock(device, own=True) - started) / len(x), torch.cat(restored)
            pictures[method] = as_saved(drawn)[0]
            errors[method] = operator.distance(operator.A(drawn), operator.A(x)).mean().item()
        rows = compare(pictures, x, seconds, judge, lpips)
        rows = {method: {"A x - y": errors[method], **row} for method, row in rows.items()}
        folder = s.out / file_name(spec)
        folder.mkdir(parents=True, exist_ok=True)
        write_report(folder, rows, {"original": x, **pictures}, asdict(s))
    return 0


if __name__ == "__main__":
    run_command(main)
