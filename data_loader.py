"""Labelled faces: CelebAMask-HQ with its masks, CelebA, a cache of what was resized, and seeded loaders.

Layouts that are known, at any depth below the folder that is given::

    CelebA-HQ-img/0.jpg ... 29999.jpg             CelebAMask-HQ: split by number, 80, 10 and 10 %
    CelebAMask-HQ-attribute-anno.txt              a count, the 40 names, then "0.jpg  -1 1 ..."
    CelebAMask-HQ-mask-anno/{0..14}/00000_hair.png    for masks; or masks/0.png, see below

    img_align_celeba/000001.jpg ... 202599.jpg    CelebA: split as published
    list_attr_celeba.txt, list_eval_partition.txt     or Kaggle's .csv of both, with images one folder deeper

    images/0.jpg ...                              any images with masks: split by number
    masks/0.png ...                               palette index = class (see `MASK_CLASSES`), any size
    labels.csv                                    if there is one: attributes, empty where unknown

Shapes: B batch, N images, S image size, M mask size. Images are (3, S, S) float32 in [-1, 1], labels (40,) float32 in
{0, 1}, masks (M, M) int64 in 0 ... 18.

Data: C.-H. Lee, Z. Liu, L. Wu, P. Luo, "MaskGAN: Towards Diverse and Interactive Facial Image Manipulation", CVPR 2020;
Z. Liu, P. Luo, X. Wang, X. Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015.
"""

import functools
import hashlib
import json
import logging
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from tqdm import tqdm

from images import (
    IMAGE_SUFFIXES,
    RESAMPLING,
    Size,
    fit,
    listed,
    natural_key,
    read_picture,
    read_rgb,
    sides,
    to_float,
    to_pixels,
)
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
SPLITS = ("train", "val", "test", "all")
MASK_CLASSES = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
    "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
"""The 19 classes of a mask, by their number. CelebAMask-HQ has a picture of each; later ones cover earlier ones."""
PART_FOLDER, MASK_FOLDER = "CelebAMask-HQ-mask-anno", "masks"

_CACHE_VERSION = 2  # raise it when the way a cached pixel is computed changes
_LAYOUT = (
    f"expected a folder with {IMAGE_FOLDER}/ and {ANNOTATION_FILE}, or with img_align_celeba/, list_attr_celeba and "
    "list_eval_partition (.txt or .csv), or with images/ and masks/"
)
_NO_DATA_SETS = {IMAGE_FOLDER, PART_FOLDER, MASK_FOLDER, "img_align_celeba", "images"}

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations and layouts
# ---------------------------------------------------------------------------------------------------------------------


class Annotations(NamedTuple):
    """What an annotation file says, rows as in the file, columns in the order of `ATTRIBUTES`."""

    files: list[str]  # N file names
    attributes: tuple[str, ...]  # the 40 names
    labels: np.ndarray  # (N, 40) int8: 1 present, 0 absent, -1 unknown


