"""The example is a program that runs."""

import sys
from pathlib import Path

from PIL import Image

import example


def test_the_example_draws_a_face_and_changes_an_attribute(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "example.png"
    monkeypatch.setattr(sys, "argv", ["example.py", "--steps", "8", "--out", str(picture)])
    monkeypatch.chdir(tmp_path)
    example.main()
    assert float(capsys.readouterr().out.split()[-1]) > 0.5  # g sees the attribute
    assert Image.open(picture).width >= 3 * 64
    assert len(Path(example.__file__).read_text().splitlines()) <= 60
