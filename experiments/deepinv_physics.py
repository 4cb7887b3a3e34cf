"""deepinv's physics, and a denoiser of it, in the sampler of this project.

    pip install -r requirements-deepinv.txt
    python experiments/deepinv_physics.py --images DDNM/exp/datasets/faces --out check_points/demosaiced

Sees images through a camera's colour filter (``deepinv.physics.Demosaicing``: of each pixel one colour) and restores
them by the rule ``linear``: with a prior of this project, and with ``deepinv.models.MMSE`` as the prior, the exact
posterior mean over these very pictures, of which it therefore finds the right one. Prints |A x - y| and PSNR of each,
and writes them with a sheet.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from deepinv.models import MMSE
from deepinv.physics import Demosaicing

sys.path.insert(0, str(Path(__file__).parents[1]))
from DDNM.guided_diffusion.diffusion import image_generator, sample
from DDNM.guided_diffusion.guidance import Linear
from DDNM.guided_diffusion.results import as_saved, write_report
from deepinv_bridge import as_prior, from_physics
from experiments.deepinv_samplers import Common
from metrics import psnr
from utils import parse, run_command


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """The command; see ``--help``."""
    (s, _) = parse(__doc__, Common, argv=argv)
    prior, names, x = s.load()
    device, shape = x.device, tuple(x.shape[1:])
    physics = Demosaicing(img_size=shape, device=device)
    y = physics((x + 1) / 2)  # as deepinv's users have it
    operator = from_physics(physics, shape)
    dirac = as_prior(MMSE((x + 1) / 2, device=device), shape[-1], prior.schedule)
    columns = {"original": x, "A+": operator.pinv(y)}
    for name, drawn_from in {"prior": prior, "MMSE": dirac}.items():
        generators = [image_generator(s.seed, image) for image in names]
        columns[name] = sample(drawn_from, generators, device, operator, y, Linear(), steps=s.steps, eta=s.eta)
    rows = {
        name: {"A x - y": operator.distance(operator.A(images), y).mean().item(),
               "PSNR, dB": psnr(as_saved(images)[0], x).mean().item()}
        for name, images in columns.items() if name != "original"
    }  # fmt: skip
    write_report(s.out, rows, columns, asdict(s))
    return 0


if __name__ == "__main__":
    run_command(main)
