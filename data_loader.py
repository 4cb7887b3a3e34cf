"""Labelled faces: CelebAMask-HQ with its masks, CelebA, a cache of what was resized, and seeded loaders.

Layouts that are known, at any depth below the folder that is given::

    CelebA-HQ-img/0.jpg ... 29999.jpg             CelebAMask-HQ: split by number, 80, 10 and 10 %
    CelebAMask-HQ-attribute-anno.txt              a count, the 40 names, then "0.jpg  -1 1 ..."
    CelebAMask-HQ-mask-anno/{0..14}/00000_hair.png    for masks; or masks/0.png, see below

    img_align_celeba/000001.jpg ... 202599.jpg    CelebA: split as published
    list_attr_celeba.txt, list_eval_partition.txt     or Kaggle's .csv of both, with images one folder deeper;
                                                      or img_align_celeba_png/; or in Img/, Anno/ and Eval/

    images/0.jpg ...                              any images with masks: split by number
    masks/0.png ...                               palette index = class (see `MASK_CLASSES`), any size
    labels.csv                                    if there is one: attributes, empty if unknown

Shapes: B batch, N images, S image size, M mask size. Images are (3, S, S) float32 in [-1, 1], labels (40,) float32 in
{0, 1}, masks (M, M) int64 in 0 ... 18.

Data: C.-H. Lee, Z. Liu, L. Wu, P. Luo, "MaskGAN: Towards Diverse and Interactive Facial Image Manipulation", CVPR 2020;
Z. Liu, P. Luo, X. Wang, X. Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015.
"""

import csv
import functools
import hashlib
import json
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
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
    to_float,
    to_pixels,
    upright_size,
)
from utils import InputError, atomic_write, nearest, sides, write_json

ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
"""The 40 attribute names, in the order of the annotation file and of every label and logit vector."""

IMAGE_FOLDER, ANNOTATION_FILE = "CelebA-HQ-img", "CelebAMask-HQ-attribute-anno.txt"
KAGGLE_DATASET = "liusonghua/celebamaskhq"
SPLITS = ("train", "val", "test", "all")
MASK_CLASSES = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
    "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
"""The 19 classes of a mask, by their number. CelebAMask-HQ has a picture of each; later ones cover earlier ones."""
PART_FOLDER, MASK_FOLDER = "CelebAMask-HQ-mask-anno", "masks"
LAYOUTS: tuple[dict[str, tuple[str, ...]], ...] = (  # of each part, the first name that is there; one without is needed
    {"images": (IMAGE_FOLDER,), "labels": (ANNOTATION_FILE,), "masks": (PART_FOLDER, MASK_FOLDER, "")},
    {
        "images": (
            "img_align_celeba/img_align_celeba",
            "Img/img_align_celeba/img_align_celeba",
            "Img/img_align_celeba",
            "img_align_celeba",
            "Img/img_align_celeba_png",
            "img_align_celeba_png",
        ),
        "labels": ("list_attr_celeba.txt", "list_attr_celeba.csv", "Anno/list_attr_celeba.txt"),
        "partition": ("list_eval_partition.txt", "list_eval_partition.csv", "Eval/list_eval_partition.txt"),
    },
    {"images": ("images",), "masks": (MASK_FOLDER,), "labels": ("labels.csv", "")},
)
"""What a data set consists of, and under which names: of each part the first that is there; "": it may be missing."""
_EXPECTED = (
    f"expected a folder with {IMAGE_FOLDER}/ and {ANNOTATION_FILE}, or with img_align_celeba/, list_attr_celeba and "
    "list_eval_partition (.txt or .csv), or with images/ and masks/"
)
_NO_DATA_SETS = {IMAGE_FOLDER, PART_FOLDER, MASK_FOLDER, "img_align_celeba", "images"}  # thousands of files
_CACHE_VERSION = 5  # raise it when the way a cached pixel is computed, or kept, changes
_VALUES = {"1": 1, "+1": 1, "-1": 0, "0": 0, "1.0": 1, "-1.0": 0, "0.0": 0}  # floats: a table with gaps has those
_UNKNOWN = -1

log = logging.getLogger(__name__)


# --- Annotations and layouts -----------------------------------------------------------------------------------------


