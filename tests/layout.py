"""CelebAMask-HQ's layout on disk, and pictures to fill it, for tests."""

from collections.abc import Iterable, Sequence
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
    x, y, radius = width / 2, height / 2, 0.4 * min(width, height)
    ImageDraw.Draw(image).ellipse([x - radius, y - radius, x + radius, y + radius], fill="black")
    return image


def annotation_text(bits: int | Sequence, end: str = "\n") -> str:
    """An annotation file of images with these attributes (N, 40), or of so many images with random ones."""
    if isinstance(bits, int):
        bits = np.random.default_rng(bits).integers(0, 2, (bits, len(ATTRIBUTES)))
    rows = [f"{i}.jpg  " + " ".join("1" if bit else "-1" for bit in row) for i, row in enumerate(bits)]
    return end.join([str(len(rows)), " ".join(ATTRIBUTES), *rows]) + end


def write_layout(root: Path, faces: Iterable[tuple[np.ndarray, np.ndarray]]) -> Path:
    """Write pictures (H, W, 3) uint8 with their 40 bits as 0.jpg, 1.jpg, ... and the annotations; ``root`` again."""
    (root / IMAGE_FOLDER).mkdir(parents=True)
    pictures, bits = zip(*faces, strict=True)
    for i, pixels in enumerate(pictures):
        Image.fromarray(np.asarray(pixels)).save(root / IMAGE_FOLDER / f"{i}.jpg", quality=95)
    (root / ANNOTATION_FILE).write_text(annotation_text(bits))
    return root


def write_dataset(root: Path, n: int = 20) -> Path:
    """`write_layout` of ``n`` pictures of noise with random attributes."""
    bits = np.random.default_rng(n).integers(0, 2, (n, len(ATTRIBUTES)))
    return write_layout(root, ((picture(i), bits[i]) for i in range(n)))
