"""Pictures in and out: found, read whatever they are, made square, written; and the face in one, framed.

An image is a (3, H, W) float32 tensor in [-1, 1].

The networks of this project have seen faces as CelebA-HQ frames them: level eyes, a quarter of the width apart, a
little above the middle. `align_face` cuts a portrait so. Faces are found by MTCNN: a small network looks at every place
and size, two more at what looked like a face; the last says where eyes, nose and mouth are. Its weights are those of
the package mtcnn (MIT licence, 2 MB), whose own networks need TensorFlow.

K. Zhang, Z. Zhang, Z. Li, Y. Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional
Networks", 2016. T. Karras, T. Aila, S. Laine, J. Lehtinen, "Progressive Growing of GANs for Improved Quality,
Stability, and Variation", 2018, has the frame in appendix C.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from utils import InputError, atomic_write, sides

Image.init()
# by content, whatever the suffix says; Pillow knows others, one of which (EPS) runs another program
_FORMATS = tuple({"JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"} & Image.OPEN.keys())
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS))

RESAMPLING = Image.Resampling.LANCZOS  # Pillow widens its kernel when it shrinks: antialiased
_IMAGES, _MASKS = {"CelebA-HQ-img", "images"}, {"CelebAMask-HQ-mask-anno", "masks"}  # side by side in a data set
_CELEBA_SIZE, _CELEBA_BOX = (178, 218), (11, 37, 167, 193)  # left, upper, right, lower; see `fit`
_cropped: list[str | Path] = []  # the first picture that was, of which a warning was given

Size = int | tuple[int, int]  # the side of a square, or (height, width)
T = TypeVar("T")
log = logging.getLogger(__name__)


# --- Found and read --------------------------------------------------------------------------------------------------


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts ``2.jpg`` before ``10.jpg``."""
    parts = re.split(r"(\d+)", name)  # text at even places, digits at odd ones
    return [(0, int(part), part) if i % 2 else (1, 0, part.lower()) for i, part in enumerate(parts) if part]


def find_images(path: str | Path) -> list[Path]:
    """The images at ``path``: one file, or a flat or nested folder, sorted naturally by their path.

    Suffixes are compared without case. Hidden files and folders and the masks of a data set are skipped; files with
    other suffixes are left out, and a warning names them.

    Raises:
        InputError: no such path, or no image in it.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else []
    for folder, folders, names in os.walk(path, followlinks=True):
        masks = _MASKS if _IMAGES & set(folders) else ()
        folders[:] = [name for name in folders if name[0] != "." and name not in masks]
        files += [Path(folder, name) for name in names if name[0] != "."]
    found = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise InputError(f"{path}: no images found; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    if others := sorted(file.name for file in set(files).difference(found)):
        log.warning("%s: left out what has no picture's suffix: %s", path, listed(others))
    return sorted(found, key=lambda p: [natural_key(part) for part in p.relative_to(path).parts])


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    """Any Pillow mode to 8-bit RGB; transparent pixels show white. ``kind``: the file's format."""
    if image.mode.startswith(("I", "F")):
        if not (image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM")):
            raise ValueError(f"pixels of mode {image.mode}, expected 8 or 16 bits for each colour")
        # scaled; Pillow's own conversion clips these at 255
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(path: Path, use: Callable[[Image.Image], T] = Image.Image.copy) -> T:
    """What ``use`` makes of a picture in a file: by default its pixels as they are, of an animation the first frame.

    Raises:
        InputError: it cannot be read, is cut short, or is a decompression bomb (179 million pixels).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half a bomb is a large photograph; oddities of the file are no concern
            with Image.open(path, formats=_FORMATS) as image:
                return use(image)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise InputError(f"{path}: cannot read image: {' '.join(str(error).split())[-200:]}") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a picture as `read_rgb` turns it; nothing is decoded."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if turned else image.size


def read_rgb(path: Path) -> Image.Image:
    """The upright 8-bit RGB picture in a file. Raises InputError as `read_picture`."""

    def upright(image: Image.Image) -> Image.Image:
        image.load()
        if image.format != "MPO" and getattr(image, "is_animated", False):  # a phone's JPEG may hold its own thumbnail
            log.warning("%s: of several frames or pages, the first is used", path)
        kind = image.format
        try:
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # damaged EXIF does not make the pixels unusable
            log.warning("%s: EXIF data ignored: %s", path, error)
        return _to_rgb(image, kind)

    return read_picture(path, upright)


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]: the one place where this is decided."""
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    batch = images.ndim == 4 and images.device.type == "cpu"
    # one by one: an image fits into a processor's cache, so that a batch crosses its memory once and not three times
    for image, values in zip(images, result, strict=True) if batch else [(images, result)]:
        torch.div(image, 127.5, out=values).sub_(1)
    return result


def fit(image: Image.Image, size: Size, path: str | Path, resampling: Image.Resampling = RESAMPLING) -> Image.Image:
    """A picture as networks see it: the largest centred part of the right proportions, resized (antialiased).

    The first picture that loses something is named in a warning.

    Pictures of 178x218 are CelebA's aligned ones: of these it is the square that CelebA-HQ's rule gives for the mean
    eyes (69.5, 111) and (107.5, 111) and mouth (88.5, 152), of 156 pixels around (89, 115), so that networks may be
    trained on either set and used on the other.
    """
    height, width = sides("images", "size", size)
    if image.size == _CELEBA_SIZE:
        image = image.crop(_CELEBA_BOX)
    w, h = image.size
    if w * height != h * width and not _cropped:
        said = "not square" if height == width else f"not {width} to {height}"
        log.warning("%s is %dx%d: of pictures that are %s, the middle is used", path, w, h, said)
        _cropped.append(path)
    return ImageOps.fit(image, (width, height), resampling)


def to_pixels(image: Image.Image, size: Size | None, path: str | Path) -> np.ndarray:
    """(3, H, W) uint8, of this size if there is one, see `fit`."""
    image = image if size is None else fit(image, size, path)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).copy()


