"""What a run of the sampler leaves behind: figures, tables, contact sheets, and the record of what is finished."""

import csv
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from images import load_image, to_uint8
from loop import check_settings, is_empty
from metrics import agreement, prob_error, psnr
from operators import Operator
from utils import InputError, atomic_write, file_name, json_values, nearest, shown, write_json

T = TypeVar("T")
PICTURES = ("input", "natural", "measured", "reconstruction", "unguided")  # folders of a result folder
SHEET_ROWS = 10  # rows on a page of the sheet: a stranger reads one page
SIDE = 160  # of its pictures
SHEET_LIMIT = 100  # rows of all pages: nobody reads a thousand, and their pictures are held at once


@dataclass
class Figures:
    """One image's figures; None if one could not be had.

    Attributes:
        agreement: share of the attributes whose sign, by g, is the target's, in [0, 1].
        judge_agreement: the same by the independent judge.
        prob_error: mean |sigmoid(g(x)) - sigmoid(y)|, in [0, 1].
        consistency: ``operator.distance`` of A x and y, for other measurements than logits, before x has 8 bits.
        psnr: against the input, dB. lpips: against the input (AlexNet).
        seconds: of its share of the batch. steps: evaluations of the prior.
    """

    name: str
    agreement: float | None = None
    judge_agreement: float | None = None
    prob_error: float | None = None
    consistency: float | None = None
    psnr: float | None = None
    lpips: float | None = None
    seconds: float | None = None
    steps: int | None = None
    seed: int | None = None

    @property
    def caption(self) -> str:
        """A line of those figures that there are."""
        shown = {
            "agreement by g": (self.agreement, ".2f"),
            "by the judge": (self.judge_agreement, ".2f"),
            "probability error": (self.prob_error, ".3f"),
            "|A x - y|": (self.consistency, ".1e"),
            "PSNR": (self.psnr, ".1f"),
            "LPIPS": (self.lpips, ".3f"),
            "seconds": (self.seconds, ".1f"),
        }
        return ", ".join(f"{key} {value:{form}}" for key, (value, form) in shown.items() if value is not None)


@dataclass
class Finished:
    """An image that is drawn, measured and on the disk.

    Attributes:
        unguided: figures of the unguided sample, if one was asked for.
        logits: of the reconstruction, (d,); none if something else was measured.
        pictures: kinds of its pictures, which are the folders they lie in.
    """

    name: str
    figures: Figures
    unguided: Figures | None
    logits: Tensor
    pictures: tuple[str, ...]


class Record:
    """A file of JSON lines: the settings of a run, then a line for whatever is finished. Processes may add to one file.

    Args:
        settings: all that decides what the pictures look like, as JSON gives it back.
        otherwise: what to do if they are others.
    """

    def __init__(self, path: Path, settings: dict, otherwise: str = "start anew with --overwrite") -> None:
        self.path, self.settings, self.otherwise = path, settings, otherwise

    def read(self, of: Callable[[dict], T]) -> list[T]:
        """What ``of`` makes of each line; a last one that a kill cut short is left out.

        Raises:
            InputError: another run's settings, or a file that is no record.
        """
        try:
            with open(self.path, encoding="utf-8") as file:
                check_settings(json.loads(file.readline())["settings"], self.settings, self.path.parent, self.otherwise)
                return [of(json.loads(line)) for line in file if line.endswith("\n")]
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise InputError(f"{self.path}: damaged ({type(error).__name__}); {self.otherwise}") from None

    def begin(self, rows: Sequence[dict]) -> None:
        """Write the file anew."""
        lines = (json.dumps(row) + "\n" for row in ({"settings": self.settings}, *rows))
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def append(self, rows: Sequence[dict]) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                # in one write, so that processes' lines do not mix
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error


