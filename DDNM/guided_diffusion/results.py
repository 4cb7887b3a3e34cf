"""What a run of the sampler leaves behind: figures, tables, contact sheets, and the record of what is finished."""

import csv
import hashlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from DDNM.guided_diffusion.diffusion import image_generator, sampling
from DDNM.guided_diffusion.guidance import Guidance
from images import load_image, to_picture, to_uint8
from logger import format_table
from loop import check_settings, is_empty
from metrics import agreement, mean_of, prob_error, psnr
from operators import Operator
from utils import InputError, atomic_write, file_name, json_values, nearest, shown, write_json, write_text

PICTURES = ("input", "natural", "measured", "reconstruction", "unguided")  # folders of a result folder
SHEET_ROWS = 50  # nobody reads a thousand, and their pictures are held at once
SIDE = 160  # of its pictures


# of one image; None for what could not be had
FIGURES = (
    "agreement",  # share of the attributes whose sign, by g, is the target's, in [0, 1]
    "judge_agreement",  # the same by the independent judge
    "prob_error",  # mean |sigmoid(g(x)) - sigmoid(y)|, in [0, 1]
    "consistency",  # operator.distance of A x and y, for other measurements than logits, before x has 8 bits
    "psnr",  # against the input, dB
    "lpips",  # against the input (AlexNet)
    "seconds",  # of its share of the batch
    "steps",  # evaluations of the prior
    "seed",
)
CAPTIONS = {
    "agreement": ("agreement by g", ".2f"), "judge_agreement": ("by the judge", ".2f"),
    "prob_error": ("probability error", ".3f"), "consistency": ("|A x - y|", ".1e"), "psnr": ("PSNR", ".1f"),
    "lpips": ("LPIPS", ".3f"), "seconds": ("seconds", ".1f"),
}  # fmt: skip


def caption(figures: dict) -> str:
    """A line of those figures that there are."""
    return ", ".join(f"{said} {figures[k]:{form}}" for k, (said, form) in CAPTIONS.items() if figures[k] is not None)


class Record:
    """A file of JSON lines: the settings of a run, then a line for whatever is finished. Processes may add to one file.

    Args:
        settings: all that decides what the pictures look like, as JSON gives it back.
        otherwise: what to do if they are others.
    """

    def __init__(self, path: Path, settings: dict, otherwise: str = "start anew with --overwrite") -> None:
        self.path, self.settings, self.otherwise = path, settings, otherwise

    def read(self) -> list[dict]:
        """The lines; a last one that a kill cut short is left out.

        Raises:
            InputError: another run's settings, or a file that is no record.
        """
        try:
            header, *rows = [json.loads(line) for line in self.path.read_text().splitlines(True) if line[-1] == "\n"]
            settings = header["settings"]
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}: damaged ({type(error).__name__}); {self.otherwise}") from None
        check_settings(settings, self.settings, self.path.parent, self.otherwise)
        return rows

    def begin(self, rows: Sequence[dict]) -> None:
        """Write the file anew."""
        lines = (json.dumps(row) + "\n" for row in ({"settings": self.settings}, *rows))
        write_text(self.path, "".join(lines))

    def append(self, rows: Sequence[dict]) -> None:
        with open(self.path, "ab", buffering=0) as file:
            # in one write, so that processes' lines do not mix
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            os.fsync(file.fileno())


class Progress(Record):
    """progress.jsonl, with a line for each image, written after its pictures.

    ``name``; ``content``, see `contents`; ``pictures``, the kinds of them, which are the folders they lie in;
    ``figures``; ``unguided``, those of the unguided sample, if one was asked for; ``logits`` of the reconstruction,
    none if something else was measured.
    """

    NAME = "progress.jsonl"

    def __init__(self, folder: Path, settings: dict) -> None:
        super().__init__(folder / self.NAME, settings)
        self.folder = folder

    def finished(self, names: Sequence[str], content: Sequence[str]) -> list[dict | None]:
        """For each name what an earlier run wrote of it, None if it did not; the others are forgotten.

        Finished is what has its line, the same content, and its pictures. Raises InputError as `read`.
        """
        rows, wanted = {row["name"]: row for row in self.read()}, dict(zip(names, content, strict=True))
        rows = {
            name: row
            for name, row in rows.items()
            if name in wanted
            and wanted[name] == row.get("content")  # lines of older versions have none
            and all((self.folder / kind / f"{name}.png").is_file() for kind in row["pictures"])
        }
        self.begin(list(rows.values()))
        return [rows.get(name) for name in names]


def contents(files: Iterable[Path] | None, logits: Tensor | None = None) -> list[str]:
    """What tells each target from another of its name: a hash of its file, or of its row of a table, (N, d)."""
    said = logits.numpy() if files is None else (file.read_bytes() for file in files)
    return [hashlib.sha256(bytes(one)).hexdigest()[:16] for one in said]