class Annotations(NamedTuple):
    """What an annotation file says, rows as in the file."""

    files: list[str]  # N file names
    labels: np.ndarray  # (N, 40) int8, in the order of `ATTRIBUTES`: 1 present, 0 absent, -1 unknown


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and words of a table: separated by commas in a .csv, by any white space elsewhere."""
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    split = (lambda line: next(csv.reader([line.strip()], skipinitialspace=True))) if _is_csv(path) else str.split
    return [(i, split(line)) for i, line in enumerate(lines, start=1) if line.strip()]


def read_annotations(path: str | Path) -> Annotations:
    """Read ``CelebAMask-HQ-attribute-anno.txt``, ``list_attr_celeba.txt`` or a CSV of the same.

    The text files hold a count, the 40 names in any order, then one row for each image. A CSV holds a header and the
    rows: the file (or its number) first, then the 40 attributes among other columns; an empty value is unknown there.
    A byte-order mark, CRLF, blank lines and any white space between columns are tolerated; 0 counts as absent.

    Raises:
        InputError: with the file and the line, for anything else.
    """
    path = Path(path)
    rows, comma = iter(_read_rows(path)), _is_csv(path)

    def wrong(line: int, what: str) -> NoReturn:
        raise InputError(f"{path}, line {line}: {what}")

    count = None if comma else " ".join(next(rows, (1, [""]))[1])
    at, names = next(rows, (2, []))
    names = names[comma:]
    missing = [name for name in ATTRIBUTES if name not in names]
    for name in [] if comma else names:
        if name not in ATTRIBUTES:
            wrong(at, f"unknown attribute {name!r}{nearest(name, ATTRIBUTES)}")
    if missing:
        wrong(at, f"expected the 40 attribute names; missing {', '.join(missing)}")
    if len(set(names)) < len(names):
        wrong(at, "an attribute is named twice")

    columns = [names.index(name) for name in ATTRIBUTES]
    values_of = {**_VALUES, "": _UNKNOWN} if comma else _VALUES
    labels, files = list[list[int]](), dict[str, int]()
    for at, (file, *values) in rows:
        if len(values) != len(names):
            wrong(at, f"{file} has {len(values)} values, expected {len(names)}")
        if file in files:
            wrong(at, f"{file} is listed twice, first on line {files[file]}")
        if Path(file).name != file:
            wrong(at, f"{file!r} is not a plain file name")
        files[file] = at
        try:
            labels.append([values_of[values[column]] for column in columns])
        except KeyError as error:
            wrong(at, f"{file} has the value {error}, expected 1 or -1")
    if count is not None and count.lstrip("0") != str(len(files)):
        raise InputError(f"{path}: the count says {count[:18]!r} images, the file lists {len(files)}")
    return Annotations(list(files), np.array(labels, dtype=np.int8).reshape(-1, 40))


def read_partition(path: str | Path) -> dict[str, int]:
    """CelebA's ``list_eval_partition.txt``, or a CSV of it: the split of each file, 0 train, 1 validation, 2 test.

    Raises:
        InputError: with the file and the line, for anything else.
    """
    path, splits = Path(path), {}
    for at, words in _read_rows(path)[_is_csv(path) :]:  # without the CSV's header
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise InputError(f"{path}, line {at}: expected a file name and 0, 1 or 2, got {' '.join(words)[:80]!r}")
        if words[0] in splits:
            raise InputError(f"{path}, line {at}: {words[0]} is listed twice")
        splits[words[0]] = int(words[1])
    return splits


def find_dataset(root: Path) -> tuple[Path, dict[str, Path]]:
    """The first folder at or below ``root`` that is a data set in one of `LAYOUTS` (downloads nest it), and its parts.

    Raises:
        InputError: there is none; the message says what is expected and what is missing.
    """
    if not root.is_dir():
        raise InputError(f"data set {root}: no such folder; unpack an archive first; {_EXPECTED}")
    partial: list[str] = []
    for name, folders, files in os.walk(root):
        folder = Path(name)
        for layout in LAYOUTS:
            there = {part: [folder / name for name in names if name] for part, names in layout.items()}
            parts = {part: path for part, paths in there.items() for path in reversed(paths) if path.exists()}
            missing = [names[0] for part, names in layout.items() if "" not in names and part not in parts]
            if not missing:
                return folder, parts
            if "images" in parts:
                partial += [f"{name} is missing in {folder}" for name in missing]
        deep = len(folder.relative_to(root).parts) > 3
        folders[:] = [] if deep else sorted(n for n in folders if n not in _NO_DATA_SETS and n[0] != ".")
        partial += [f"unpack {n} first" for n in sorted(files) if n.endswith((".zip", ".tar", ".gz", ".tgz", ".7z"))]
    raise InputError(f"data set {root}: " + "; ".join([*partial[:3], _EXPECTED]))


def download_dataset() -> Path:
    """Fetch CelebAMask-HQ from Kaggle (or reuse kagglehub's copy) and return its folder.

    Raises:
        InputError: kagglehub, its credentials or the network is missing.
    """
    try:
        import kagglehub

        path = kagglehub.dataset_download(KAGGLE_DATASET)
    except Exception as error:  # network, credentials and quota all have types of their own
        raise InputError(
            f"cannot download {KAGGLE_DATASET}: {str(error)[:300]}; pip install kagglehub, check the network and your "
            "Kaggle API credentials, or fetch it by hand and pass its folder with --dataset_path"
        ) from error
    return find_dataset(Path(path))[0]


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


class Records(NamedTuple):
    """Everything that a data set lists, in the order of its numbers."""

    files: list[Path]
    labels: np.ndarray  # (N, 40) int8: 1 present, 0 absent, -1 unknown
    splits: np.ndarray  # (N,): position in `SPLITS`


@functools.lru_cache(maxsize=1)  # three splits ask for it, one after the other
def read_records(items: tuple[tuple[str, Path], ...], states: tuple) -> Records:
    """Files, labels and splits of a data set: CelebA's as published, others by number, 80, 10 and 10 %.

    Args:
        items: the parts of the data set, see `LAYOUTS`. states: what they are remembered by, see `_state`.

    Raises:
        InputError: tables that cannot be read, or that do not fit each other.
    """
    parts = dict(items)
    folder = parts["images"]
    there = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES) and e.name[0] != ".")
    if "labels" in parts:
        names, labels = read_annotations(parts["labels"])
    else:
        names, labels = there, np.full((len(there), 40), _UNKNOWN, dtype=np.int8)
    # a CSV may list numbers, a folder hold PNG if the table says JPEG
    known = set(there)
    by_stem = {os.path.splitext(name)[0]: name for name in known - set(names)}
    files = [name if name in known else by_stem.get(os.path.splitext(name)[0], name) for name in names]
    order = sorted(range(len(files)), key=lambda i: natural_key(files[i]))
    if "partition" in parts:
        published = read_partition(parts["partition"])
        if lacking := [name for name in names if name not in published]:
            said = f"no split for {listed(lacking)}, which {parts['labels'].name} lists"
            raise InputError(f"{parts['partition']}: {said}")
        splits = np.array([published[names[i]] for i in order], dtype=np.int8)
    else:
        splits = np.repeat(np.arange(3), [len(split_indices(len(order), split)) for split in SPLITS[:3]])
    if extra := sorted(known - set(files), key=natural_key):
        log.warning("%s: left out %d pictures without labels: %s", folder, len(extra), listed(extra))
    return Records([folder / files[i] for i in order], labels[order], splits)


# --- Masks -----------------------------------------------------------------------------------------------------------


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
    pictures: list[Image.Image] = [read_picture(file) for file in files]
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
    width, height = read_picture(image, upright_size)
    if width * mask.shape[0] != height * mask.shape[1]:
        raise InputError(f"{files[0]}: a mask of {mask.shape[1]}x{mask.shape[0]} for an image of {width}x{height}")
    return np.asarray(fit(Image.fromarray(mask), size, files[0], Image.Resampling.NEAREST))


# --- The data set ----------------------------------------------------------------------------------------------------


class _Store:
    """N arrays (*shape) uint8, each read from some files; kept in one memory-mapped file if that can be written.

    Beside it lies JSON: why which rows could not be read.

    Args:
        folder: for the file; None to read anew at every access. What was kept of an earlier state of the files, by
            their names, sizes and dates, is made again.
        name: of what is read, for the file's name.
        read: makes an array of (files, its height and width), or raises an `InputError`: one bad file must not end a
            pass over 30,000.

    Attributes:
        bad: why a row could not be read.
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
        if folder is not None:
            key = json.dumps([_CACHE_VERSION, name, int(RESAMPLING), [list(map(_state, files)) for files in sources]])
            file = folder / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
            try:
                if not file.is_file():
                    self._write(file)
                self.bad = {int(i): why for i, why in json.loads(file.with_suffix(".json").read_text()).items()}
                self.file = file
            except (InputError, OSError) as error:
                log.warning("no cache of resized images, every epoch reads the originals: %s", error)
        if self.file is None:
            self.bad = {i: row for i, row in enumerate(self._read(sources)) if isinstance(row, str)}

    def _read(self, sources: Sequence[Sequence[Path]]) -> Iterator[np.ndarray | str]:
        """The array of each source, or why there is none."""

        def read(files: Sequence[Path]) -> np.ndarray | str:
            try:
                return self.read(files, self.shape[-2:])
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            yield from pool.map(read, sources)

    def _write(self, file: Path) -> None:
        """Make the file, in place of one of an earlier state."""
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
            write_json(file.with_suffix(".json"), bad)
        for old in file.parent.glob(f"{self.name}_*"):
            if re.fullmatch(rf"{self.name}_[0-9a-f]{{16}}\.(npy|json)", old.name) and old.stem != file.stem:
                old.unlink()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(B, *shape) uint8."""
        if self.file is None:
            return torch.from_numpy(np.stack([self.read(self.sources[row], self.shape[-2:]) for row in rows]))
        if self._map is None:
            self._map = np.load(self.file, mmap_mode="r", allow_pickle=False)
        return torch.from_numpy(self._map[rows])


def _read_pixels(files: Sequence[Path], size: Size) -> np.ndarray:
    """(3, H, W) uint8 of the one file."""
    return to_pixels(read_rgb(files[0]), size, files[0])


class CelebAMaskHQ(Dataset):
    """Labelled faces: item i is ``(image (3, S, S) float32 in [-1, 1], labels (40,) float32 in {0, 1})``.

    With ``mask_size`` M it is ``(image, mask (M, M) int64)``.

    Images are sorted by number and split before anything is left out, so a missing file never moves another image to
    another split. What cannot be used is left out, and one warning says how much and why. Resized pixels are kept in
    ``.cache/`` of the data set, see `_Store`.

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
        self.root, parts = find_dataset(Path(root))
        self.split, self.img_size, self.mask_size = split, img_size, mask_size
        records = read_records(tuple(parts.items()), tuple(map(_state, parts.values())))
        total, wanted = len(records.files), split_indices(len(records.files), split)  # refuses unknown names
        rows = np.flatnonzero(records.splits == SPLITS.index(split)) if split != "all" else np.array(wanted, dtype=int)
        if not len(rows):
            raise InputError(f"{self.root}: the {split} split of {total} images is empty; 10 images are enough")
        files, labels = [records.files[row] for row in rows], records.labels[rows]
        folder, count = self.root / ".cache" if cache else None, len(files)
        wrong = {i: f"{file}: no such file" for i, file in enumerate(files) if not file.is_file()}
        if mask_size is None:
            unknown = np.flatnonzero((labels == _UNKNOWN).any(1)).tolist()
            wrong = {i: f"{files[i].name}: attributes unknown" for i in unknown} | wrong
        elif "masks" not in parts:
            raise InputError(f"{self.root}: no masks; expected {PART_FOLDER}/ or {MASK_FOLDER}/")
        why, usable = [wrong[i] for i in sorted(wrong)], [i for i in range(count) if i not in wrong]
        files, labels, bad = [files[i] for i in usable], labels[usable], dict[int, str]()
        self._masks = None
        if files and not (strict and why):  # before an hour of resizing; what is not there takes no room in the cache
            name, shape = f"{split}_{_named(img_size)}", (3, *sides("images", "size", img_size))
            self._images = _Store(folder, name, [(file,) for file in files], shape, _read_pixels)
            bad = self._images.bad
            if mask_size is not None:
                sources = [(file, *masks) for file, masks in zip(files, mask_files(parts["masks"], files), strict=True)]
                name = f"{split}_masks_{_named(mask_size)}"
                self._masks = _Store(folder, name, sources, sides("masks", "size", mask_size), read_mask)
                bad = self._masks.bad | bad
            why += [bad[i] for i in sorted(bad)]
        if why:
            if strict:
                raise InputError(listed(why, 1))
            if len(why) == count:
                raise InputError(f"{parts['images']}: no image of the {split} split can be used: {listed(why)}")
            log.warning("%s split: left out %d of %d images: %s", split, len(why), count, listed(why))
        self._rows = np.array([i for i in range(len(files)) if i not in bad])  # item -> row of the stores
        self.paths = [files[i] for i in self._rows]
        self.files = [path.name for path in self.paths]
        self.labels = torch.from_numpy(labels[self._rows]).float()  # (N, 40) in {0, 1}; with masks -1 if unknown

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
        images, targets = self.batch([index])  # raises IndexError
        return images[0], targets[0]


def _named(size: Size) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


# --- Loaders ---------------------------------------------------------------------------------------------------------

Key = tuple[int, bool]  # (item, whether it is mirrored): each stands for one picture
RawBatch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, S, S) uint8, their targets, which to mirror (B,) bool


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


