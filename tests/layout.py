"""CelebAMask-HQ's layout on disk, for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data_loader import ANNOTATION_FILE, ATTRIBUTES, IMAGE_FOLDER


def write_layout(root: Path, faces: Iterable[tuple[np.ndarray, np.ndarray]]) -> Path:
    """Write pictures (H, W, 3) uint8 with their 40 bits as 0.jpg, 1.jpg, ... and the annotations; ``root`` again."""
    (root / IMAGE_FOLDER).mkdir()
    rows = []
    for i, (pixels, bits) in enumerate(faces):
        Image.fromarray(pixels).save(root / IMAGE_FOLDER / f"{i}.jpg", quality=95)
        rows.append(f"{i}.jpg " + " ".join("1" if bit else "-1" for bit in bits))
    (root / ANNOTATION_FILE).write_text("\n".join([str(len(rows)), " ".join(ATTRIBUTES), *rows]) + "\n")
    return root
