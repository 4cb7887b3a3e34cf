"""From a clone to a picture: reconstruct a face from its 40 attribute logits alone, then with glasses on.

    python example.py                       # a face of the demo -> example.png
    python example.py --face my.png --set Smiling

Every line can be copied into a program of your own.
"""

import argparse
from pathlib import Path

import torch

from DDNM.guided_diffusion.diffusion import reconstruct
from DDNM.guided_diffusion.prior import load_prior
from images import grid, load_image, save_image
from models import SPNN

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "DDNM" / "exp" / "logs" / "faces"  # the weights that come with the project


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--face", default=ROOT / "DDNM" / "exp" / "datasets" / "faces" / "0.jpg")
    parser.add_argument("--set", default="Eyeglasses", help="the attribute to add")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="example.png")
    args = parser.parse_args()

    # g, with its exact pseudo-inverse g', and a diffusion model that knows what faces look like
    spnn = SPNN.from_pretrained(DEMO / "spnn.safetensors")
    prior = load_prior(DEMO / "prior")

    # all that is kept of the picture: 40 numbers
    face = load_image(args.face, spnn.img_size)  # (3, 64, 64) in [-1, 1]
    with torch.no_grad():
        logits = spnn(face[None])  # (1, 40)

    # the same numbers but one: typical of faces with the attribute
    changed = logits.clone()
    if args.set not in spnn.notes["attributes"]:
        parser.error(f"--set {args.set}: the attributes are {', '.join(spnn.notes['attributes'])}")
    index = spnn.notes["attributes"].index(args.set)
    changed[0, index] = spnn.notes["typical_logits"][index][1]

    # one image per row of logits; equal names have equal noise, so that the two faces differ by the attribute
    images = reconstruct(spnn, prior, torch.cat([logits, changed]), steps=args.steps, names=["face", "face"])
    save_image(grid(torch.stack([face, *images]), columns=3), args.out)

    with torch.no_grad():
        seen = spnn(images)[:, index].sigmoid().tolist()
    print(f"{args.out}: the face, its reconstruction, and the same with {args.set}")
    print(f"g's probability of {args.set}: {seen[0]:.2f}, then {seen[1]:.2f}")


if __name__ == "__main__":
    main()