class _Batched(Dataset):
    """Hands a whole batch of keys to a data set."""

    def __init__(self, source: CelebAMaskHQ) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> RawBatch:
        indices, flips = zip(*keys, strict=True)
        return *self.source.batch_uint8(indices), torch.tensor(flips)


class FaceLoader(DataLoader):
    """A loader whose bytes go to ``device`` and become images there: mirrored if marked, and in [-1, 1]."""

    dataset: _Batched
    batch_sampler: EpochBatches
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
    loader = FaceLoader(
        _Batched(source),
        batch_sampler=EpochBatches(len(source), batch_size, shuffle, flip, drop_last, seed, share),
        num_workers=workers,
        collate_fn=tuple,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=outlive_stop_signals,
        generator=torch.Generator().manual_seed(seed),  # or the loader draws worker seeds from the global one
    )
    loader.device = device
    return loader


def outlive_stop_signals(worker: int) -> None:
    """A loader's ``worker_init_fn``. Terminals and schedulers signal every process of a run, but the step under way may
    still wait for a batch. A worker does not stay for long: SIGTERM is also how its own process ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # any other status breaks the main process's last step
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


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
        InputError: as `CelebAMaskHQ`, or a batch that cannot be shared evenly.
    """
    parts = {split: CelebAMaskHQ(root, split, img_size, strict, cache, mask_size) for split in SPLITS[:3]}
    common = {"batch_size": batch_size, "workers": workers, "seed": seed, "device": device}
    together = min(batch_size, len(parts["train"]))
    if together % share[1]:
        raise InputError(f"a batch of {together} images cannot be shared evenly by {share[1]} processes")
    drop = len(parts["train"]) > batch_size
    train = make_loader(parts["train"], shuffle=True, flip=flip, drop_last=drop, share=share, **common)
    return Loaders(train, make_loader(parts["val"], **common), make_loader(parts["test"], **common))