class Progress(Record):
    """progress.jsonl, with a line for each image, written after its pictures."""

    def __init__(self, folder: Path, settings: dict) -> None:
        super().__init__(self.file(folder), settings)
        self.folder = folder

    @staticmethod
    def file(folder: Path) -> Path:
        return folder / "progress.jsonl"

    def finished(self, names: Sequence[str], targets: Tensor) -> list[Finished | None]:
        """For each name the image that an earlier run finished, None if it did not; the others are forgotten.

        Finished is what has its line, the same target, (N, *out_shape), and pictures that are what was written: by
        their SHA-256. Raises InputError as `read`.
        """
        wanted = dict(zip(names, targets, strict=True))

        def of(row: dict) -> tuple[dict, Finished] | None:
            target = wanted.get(row["name"])
            if target is None or not torch.allclose(torch.tensor(row["target"]), self._target(target), 1e-4, 1e-4):
                return None  # not asked for any more, or its input is another
            if any(self._digest(kind, row["name"]) != digest for kind, digest in row["pictures"].items()):
                return None
            unguided, logits = row["unguided"] and Figures(**row["unguided"]), torch.tensor(row["logits"])
            return row, Finished(row["name"], Figures(**row["figures"]), unguided, logits, tuple(row["pictures"]))

        found = {one.name: (row, one) for row, one in filter(None, self.read(of))}
        self.begin([row for row, _ in found.values()])
        return [found[name][1] if name in found else None for name in names]

    def add(self, entries: Sequence[tuple[Finished, Tensor]]) -> None:
        """Add images with their targets, whose pictures are written."""
        self.append([self._row(entry, target) for entry, target in entries])

    def _digest(self, kind: str, name: str) -> str | None:
        try:
            return hashlib.sha256((self.folder / kind / f"{name}.png").read_bytes()).hexdigest()
        except OSError:
            return None

    @staticmethod
    def _target(target: Tensor) -> Tensor:
        """Logits as they are; of another measurement the means of 256 parts: rounding is not the same everywhere."""
        return target if target.ndim == 1 else F.adaptive_avg_pool1d(target.flatten()[None], 256)[0]

    def _row(self, entry: Finished, target: Tensor) -> dict:
        return {
            "name": entry.name,
            "pictures": {kind: self._digest(kind, entry.name) for kind in entry.pictures},
            "figures": asdict(entry.figures),
            "unguided": None if entry.unguided is None else asdict(entry.unguided),
            "target": self._target(target).tolist(),
            "logits": entry.logits.tolist(),
        }


# --- The folder -------------------------------------------------------------------------------------------------------


def check_results(folder: Path, resume: bool, overwrite: bool, ask: bool) -> None:
    """Raises InputError if ``folder`` has results that may neither be replaced nor continued."""
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if is_empty(folder) or overwrite or resume and Progress.file(folder).is_file():
        return
    if ask and sys.stdin.isatty():
        if input(f"{folder} has results. Replace them? [y/N] ").strip().lower() in ("y", "yes"):
            return
    hint = " or --resume" if Progress.file(folder).is_file() else ""
    raise InputError(f"{folder} is not empty; give --overwrite{hint} or another folder")


def clear_results(folder: Path) -> None:
    """Delete what an earlier run wrote into its result folder, and nothing else."""
    pictures = [f"{kind}/*.png" for kind in PICTURES]
    files = (
        "sheet.png",
        "sheet_[0-9].png",
        "sheet_[0-9][0-9].png",
        "results.json",
        "results.csv",
        "logits.csv",
        "log.txt",
    )
    for pattern in (Progress.file(folder).name, *files, *pictures):
        for file in folder.glob(pattern):
            file.unlink()


# --- Figures ---------------------------------------------------------------------------------------------------------