# --- The folder -------------------------------------------------------------------------------------------------------


def check_results(folder: Path, resume: bool, overwrite: bool, ask: bool) -> None:
    """Raises InputError if ``folder`` has results that may neither be replaced nor continued."""
    resumable = (folder / Progress.NAME).is_file()
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if is_empty(folder) or overwrite or resume and resumable:
        return
    if ask and sys.stdin.isatty():
        if input(f"{folder} has results. Replace them? [y/N] ").strip().lower() in ("y", "yes"):
            return
    hint = " or --resume" if resumable else ""
    raise InputError(f"{folder} is not empty; give --overwrite{hint} or another folder")


def clear_results(folder: Path) -> None:
    """Delete what an earlier run wrote into its result folder, and nothing else."""
    files = (Progress.NAME, "sheet.png", "results.json", "results.csv", "logits.csv", "log.txt")
    for pattern in (*files, *(f"{kind}/*.png" for kind in PICTURES)):
        for file in folder.glob(pattern):
            file.unlink()


# --- Pictures --------------------------------------------------------------------------------------------------------


def draw(
    networks, names: Sequence[str], y: Tensor, rule: Guidance, steps: int, walk, label: str, shown: bool, log
) -> tuple[Tensor, dict[str, float]]:
    """Images (B, 3, S, S) of targets y by a rule; its evaluations of the prior and each image's seconds.

    What is not finite is named in the log.

    Args:
        networks, walk: `inputs.Networks` and `inputs.WalkSettings`. names: with the seed, the images' noise.
        label, shown: of the progress bar.
    """
    n, settings, started = networks, walk.travel | {"steps": steps}, time.perf_counter()
    count = rule.evaluations(n.prior.schedule, **settings)
    generators = [image_generator(walk.seed, name) for name in names]
    drawing = sampling(
        n.prior, generators, n.device, n.operator, y.to(n.device), rule, eta=walk.eta, clip_x0=walk.clip_x0, **settings
    )
    drawn = tqdm(drawing, label, count, leave=False, dynamic_ncols=True, disable=not shown)
    images = deque(drawn, maxlen=1)[0][1]
    finite = as_saved(images)[1].tolist()
    if broken := [name for name, ok in zip(names, finite, strict=True) if not ok]:
        log.warning("%s: not finite: %s; --clip_x0 and --max_move keep images in range", label, ", ".join(broken))
    return images, {"steps": count, "seconds": (time.perf_counter() - started) / len(names)}


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
) -> tuple[list[dict], list[list[float]]]:
    """The `FIGURES` of the pictures that are left of images (B, 3, H, W), and their logits, d each, if those are
    measured.

    An image that is not finite has none: its agreement is 0.
    """
    pictures, finite = as_saved(images)
    if targets.ndim == 2:
        logits = torch.where(finite[:, None], operator.A(pictures), math.nan)
        columns = {"agreement": agreement(logits, targets), "prob_error": prob_error(logits, targets)}
    else:
        logits = images.new_zeros(len(images), 0)
        columns = {"consistency": operator.distance(operator.A(images), targets)}
    if judge is not None and judge_targets is not None:
        by_judge = torch.where(finite[:, None], judge(pictures), math.nan)
        columns["judge_agreement"] = agreement(by_judge, judge_targets)
    figures = []
    for i, name in enumerate(names):
        values = common | {key: column[i].item() for key, column in columns.items()}
        if inputs[i] is not None and finite[i]:
            pair = pictures[i : i + 1], inputs[i][None].to(images.device)
            values |= {"psnr": psnr(*pair).item(), "lpips": None if lpips is None else lpips(*pair).item()}
        figures.append({"name": name} | {key: values.get(key) for key in FIGURES})
    return figures, logits.tolist()


@torch.no_grad()
def compare(
    pictures: Mapping[str, Tensor], x: Tensor, seconds: Mapping[str, float],
    judge: nn.Module | None, lpips: nn.Module | None,
) -> dict[str, dict]:  # fmt: skip
    """By method: how near pictures are to the originals x, (N, 3, H, W), means with intervals; seconds per image."""
    rows: dict[str, dict] = {}
    for name, images in pictures.items():
        rows[name] = {"PSNR, dB": mean_of(psnr(images, x)), "s/image": seconds.get(name)}
        if lpips is not None:
            rows[name]["LPIPS"] = mean_of(lpips(images, x).flatten())
        if judge is not None:
            rows[name]["judge agrees"] = mean_of(agreement(judge(images), judge(x)))
    return rows


# --- Tables ----------------------------------------------------------------------------------------------------------