def load_image(path: str | Path, size: Size | None = None, align: bool | None = False) -> Tensor:
    """Read any picture as a (3, H, W) float32 tensor in [-1, 1].

    EXIF rotation is applied, every mode becomes 8-bit RGB, alpha is laid over white, and of an animation the first
    frame is taken, with a warning.

    Args:
        path: the file.
        size: the side of a square, or (height, width); when given, the picture becomes of that size, see `fit`.
        align: find the face and cut it as CelebA-HQ does, see `align_face`; None: only warn if that is needed.

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


def to_picture(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [-1, 1] as Pillow has it, 8-bit RGB."""
    return Image.fromarray(to_uint8(image).cpu().permute(1, 2, 0).contiguous().numpy())


def save_image(image: Tensor, path: str | Path) -> None:
    """Write a (3, H, W) image in [-1, 1] as PNG; the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        to_picture(image).save(temporary, format="PNG")


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Images (B, 3, H, W) side by side as one: (3, rows * H, columns * W); empty places are white."""
    from torchvision.utils import make_grid  # slow to import

    return make_grid(images, columns, padding=0, pad_value=1)


# --- Faces, found and framed as CelebA-HQ's ---------------------------------------------------------------------------

_SHA256 = {  # of the weights: what is in there is unpickled
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
_THRESHOLDS = 0.6, 0.7, 0.8  # a network's probability that it sees a face
_SMALLEST, _LARGEST = 20, 640  # pixels: the side of a face that is looked for; a larger picture is looked at smaller
_OVERLAP = 0.25  # of two boxes' union, in which they are one face: a box within another of twice its side
_SHRINK = 0.709  # from one size that is looked at to the next: half the area
_ROLL = 0.1  # radians: a face that is turned by more is looked at again
_FAR = 0.3  # of the width: a picture whose corners are farther off is not aligned


class _Net(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> where the box is (4), [where the five points are (10),] face or not (2)."""

    def __init__(self, layers: list[nn.Module], heads: list[nn.Module]) -> None:
        super().__init__()
        self.layers, self.heads = nn.Sequential(*layers), nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        for layer in self.layers:
            if isinstance(layer, nn.Linear) and x.ndim == 4:
                x = x.transpose(2, 3).permute(0, 2, 3, 1).flatten(1)  # (B, C, H, W) -> (B, W * H * C)
            x = layer(x)
        return [head(x) for head in self.heads]


def _networks() -> dict[str, _Net]:
    def conv(inside: int, outside: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, size), nn.PReLU(outside)]

    def pool(size: int, ceil: bool = True) -> nn.Module:
        return nn.MaxPool2d(size, 2, ceil_mode=ceil)

    return {
        "pnet": _Net(  # 12x12, and every 12x12 of a larger picture
            [*conv(3, 10, 3), pool(2), *conv(10, 16, 3), *conv(16, 32, 3)],
            [nn.Conv2d(32, 4, 1), nn.Conv2d(32, 2, 1)],
        ),
        "rnet": _Net(  # 24x24
            [*conv(3, 28, 3), pool(3), *conv(28, 48, 3), pool(3, False), *conv(48, 64, 2),
             nn.Linear(576, 128), nn.PReLU(128)],
            [nn.Linear(128, 4), nn.Linear(128, 2)],
        ),
        "onet": _Net(  # 48x48
            [*conv(3, 32, 3), pool(3), *conv(32, 64, 3), pool(3, False), *conv(64, 64, 3), pool(2), *conv(64, 128, 2),
             nn.Linear(1152, 256), nn.PReLU(256)],
            [nn.Linear(256, 4), nn.Linear(256, 10), nn.Linear(256, 2)],
        ),
    }  # fmt: skip


def can_align() -> bool:
    """Whether the weights are installed."""
    return importlib.util.find_spec("mtcnn") is not None


@functools.cache
def load_detector() -> dict[str, _Net]:
    """The three networks with the weights of the package mtcnn.

    Raises:
        InputError: it is not installed, or of another version.
    """
    spec = importlib.util.find_spec("mtcnn")  # looked up, not imported: that would ask for TensorFlow
    if spec is None:
        raise InputError("aligning faces needs the weights of MTCNN: pip install mtcnn")
    import joblib

    networks = _networks()
    for name, network in networks.items():
        file = Path(spec.origin).parent / "assets" / "weights" / f"{name}.lz4"
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != _SHA256[name]:
            raise InputError(f"{file}: not the weights of mtcnn 1.0.0: pip install mtcnn==1.0.0")
        for parameter, array in zip(network.parameters(), map(torch.from_numpy, joblib.load(file)), strict=True):
            # (H, W, in, out) there, (out, in, H, W) here; (in, out) -> (out, in); slopes of PReLU (1, 1, C) -> (C,)
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array.flatten()
            parameter.data = array.contiguous()
        network.eval()
    return networks


def _tensor(picture: Image.Image) -> Tensor:
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() - 127.5) / 128  # (3, H, W)


def _moved(boxes: Tensor, by: Tensor) -> Tensor:
    """Boxes (N, 4) whose corners are moved by parts (N, 4) of their sides."""
    return boxes + by * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def _squares(boxes: Tensor) -> Tensor:
    """The squares around the middles of boxes, as large as their longer sides."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([middle - half, middle + half], 1)


def _proposals(network: _Net, picture: Image.Image) -> Tensor:
    """Squares (N, 4) that may hold a face: the first network looks at every place, in ever smaller copies."""
    from torchvision.ops import nms

    image, found, scores = _tensor(picture)[None], [torch.empty(0, 4)], [torch.empty(0)]
    scale = 12 / _SMALLEST
    while min(picture.size) * scale >= 12:
        size = [round(side * scale) for side in (picture.height, picture.width)]
        moves, faces = network(F.interpolate(image, size, mode="bilinear", antialias=True))
        probability = faces[0].softmax(0)[1]  # (rows, columns): a square of 12 pixels for each, 2 apart
        at = (probability > _THRESHOLDS[0]).nonzero()
        corner, score = at.flip(1) * 2, probability[at[:, 0], at[:, 1]]
        boxes = _moved(torch.cat([corner, corner + 12], 1) / scale, moves[0][:, at[:, 0], at[:, 1]].T)
        kept = nms(boxes, score, 0.5)
        found.append(boxes[kept])
        scores.append(score[kept])
        scale *= _SHRINK
    boxes = torch.cat(found)
    return _squares(boxes[nms(boxes, torch.cat(scores), 0.7)])


@torch.no_grad()
def find_faces(picture: Image.Image) -> list[np.ndarray]:
    """The faces in an RGB picture that are at least half as large as its largest one, each as five points.

    Returns:
        (5, 2) each, x and y in pixels from the upper left corner: the eyes, left one in the picture first, nose,
        corners of the mouth.

    Raises:
        InputError: no weights, see `load_detector`.
    """
    from torchvision.ops import nms

    networks = load_detector()
    scale = min(1, _LARGEST / max(picture.size))
    small = picture.resize([max(12, round(side * scale)) for side in picture.size], Image.Resampling.BILINEAR)
    boxes = _proposals(networks["pnet"], small)
    for name, size, threshold in (("rnet", 24, _THRESHOLDS[1]), ("onet", 48, _THRESHOLDS[2])):
        if not len(boxes):
            return []
        crops = (small.crop(box) for box in boxes.round().int().tolist())  # black outside of the picture
        patches = [_tensor(crop.resize((size, size), Image.Resampling.BILINEAR)) for crop in crops]
        moves, *places, faces = networks[name](torch.stack(patches))
        score = faces.softmax(1)[:, 1]
        sure = score > threshold
        squares, boxes, score = boxes[sure], _moved(boxes, moves)[sure], score[sure]
        if name == "rnet":
            boxes = _squares(boxes[nms(boxes, score, 0.7)])
    parts = places[0][sure].unflatten(1, (2, 5)).transpose(1, 2)  # (N, 5, 2), parts of the square
    points = squares[:, None, :2] + parts * (squares[:, None, 2:] - squares[:, None, :2])
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    kept = nms(boxes, score, _OVERLAP)
    large = kept[side[kept] >= side[kept].amax() / 2] if len(kept) else kept
    return list(points[large].numpy() / scale)


def frame(points: np.ndarray) -> np.ndarray:
    """Corners (4, 2) of the square that CelebA-HQ's rule cuts: upper left, lower left, lower right, upper right.

    Args:
        points: (5, 2), see `find_faces`.
    """
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    across, down = points[1] - points[0], mouth - eyes
    x = across + np.array([down[1], -down[0]])  # to the right of the face: as the eyes say, and as the mouth says
    x *= max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down)) / np.hypot(*x)
    y = np.array([-x[1], x[0]])
    middle = eyes + 0.1 * down
    return np.stack([middle - x - y, middle - x + y, middle + x + y, middle + x - y])


