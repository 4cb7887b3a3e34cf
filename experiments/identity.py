"""How far the person of a photograph comes back: face recognition between photographs and what was drawn of them.

    pip install dlib-bin face_recognition_models
    python experiments/identity.py --photos data/people --drawn check_points/people/pictures/nlbp+gradient_50 \
        --data data/celeba64

Distances are those of dlib's 128 numbers per face (a residual network of 2017, trained on 3 million faces), which calls
two pictures one person below 0.6. They are given from a photograph to its drawing, to another photograph of the same
person, and to one of somebody else; and the rank is the photograph's place among all when they are sorted by their
distance to the drawing: 1 if the person is told, half the number of photographs if nothing is.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from images import find_images
from metrics import mean_of
from utils import InputError, option, parse, run_command

SAME = 0.6  # dlib's own threshold


@dataclass
class Settings:
    """Settings."""

    photos: Path = option(..., "folder of aligned photographs")
    drawn: Path = option(..., "folder of what was drawn of them, by the same names")
    data: Path | None = option(None, "data set with identities.txt (number, file, person), which the photographs are "
                               "named after: for others of the same person")  # fmt: skip


def embeddings(paths: list[Path]) -> Tensor:
    """(N, 128) of aligned faces, which need no detector."""
    package = find_spec("face_recognition_models")  # not imported: it asks for an old setuptools
    if package is None or find_spec("dlib") is None:
        raise InputError("face recognition needs: pip install dlib-bin face_recognition_models")
    import dlib

    weights = Path(package.origin).parent / "models"
    network = dlib.face_recognition_model_v1(str(weights / "dlib_face_recognition_resnet_model_v1.dat"))
    points = dlib.shape_predictor(str(weights / "shape_predictor_5_face_landmarks.dat"))
    found = []
    for path in tqdm(paths, "faces", unit="face", disable=None):
        image = np.asarray(Image.open(path).convert("RGB").resize((256, 256), Image.BICUBIC))
        face = points(image, dlib.rectangle(48, 64, 208, 224))  # where CelebA-HQ's cut has it
        found.append(torch.tensor(list(network.compute_face_descriptor(image, face))))
    return torch.stack(found)


def others_of(data: Path, numbers: list[int]) -> dict[int, int]:
    """For each image's number that of another image of the same person, if there is one."""
    rows = [line.split() for line in (data / "identities.txt").read_text().splitlines()[1:]]
    person = {int(number): who for number, _, who in rows}
    return {n: other[0] for n in numbers if (other := [m for m, who in person.items() if who == person[n] and m != n])}


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    s, _ = parse(__doc__, Settings, argv=argv)
    pairs = [(photo, s.drawn / f"{photo.stem}.png") for photo in find_images(s.photos)]
    if missing := [drawn for _, drawn in pairs if not drawn.is_file()]:
        raise InputError(f"{missing[0]}: no such file; nothing was drawn of {len(missing)} of {len(pairs)} photographs")
    photos, drawn = embeddings([photo for photo, _ in pairs]), embeddings([picture for _, picture in pairs])
    apart = torch.cdist(drawn, photos)  # (N, N)
    own = apart.diagonal()
    show("its drawing", own)
    if s.data is not None:
        others = others_of(s.data, [int(photo.stem) for photo, _ in pairs])
        chosen = [i for i, (photo, _) in enumerate(pairs) if int(photo.stem) in others]
        folder, suffix = s.data / "CelebA-HQ-img", pairs[0][0].suffix
        again = embeddings([folder / f"{others[int(pairs[i][0].stem)]}{suffix}" for i in chosen])
        show("another photograph of the same person", (photos[chosen] - again).norm(dim=1))
    show("a photograph of somebody else", (photos - photos.roll(1, 0)).norm(dim=1))
    rank = (apart <= own[:, None]).sum(1)
    print(f"rank of the photograph among {len(pairs)}: median {int(rank.median())}, first {int((rank == 1).sum())}")
    return 0


def show(what: str, distances: Tensor) -> None:
    mean, low, high = mean_of(distances)
    same = (distances < SAME).float().mean().item()
    interval = f"{mean:.2f} ({low:.2f} to {high:.2f})"
    print(f"from a photograph to {what}: {interval}, one person {same:.0%}, n {len(distances)}")


if __name__ == "__main__":
    run_command(main)
