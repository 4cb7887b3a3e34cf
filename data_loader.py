"""CelebAMask-HQ: images, annotations, splits, a resized cache and seeded loaders.

Layout of a data set::

    CelebAMask-HQ/
    ├── CelebA-HQ-img/                      0.jpg ... 29999.jpg
    └── CelebAMask-HQ-attribute-anno.txt    a count, the 40 names, then "0.jpg  -1 1 ..."

Shapes: B batch, N images, S image size. Images are (3, S, S) float32 in [-1, 1], labels (40,) float32 in {0, 1}.

Data: C.-H. Lee, Z. Liu, L. Wu, P. Luo, "MaskGAN: Towards Diverse and Interactive Facial Image Manipulation", CVPR 2020.
"""

import hashlib
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from utils import InputError, atomic_write, nearest

ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
"""The 40 attribute names, in the order of the annotation file and of every label and logit vector."""

IMAGE_FOLDER = "CelebA-HQ-img"
ANNOTATION_FILE = "CelebAMask-HQ-attribute-anno.txt"
KAGGLE_DATASET = "liusonghua/celebamaskhq"
Image.init()
# by content, whatever the suffix says; Pillow knows others, one of which (EPS) runs another program
_FORMATS = tuple({"JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"} & Image.OPEN.keys())
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS))
SPLITS = ("train", "val", "test", "all")

