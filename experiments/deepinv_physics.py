"""deepinv's physics, and a denoiser of it, in the sampler of this project.

    pip install -r requirements-deepinv.txt
    python experiments/deepinv_physics.py --images DDNM/exp/datasets/faces --out check_points/demosaiced

Sees images through a camera's colour filter (``deepinv.physics.Demosaicing``: of each pixel one colour) and restores
them by the rule ``linear``: with a prior of this project, and with ``deepinv.models.MMSE`` as the prior, the exact
posterior mean over these very pictures, of which it therefore finds the right one. Prints |A x - y| and PSNR of each,
and writes them with a sheet.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from deepinv.models import MMSE
from deepinv.physics import Demosaicing

sys.path.insert(0, str(Path(__file__).parents[1]))
from DDNM.guided_diffusion.diffusion import image_generator, sample
from DDNM.guided_diffusion.guidance import Linear
from DDNM.guided_diffusion.inputs import from_ddnm
from DDNM.guided_diffusion.prior import load_prior
from DDNM.guided_diffusion.results import as_saved
from deepinv_bridge import as_prior, from_physics
from images import find_images, load_image
from metrics import psnr
from train_operator import write_report
from utils import option, parse, resolve_device, run_command


@dataclass
class Settings:
    """Settings."""

    images: Path = option(..., "folder of originals")
    prior: str = option("exp/logs/faces/prior", "diffusion prior, as of DDNM/main.py")
    count: int = option(9, "images", 1)
    steps: int = option(50, "sampling steps", 2, 1000)
    eta: float = option(0.85, "DDIM's variance", 0, 1)
    seed: int = option(0, "of the noise", 0)
    out: Path = option(..., "folder for the sheet")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    (s, _) = parse(__doc__, Settings, argv=argv)
    device = resolve_device(s.device)
    prior = load_prior(from_ddnm(s.prior)).to(device)
    shape = (3, prior.image_size, prior.image_size)
    x = torch.stack([load_image(file, shape[-1]) for file in find_images(s.images)[: s.count]]).to(device)
    physics = Demosaicing(img_size=shape, device=device)
    y = physics((x + 1) / 2)  # as deepinv's users have it
    operator = from_physics(physics, shape)
    dirac = as_prior(MMSE((x + 1) / 2, device=device), shape[-1], prior.schedule)
    columns = {"original": x, "A+": operator.pinv(y)}
    for name, drawn_from in {"prior": prior, "MMSE": dirac}.items():
        generators = [image_generator(s.seed, str(i)) for i in range(len(x))]
        columns[name] = sample(drawn_from, generators, device, operator, y, Linear(), steps=s.steps, eta=s.eta)
    rows = {
        name: {"A x - y": operator.distance(operator.A(images), y).mean().item(),
               "PSNR, dB": psnr(as_saved(images)[0], x).mean().item()}
        for name, images in columns.items() if name != "original"
    }  # fmt: skip
    s.out.mkdir(parents=True, exist_ok=True)
    write_report(s.out, rows, columns, asdict(s))
    return 0


if __name__ == "__main__":
    run_command(main)