def with_batches(loader: FaceLoader, batches: Sequence[list[Key]], workers: int = 0) -> FaceLoader:
    """A loader of these batches alone, otherwise like ``loader``."""
    other = FaceLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=tuple,
        pin_memory=loader.pin_memory,
        worker_init_fn=outlive_stop_signals,
        generator=torch.Generator(),  # or it draws the workers' seed from the global one
    )
    other.device = loader.device
    return other


def first_items(loader: FaceLoader, count: int) -> list[Tensor]:
    """Images and targets of the first ``count`` items, or of all if there are fewer; no others are loaded."""
    batches = islice(loader, -(-count // loader.batch_sampler.batch_size))
    return [torch.cat(part)[:count] for part in zip(*batches, strict=True)]


def batches_from(loader: FaceLoader, step: int) -> Iterator[tuple[list[Key], tuple[Tensor, Tensor]]]:
    """The batches of a training, epoch after epoch, each with its keys; those of the first ``step`` are not loaded."""
    epoch, done = divmod(step, len(loader))
    while True:
        keys, loader.batch_sampler.epoch = loader.batch_sampler.batches(epoch), epoch
        batches = with_batches(loader, keys[done:], loader.num_workers) if done else loader
        yield from zip(keys[done:], batches, strict=True)
        epoch, done = epoch + 1, 0


# --- Pictures that training did not see, made of those it has ---------------------------------------------------------


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
    places = F.affine_grid(affine.to(x.dtype), list(x.shape), align_corners=False)  # (B, H, W, 2)
    x = F.grid_sample(x, places, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast, light = 1 + 0.1 * draws[:, 4], 0.1 * draws[:, 5]
    return (x * contrast.view(-1, 1, 1, 1) + light.view(-1, 1, 1, 1)).clamp(-1, 1)