def mean_figures(images: Sequence[dict]) -> dict:
    """The mean of every figure over the images that have it, None if none has."""
    known = {k: [i[k] for i in images if i[k] is not None and math.isfinite(i[k])] for k in FIGURES}
    return {key: fmean(values) if values else None for key, values in known.items()}


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
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as a table: {error}") from None
    wanted = ["name", *attributes]
    if not rows or sorted(header) != sorted(wanted):
        unknown = [shown(c) + nearest(c[:80], wanted) for c in header if c not in wanted]
        said = f"; unknown {unknown[0]}" if unknown else ""
        raise InputError(f"{path}: expected the columns name and {len(attributes)} attributes, and rows{said}")
    values: dict[str, list[float]] = {}
    for line, row in enumerate(filter(None, rows), start=2):
        try:
            said = dict(zip(header, row, strict=True))
            numbers = [float(said[a]) for a in attributes]
            if not torch.tensor(numbers).isfinite().all():  # in float32: 1e99 is none
                raise ValueError
        except ValueError:
            raise InputError(f"{path}, line {line}: expected a name and {len(attributes)} finite numbers") from None
        name = said["name"]
        if name in ("", ".", "..") or file_name(name) != name or name in values:  # it names the result's file
            raise InputError(f"{path}, line {line}: name {shown(name)} must be a file name, and each one's own")
        values[name] = numbers
    return list(values), torch.tensor(list(values.values()))


# --- The sheet -------------------------------------------------------------------------------------------------------

_INK, _PALE, _WRONG = (30, 32, 38), (236, 238, 242), (214, 60, 50)
_ROWS, _COLUMNS = 4, 10
_font = ImageFont.load_default


def picture(image: Tensor, side: int) -> Image.Image:
    """An image (3, H, W) in [-1, 1] for a sheet."""
    shown = to_picture(image)
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


def write_report(
    folder: Path, rows: dict[str, dict], columns: Mapping[str, Tensor], settings: dict,
    footer: Image.Image | None = None,
) -> None:  # fmt: skip
    """Figures by method, with intervals or not, as tables; pictures (N, 3, H, W) by heading as a sheet."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    table = format_table([{"": method, **row} for method, row in rows.items()], "", {n: (n, ".3g") for n in names})
    write_text(folder / "table.md", f"{table}\n")
    write_json(folder / "table.json", {"settings": {k: str(v) for k, v in settings.items()}, "rows": rows})
    side = [[picture(image, 128) for image in row] for row in list(zip(*columns.values(), strict=True))[:4]]
    contact_sheet(folder / "sheet.png", list(columns), side, [""] * len(side), footer)
    print(table)


def write_results(
    folder: Path, settings: dict, done: Sequence[dict], targets: Tensor, attributes: Sequence[str], size: int, log
) -> None:
    """The tables of the finished images (lines of `Progress`), whose targets are (N, d), and the sheet of some."""
    record = {"settings": settings, "images": [entry["figures"] for entry in done]}
    record["mean"] = mean_figures(record["images"])
    log.info("mean: %s", caption(record["mean"]))
    if done[0]["unguided"] is not None:
        unguided = [entry["unguided"] for entry in done]
        record["unguided"] = {"images": unguided, "mean": mean_figures(unguided)}
        log.info("unguided, same noise: %s", caption(record["unguided"]["mean"]))
    record = json_values(record)
    write_json(folder / "results.json", record)
    write_csv(folder / "results.csv", record["images"])

    def saved(kind: str, entry: dict) -> Image.Image:
        return picture(load_image(folder / kind / f"{entry['name']}.png", size), SIDE)

    shown, footer = done[:SHEET_ROWS], None
    if attributes:
        write_logits(folder / "logits.csv", [entry["name"] for entry in done], attributes, targets)
        beside, heading = ("input",) * 2 if "input" in shown[0]["pictures"] else ("natural", "g'(y), in one pass")
        headings = [heading, f"{len(attributes)} logits, all that is used", "reconstruction", "its attributes"]
        rows = [
            [saved(beside, entry), _shades(y, SIDE),
             saved("reconstruction", entry), _shades(torch.tensor(entry["logits"]), SIDE, y)]
            for entry, y in zip(shown, targets, strict=False)
        ]  # fmt: skip
        footer = _key(attributes, sum(each.width + 16 for each in rows[0]) + 16)
    else:
        headings = [kind for kind in PICTURES if kind in shown[0]["pictures"]]
        rows = [[saved(kind, entry) for kind in headings] for entry in shown]
    captions = [f"{entry['name']}   {caption(entry['figures'])}" for entry in shown]
    contact_sheet(folder / "sheet.png", headings, rows, captions, footer)
    if len(done) > len(shown):
        log.info("the sheet shows the first %d of %d images", len(shown), len(done))
    log.info("%s", folder / "sheet.png")