_RESAMPLING = Image.Resampling.LANCZOS  # Pillow widens its kernel when it shrinks: antialiased
_CACHE_VERSION = 2  # raise it when the way a cached pixel is computed changes
_LAYOUT = f"expected a folder with {IMAGE_FOLDER}/ and {ANNOTATION_FILE}"

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts ``2.jpg`` before ``10.jpg``."""
    parts = re.split(r"(\d+)", name)  # text at even places, digits at odd ones
    return [(0, int(part), part) if i % 2 else (1, 0, part.lower()) for i, part in enumerate(parts) if part]


def find_images(path: str | Path) -> list[Path]:
    """The images at ``path``: one file, or a flat or nested folder, sorted naturally by their path.

    Suffixes are compared without case. Hidden files and folders are skipped; files with other suffixes are left out,
    and a warning names them.

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
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                (found if name.lower().endswith(IMAGE_SUFFIXES) else others).append(Path(folder, name))
    if found and others:
        log.warning("%s: left out what has no picture's suffix: %s", path, _listed(sorted(p.name for p in others)))
    if not found:
        raise InputError(f"{path}: no images found; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(found, key=lambda p: [natural_key(part) for part in p.relative_to(path).parts])


def _listed(names: Sequence[str], most: int = 5) -> str:
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


def _open(path: Path) -> Image.Image:
    """Open a picture; of an animation its first frame, of a decompression bomb (179 million pixels) an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half a bomb is a large photograph; oddities of the file are no concern here
        return Image.open(path, formats=_FORMATS)


def _read_rgb(path: Path) -> Image.Image:
    """The upright 8-bit RGB picture in a file.

    Raises:
        InputError: it cannot be read, or is cut short.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait forever
        raise InputError(f"{path}: not a file")
    try:
        with _open(path) as image:
            image.load()
            png = image.format == "PNG"
            try:
                image = ImageOps.exif_transpose(image)
            except Exception as error:  # damaged EXIF does not make the pixels unusable
                log.warning("%s: EXIF data ignored: %s", path, error)
            return _to_rgb(image, png)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        reason = "not a picture that can be read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(f"{path}: cannot read image: {' '.join(reason.split())[:200]}") from error


def _to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]: the one place where this is decided."""
    return (images / 127.5).sub_(1)


def _to_chw(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


_CROPPED = threading.Lock()


def square(image: Image.Image, size: int, path: str | Path) -> Image.Image:
    """The largest centred square of a picture, resized (antialiased) to size x size.

    Training and use see a picture alike: nothing in the project changes its proportions. The first one that loses
    something is named in a warning.
    """
    if image.width != image.height:
        if _CROPPED.acquire(blocking=False):  # taken once, never given back
            log.warning("%s is %dx%d: of pictures that are not square, the middle is used", path, *image.size)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if image.size == (size, size) else image.resize((size, size), _RESAMPLING)


def load_image(path: str | Path, size: int | None = None) -> Tensor:
    """Read any picture as a (3, H, W) float32 tensor in [-1, 1].

    EXIF rotation is applied, every mode becomes 8-bit RGB, alpha is laid over white, and of an animation the first
    frame is taken.

    Args:
        path: the file.
        size: when given, the picture is made size x size, see `square`.

    Raises:
        InputError: the file is missing, unreadable or cut short.
    """
    image = _read_rgb(Path(path))
    if size is not None:
        image = square(image, size, path)
    return _to_float(torch.from_numpy(_to_chw(image)))


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


# ---------------------------------------------------------------------------------------------------------------------
# Annotations and folders
# ---------------------------------------------------------------------------------------------------------------------


class Annotations(NamedTuple):
    """What the annotation file says, rows as in the file, columns in the order of `ATTRIBUTES`."""

    files: list[str]  # N file names
    attributes: tuple[str, ...]  # the 40 names
    labels: np.ndarray  # (N, 40) int8 in {0, 1}


_VALUES = {"1": 1, "+1": 1, "-1": 0, "0": 0}


def read_annotations(path: str | Path) -> Annotations:
    """Read ``CelebAMask-HQ-attribute-anno.txt``: a count, the 40 names in any order, then one row an image.

    A byte-order mark, CRLF, blank lines and any white space between columns are tolerated; 0 counts as negative.

    Raises:
        InputError: with the file and the line, for anything else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read annotations: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: annotations are not UTF-8 text (byte {error.start})") from None
    lines = [(i, line.split()) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: empty; expected a count, the attribute names, then one row an image")

    at, words = lines[0]
    if len(words) != 1 or not words[0].isdecimal():
        got = " ".join(words[:3]) + (" ..." if len(words) > 3 else "")
        raise InputError(f"{path}, line {at}: expected the number of images, got {got!r}")
    count = int(words[0][:18])  # nobody has more; int() refuses thousands of digits

    if len(lines) < 2:
        raise InputError(f"{path}, line {at + 1}: expected the {len(ATTRIBUTES)} attribute names, the file ends here")
    at, names = lines[1]
    for i, name in enumerate(names):
        if name not in ATTRIBUTES:
            raise InputError(f"{path}, line {at}: unknown attribute {name!r}{nearest(name, ATTRIBUTES)}")
        if name in names[:i]:
            raise InputError(f"{path}, line {at}: attribute {name!r} is named twice")
    if len(names) != len(ATTRIBUTES):
        missing = [name for name in ATTRIBUTES if name not in names]
        raise InputError(
            f"{path}, line {at}: {len(names)} attribute names, expected {len(ATTRIBUTES)}; missing {', '.join(missing)}"
        )

    labels = np.zeros((len(lines) - 2, len(names)), dtype=np.int8)
    rows: dict[str, int] = {}
    for row, (at, words) in enumerate(lines[2:]):
        file, values = words[0], words[1:]
        if len(values) != len(names):
            raise InputError(f"{path}, line {at}: {file} has {len(values)} values, expected {len(names)}")
        if file in rows:
            raise InputError(f"{path}, line {at}: {file} is listed twice, first on line {rows[file]}")
        if Path(file).name != file or "\0" in file or len(file.encode()) > 255:
            raise InputError(f"{path}, line {at}: {file[:80]!r} is not a plain file name")
        rows[file] = at
        try:
            labels[row] = [_VALUES[value] for value in values]
        except KeyError as error:
            name = names[values.index(error.args[0])]
            raise InputError(f"{path}, line {at}: {name} of {file} is {error.args[0]!r}, expected 1 or -1") from None
    if len(rows) != count:
        raise InputError(f"{path}, line {lines[0][0]}: the count says {count} images, the file lists {len(rows)}")
    order = [names.index(name) for name in ATTRIBUTES]
    return Annotations(list(rows), ATTRIBUTES, np.ascontiguousarray(labels[:, order]))


def find_dataset(root: str | Path) -> Path:
    """The folder at or below ``root`` that holds the images and the annotation file (downloads nest it).

    Raises:
        InputError: there is none; the message says what is expected and what is missing.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"data set {root}: no such folder; {_LAYOUT}")
    level, partial = [root], []
    for _ in range(5):  # level by level, so that the outermost match wins
        below = []
        for folder in level:
            annotated, pictured = (folder / ANNOTATION_FILE).is_file(), (folder / IMAGE_FOLDER).is_dir()
            if annotated and pictured:
                return folder
            if annotated or pictured:
                missing = IMAGE_FOLDER + "/" if annotated else ANNOTATION_FILE
                partial.append(f"{missing} is missing in {folder}")
            try:  # not into the image folder: it holds 30,000 files and no data set
                inner = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
            except OSError:
                inner = []
            below += [folder / name for name in inner if name not in (IMAGE_FOLDER, "CelebAMask-HQ-mask-anno")]
        level = below
    raise InputError(f"data set {root}: " + "; ".join([*partial, _LAYOUT]))


def download_dataset() -> Path:
    """Fetch CelebAMask-HQ from Kaggle (or reuse kagglehub's copy) and return its folder.

    Raises:
        InputError: kagglehub, its credentials or the network is missing.
    """
    advice = f"or fetch {KAGGLE_DATASET} by hand and pass its folder with --dataset_path"
    try:
        import kagglehub
    except ImportError:
        raise InputError(f"kagglehub is not installed: pip install kagglehub, {advice}") from None
    try:
        path = kagglehub.dataset_download(KAGGLE_DATASET)
    except Exception as error:  # network, credentials and quota all have types of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"{reason[:300]}; check the network and your Kaggle API credentials, {advice}"
        raise InputError(f"cannot download {KAGGLE_DATASET}: {reason}") from error
    return find_dataset(path)


def split_indices(n: int, split: str) -> range:
    """Positions, in number order, of a split of ``n`` images: first 80 % train, next 10 % val, last 10 % test.

    Of 30,000 images the test split is 27000 ... 29999.
    """
    bounds = {"train": (0, n * 8 // 10), "val": (n * 8 // 10, n * 9 // 10), "test": (n * 9 // 10, n), "all": (0, n)}
    if split not in bounds:
        raise InputError(f"split {split!r}: unknown{nearest(split, SPLITS)}; expected one of {', '.join(SPLITS)}")
    return range(*bounds[split])


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


def _resized(path: Path, size: int) -> np.ndarray | InputError:
    """(3, S, S) uint8, or the error: one bad file must not end a pass over 30,000."""
    try:
        return _to_chw(square(_read_rgb(path), size, path))
    except InputError as error:
        return error


def _check(path: Path) -> InputError | None:
    """The error that reading ``path`` would give. JPEG is decoded at 1/8 scale, which still reads every byte."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        with _open(path) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:
        try:
            _read_rgb(path)  # for its message
        except InputError as error:
            return error
    return None


class CelebAMaskHQ(Dataset):
    """Labelled faces: item i is ``(image (3, S, S) float32 in [-1, 1], labels (40,) float32 in {0, 1})``.

    Images are sorted by number and split before anything is left out, so a missing file never moves another image
    to another split. Resized pixels are kept as one memory-mapped uint8 file a split and size in ``.cache/`` of the
    data set; it is rebuilt when names, sizes or dates of the images change.

    Args:
        root: a folder that holds the data set, at any depth.
        split: "train", "val", "test" or "all".
        img_size: S; see `square`.
        strict: refuse missing and unreadable images instead of leaving them out with a warning.
        cache: keep the resized pixels; otherwise every access reads the picture.

    Raises:
        InputError: no data set, bad annotations, an empty split, or (strict) an image that cannot be read.
    """

    def __init__(
        self, root: str | Path, split: str = "train", img_size: int = 256, strict: bool = False, cache: bool = True
    ) -> None:
        if img_size < 1:
            raise InputError(f"img_size must be at least 1, got {img_size}")
        self.root = find_dataset(root)
        self.split, self.img_size = split, img_size
        annotations = read_annotations(self.root / ANNOTATION_FILE)
        order = sorted(range(len(annotations.files)), key=lambda i: natural_key(annotations.files[i]))
        rows = [order[i] for i in split_indices(len(order), split)]
        if not rows:
            raise InputError(f"{self.root}: the {split} split of {len(order)} images is empty; 10 images are enough")

        folder = self.root / IMAGE_FOLDER
        absent = {r for r in rows if not (folder / annotations.files[r]).is_file()}
        errors = [InputError(f"{folder / annotations.files[r]}: no such file") for r in rows if r in absent]
        self._report(errors, "missing", strict)
        rows = [r for r in rows if r not in absent]

        self._cache_file: Path | None = None
        self._pixels: np.ndarray | None = None  # opened once a process: a pickled memory map would be a full copy
        paths = [folder / annotations.files[r] for r in rows]
        bad = self._open_cache(paths) if cache and paths else None
        if bad is None:
            with ThreadPoolExecutor(_threads()) as pool:
                bad = {i: error for i, error in enumerate(pool.map(_check, paths)) if error is not None}
        self._report(list(bad.values()), "unreadable", strict)
        keep = [i for i in range(len(rows)) if i not in bad]
        if not keep:
            raise InputError(f"{folder}: no image of the {split} split can be read")
        self._slots = np.array(keep)  # item -> row of the cache
        self.paths = [paths[i] for i in keep]
        self.files = [path.name for path in self.paths]
        self.labels = torch.from_numpy(annotations.labels[[rows[i] for i in keep]]).float()  # (N, 40) in {0, 1}

    def _report(self, errors: Sequence[InputError], what: str, strict: bool) -> None:
        if not errors:
            return
        if strict:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise InputError(f"{errors[0]}{more}")
        for error in errors[:20]:
            log.warning("left out: %s", error)
        log.warning("%s split: %d %s images left out", self.split, len(errors), what)

    def _open_cache(self, paths: list[Path]) -> dict[int, InputError] | None:
        """Map the cache of ``paths``, building it first where needed; its unreadable rows, or None without a cache."""
        stats = [path.stat() for path in paths]
        source = [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
        key = hashlib.sha256(json.dumps([_CACHE_VERSION, self.img_size, int(_RESAMPLING), source]).encode()).hexdigest()
        folder, stem = self.root / ".cache", f"{self.split}_{self.img_size}"
        if folder.is_symlink():
            log.warning("no cache of resized images: %s is a link, and nothing is written outside the data set", folder)
            return None
        file = folder / f"{stem}_{key[:16]}.npy"
        notes = file.with_suffix(".json")
        try:
            bad = self._read_notes(file, notes, len(paths))
            if bad is None:
                self._build_cache(paths, file, notes)
                for old in folder.glob(f"{stem}_*"):  # made from an earlier state of the same images
                    ours = re.fullmatch(rf"{stem}_[0-9a-f]{{16}}\.(npy|json)", old.name)
                    if ours and old.stem != file.stem and not old.is_dir():
                        old.unlink(missing_ok=True)
                bad = self._read_notes(file, notes, len(paths))
        except (InputError, OSError) as error:
            log.warning("no cache of resized images, every epoch reads the originals: %s", error)
            return None
        if bad is None:
            log.warning("no cache of resized images: %s was changed by another process", file)
            return None
        self._cache_file = file
        return {i: InputError(message) for i, message in bad.items()}

    def _read_notes(self, file: Path, notes: Path, n: int) -> dict[int, str] | None:
        """Unreadable rows of a complete cache, or None where there is none."""
        try:
            bad = {int(i): str(message) for i, message in json.loads(notes.read_text(encoding="utf-8")).items()}
            pixels = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, AttributeError, EOFError):
            return None
        if pixels.shape != (n, 3, self.img_size, self.img_size) or pixels.dtype != np.uint8:
            return None
        return bad

    def _build_cache(self, paths: list[Path], file: Path, notes: Path) -> None:
        size, bad, chunk = self.img_size, {}, 256
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, size, size)}
        label = f"resizing {self.split} images to {size}x{size}"
        with (
            atomic_write(file) as temporary,
            open(temporary, "wb") as out,  # plain writes: a full disk is an error here, and a crash through a map
            ThreadPoolExecutor(_threads()) as pool,
            tqdm(total=len(paths), desc=label, unit="image", disable=None) as progress,
        ):
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(paths), chunk):
                part = paths[start : start + chunk]
                for i, pixels in enumerate(pool.map(_resized, part, [size] * len(part)), start=start):
                    if isinstance(pixels, InputError):
                        bad[i] = str(pixels)
                        pixels = np.zeros((3, size, size), dtype=np.uint8)
                    out.write(pixels.tobytes())
                progress.update(len(part))
            out.close()
            with atomic_write(notes) as temporary_notes:  # first: the array in place means that both are
                temporary_notes.write_text(json.dumps(bad), encoding="utf-8")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}

    def __len__(self) -> int:
        return len(self.paths)

    def batch_uint8(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8 and labels (B, 40) of ``indices``."""
        return self._pixels_of(indices), self.labels[list(indices)]

    def _pixels_of(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, S, S) uint8, read at once from the cache where there is one."""
        if self._cache_file is not None:
            try:
                if self._pixels is None:
                    self._pixels = np.load(self._cache_file, mmap_mode="r", allow_pickle=False)
                return torch.from_numpy(self._pixels[self._slots[list(indices)]])
            except (OSError, ValueError) as error:  # deleted, or replaced after the images changed, before it was open
                log.warning("no cache of resized images any more, the originals are read: %s", error)
                self._cache_file = None
        images = [_resized(self.paths[i], self.img_size) for i in indices]
        for image in images:
            if isinstance(image, InputError):
                raise image
        return torch.from_numpy(np.stack(images))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in [-1, 1] and labels (B, 40) in {0, 1} of ``indices``."""
        images, labels = self.batch_uint8(indices)
        return _to_float(images), labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        images, labels = self.batch([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What `torch.utils.data.DataLoader` asks for when it can fetch a whole batch at once."""
        images, labels = self.batch(indices)
        return list(zip(images, labels, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------


class EpochBatches(Sampler[list[tuple[int, bool]]]):
    """Batches of (index, mirrored), drawn in the main process from a generator seeded by (seed, epoch).

    So order and flips are the same for any number of workers, and epoch k is the same after a resume: set
    ``epoch`` (it counts on by itself at every pass) before iterating. ``share`` is (rank, size) of one of several
    processes: each gets its part of every batch.
    """

    def __init__(
        self, n: int, batch_size: int, shuffle: bool, flip: bool, drop_last: bool, seed: int, share=(0, 1)
    ) -> None:
        self.n, self.batch_size, self.shuffle, self.flip, self.drop_last = n, batch_size, shuffle, flip, drop_last
        self.seed, self.epoch, self.share = seed, 0, share

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    @property
    def all_keys(self) -> list[tuple[int, bool]]:
        """Every key that a pass may hand out: each stands for one picture."""
        return [(index, mirrored) for mirrored in (False, True)[: 1 + self.flip] for index in range(self.n)]

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        # A generator function: a pass counts from its first batch on. (A loader with persistent workers asks for its
        # first iterator twice and drops one.)
        epoch, self.epoch = self.epoch, self.epoch + 1
        mixed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()  # seed + epoch would repeat across seeds
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little", signed=True))
        order = torch.randperm(self.n, generator=generator) if self.shuffle else torch.arange(self.n)
        flips = torch.rand(self.n, generator=generator) < 0.5 if self.flip else torch.zeros(self.n, dtype=torch.bool)
        keys = list(zip(order.tolist(), flips.tolist(), strict=True))
        rank, size = self.share
        for i in range(len(self)):
            yield keys[i * self.batch_size : (i + 1) * self.batch_size][rank::size]


RawBatch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, S, S) uint8, labels (B, 40), which to mirror (B,) bool


class _Batched(Dataset):
    """Hands a whole batch of keys from `EpochBatches` to a data set."""

    def __init__(self, source: CelebAMaskHQ) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, bool]]) -> RawBatch:
        indices, flips = zip(*keys, strict=True)
        return *self.source.batch_uint8(indices), torch.tensor(flips)


