"""Logging to the console and a run folder, a table of metrics, and its curves as a picture."""

import csv
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from utils import InputError, atomic_write, unlinked

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _Console(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _RunFile(logging.FileHandler):
    """The log of the present run; a type of its own, so that a second call finds it."""

    def _open(self):
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=unlinked)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs the line in the file; the console has it. Logging's own way prints a traceback a line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def get_logger(name: str, folder: str | Path | None = None) -> logging.Logger:
    """A logger that writes to the console and, when ``folder`` is given, appends to ``folder/log.txt``.

    The handlers hang on the root logger, so warnings of other modules (an unreadable image, say) reach the same
    places. Repeated calls add nothing; a new folder takes the place of the one before; ``None`` leaves it as it is.

    Raises:
        InputError: the folder cannot be written, or its log.txt is a link.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _Console) for handler in root.handlers):
        console = _Console()
        console.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(console)
    if folder is not None:
        file = Path(folder).resolve() / "log.txt"
        present = [handler for handler in root.handlers if isinstance(handler, _RunFile)]
        if [Path(handler.baseFilename) for handler in present] != [file] or not file.exists():  # or was deleted since
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                handler = _RunFile(file, encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write {file}: {error.strerror or error}") from error
            handler.setFormatter(logging.Formatter(_FORMAT))
            for old in present:
                root.removeHandler(old)
                old.close()
            root.addHandler(handler)
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    return logger


class MetricsTable:
    """A CSV table that grows by one row at a time and survives an interruption.

    Args:
        path: the file, ``metrics.csv`` in the run folder by custom.
        rows: those to continue from, in place of the file's: a killed run wrote rows beyond the state that is resumed.
            None keeps the rows of an existing file.

    Raises:
        InputError: the file exists and is no table, or cannot be written.
    """

    def __init__(self, path: str | Path, rows: Sequence[Mapping[str, str]] | None = None) -> None:
        self.path = Path(path)
        self.columns: list[str] = []
        self.rows: list[dict[str, str]] = []
        if rows is not None:
            self.rows = [dict(row) for row in rows]
            self.columns = list(dict.fromkeys(column for row in rows for column in row))
            if rows:
                self._rewrite()
            else:
                self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self.columns, self.rows, whole = _read_table(self.path)
            if not whole:
                self._rewrite()

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row. Columns may be missing (left empty) or new (the file is rewritten with a wider header)."""
        new = [column for column in row if column not in self.columns]
        self.rows.append({column: _text(value) for column, value in row.items()})
        if new:
            self.columns += new
            self._rewrite()
            return
        try:
            with open(self.path, "a", newline="", encoding="utf-8", opener=unlinked) as file:
                csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(self.rows[-1])
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _rewrite(self) -> None:
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def _text(value: object) -> str:
    if hasattr(value, "item"):  # a tensor or NumPy scalar
        value = value.item()
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]], bool]:
    """Columns, rows, and whether the last line is complete (an interrupted run may have cut it; it is left out)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read metrics: {error}") from None
    whole = text.endswith("\n") or not text
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not lines:
        return [], [], whole
    columns = lines[0]
    for i, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise InputError(f"{path}, line {i}: {len(line)} values for {len(columns)} columns")
    return columns, [dict(zip(columns, line, strict=True)) for line in lines[1:]], whole


_AXES = ("step", "iteration", "epoch")
_SPLITS = {"train": "-", "val": "--", "valid": "--", "validation": "--", "test": ":"}


def _series(column: str) -> tuple[str, str]:
    """The quantity a column measures and the line style of its split: ``val_loss`` is ``("loss", "--")``."""
    words = re.split(r"[_/. ]", column)
    split = next((word for word in words if word.lower() in _SPLITS), None)
    rest = "_".join(word for word in words if word != split)
    return rest or column, _SPLITS[split.lower()] if split is not None else "-"


def _panel(quantity: str) -> str:
    lower = quantity.lower()
    if "loss" in lower or "bce" in lower:
        return "loss"
    return "accuracy" if "acc" in lower else quantity


def plot_curves(table: str | Path, picture: str | Path) -> None:
    """Draw every numeric column of a metrics table over its step or epoch.

    Losses share a panel, accuracies share a panel, every other quantity has its own. A quantity keeps its colour over
    the splits: training is solid, validation dashed, test dotted. Positive values over a wide range get a log axis.

    Raises:
        InputError: the table is missing, empty or malformed, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and no display is needed
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    table = Path(table)
    columns, rows, _ = _read_table(table)
    if not rows:
        raise InputError(f"{table}: no rows to plot")
    axis = next((name for name in _AXES if name in columns), None)
    x = [_number(row[axis]) for row in rows] if axis is not None else list(range(1, len(rows) + 1))

    panels: dict[str, list[tuple[str, list[float], list[float]]]] = {}
    for column in columns:
        if column in _AXES:
            continue
        points = [(at, _number(row[column])) for at, row in zip(x, rows, strict=True)]
        points = [(at, value) for at, value in points if math.isfinite(at) and math.isfinite(value)]
        if points:
            xs, ys = zip(*points, strict=True)
            panels.setdefault(_panel(_series(column)[0]), []).append((column, list(xs), list(ys)))
    if not panels:
        raise InputError(f"{table}: no numbers to plot")

    order = sorted(panels, key=lambda panel: {"loss": 0, "accuracy": 1}.get(panel, 2))  # stable: then as in the table
    across = min(len(order), 3)
    down = -(-len(order) // across)
    figure = Figure(figsize=(5.2 * across, 3.6 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(order):
        axes = figure.add_subplot(down, across, i + 1)
        colours: dict[str, str] = {}
        for column, xs, ys in panels[panel]:
            quantity, style = _series(column)
            colour = colours.setdefault(quantity, f"C{len(colours) % 10}")
            marker = "o" if len(xs) <= 30 else None
            label = column.replace("_", " ")
            axes.plot(xs, ys, style, color=colour, marker=marker, markersize=3, linewidth=1.4, label=label)
        values = [value for _, _, ys in panels[panel] for value in ys]
        if panel != "lr" and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel(axis if axis is not None else "row")
        if axis is not None and all(float(at).is_integer() for at in x if math.isfinite(at)):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(panel.replace("_", " "))
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