_VALUES = {"1": 1, "+1": 1, "-1": 0, "0": 0}
_UNKNOWN = -1


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and words of a table: separated by commas in a .csv, by any white space elsewhere."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read annotations: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: annotations are not UTF-8 text (byte {error.start})") from None
    comma = path.suffix.lower() == ".csv"
    rows = [
        (i, [word.strip() for word in line.split(",")] if comma else line.split())
        for i, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise InputError(f"{path}: empty; expected the attribute names, then one row for each image")
    return rows


def read_annotations(path: str | Path) -> Annotations:
    """Read ``CelebAMask-HQ-attribute-anno.txt``, ``list_attr_celeba.txt`` or a CSV of the same.

    The text files hold a count, the 40 names in any order, then one row for each image. A CSV holds a header and the
    rows: the file (or its number) first, then the 40 attributes among other columns; an empty value is unknown there.
    A byte-order mark, CRLF, blank lines and any white space between columns are tolerated; 0 counts as absent.

    Raises:
        InputError: with the file and the line, for anything else.
    """
    path = Path(path)
    lines = _read_rows(path)
    comma = path.suffix.lower() == ".csv"
    count = None
    if not comma:
        at, words = lines.pop(0)
        if len(words) != 1 or not words[0].isdecimal():
            got = " ".join(words[:3]) + (" ..." if len(words) > 3 else "")
            raise InputError(f"{path}, line {at}: expected the number of images, got {got!r}")
        count = (at, int(words[0][:18]))  # nobody has more; int() refuses thousands of digits
        if not lines:
            raise InputError(f"{path}, line {at + 1}: expected the 40 attribute names, the file ends here")
    at, names = lines.pop(0)
    names = names[1:] if comma else names
    for i, name in enumerate(names):
        if name not in ATTRIBUTES and not comma:
            raise InputError(f"{path}, line {at}: unknown attribute {name!r}{nearest(name, ATTRIBUTES)}")
        if name in names[:i]:
            raise InputError(f"{path}, line {at}: attribute {name!r} is named twice")
    if missing := [name for name in ATTRIBUTES if name not in names]:
        expected = f"{len(ATTRIBUTES) - len(missing)} attribute names, expected {len(ATTRIBUTES)}"
        raise InputError(f"{path}, line {at}: {expected}; missing {', '.join(missing)}")

    pick = operator.itemgetter(*(names.index(name) for name in ATTRIBUTES))
    values_of = {**_VALUES, "": _UNKNOWN} if comma else _VALUES
    labels = np.zeros((len(lines), len(ATTRIBUTES)), dtype=np.int8)
    rows: dict[str, int] = {}
    for row, (at, words) in enumerate(lines):
        file, values = words[0], words[1:]
        if len(values) != len(names):
            raise InputError(f"{path}, line {at}: {file} has {len(values)} values, expected {len(names)}")
        if file in rows:
            raise InputError(f"{path}, line {at}: {file} is listed twice, first on line {rows[file]}")
        if "/" in file or "\\" in file or file in (".", "..") or "\0" in file or len(file.encode()) > 255:
            raise InputError(f"{path}, line {at}: {file[:80]!r} is not a plain file name")
        rows[file] = at
        try:
            labels[row] = [values_of[value] for value in pick(values)]
        except KeyError as error:
            name = ATTRIBUTES[pick(values).index(error.args[0])]
            raise InputError(f"{path}, line {at}: {name} of {file} is {error.args[0]!r}, expected 1 or -1") from None
    if count is not None and len(rows) != count[1]:
        raise InputError(f"{path}, line {count[0]}: the count says {count[1]} images, the file lists {len(rows)}")
    return Annotations(list(rows), ATTRIBUTES, labels)


def read_partition(path: str | Path) -> dict[str, int]:
    """CelebA's ``list_eval_partition.txt``, or a CSV of it: the split of each file, 0 train, 1 validation, 2 test.

    Raises:
        InputError: with the file and the line, for anything else.
    """
    path = Path(path)
    rows = _read_rows(path)
    if path.suffix.lower() == ".csv":
        rows.pop(0)  # the header
    splits: dict[str, int] = {}
    for at, words in rows:
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise InputError(f"{path}, line {at}: expected a file name and 0, 1 or 2, got {' '.join(words)[:80]!r}")
        splits[words[0]] = int(words[1])
    return splits


class Layout(NamedTuple):
    """What a data set consists of, and under which names: of each, the first that is there."""

    images: tuple[str, ...]
    labels: tuple[str, ...]
    partition: tuple[str, ...] = ()  # none: split by number
    masks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("images", "labels")


LAYOUTS = (
    Layout((IMAGE_FOLDER,), (ANNOTATION_FILE,), masks=(PART_FOLDER, MASK_FOLDER)),
    Layout(
        ("img_align_celeba/img_align_celeba", "Img/img_align_celeba", "img_align_celeba"),
        ("list_attr_celeba.txt", "list_attr_celeba.csv", "Anno/list_attr_celeba.txt"),
        ("list_eval_partition.txt", "list_eval_partition.csv", "Eval/list_eval_partition.txt"),
        needs=("images", "labels", "partition"),
    ),
    Layout(("images",), ("labels.csv",), masks=(MASK_FOLDER,), needs=("images", "masks")),
)


def _parts(layout: Layout, folder: Path) -> dict[str, Path]:
    """What of a layout is in a folder."""
    names = {part: getattr(layout, part) for part in ("images", "labels", "partition", "masks")}
    found = {part: [folder / name for name in several if (folder / name).exists()] for part, several in names.items()}
    return {part: paths[0] for part, paths in found.items() if paths}


def _find(root: Path) -> tuple[Path, dict[str, Path]]:
    """The outermost folder at or below ``root`` that is a data set (downloads nest it), and its parts."""
    if not root.is_dir():
        what = "not a folder; unpack it and give the folder" if root.exists() else f"no such folder; {_LAYOUT}"
        raise InputError(f"data set {root}: {what}")
    level, partial = [root], []
    for _ in range(5):  # level by level, so that the outermost match wins
        below = []
        for folder in level:
            for layout in LAYOUTS:
                parts = _parts(layout, folder)
                missing = [getattr(layout, part)[0] for part in layout.needs if part not in parts]
                if not missing:
                    return folder, parts
                if len(missing) < len(layout.needs):
                    partial += [f"{name} is missing in {folder}" for name in missing]
            try:  # not into a folder of images: it holds 30,000 files and no data set
                inner = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
            except OSError:
                inner = []
            below += [folder / name for name in inner if name not in _NO_DATA_SETS]
        level = below
    archives = sorted(p.name for p in root.iterdir() if p.suffix in (".zip", ".tar", ".gz", ".tgz", ".7z"))
    unpack = [f"unpack {listed(archives)} first"] if archives else []
    raise InputError(f"data set {root}: " + "; ".join([*partial[:3], *unpack, _LAYOUT]))


def find_dataset(root: str | Path) -> Path:
    """The folder at or below ``root`` that holds a data set in one of `LAYOUTS` (downloads nest it).

    Raises:
        InputError: there is none; the message says what is expected and what is missing.
    """
    return _find(Path(root))[0]


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


def _state(path: Path) -> tuple:
    """What tells that a file or folder has changed; that it is missing is a state too."""
    try:
        found = path.stat()
        return path.name, found.st_size, found.st_mtime_ns
    except OSError:
        return (path.name,)


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


class Records(NamedTuple):
    """Everything that a data set lists, in the order of its numbers."""

    files: list[Path]
    labels: np.ndarray  # (N, 40) int8: 1 present, 0 absent, -1 unknown
    splits: np.ndarray  # (N,): position in `SPLITS`


def read_records(parts: dict[str, Path]) -> Records:
    """Files, labels and splits of a data set: CelebA's as published, others by number, 80, 10 and 10 %.

    Raises:
        InputError: tables that cannot be read, or that do not fit each other.
    """
    return _records(tuple(parts.items()), tuple(map(_state, parts.values())))


@functools.lru_cache(maxsize=1)  # three splits ask for it, one after the other
def _records(items: tuple[tuple[str, Path], ...], state: object) -> Records:
    parts = dict(items)
    folder = parts["images"]
    there = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES) and e.name[0] != ".")
    if "labels" in parts:
        names, _, labels = read_annotations(parts["labels"])
    else:
        names, labels = there, np.full((len(there), len(ATTRIBUTES)), _UNKNOWN, dtype=np.int8)
    # a CSV may list numbers, a folder hold PNG where the table says JPEG
    known = set(there)
    by_stem = {_stem(name): name for name in known - set(names)}
    files = [name if name in known else by_stem.get(_stem(name), name) for name in names]
    order = sorted(range(len(files)), key=lambda i: natural_key(files[i]))
    if "partition" in parts:
        published = read_partition(parts["partition"])
        if lacking := [name for name in names if name not in published]:
            said = f"no split for {listed(lacking)}, which {parts['labels'].name} lists"
            raise InputError(f"{parts['partition']}: {said}")
        splits = np.array([published[names[i]] for i in order], dtype=np.int8)
    else:
        bounds = [split_indices(len(order), split) for split in SPLITS[:3]]
        splits = np.repeat(np.arange(3, dtype=np.int8), [len(part) for part in bounds])
    if extra := sorted(known - set(files), key=natural_key):
        log.warning("%s: left out %d pictures without labels: %s", folder, len(extra), listed(extra))
    return Records([folder / files[i] for i in order], labels[order], splits)


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


