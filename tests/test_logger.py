import csv
import logging

import pytest
import torch
from PIL import Image

from logger import MetricsTable, format_table, get_logger, plot_curves, tensorboard_events
from utils import InputError


def table(path):
    return list(csv.DictReader(path.open()))


def test_log_reaches_file_and_console_once(tmp_path, capsys):
    get_logger("run", tmp_path / "a")
    log = get_logger("run", tmp_path / "a")
    log.info("hello")
    logging.getLogger("some_module").warning("left out: 7.jpg")
    text = (tmp_path / "a" / "log.txt").read_text()
    assert text.count("hello") == 1 and text.count("left out: 7.jpg") == 1
    console = capsys.readouterr().err
    assert console.count("hello") == 1 and console.count("left out") == 1
    get_logger("run", tmp_path / "b")
    get_logger("other").info("two")
    assert "two" not in (tmp_path / "a" / "log.txt").read_text()
    assert "two" in (tmp_path / "b" / "log.txt").read_text()


def test_table_grows_rows_and_columns_and_resumes(tmp_path):
    """A killed run wrote rows beyond its last saved state, or a line that was cut short."""
    path = tmp_path / "metrics.csv"
    metrics = MetricsTable(path)
    metrics.append({"epoch": 1, "train_loss": torch.tensor(0.5)})
    saved = metrics.rows[:]
    metrics.append({"epoch": 2, "train_loss": 0.25, "val_loss": float("nan")})
    path.write_text(path.read_text() + "3,0.")
    metrics = MetricsTable(path)  # without a state
    metrics.append({"epoch": 3})
    assert table(path) == [
        {"epoch": "1", "train_loss": "0.5", "val_loss": ""},
        {"epoch": "2", "train_loss": "0.25", "val_loss": "nan"},
        {"epoch": "3", "train_loss": "", "val_loss": ""},
    ]
    resumed = MetricsTable(path, saved)
    assert table(path) == [{"epoch": "1", "train_loss": "0.5"}]
    resumed.append({"epoch": 2, "train_loss": 0.125})
    assert [row["train_loss"] for row in table(path)] == ["0.5", "0.125"]
    MetricsTable(path, [])
    assert not path.exists()


def test_figures_with_intervals_are_a_markdown_table():
    rows = [{"name": "a", "x": 1.0, "x_low": 0.0, "x_high": 2.0}, {"name": "b", "x": None, "y": (1, 2.0, "3")}]
    assert format_table(rows, "name", {"x": ("X", ".1f"), "y": ("Y", ".3g"), "z": ("Z", ".1f")}).splitlines() == [
        "| name | X | Y |", "| --- | --- | --- |", "| a | 1.0 (0.0 to 2.0) | - |", "| b | - | 1 (2 to 3) |",
    ]  # fmt: skip


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2,3\n")
    with pytest.raises(InputError, match="line 2: 3 values for 2 columns"):
        MetricsTable(tmp_path / "metrics.csv")


def test_curves(tmp_path):
    metrics = MetricsTable(tmp_path / "metrics.csv")
    for epoch in range(1, 6):
        row = {"epoch": epoch, "train_loss": 1 / epoch**3, "val_loss": 2 / epoch, "val_accuracy": 0.5 + epoch / 20}
        metrics.append({**row, "lr": 1e-3, **({"penrose": 1e-6} if epoch == 3 else {})})
    plot_curves(metrics.path, tmp_path / "curves.png")
    four = Image.open(tmp_path / "curves.png").width  # loss, accuracy, lr and penrose
    (tmp_path / "methods.csv").write_text("step,loss_plain,loss_landscape\n0,2,2\n1,1,0.5\n")
    plot_curves(tmp_path / "methods.csv", tmp_path / "curves.png")
    assert 400 < Image.open(tmp_path / "curves.png").width < four / 3  # two lines of one panel


def test_tensorboard_events_beside_the_table(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, steps in ((1, (1, 2, 3)), (3, (3, 4))):  # killed after step 3 of which the state knew two
        with tensorboard_events(tmp_path / "events", begin) as write:
            for step in steps:
                write({"loss": 10 * begin + step}, step)
    found = EventAccumulator(str(tmp_path / "events"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 11), (2, 12), (3, 33), (4, 34)]
    with tensorboard_events(None, 0) as write:
        write({"loss": 1.0}, 1)