def as_saved(images: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures that `images.save_image` leaves of images, (B, 3, H, W), and which of them are finite, (B,).

    An image that is not becomes a grey picture.
    """
    finite = images.isfinite().flatten(1).all(1)  # (B,)
    shown = torch.where(finite[:, None, None, None], images, 0.0)
    return to_uint8(shown).to(images) / 127.5 - 1, finite


@torch.no_grad()
def measure(
    names: Sequence[str],
    images: Tensor,
    inputs: Sequence[Tensor | None],
    operator: Operator,
    targets: Tensor,
    judge: nn.Module | None,
    judge_targets: Tensor | None,
    lpips: nn.Module | None,
    **common,
) -> tuple[list[Figures], Tensor]:
    """The figures of the pictures that are left of images (B, 3, H, W), and their logits, (B, d), if that is measured.

    An image that is not finite has none: its agreement is 0.
    """
    pictures, finite = as_saved(images)
    if targets.ndim == 2:
        logits = torch.where(finite[:, None], operator.A(pictures), math.nan)
        measured = {"agreement": agreement(logits, targets), "prob_error": prob_error(logits, targets)}
    else:
        logits = images.new_zeros(len(images), 0)
        measured = {"consistency": operator.distance(operator.A(images), targets)}
    by_judge = None
    if judge is not None and judge_targets is not None:
        by_judge = agreement(torch.where(finite[:, None], judge(pictures), math.nan), judge_targets)
    figures = []
    for i, name in enumerate(names):
        f = Figures(name, **{key: values[i].item() for key, values in measured.items()}, **common)
        if by_judge is not None:
            f = replace(f, judge_agreement=by_judge[i].item())
        if inputs[i] is not None and finite[i]:
            pair = pictures[i : i + 1], inputs[i][None].to(images.device)
            f = replace(f, psnr=psnr(*pair).item(), lpips=None if lpips is None else lpips(*pair).item())
        figures.append(f)
    return figures, logits


# --- Tables ----------------------------------------------------------------------------------------------------------


def mean_figures(figures: Sequence[Figures]) -> dict:
    """The mean of every figure over the images that have it, None if none has."""
    means = {}
    for key in list(asdict(figures[0]))[1:]:
        values = [v for f in figures if (v := getattr(f, key)) is not None and math.isfinite(v)]
        means[key] = sum(values) / len(values) if values else None
    return means


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows of one set of keys as a table."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_logits(path: Path, names: Sequence[str], attributes: Sequence[str], logits: Tensor) -> None:
    """Write logits, (N, d), as a table that `read_logits` reads."""
    values = [[f"{value:.9g}" for value in row] for row in logits.tolist()]
    write_csv(path, [{"name": n, **dict(zip(attributes, v, strict=True))} for n, v in zip(names, values, strict=True)])


def read_logits(path: Path, attributes: Sequence[str]) -> tuple[list[str], Tensor]:
    """Names and logits, (N, d), of a table with the columns ``name`` and every attribute, in any order.

    Raises:
        InputError: a missing or unknown column, or a value that is no finite number, with its line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as a table: {error}") from None
    wanted = ["name", *attributes]
    if not rows:
        raise InputError(f"{path}: no rows; expected the columns name and {len(attributes)} attributes")
    for column in header:
        if column not in wanted:
            raise InputError(f"{path}: unknown column {shown(column)}{nearest(column[:80], attributes)}")
    if sorted(header) != sorted(wanted):
        absent = [column for column in wanted if column not in header]
        raise InputError(f"{path}: column {absent[0]!r} is missing" if absent else f"{path}: a column is there twice")
    values: dict[str, list[float]] = {}
    for line, row in enumerate(filter(None, rows), start=2):
        try:
            said = dict(zip(header, row, strict=True))
            name = said["name"]
            numbers = [float(said[a]) for a in attributes]
        except ValueError:
            raise InputError(f"{path}, line {line}: expected a name and {len(attributes)} numbers") from None
        if not torch.tensor(numbers).isfinite().all():  # in float32: 1e99 is none
            raise InputError(f"{path}, line {line}: a value is not finite")
        if name in ("", ".", "..") or file_name(name) != name or name in values:  # it names the result's file
            raise InputError(f"{path}, line {line}: name {shown(name)} must be a file name, and each one's own")
        values[name] = numbers
    return list(values), torch.tensor(list(values.values()))


# --- The sheet -------------------------------------------------------------------------------------------------------

_INK, _PALE, _WRONG = (30, 32, 38), (236, 238, 242), (214, 60, 50)
_ROWS, _COLUMNS = 4, 10


_font = ImageFont.load_default


def picture(image: Tensor | None, side: int) -> Image.Image:
    """An image (3, H, W) in [-1, 1] for a sheet; a blank one for None."""
    if image is None:
        blank = Image.new("RGB", (side, side), _PALE)
        ImageDraw.Draw(blank).text((side / 2, side / 2), "no picture", _INK, _font(side // 10), anchor="mm")
        return blank
    pixels = to_uint8(image).permute(1, 2, 0).contiguous().numpy()
    shown = Image.fromarray(pixels)
    whole = side // shown.width  # small pictures grow by a whole factor first, so that their pixels stay square
    if whole > 1:
        shown = shown.resize((shown.width * whole, shown.height * whole), Image.Resampling.NEAREST)
    return shown.resize((side, side), Image.Resampling.LANCZOS)


def _shades(logits: Tensor, side: int, against: Tensor | None = None) -> Image.Image:
    """The probabilities as a 4x10 grid, dark is present; framed in red if the sign differs from ``against``."""
    cell = side / _ROWS
    grid = Image.new("RGB", (round(_COLUMNS * cell * 0.75), side), "white")
    draw = ImageDraw.Draw(grid)
    for index, p in enumerate(logits.sigmoid().nan_to_num(0.5).tolist()):
        row, column = divmod(index, _COLUMNS)
        box = [column * cell * 0.75 + 1, row * cell + 1, (column + 1) * cell * 0.75 - 2, (row + 1) * cell - 2]
        shade = tuple(round(a + (b - a) * p) for a, b in zip(_PALE, _INK, strict=True))
        wrong = against is not None and bool((logits[index] > 0) != (against[index] > 0))
        draw.rectangle(box, fill=shade, outline=_WRONG if wrong else None, width=max(2, side // 50))
    return grid


def _key(attributes: Sequence[str], width: int) -> Image.Image:
    """The attributes' names in the order of the grids: four lines of ten."""
    font, line = _font(11), 40
    key = Image.new("RGB", (width, _ROWS * line + 30), "white")
    draw = ImageDraw.Draw(key)
    draw.text((12, 4), "Order of the shades (dark: present; red frame: differs from the target):", _INK, _font(13))
    for index, name in enumerate(attributes):
        row, column = divmod(index, _COLUMNS)
        text = name.replace("_", " ").replace(" ", "\n", 1)
        draw.multiline_text((12 + column * (width - 24) / _COLUMNS, 28 + row * line), text, _INK, font, spacing=1)
    return key


def contact_sheet(
    path: Path, headings: Sequence[str], rows: Sequence[Sequence[Image.Image]], captions: Sequence[str],
    footer: Image.Image | None = None,
) -> None:  # fmt: skip
    """Write rows of pictures, all of one height, under the headings of their columns, with a line below each row."""
    gap, line = 16, 24
    lefts = [gap]
    for picture in rows[0]:
        lefts.append(lefts[-1] + picture.width + gap)
    side = rows[0][0].height
    page = Image.new("RGB", (lefts[-1], 40 + len(rows) * (side + line + 8) + (footer.height if footer else 0)), "white")
    draw = ImageDraw.Draw(page)
    for x, heading in zip(lefts, headings, strict=False):
        draw.text((x, 12), heading, _INK, _font(16))
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = 40 + i * (side + line + 8)
        for x, picture in zip(lefts, row, strict=False):
            page.paste(picture, (x, y))
        draw.text((gap, y + side + 4), caption, _INK, _font(13))
    if footer is not None:
        page.paste(footer, (0, page.height - footer.height))
    with atomic_write(path) as temporary:
        page.save(temporary)


def write_sheet(
    folder: Path,
    headings: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    attributes: Sequence[str] = (),
) -> list[Path]:
    """The sheet, with a key to the shades of the attributes if there are any.

    Returns:
        The pages, sheet.png, sheet_2.png ..., of `SHEET_ROWS` rows each.
    """
    key = _key(attributes, sum(each.width + 16 for each in rows[0]) + 16) if attributes else None
    pages = []
    for start in range(0, len(rows), SHEET_ROWS):
        part = slice(start, start + SHEET_ROWS)
        pages.append(folder / (f"sheet_{start // SHEET_ROWS + 1}.png" if start else "sheet.png"))
        contact_sheet(pages[-1], headings, rows[part], captions[part], key)
    return pages


def write_results(
    folder: Path, settings: dict, done: Sequence[Finished], targets: Tensor, attributes: Sequence[str], size: int, log
) -> None:
    """The tables of the finished images, whose targets are (N, d), and the sheet of the first `SHEET_LIMIT`."""
    figures = [entry.figures for entry in done]
    unguided = [entry.unguided for entry in done if entry.unguided is not None]
    record = {"settings": settings, "images": [asdict(f) for f in figures], "mean": mean_figures(figures)}
    if unguided:
        record["unguided"] = {"images": [asdict(f) for f in unguided], "mean": mean_figures(unguided)}
    record = json_values(record)
    write_json(folder / "results.json", record)
    write_csv(folder / "results.csv", record["images"])

    def saved(kind: str, entry: Finished) -> Tensor | None:
        return load_image(folder / kind / f"{entry.name}.png", size) if kind in entry.pictures else None

    shown = done[:SHEET_LIMIT]
    if attributes:
        write_logits(folder / "logits.csv", [entry.name for entry in done], attributes, targets)
        beside = "input" if "input" in shown[0].pictures else "natural"
        headings = ["input" if beside == "input" else "g'(y), in one pass",
                    f"{len(attributes)} logits, all that is used", "reconstruction", "its attributes"]  # fmt: skip
        rows = [
            [picture(saved("input" if "input" in entry.pictures else "natural", entry), SIDE), _shades(target, SIDE),
             picture(saved("reconstruction", entry), SIDE), _shades(entry.logits, SIDE, target)]
            for entry, target in zip(shown, targets, strict=False)
        ]  # fmt: skip
    else:
        headings = [kind for kind in PICTURES if kind in shown[0].pictures]
        rows = [[picture(saved(kind, entry), SIDE) for kind in headings] for entry in shown]
    captions = [f"{entry.name}   {entry.figures.caption}" for entry in shown]
    pages = write_sheet(folder, headings, rows, captions, attributes)
    log.info("mean: %s", Figures("", **mean_figures(figures)).caption)
    if unguided:
        log.info("unguided, same noise: %s", Figures("", **mean_figures(unguided)).caption)
    if len(done) > len(shown):
        log.info("the sheet shows the first %d of %d images", len(shown), len(done))
    log.info("%s", ", ".join(str(page) for page in pages))
