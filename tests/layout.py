"""CelebAMask-HQ's layout on disk, and pictures to fill it, for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_loader import ANNOTATION_FILE, ATTRIBUTES, IMAGE_FOLDER


def picture(seed: int, size: int | tuple[int, int] = 12) -> Image.Image:
    """Noise."""
    width, height = (size, size) if isinstance(size, int) else size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def circle(width: int, height: int) -> Image.Image:
    """A black disc in the middle."""
    image = Image.new("RGB", (width, height), "white")
    radius = 0.4 * min(width, height)
    ImageDraw.Draw(image).ellipse(
        [width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius], fill="black"
    )
    return image


def annotation_text(n: int, end: str = "\n") -> str:
    """An annotation file of ``n`` images with random attributes."""
    bits = np.random.default_rng(n).integers(0, 2, (n, len(ATTRIBUTES)))
    rows = [f"{i}.jpg  " + " ".join("1" if bit else "-1" for bit in row) for i, row in enumerate(bits)]
    return end.join([str(n), " ".join(ATTRIBUTES), *rows]) + end


def write_layout(root: Path, faces: Iterable[tuple[np.ndarray, np.ndarray]]) -> Path:
    """Write pictures (H, W, 3) uint8 with their 40 bits as 0.jpg, 1.jpg, ... and the annotations; ``root`` again."""
    (root / IMAGE_FOLDER).mkdir(parents=True)
    rows = []
    for i, (pixels, bits) in enumerate(faces):
        Image.fromarray(np.asarray(pixels)).save(root / IMAGE_FOLDER / f"{i}.jpg", quality=95)
        rows.append(f"{i}.jpg " + " ".join("1" if bit else "-1" for bit in bits))
    (root / ANNOTATION_FILE).write_text("\n".join([str(len(rows)), " ".join(ATTRIBUTES), *rows]) + "\n")
    return root


def write_dataset(root: Path, n: int = 20) -> Path:
    """`write_layout` of ``n`` pictures of noise with random attributes."""
    bits = np.random.default_rng(n).integers(0, 2, (n, len(ATTRIBUTES)))
    return write_layout(root, ((picture(i), bits[i]) for i in range(n)))
