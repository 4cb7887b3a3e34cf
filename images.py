"""Pictures in and out: found, read whatever they are, made square, written.

An image is a (3, H, W) float32 tensor in [-1, 1].
"""

import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from align import align_face, warn_unaligned
from utils import InputError, atomic_write

Image.init()
# by content, whatever the suffix says; Pillow knows others, one of which (EPS) runs another program
_FORMATS = tuple({"JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"} & Image.OPEN.keys())
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS))

_IMAGES, _MASKS = {"CelebA-HQ-img", "images"}, {"CelebAMask-HQ-mask-anno", "masks"}  # side by side in a data set
RESAMPLING = Image.Resampling.LANCZOS  # Pillow widens its kernel when it shrinks: antialiased
_CELEBA_SIZE, _CELEBA_BOX = (178, 218), (11, 37, 167, 193)  # left, upper, right, lower; see `fit`

log = logging.getLogger(__name__)
T = TypeVar("T")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts ``2.jpg`` before ``10.jpg``."""
    parts = re.split(r"(\d+)", name)  # text at even places, digits at odd ones
    return [(0, int(part), part) if i % 2 else (1, 0, part.lower()) for i, part in enumerate(parts) if part]


def find_images(path: str | Path) -> list[Path]:
    """The images at ``path``: one file, or a flat or nested folder, sorted naturally by their path.

    Suffixes are compared without case. Hidden files and folders are skipped, and the masks of a data set are; files
    with other suffixes are left out, and a warning names them.

    Raises:
        InputError: no such path, or no image in it.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{path}: not an image; expected one of {', '.join(IMAGE_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    found, others, visited = [], [], set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        masks = _MASKS if _IMAGES & set(folders) else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in masks]
        for name in files:
            if not name.startswith("."):
                (found if name.lower().endswith(IMAGE_SUFFIXES) else others).append(Path(folder, name))
    if found and others:
        log.warning("%s: left out what has no picture's suffix: %s", path, listed(sorted(p.name for p in others)))
    if not found:
        raise InputError(f"{path}: no images found; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(found, key=lambda p: [natural_key(part) for part in p.relative_to(path).parts])


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _to_rgb(image: Image.Image, png: bool = False) -> Image.Image:
    """Any Pillow mode to 8-bit RGB; transparent pixels show white.

    Args:
        png: it comes from one, whose integers have 16 bits, which older versions of Pillow do not say.
    """
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips these at 255 instead of scaling them
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        if image.mode == "F":
            most = 1 if values.max() <= 1 else 255
        else:
            most = 65535 if png or image.mode.startswith("I;16") or values.max() > 255 else 255
        if values.min() < 0 or values.max() > most:
            raise ValueError(f"its values reach from {values.min():g} to {values.max():g}, expected 0 to {most}")
        image = Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(path: Path, use: Callable[[Image.Image], T] = Image.Image.copy) -> T:
    """What ``use`` makes of a picture in a file: by default its pixels as they are, of an animation the first frame.

    Raises:
        InputError: it cannot be read, is cut short, or is a decompression bomb (179 million pixels).
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait forever
        raise InputError(f"{path}: not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half a bomb is a large photograph; oddities of the file are no concern
            with Image.open(path, formats=_FORMATS) as image:
                return use(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        reason = "not a picture that can be read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(f"{path}: cannot read image: {' '.join(reason.split())[:200]}") from error


def read_rgb(path: Path) -> Image.Image:
    """The upright 8-bit RGB picture in a file. Raises InputError as `read_picture`."""

    def upright(image: Image.Image) -> Image.Image:
        image.load()
        if image.format in ("GIF", "WEBP", "PNG", "TIFF") and getattr(image, "is_animated", False):
            log.warning("%s: of several frames or pages, the first is used", path)
        png = image.format == "PNG"
        try:
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # damaged EXIF does not make the pixels unusable
            log.warning("%s: EXIF data ignored: %s", path, error)
        return _to_rgb(image, png)

    return read_picture(path, upright)


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]: the one place where this is decided."""
    return (images / 127.5).sub_(1)


_CROPPED = threading.Lock()


Size = int | tuple[int, int]  # the side of a square, or (height, width)


def sides(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def fit(image: Image.Image, size: Size, path: str | Path, resampling: Image.Resampling = RESAMPLING) -> Image.Image:
    """A picture as networks see it: the largest centred part of the right proportions, resized (antialiased).

    So it is for training pictures and for any others: nothing here changes proportions. The first picture that loses
    something is named in a warning.

    Pictures of 178x218 are CelebA's aligned ones: of these it is the square that CelebA-HQ's rule gives for the mean
    eyes (69.5, 111) and (107.5, 111) and mouth (88.5, 152), of 156 pixels around (89, 115), so that networks may be
    trained on either set and used on the other: eyes a quarter of the width apart, at 48 % of the height.
    """
    height, width = sides(size)
    if image.size == _CELEBA_SIZE:
        image = image.crop(_CELEBA_BOX)
    elif image.width * height != image.height * width and _CROPPED.acquire(blocking=False):  # never given back
        said = "not square" if height == width else f"not {width} to {height}"
        log.warning("%s is %dx%d: of pictures that are %s, the middle is used", path, *image.size, said)
    if image.width * height != image.height * width:
        part = [max(1, min(image.width, image.height * width // height))]
        part.append(max(1, min(image.height, image.width * height // width)))
        left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
        image = image.crop((left, top, left + part[0], top + part[1]))
    return image if image.size == (width, height) else image.resize((width, height), resampling)


def to_pixels(image: Image.Image, size: Size | None, path: str | Path) -> np.ndarray:
    """(3, H, W) uint8, of this size if there is one, see `fit`."""
    image = image if size is None else fit(image, size, path)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def load_image(path: str | Path, size: Size | None = None, align: bool | None = False) -> Tensor:
    """Read any picture as a (3, H, W) float32 tensor in [-1, 1].

    EXIF rotation is applied, every mode becomes 8-bit RGB, alpha is laid over white, and of an animation the first
    frame is taken, with a warning.

    Args:
        path: the file.
        size: the side of a square, or (height, width); when given, the picture becomes of that size, see `fit`.
        align: find the face and cut it as CelebA-HQ does, see `align.align_face`; None: only warn if that is needed.

    Raises:
        InputError: the file is missing, unreadable or cut short; to be aligned, and without a face or with several.
    """
    image = read_rgb(Path(path))
    if align:
        image = align_face(image, path)
    elif align is None:
        warn_unaligned(image, path)
    return to_float(torch.from_numpy(to_pixels(image, size, path)))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], any shape, to uint8 in [0, 255]: clamped and rounded; the inverse of reading. NaN is black."""
    return torch.nan_to_num((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_image(image: Tensor, path: str | Path) -> None:
    """Write a (3, H, W) image in [-1, 1] as PNG; the file appears whole or not at all."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"save_image: expected (3, H, W), got {tuple(image.shape)}")
    picture = Image.fromarray(to_uint8(image).cpu().permute(1, 2, 0).contiguous().numpy())
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Images (B, 3, H, W) side by side as one: (3, rows * H, columns * W); empty places are white."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    filled = torch.cat([images, blank]).unflatten(0, (rows, columns))  # (rows, columns, 3, H, W)
    return filled.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