def _turned(points: np.ndarray, angle: float, around: np.ndarray) -> np.ndarray:
    """Points turned by an angle in radians, counter-clockwise as seen (y grows downwards), as `Image.rotate` does."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (points - around) @ turn.T + around


def find_frame(image: Image.Image, name: str | Path) -> np.ndarray:
    """The `frame` (4, 2) of the one face in a picture; a turned face is looked at again, upright.

    Raises:
        InputError: no face in it, or several, or no weights.
    """
    faces = find_faces(image)
    if len(faces) != 1:
        said = f"{len(faces)} faces found; cut out the one that is meant" if faces else "no face found"
        raise InputError(f"{name}: {said}")
    corners = frame(faces[0])
    across = corners[3] - corners[0]
    roll, middle = float(np.arctan2(across[1], across[0])), corners.mean(0)
    if abs(roll) > _ROLL:  # what was learnt of upright faces says little of the corners of a mouth on a turned one
        upright = image.rotate(np.rad2deg(roll), Image.Resampling.BICUBIC, center=tuple(middle))
        closest = min(find_faces(upright), key=lambda face: np.hypot(*(frame(face).mean(0) - middle)), default=None)
        corners = corners if closest is None else _turned(frame(closest), -roll, middle)
    return corners


def align_face(image: Image.Image, name: str | Path = "the picture") -> Image.Image:
    """The square of an RGB picture with one face that CelebA-HQ would show, at the picture's own resolution.

    What lies outside of the picture is its mirror image.

    Raises:
        InputError: no face in it, or several, or no weights; ``name`` says of what.
    """
    corners = find_frame(image, name)
    low, high = np.floor(corners.min(0)).astype(int) - 2, np.ceil(corners.max(0)).astype(int) + 2
    beyond = [max(0, int(n)) for n in (-low[1], high[1] - image.height, -low[0], high[0] - image.width)]
    pixels = np.pad(np.asarray(image), (beyond[:2], beyond[2:], (0, 0)), mode="reflect")
    side = round(float(np.hypot(*(corners[3] - corners[0]))))
    corners = corners + (beyond[2], beyond[0])
    return Image.fromarray(pixels).transform(
        (side, side), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC
    )


def warn_unaligned(image: Image.Image, name: str | Path) -> None:
    """Warn of a picture whose corners are far from CelebA-HQ's `frame`, if the weights are there to tell.

    Of 237 CelebA-HQ crops the farthest is 0.28 of the width off, the median 0.04; drawn faces up to 0.28.
    """
    faces = find_faces(image) if can_align() else []
    w, h = image.size
    own = np.array([[0, 0], [0, h], [w, h], [w, 0]])
    if len(faces) == 1 and (off := np.hypot(*(frame(faces[0]) - own).T).max() / w) > _FAR:
        said = "%s: its face is not where the networks have seen faces (%.0f %% off); try --align"
        log.warning(said, name, 100 * off)