def _as_is(batch: RawBatch) -> RawBatch:
    return batch


class FaceLoader(DataLoader):
    """A loader whose bytes go to ``device`` and become images there: mirrored where marked, and in [-1, 1]."""

    device = torch.device("cpu")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            some = batch[2].any()  # asked here: on the device it would have to be waited for
            images, labels, mirrored = (part.to(self.device, non_blocking=True) for part in batch)
            if some:
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            yield _to_float(images), labels  # (B, 3, S, S) in [-1, 1], (B, 40) in {0, 1}


def make_loader(
    source: CelebAMaskHQ,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    flip: bool = False,
    drop_last: bool = False,
    device: torch.device = FaceLoader.device,
    share: tuple[int, int] = (0, 1),
) -> FaceLoader:
    """A loader of (images (B, 3, S, S) float32 in [-1, 1], labels (B, 40) float32 in {0, 1}), both on ``device``.

    Its ``batch_sampler`` is an `EpochBatches`: set ``loader.batch_sampler.epoch`` to resume at an epoch.
    """
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
    loader = FaceLoader(
        _Batched(source),
        batch_sampler=EpochBatches(len(source), batch_size, shuffle, flip, drop_last, seed, share),
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),  # or the loader draws worker seeds from the global one
    )
    loader.device = device
    return loader