_MIRRORED = torch.tensor([0, 1, 2, 3, 5, 4, 7, 6, 9, 8, *range(10, 19)])  # class -> class on the other side


def mirror_masks(masks: Tensor) -> Tensor:
    """The masks (..., M, M) of the mirrored faces: left eyes, brows and ears become right ones."""
    return _MIRRORED.to(masks.device, masks.dtype)[masks.flip(-1).long()]


def mask_files(folder: Path, images: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The files that make the mask of each image: one palette picture, or its parts in the order of `MASK_CLASSES`."""
    if folder.name != PART_FOLDER:
        return [(folder / f"{image.stem}.png",) for image in images]
    there = {k: {e.name for e in os.scandir(folder / k)} for k in os.listdir(folder) if (folder / k).is_dir()}
    sources = []
    for image in images:
        k = str(int(image.stem) // 2000) if image.stem.isdecimal() else "0"
        names = [f"{image.stem:0>5}_{part}.png" for part in MASK_CLASSES[1:]]
        found = tuple(folder / k / name for name in names if name in there.get(k, ()))
        sources.append(found or (folder / k / names[0],))  # of a face without any part: the one that is missing
    return sources


def read_mask(files: Sequence[Path], size: Size) -> np.ndarray:
    """The mask of this size, uint8, of an image, from the image's file and its `mask_files`.

    It is cut like the image, and resized by nearest neighbours.

    Raises:
        InputError: a file that is missing or unreadable, other classes, or other proportions than the image's.
    """
    image, *files = files
    pictures = [read_picture(file) for file in files]
    if files[0].parent.parent.name == PART_FOLDER:
        mask = np.zeros(pictures[0].size[::-1], dtype=np.uint8)
        for file, picture in zip(files, pictures, strict=True):
            if picture.size != pictures[0].size:
                raise InputError(f"{file}: of another size than {files[0].name}")
            mask[np.asarray(picture.convert("L")) > 0] = MASK_CLASSES.index(file.stem.partition("_")[2])
    elif pictures[0].mode not in ("P", "L") or pictures[0].getextrema()[1] >= len(MASK_CLASSES):
        raise InputError(f"{files[0]}: not a mask; expected a palette picture of classes 0 to {len(MASK_CLASSES) - 1}")
    else:
        mask = np.asarray(pictures[0])
    width, height = read_picture(image, lambda opened: opened.size)
    if width * mask.shape[0] != height * mask.shape[1]:
        raise InputError(f"{files[0]}: a mask of {mask.shape[1]}x{mask.shape[0]} for an image of {width}x{height}")
    return np.asarray(fit(Image.fromarray(mask), size, files[0], Image.Resampling.NEAREST))


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


class _Store:
    """N arrays (*shape) uint8, each read from some files; kept as one memory-mapped file where that can be written.

    Args:
        folder: for the file, with a name that says what was read; None to read anew at every access. What was kept of
            an earlier state of the files, by their names, sizes and dates, is made again.
        read: makes an array of (files, its height and width), or raises an `InputError`: one bad file must not end a
            pass over 30,000.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        sources: Sequence[Sequence[Path]],
        shape: tuple[int, ...],
        read: Callable[[Sequence[Path], tuple[int, int]], np.ndarray],
    ) -> None:
        self.name, self.sources, self.shape, self.read = name, sources, shape, read
        self.file: Path | None = None
        self._map: np.ndarray | None = None  # opened once in a process: a pickled memory map would be a full copy
        bad = None
        if folder is not None:
            key = [_CACHE_VERSION, name, int(RESAMPLING), [list(map(_state, files)) for files in sources]]
            bad = self._keep(folder, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16])
        if bad is None:
            bad = {i: row for i, row in enumerate(self._read(sources)) if isinstance(row, str)}
        self.bad: dict[int, str] = bad
        """Why a row could not be read."""

    def _read(self, sources: Sequence[Sequence[Path]]) -> Iterator[np.ndarray | str]:
        """The array of each source, or why there is none."""

        def read(files: Sequence[Path]) -> np.ndarray | str:
            try:
                return self.read(files, self.shape[-2:])
            except InputError as error:
                return str(error)

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(min(16, cores)) as pool:
            yield from pool.map(read, sources)

    def _keep(self, folder: Path, key: str) -> dict[int, str] | None:
        """Map the file of this key, making it first if need be; its unreadable rows, or None without a file."""
        if folder.is_symlink():
            log.warning("no cache of resized images: %s is a link, and nothing is written outside the data set", folder)
            return None
        file = folder / f"{self.name}_{key}.npy"
        try:
            bad = self._notes(file)
            if bad is None:
                self._write(file)
                for old in folder.glob(f"{self.name}_*"):  # made from an earlier state of the same files
                    ours = re.fullmatch(rf"{self.name}_[0-9a-f]{{16}}\.(npy|json)", old.name)
                    if ours and old.stem != file.stem and not old.is_dir():
                        old.unlink(missing_ok=True)
                bad = self._notes(file)
        except (InputError, OSError) as error:
            log.warning("no cache of resized images, every epoch reads the originals: %s", error)
            return None
        if bad is None:
            log.warning("no cache of resized images: %s was changed by another process", file)
            return None
        self.file = file
        return bad

    def _notes(self, file: Path) -> dict[int, str] | None:
        """Unreadable rows of a complete file, or None without one."""
        try:
            notes = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            kept = np.load(file, mmap_mode="r", allow_pickle=False)
            bad = {int(i): str(message) for i, message in notes.items()}
        except (OSError, ValueError, AttributeError, EOFError):
            return None
        return bad if kept.shape == (len(self.sources), *self.shape) and kept.dtype == np.uint8 else None

    def _write(self, file: Path) -> None:
        bad, nothing = {}, np.zeros(self.shape, dtype=np.uint8)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.sources), *self.shape)}
        with (
            atomic_write(file) as temporary,
            open(temporary, "wb") as out,  # plain writes: a full disk is an error here, and a crash through a map
            tqdm(total=len(self.sources), desc=f"caching {self.name}", unit="image", disable=None) as progress,
        ):
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(self.sources), 256):  # not all at once: arrays would wait in memory
                for i, row in enumerate(self._read(self.sources[start : start + 256]), start):
                    if isinstance(row, str):
                        bad[i], row = row, nothing
                    out.write(row.tobytes())
                    progress.update()
            out.close()
            with atomic_write(file.with_suffix(".json")) as notes:  # first: the array in place means that both are
                notes.write_text(json.dumps(bad), encoding="utf-8")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(B, *shape) uint8."""
        if self.file is not None:
            try:
                if self._map is None:
                    self._map = np.load(self.file, mmap_mode="r", allow_pickle=False)
                return torch.from_numpy(self._map[rows])
            except (OSError, ValueError) as error:  # deleted, or replaced after the images changed, before it was open
                log.warning("no cache of resized images any more, the originals are read: %s", error)
                self.file = None
        return torch.from_numpy(np.stack([self.read(self.sources[row], self.shape[-2:]) for row in rows]))


def _said(size: Size) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _read_pixels(files: Sequence[Path], size: Size) -> np.ndarray:
    """(3, H, W) uint8 of the one file."""
    return to_pixels(read_rgb(files[0]), size, files[0])


class CelebAMaskHQ(Dataset):
    """Labelled faces: item i is ``(image (3, S, S) float32 in [-1, 1], labels (40,) float32 in {0, 1})``.

    With ``mask_size`` M it is ``(image, mask (M, M) int64)``.

    Images are sorted by number and split before anything is left out, so a missing file never moves another image to
    another split. What cannot be used is left out, and one warning says how much and why. Resized pixels are kept as
    one memory-mapped uint8 file for each split and size in ``.cache/`` of the data set, see `_Store`.

    Args:
        root: a folder that holds a data set, at any depth; the module says in which layouts.
        split: "train", "val", "test" or "all".
        img_size: S, or (height, width); see `images.fit`.
        strict: refuse missing and unreadable images instead of leaving them out with a warning.
        cache: keep the resized pixels; otherwise every access reads the picture.
        mask_size: M, or (height, width), for masks in place of labels.

    Raises:
        InputError: no data set, tables that do not fit, no masks, an empty split, or (strict) an image that cannot be
            read.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        img_size: Size = 256,
        strict: bool = False,
        cache: bool = True,
        mask_size: Size | None = None,
    ) -> None:
        if min(sides(img_size) + sides(1 if mask_size is None else mask_size)) < 1:
            raise InputError(f"img_size and mask_size must be at least 1, got {img_size} and {mask_size}")
        self.root, parts = _find(Path(root))
        self.split, self.img_size, self.mask_size = split, img_size, mask_size
        records = read_records(parts)
        total, wanted = len(records.files), split_indices(len(records.files), split)  # refuses unknown names
        rows = np.flatnonzero(records.splits == SPLITS.index(split)) if split != "all" else np.array(wanted, dtype=int)
        if not len(rows):
            raise InputError(f"{self.root}: the {split} split of {total} images is empty; 10 images are enough")
        files, labels = [records.files[row] for row in rows], records.labels[rows]
        folder = self.root / ".cache" if cache else None

        if strict and (missing := [f"{file}: no such file" for file in files if not file.is_file()]):
            raise InputError(listed(missing, 1))  # before an hour of resizing
        shape, name = (3, *sides(img_size)), f"{split}_{_said(img_size)}"
        self._images = _Store(folder, name, [(file,) for file in files], shape, _read_pixels)
        bad = dict(self._images.bad)
        if mask_size is None:
            self._masks = None
            unknown = [i for i in range(len(files)) if i not in bad and _UNKNOWN in labels[i]]
            bad |= {i: f"{files[i].name}: attributes unknown" for i in unknown}
        else:
            if "masks" not in parts:
                raise InputError(f"{self.root}: no masks; expected {PART_FOLDER}/ or {MASK_FOLDER}/")
            sources = [(file, *masks) for file, masks in zip(files, mask_files(parts["masks"], files), strict=True)]
            self._masks = _Store(folder, f"{split}_masks_{_said(mask_size)}", sources, sides(mask_size), read_mask)
            bad = self._masks.bad | bad
        if bad:
            why = listed([bad[i] for i in sorted(bad)], 1 if strict else 5)
            if strict:
                raise InputError(why)
            log.warning("%s split: left out %d of %d images: %s", split, len(bad), len(files), why)
        keep = [i for i in range(len(files)) if i not in bad]
        if not keep:
            why = next(iter(bad.values()))
            raise InputError(f"{parts['images']}: no image of the {split} split can be used: {why}")
        self._rows = np.array(keep)  # item -> row of the stores
        self.paths = [files[i] for i in keep]
        self.files = [path.name for path in self.paths]
        self.labels = torch.from_numpy(labels[keep]).float()  # (N, 40) in {0, 1}; with masks -1 where unknown

    def __len__(self) -> int:
        return len(self.paths)

    def batch_uint8(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8 of ``indices``, and their labels (B, 40), or masks (B, M, M) uint8."""
        rows = self._rows[list(indices)]
        return self._images(rows), self.labels[list(indices)] if self._masks is None else self._masks(rows)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in [-1, 1] of ``indices``, and their labels (B, 40) in {0, 1}, or masks (B, M, M)."""
        images, targets = self.batch_uint8(indices)
        return to_float(images), targets if self._masks is None else targets.long()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        images, targets = self.batch([index])
        return images[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What `torch.utils.data.DataLoader` asks for when it can fetch a whole batch at once."""
        return list(zip(*self.batch(indices), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------


Key = tuple[int, bool]  # (item, whether it is mirrored): each stands for one picture


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys, drawn in the main process from a generator seeded by (seed, epoch).

    So order and flips are the same for any number of workers, and epoch k is the same after a resume: set ``epoch``
    (from 0; it counts on by itself at every pass) before iterating, or see `batches_from`. ``share`` is (rank, size) of
    one of several processes: each gets its part of every batch.
    """

    def __init__(
        self, n: int, batch_size: int, shuffle: bool, flip: bool, drop_last: bool, seed: int, share=(0, 1)
    ) -> None:
        self.n, self.batch_size, self.shuffle, self.flip, self.drop_last = n, batch_size, shuffle, flip, drop_last
        self.seed, self.epoch, self.share = seed, 0, share

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    @property
    def all_keys(self) -> list[Key]:
        """Every key that a pass may hand out."""
        return [(index, mirrored) for mirrored in (False, True)[: 1 + self.flip] for index in range(self.n)]

    def batches(self, epoch: int) -> list[list[Key]]:
        """The keys of every batch of an epoch."""
        mixed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()  # seed + epoch would repeat across seeds
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little", signed=True))
        order = torch.randperm(self.n, generator=generator) if self.shuffle else torch.arange(self.n)
        flips = torch.rand(self.n, generator=generator) < 0.5 if self.flip else torch.zeros(self.n, dtype=torch.bool)
        keys = list(zip(order.tolist(), flips.tolist(), strict=True))
        rank, size = self.share
        return [keys[i * self.batch_size : (i + 1) * self.batch_size][rank::size] for i in range(len(self))]

    def __iter__(self) -> Iterator[list[Key]]:
        # A generator function: a pass counts from its first batch on. (A loader with persistent workers asks for its
        # first iterator twice and drops one.)
        epoch, self.epoch = self.epoch, self.epoch + 1
        yield from self.batches(epoch)


RawBatch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, S, S) uint8, their targets, which to mirror (B,) bool


class _Batched(Dataset):
    """Hands a whole batch of keys to a data set."""

    def __init__(self, source: CelebAMaskHQ) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> RawBatch:
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
            images, targets, mirrored = (part.to(self.device, non_blocking=True) for part in batch)
            masks = targets.ndim == 3
            if some:
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
                targets = torch.where(mirrored[:, None, None], mirror_masks(targets), targets) if masks else targets
            # (B, 3, S, S) in [-1, 1]; (B, 40) in {0, 1}, or (B, M, M)
            yield to_float(images), targets.long() if masks else targets


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
    """A loader of images (B, 3, S, S) in [-1, 1] and labels (B, 40) in {0, 1}, or masks (B, M, M), on ``device``.

    Its ``batch_sampler`` is an `EpochBatches`; `batches_from` goes on in the middle of an epoch.
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
    """One loader per split."""

    train: FaceLoader
    val: FaceLoader
    test: FaceLoader


def make_loaders(
    root: str | Path,
    img_size: Size,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    *,
    flip: bool = True,
    strict: bool = False,
    cache: bool = True,
    device: torch.device = FaceLoader.device,
    share: tuple[int, int] = (0, 1),
    mask_size: Size | None = None,
) -> Loaders:
    """Loaders of the three splits: training shuffled and mirrored at random (seeded), the others in number order.

    The last, smaller training batch is dropped unless it is the only one; evaluation sees every image. ``share`` is
    (rank, size) of one of several processes that train together: it gets its part of every training batch. With
    ``mask_size`` they hand out masks in place of labels.

    Raises:
        InputError: as `CelebAMaskHQ`, or a batch size or worker count that makes no sense.
    """
    parts = {split: CelebAMaskHQ(root, split, img_size, strict, cache, mask_size) for split in SPLITS[:3]}
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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that training did not see, made of those it has: for small data sets
# ---------------------------------------------------------------------------------------------------------------------


def augmented(x: Tensor, strength: float, share: float = 1.0) -> Tensor:
    """Shift, scale and turn pictures a little, and change their light; each its own way.

    At ``strength`` 1 a picture moves by up to 6 % of its side, grows or shrinks by up to 8 %, turns by up to 6 degrees,
    its contrast changes by up to 10 % and its brightness by up to 5 % of the range; all uniform, and in proportion to
    ``strength``. What comes in at the borders is the picture mirrored there. The draws are torch's global ones of x's
    device.

    Args:
        x: (B, C, H, W) in [-1, 1].
        share: of the pictures that change; the others stay as they are, but for interpolation's rounding.

    Returns:
        (B, C, H, W) in [-1, 1].
    """
    if strength == 0:
        return x
    changed = torch.rand(len(x), 1, device=x.device) < share
    draws = (2 * torch.rand(len(x), 6, device=x.device) - 1) * strength * changed  # (B, 6) in [-strength, strength]
    scale, angle = torch.exp(0.08 * draws[:, 0]), math.radians(6) * draws[:, 1]
    cos, sin, dx, dy = scale * angle.cos(), scale * angle.sin(), 0.12 * draws[:, 2], 0.12 * draws[:, 3]
    affine = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)  # a side is 2 long
    where = F.affine_grid(affine.to(x.dtype), list(x.shape), align_corners=False)  # (B, H, W, 2)
    x = F.grid_sample(x, where, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast, light = 1 + 0.1 * draws[:, 4], 0.1 * draws[:, 5]
    return (x * contrast.view(-1, 1, 1, 1) + light.view(-1, 1, 1, 1)).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The batches of a training
# ---------------------------------------------------------------------------------------------------------------------


def epoch_keys(loader: DataLoader, epoch: int) -> list | None:
    """What the loader's batch sampler hands out in an epoch, from 0: the keys of every batch, no image loaded.

    None if it shuffles and is no `EpochBatches`, so that it cannot be told.
    """
    sampler = loader.batch_sampler
    if isinstance(sampler, EpochBatches):
        return sampler.batches(epoch)
    return list(sampler) if isinstance(getattr(sampler, "sampler", None), SequentialSampler) else None


def with_batches(loader: DataLoader, batches: Sequence, workers: int = 0) -> DataLoader:
    """A loader of these batches (lists of keys) alone, otherwise like ``loader``."""
    other = type(loader)(
        loader.dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # or it draws the workers' seed from the global one
    )
    if isinstance(loader, FaceLoader):
        other.device = loader.device
    return other


def batches_from(loader: DataLoader, step: int) -> Iterator[tuple[list | None, tuple]]:
    """The batches of a training, epoch after epoch, each with its keys; those of the first ``step`` are not loaded.

    Raises:
        ValueError: the order of an epoch, in which ``step`` lies, is not known.
    """
    epoch, done = divmod(step, len(loader))
    while True:
        keys = epoch_keys(loader, epoch)
        if done and keys is None:
            raise ValueError("the order of an epoch must be known to resume in it: use `EpochBatches`")
        if isinstance(loader.batch_sampler, EpochBatches):
            loader.batch_sampler.epoch = epoch
        batches = with_batches(loader, keys[done:], loader.num_workers) if done else loader
        names = repeat(None) if keys is None else keys[done:]
        yield from ((name, batch) for batch, name in zip(batches, names))  # noqa: B905  (repeat has no end)
        epoch, done = epoch + 1, 0
