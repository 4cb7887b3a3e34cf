"""The example is a program that runs."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_draws_a_face_and_changes_an_attribute(tmp_path):
    picture = tmp_path / "example.png"
    command = [sys.executable, ROOT / "example.py", "--steps", "8", "--out", picture]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.5  # g sees the attribute
    assert Image.open(picture).width >= 3 * 64
    assert len((ROOT / "example.py").read_text().splitlines()) <= 60
