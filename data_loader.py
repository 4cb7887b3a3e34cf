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
import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
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
from utils import InputError, atomic_write, read_json, sides, write_json

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
_CACHE_VERSION = 6  # raise it when the way a cached pixel is computed, or kept, changes
_VALUES = {"1": 1, "+1": 1, "-1": 0, "0": 0, "1.0": 1, "-1.0": 0, "0.0": 0}  # floats: a table with gaps has those
_UNKNOWN = -1

log = logging.getLogger(__name__)


# --- Annotations and layouts -----------------------------------------------------------------------------------------


class Annotations(NamedTuple):
    """What an annotation file says, rows as in the file."""

    files: list[str]  # N file names
    labels: np.ndarray  # (N, 40) int8, in the order of `ATTRIBUTES`: 1 present, 0 absent, -1 unknown


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and words of a table: separated by commas in a .csv, by any white space elsewhere."""
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    comma = path.suffix.lower() == ".csv"
    split = (lambda line: next(csv.reader([line.strip()], skipinitialspace=True))) if comma else str.split
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
    rows, comma = iter(_read_rows(path)), path.suffix.lower() == ".csv"

    def wrong(line: int, what: str) -> NoReturn:
        raise InputError(f"{path}, line {line}: {what}")

    count = None if comma else " ".join(next(rows, (1, [""]))[1])
    at, names = next(rows, (2, []))
    names = names[comma:]
    if missing := [name for name in ATTRIBUTES if name not in names]:
        wrong(at, f"expected the 40 attribute names; missing {', '.join(missing)}")
    columns = [names.index(name) for name in ATTRIBUTES]
    values_of = {**_VALUES, "": _UNKNOWN} if comma else _VALUES
    files, labels = dict[str, int](), []
    for at, (file, *values) in rows:
        if len(values) != len(names):
            wrong(at, f"{file} has {len(values)} values, expected {len(names)}")
        if file in files:
            wrong(at, f"{file} is listed twice, first on line {files[file]}")
        files[file] = at
        try:
            labels.append([values_of[values[column]] for column in columns])
        except KeyError as error:
            wrong(at, f"{file} has the value {error}, expected 1 or -1")
    if count is not None and count != str(len(files)):
        raise InputError(f"{path}: the count says {count[:18]!r} images, the file lists {len(files)}")
    return Annotations(list(files), np.array(labels, dtype=np.int8).reshape(-1, 40))


def read_partition(path: Path) -> dict[str, int]:
    """CelebA's ``list_eval_partition.txt``, or a CSV of it: the split of each file, 0 train, 1 validation, 2 test.

    Raises:
        InputError: with the file and the line, for anything else.
    """
    splits = {}
    for at, words in _read_rows(path)[path.suffix.lower() == ".csv" :]:  # without the CSV's header
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise InputError(f"{path}, line {at}: expected a file name and 0, 1 or 2, got {' '.join(words)[:80]!r}")
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
    return range(*bounds[split])


class Records(NamedTuple):
    """What a data set lists, in the order of its numbers."""

    files: list[Path]
    labels: np.ndarray  # (N, 40) int8: 1 present, 0 absent, -1 unknown
    splits: np.ndarray  # (N,): position in `SPLITS`


def read_records(parts: dict[str, Path]) -> Records:
    """Files, labels and splits of a data set (`LAYOUTS`): CelebA's as published, others by number, 80, 10 and 10 %.

    Raises:
        InputError: tables that cannot be read, or that do not fit each other.
    """
    folder = parts["images"]
    there = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES) and e.name[0] != ".")
    if "labels" in parts:
        names, labels = read_annotations(parts["labels"])
    else:
        names, labels = there, np.full((len(there), 40), _UNKNOWN, dtype=np.int8)
    # a CSV may list numbers, a folder hold PNG if the table says JPEG
    known = set(there)
    by_stem = {Path(name).stem: name for name in known - set(names)}
    files = [name if name in known else by_stem.get(Path(name).stem, name) for name in names]
    if extra := sorted(known - set(files), key=natural_key):
        log.warning("%s: left out %d pictures without labels: %s", folder, len(extra), listed(extra))
    order = sorted(range(len(files)), key=lambda i: natural_key(files[i]))
    if "partition" in parts:
        published = read_partition(parts["partition"])
        if lacking := [name for name in names if name not in published]:
            raise InputError(f"{parts['partition']}: no split for {listed(lacking)}")
        splits = np.array([published[names[i]] for i in order], dtype=np.int8)
    else:
        splits = np.repeat(np.arange(3), [len(split_indices(len(order), split)) for split in SPLITS[:3]])
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
    there = {file.stem: file for file in folder.glob("*/*.png")}
    sources = []
    for image in images:
        names = [f"{image.stem:0>5}_{part}" for part in MASK_CLASSES[1:]]
        found = tuple(there[name] for name in names if name in there)
        sources.append(found or (folder / f"{names[0]}.png",))  # of a face without any part: one that is missing
    return sources


def read_mask(files: Sequence[Path], size: Size) -> np.ndarray:
    """The mask of this size, uint8, of an image, from the image's file and its `mask_files`.

    It is cut like the image, and resized by nearest neighbours.

    Raises:
        InputError: a file that is missing or unreadable, other classes, or other proportions than the image's.
    """
    image, *files = files
    width, height = read_picture(image, upright_size)
    mask = np.zeros(sides("masks", "size", size), dtype=np.uint8)
    for file in files:
        picture = read_picture(file)
        if width * picture.height != height * picture.width:
            raise InputError(f"{file}: a mask of {picture.width}x{picture.height} for an image of {width}x{height}")
        if file.parent.parent.name == PART_FOLDER:
            part = fit(picture.convert("L"), size, file, Image.Resampling.NEAREST)
            mask[np.asarray(part) > 0] = MASK_CLASSES.index(file.stem.partition("_")[2])
        elif picture.mode not in ("P", "L") or picture.getextrema()[1] >= len(MASK_CLASSES):
            raise InputError(f"{file}: not a mask; expected a palette picture of classes 0 to {len(MASK_CLASSES) - 1}")
        else:
            mask[:] = fit(picture, size, file, Image.Resampling.NEAREST)
    return mask


# --- The data set ----------------------------------------------------------------------------------------------------


def _state(path: Path) -> tuple:
    """What tells that a file has changed; that it is missing is a state too."""
    try:
        found = path.stat()
        return path.name, found.st_size, found.st_mtime_ns
    except OSError:
        return (path.name,)


class _Store:
    """N arrays (*shape) uint8, each read from some files; kept in one memory-mapped file if that can be written.

    Beside it lies JSON: what it was made of, and why which rows could not be read.

    Args:
        folder: for the file; None to read anew at every access. What was kept of an earlier state of the sources, by
            their names, sizes and dates, is made again.
        name: of the file.
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
        self.sources, self.shape, self.read = sources, shape, read
        self.kept: np.ndarray | None = None
        if folder is not None:
            try:
                self.kept, self.bad = self._keep(folder / f"{name}_{'x'.join(map(str, shape[-2:]))}.npy")
            except (InputError, OSError) as error:
                log.warning("no cache of resized images, every epoch reads the originals: %s", error)
        if self.kept is None:
            self.bad = {i: row for i, row in self._read_all() if isinstance(row, str)}

    def _read_all(self) -> Iterator[tuple[int, np.ndarray | str]]:
        """The array of each source, or why there is none."""

        def read(files: Sequence[Path]) -> np.ndarray | str:
            try:
                return self.read(files, self.shape[-2:])
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self.sources), 256):  # not all at once: arrays would wait in memory
                yield from enumerate(pool.map(read, self.sources[start : start + 256]), start)

    def _keep(self, file: Path) -> tuple[np.ndarray, dict[int, str]]:
        """The file's rows, made if they are not there, and those that could not be read."""
        key = json.dumps([_CACHE_VERSION, int(RESAMPLING), [list(map(_state, files)) for files in self.sources]])
        key, notes = hashlib.sha256(key.encode()).hexdigest(), file.with_suffix(".json")
        kept = None
        with suppress(InputError):  # missing, or damaged: it is made again
            kept = read_json(notes).get("sources")
        if not (file.is_file() and kept == key):
            bad, nothing = {}, np.zeros(self.shape, dtype=np.uint8)
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.sources), *self.shape)}
            # plain writes: a full disk is an error here, and a crash through a memory map
            with atomic_write(file) as temporary, open(temporary, "wb") as out:
                np.lib.format.write_array_header_1_0(out, header)
                progress = tqdm(total=len(self.sources), desc=f"caching {file.stem}", unit="image", disable=None)
                for i, row in self._read_all():
                    if isinstance(row, str):
                        bad[i], row = row, nothing
                    out.write(row.tobytes())
                    progress.update()
                progress.close()
                notes.unlink(missing_ok=True)  # or a run that is killed now leaves the file with notes of another
            write_json(notes, {"sources": key, "bad": bad})
        bad = {int(i): why for i, why in read_json(notes)["bad"].items()}
        return np.load(file, mmap_mode="r", allow_pickle=False), bad

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(B, *shape) uint8."""
        if self.kept is not None:
            return torch.from_numpy(self.kept[rows])
        return torch.from_numpy(np.stack([self.read(self.sources[row], self.shape[-2:]) for row in rows]))


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
        records: what `read_records` gives of it, if that is known: several splits need it once.

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
        records: Records | None = None,
    ) -> None:
        self.root, parts = find_dataset(Path(root))
        self.split, self.img_size, self.mask_size = split, img_size, mask_size
        records = read_records(parts) if records is None else records
        rows = np.flatnonzero((records.splits == SPLITS.index(split)) | (split == "all")).tolist()
        if not rows:
            said = f"the {split} split of {len(records.files)} images is empty; 10 images are enough"
            raise InputError(f"{self.root}: {said}")
        if mask_size is not None and "masks" not in parts:
            raise InputError(f"{self.root}: no masks; expected {PART_FOLDER}/ or {MASK_FOLDER}/")
        files, labels, why = list[Path](), list[np.ndarray](), list[str]()
        for row in rows:  # what is not there takes no room in the cache
            file, bits = records.files[row], records.labels[row]
            if not file.is_file():
                why.append(f"{file}: no such file")
            elif mask_size is None and _UNKNOWN in bits:
                why.append(f"{file.name}: attributes unknown")
            else:
                files.append(file)
                labels.append(bits)
        folder, bad = self.root / ".cache" if cache else None, dict[int, str]()
        self._masks = None
        if files and not (strict and why):  # refused before an hour of resizing
            shape = (3, *sides("images", "size", img_size))
            self._images = _Store(folder, split, [(file,) for file in files], shape, _read_pixels)
            bad = self._images.bad
            if mask_size is not None:
                sources = [(file, *masks) for file, masks in zip(files, mask_files(parts["masks"], files), strict=True)]
                shape = sides("masks", "size", mask_size)
                self._masks = _Store(folder, f"{split}_masks", sources, shape, read_mask)
                bad = self._masks.bad | bad
            why += [bad[i] for i in sorted(bad)]
        if why and strict:
            raise InputError(listed(why, 1))
        if len(why) == len(rows):
            raise InputError(f"{parts['images']}: no image of the {split} split can be used: {listed(why)}")
        if why:
            log.warning("%s split: left out %d of %d images: %s", split, len(why), len(rows), listed(why))
        self._rows = np.array([i for i in range(len(files)) if i not in bad])  # item -> row of the stores
        self.paths = [files[i] for i in self._rows]
        self.files = [path.name for path in self.paths]
        self.labels = torch.from_numpy(np.stack(labels)[self._rows]).float()  # (N, 40) in {0, 1}; with masks -1 too

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


# --- Loaders ---------------------------------------------------------------------------------------------------------

Key = tuple[int, bool]  # (item, whether it is mirrored): each stands for one picture
_CPU = torch.device("cpu")


class EpochBatches:
    """Batches of keys, drawn from a generator seeded by (seed, epoch).

    So order and flips are the same for any number of workers, and epoch k is the same after a resume, see
    `batches_from`; iterating gives epoch 0. ``share`` is (rank, size) of one of several processes: each gets its part
    of every batch.
    """

    def __init__(
        self, n: int, batch_size: int, shuffle: bool, flip: bool, drop_last: bool, seed: int, share=(0, 1)
    ) -> None:
        self.n, self.batch_size, self.shuffle, self.flip, self.drop_last = n, batch_size, shuffle, flip, drop_last
        self.seed, self.share = seed, share

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
        return iter(self.batches(0))


class FaceLoader:
    """Hands out the images (B, 3, S, S) in [-1, 1] and the targets of batches of keys, on ``device``.

    ``num_workers`` threads read ahead; 0: each batch is read when it is asked for. Threads suffice: what a cache holds
    is only copied, and Pillow decodes and resizes beside other threads.
    """

    def __init__(
        self,
        dataset: CelebAMaskHQ,
        batch_sampler: EpochBatches | Sequence[list[Key]],
        num_workers: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self.dataset, self.batch_sampler, self.num_workers, self.device = dataset, batch_sampler, num_workers, device

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.num_workers:
            yield from map(self._load, self.batch_sampler)
            return
        # Threads that compute beside others are fastest alone. One that has not computed yet takes over what any was
        # told last, the present one too: asked now, it keeps its own number, and threads to come get that at the end.
        torch.get_num_threads()
        pool = ThreadPoolExecutor(self.num_workers, initializer=torch.set_num_threads, initargs=(1,))
        coming = deque[Future]()
        try:
            for keys in self.batch_sampler:
                coming.append(pool.submit(self._load, keys))
                if len(coming) > self.num_workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(torch.get_num_threads())

    def _load(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        indices, flips = zip(*keys, strict=True)
        # a device gets bytes, and makes images of them
        images, targets = (part.to(self.device) for part in self.dataset.batch_uint8(indices))
        masks = targets.ndim == 3
        if mirrored := [i for i, flip in enumerate(flips) if flip]:
            images[mirrored] = images[mirrored].flip(-1)
            if masks:
                targets[mirrored] = mirror_masks(targets[mirrored])
        return to_float(images), targets.long() if masks else targets


def make_loader(
    source: CelebAMaskHQ,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    flip: bool = False,
    drop_last: bool = False,
    device: torch.device = _CPU,
    share: tuple[int, int] = (0, 1),
) -> FaceLoader:
    """A `FaceLoader` of `EpochBatches`; `batches_from` goes on in the middle of an epoch."""
    batches = EpochBatches(len(source), batch_size, shuffle, flip, drop_last, seed, share)
    return FaceLoader(source, batches, workers, device)


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
    device: torch.device = _CPU,
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
    records = read_records(find_dataset(Path(root))[1])
    train, val, test = (CelebAMaskHQ(root, split, img_size, strict, cache, mask_size, records) for split in SPLITS[:3])
    together = min(batch_size, len(train))
    if together % share[1]:
        raise InputError(f"a batch of {together} images cannot be shared evenly by {share[1]} processes")
    common = {"batch_size": batch_size, "workers": workers, "seed": seed, "device": device}
    drop = len(train) > batch_size
    training = make_loader(train, shuffle=True, flip=flip, drop_last=drop, share=share, **common)
    return Loaders(training, make_loader(val, **common), make_loader(test, **common))


def with_batches(loader: FaceLoader, batches: Sequence[list[Key]], workers: int = 0) -> FaceLoader:
    """A loader of these batches alone, otherwise like ``loader``."""
    return FaceLoader(loader.dataset, batches, workers, loader.device)


def first_items(loader: FaceLoader, count: int) -> list[Tensor]:
    """Images and targets of the first ``count`` items, or of all if there are fewer; no others are loaded."""
    some = with_batches(loader, loader.batch_sampler.batches(0)[: -(-count // loader.batch_sampler.batch_size)])
    return [torch.cat(part)[:count] for part in zip(*some, strict=True)]


def batches_from(loader: FaceLoader, step: int) -> Iterator[tuple[list[Key], tuple[Tensor, Tensor]]]:
    """The batches of a training, epoch after epoch, each with its keys; those of the first ``step`` are not loaded."""
    epoch, done = divmod(step, len(loader))
    while True:
        keys = loader.batch_sampler.batches(epoch)[done:]
        yield from zip(keys, with_batches(loader, keys, loader.num_workers), strict=True)
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
