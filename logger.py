"""Logging to the console and a run folder, a table of metrics, its curves as a picture, and TensorBoard events."""

import csv
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from utils import InputError, atomic_write


class _Console(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _RunFile(logging.FileHandler):
    """The log of the present run; a type of its own, so that a second call finds it."""


def get_logger(name: str, folder: str | Path | None = None) -> logging.Logger:
    """A logger that writes to the console and, when ``folder`` is given, appends to ``folder/log.txt``.

    The handlers hang on the root logger, so warnings of other modules (an unreadable image, say) reach the same
    places. Repeated calls add nothing; a new folder takes the place of the one before; ``None`` leaves it as it is.
    """
    _take_over(_Console(), datefmt="%H:%M:%S")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _take_over(_RunFile(Path(folder) / "log.txt", encoding="utf-8"))
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    return logger


def _take_over(handler: logging.Handler, datefmt: str | None = None) -> None:
    """Put ``handler`` on the root logger, in the place of an earlier one of its type."""
    root = logging.getLogger()
    for old in [each for each in root.handlers if type(each) is type(handler)]:
        root.removeHandler(old)
        old.close()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt))
    root.addHandler(handler)


class MetricsTable:
    """A CSV table that grows by one row at a time and survives an interruption.

    Args:
        path: the file, ``metrics.csv`` in the run folder by custom; None keeps the rows in memory alone.
        rows: those to continue from, in place of the file's: a killed run wrote rows beyond the state that is resumed.
            None keeps the rows of an existing file.

    Raises:
        InputError: the file is no table.
    """

    def __init__(self, path: str | Path | None, rows: Sequence[Mapping[str, str]] | None = None) -> None:
        self.path = None if path is None else Path(path)
        if rows is None:
            rows = _read_table(self.path)[1] if self.path is not None and self.path.exists() else []
        self.rows = [dict(row) for row in rows]
        self.columns = list(dict.fromkeys(column for row in self.rows for column in row))
        if self.rows:
            self._write()
        elif self.path is not None:
            self.path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row. Columns may be missing (left empty) or new (the file is rewritten with a wider header)."""
        new = [column for column in row if column not in self.columns]
        self.columns += new
        self.rows.append({column: _text(value) for column, value in row.items()})
        if new:
            self._write()
        elif self.path is not None:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                self._writer(file).writerow(self.rows[-1])

    def _writer(self, file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, restval="", lineterminator="\n")

    def _write(self) -> None:
        if self.path is not None:
            with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                self._writer(file).writeheader()
                self._writer(file).writerows(self.rows)


def _text(value: object) -> str:
    if hasattr(value, "item"):  # a tensor or NumPy scalar
        value = value.item()
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; the last line is left out if an interruption has cut it."""
    text = path.read_text(encoding="utf-8")
    columns, *lines = csv.reader(text[: text.rfind("\n") + 1].splitlines() or [""])
    for i, line in enumerate(lines, start=2):
        if len(line) != len(columns):
            raise InputError(f"{path}, line {i}: {len(line)} values for {len(columns)} columns")
    return columns, [dict(zip(columns, line, strict=True)) for line in lines]


def format_table(rows: Sequence[Mapping], first: str, columns: Mapping[str, tuple[str, str]]) -> str:
    """Figures as a Markdown table: the column ``first``, and those of ``columns`` (heading, format) that a row has.

    A figure is a number, with an interval if the row has ``<column>_low`` and ``_high``, or (number, low, high).
    """

    def cell(row: Mapping, key: str) -> str:
        value, form = row.get(key), columns[key][1]
        values = value if isinstance(value, tuple) else (value, row.get(f"{key}_low"), row.get(f"{key}_high"))
        value, low, high = ("" if each in (None, "") else f"{float(each):{form}}" for each in values)
        return f"{value} ({low} to {high})" if low else value or "-"

    used = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [[first, *(columns[key][0] for key in used)], ["---"] * (len(used) + 1)]
    lines += [[row[first], *(cell(row, key) for key in used)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def tensorboard_events(folder: Path | None, begin: int) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """A function that writes the figures of a step for TensorBoard, if that is installed; else it does nothing.

    Args:
        folder: of the events; None writes none.
        begin: the first step to come: what a killed run wrote from there on does not count.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except ImportError:
        folder = None
    if folder is None:
        yield lambda figures, step: None
        return

    def write(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    with SummaryWriter(folder, purge_step=begin) as writer:
        yield write


# --- Curves ----------------------------------------------------------------------------------------------------------

_STYLES = {"train": "-", "val": "--", "test": ":"}


def plot_curves(table: str | Path, picture: str | Path) -> None:
    """Draw every numeric column of a metrics table, the seconds left out, over its first, the step or epoch.

    Each quantity has a panel: train_loss and val_loss are two lines of one, solid and dashed, and so are the losses
    of several methods, loss_NAME. Positive values over a wide range get a log axis.

    Raises:
        InputError: the table is malformed.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is needed
    from matplotlib.ticker import MaxNLocator

    columns, rows = _read_table(Path(table))
    axis, *others = columns
    at = [float(row[axis]) for row in rows]
    panels: dict[str, dict[str, tuple]] = {}  # quantity -> line -> xs, ys
    for column in others:
        words = column.split("_")
        line = " ".join(words[1:]) if words[0] == "loss" else next((word for word in words if word in _STYLES), "")
        quantity = "loss" if words[0] == "loss" else " ".join(word for word in words if word != line)
        values = (float(row[column] or "nan") for row in rows)
        points = [(x, y) for x, y in zip(at, values, strict=True) if math.isfinite(y)]
        if points and column != "seconds":
            panels.setdefault(quantity, {})[line] = tuple(zip(*points, strict=True))

    across = max(1, min(len(panels), 4))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.4 * across, 3.2 * down), layout="constrained")
    for i, (quantity, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, i, xlabel=axis, title=quantity)
        for line, (xs, ys) in lines.items():
            axes.plot(xs, ys, _STYLES.get(line, "-"), label=line, marker="o" if len(xs) <= 30 else None, markersize=3)
        values = [y for _, ys in lines.values() for y in ys]
        if quantity != "lr" and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