class Loaders(NamedTuple):
    """One loader a split."""

    train: FaceLoader
    val: FaceLoader
    test: FaceLoader


def make_loaders(
    root: str | Path,
    img_size: int,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    *,
    flip: bool = True,
    strict: bool = False,
    cache: bool = True,
    device: torch.device = FaceLoader.device,
    share: tuple[int, int] = (0, 1),
) -> Loaders:
    """Loaders of the three splits: training shuffled and mirrored at random (seeded), the others in number order.

    The last, smaller training batch is dropped unless it is the only one; evaluation sees every image. ``share`` is
    (rank, size) of one of several processes that train together: it gets its part of every training batch.

    Raises:
        InputError: as `CelebAMaskHQ`, or a batch size or worker count that makes no sense.
    """
    parts = {split: CelebAMaskHQ(root, split, img_size, strict, cache) for split in ("train", "val", "test")}
    common = {"batch_size": batch_size, "workers": workers, "seed": seed, "device": device}
    drop = len(parts["train"]) > batch_size
    together = min(batch_size, len(parts["train"]))
    if together % share[1]:
        raise InputError(f"a batch of {together} images cannot be shared evenly by {share[1]} processes")
    train = make_loader(parts["train"], shuffle=True, flip=flip, drop_last=drop, share=share, **common)
    return Loaders(train, make_loader(parts["val"], **common), make_loader(parts["test"], **common))


def attribute_indices(names: Iterable[str]) -> list[int]:
    """Positions of attribute names in `ATTRIBUTES`.

    Raises:
        InputError: an unknown name, with its nearest match.
    """
    indices = []
    for name in names:
        if name not in ATTRIBUTES:
            raise InputError(f"unknown attribute {name!r}{nearest(name, ATTRIBUTES)}")
        indices.append(ATTRIBUTES.index(name))
    return indices
