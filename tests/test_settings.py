"""Dataclasses as flags and presets: what is taken, what is refused, and in which words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from helpers import refused

from utils import option, parse, run_command


@dataclass(frozen=True)
class Training:
    """How it is trained. More about it."""

    out: Path = option(..., "result folder")
    count: int = option(3, "of steps", 1)
    rate: float = option(0.5, "per step", 0, 1)
    kind: Literal["one", "two"] = option("one")
    fast: bool = option(False, "at once")
    clip: bool = True
    seed: int = option(0, "of everything", 0, 2**63 - 1)


@dataclass
class Drawing:
    """What is drawn."""

    widths: tuple[int, ...] = option((4, 8), "of each level", 1, 100)
    set: list[str] = option([], "an attribute; may be repeated")
    eta: float | None = option(None, "DDIM's variance", 0, 1)
    size: int | None = None
    seed: int = 0
    colour: str = option("red", choices=("red", "blue"))


def settings(*argv, preset=None, tmp_path=None, extra=()):
    if preset is not None:
        (tmp_path / "preset.yml").write_text(preset, encoding="utf-8")
        argv = ("--config", str(tmp_path / "preset.yml"), *argv)
    return parse("What it does.", Training, Drawing, argv=argv, extra=extra)


def test_flags_of_every_type():
    training, drawing, extra = settings("--out", "here")
    assert training == Training(out=Path("here")) and drawing == Drawing() and extra == {}
    training, drawing, _ = settings(
        *"--out o --count 7 --rate 2e-1 --kind two --fast --no-clip --widths 1,2 3 --set a=1 --set b=0".split(),
        *"--eta 0.5 --size 9 --seed 9223372036854775807 --colour blue".split(),
    )
    assert training == Training(out=Path("o"), count=7, rate=0.2, kind="two", fast=True, clip=False, seed=2**63 - 1)
    assert drawing == Drawing((1, 2, 3), ["a=1", "b=0"], 0.5, 9, 2**63 - 1, "blue")


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default(tmp_path):
    preset = "out: there\ncount: 7\nrate: 2e-1\nfast: true\nclip: false\n"
    preset += "widths: [5, 6]\nset: x=1\neta: 0.5\nchain: [1, {a: 2}]\n"
    training, drawing, extra = settings(
        *"--count 9 --no-fast --eta none --set y=-1".split(), preset=preset, tmp_path=tmp_path, extra=["chain", "other"]
    )
    assert training == Training(out=Path("there"), count=9, rate=0.2, fast=False, clip=False)
    assert drawing == Drawing(widths=(5, 6), set=["y=-1"], eta=None) and extra == {"chain": [1, {"a": 2}]}
    assert settings(preset="out: o\nset: [--x, y=1]\n", tmp_path=tmp_path)[1].set == ["--x", "y=1"]
    for empty in ("none", "null", ""):
        assert settings(preset=f"out: here\neta: {empty}\n", tmp_path=tmp_path)[1].eta is None
    for text in ("007", "2024-01-01", "on", "1e5", "1:30", "'#5'", "-x"):  # YAML makes a number or a date of them
        training, _, _ = settings(preset=f"out: {text}\nfast: on\n", tmp_path=tmp_path)
        assert training.out == Path(text.strip("'")) and training.fast is True
    training, _, _ = settings(preset="<<: {count: 4, out: a, size: 3}\n", tmp_path=tmp_path)
    assert training == Training(out=Path("a"), count=4)
    (tmp_path / "small.yml").write_text("size: 4\n")
    assert parse("", Drawing, argv=["--config", "small.yml"], presets=tmp_path)[0].size == 4


@pytest.mark.parametrize("argv, said", [
    ([], "required: --out"),
    (["--count", "0"], "argument --count: '0' is out of range, must be in [1, 9.22337e+18]"),
    (["--count", "1.5"], "argument --count: '1.5' is not a whole number"),
    (["--count", str(2**63)], "argument --count: '9223372036854775808' is out of range"),
    (["--rate", "nan"], "argument --rate: 'nan' is out of range, must be in [0, 1]"),
    (["--out", ""], "argument --out: '' is empty"),
    (["--kind", "tow"], "'tow' must be one of one, two, did you mean 'two'?"),
    (["--colour", "green"], "must be one of red, blue"),
    (["--widths", "4,200"], "argument --widths: '200' is out of range"),
    (["--cuont", "3"], "unknown argument '--cuont', did you mean '--count'?"),
    (["--count"], "argument --count: expected one argument"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_status_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: settings(*argv))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and said in message
    assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 400


@pytest.mark.parametrize("text, said", [
    ("count: 0", "count: '0' is out of range"),
    ("count: true", "count: 'true' is not a whole number"),
    ("count:", "count: '' is not a whole number"),
    ("count: [1]", "count: expected one value"),
    ("widths: [1, [2]]", "widths: expected values"),
    ("fast: 1", "fast: must be true or false"),
    ("help: true", "unknown key 'help'"),
    ("count: 1\ncount: 2", "the key 'count' is there twice"),
])  # fmt: skip
def test_a_preset_is_checked_like_a_command_line(tmp_path, text, said):
    assert "preset.yml" in refused(said, settings, preset=text, tmp_path=tmp_path)


def test_help_names_flags_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        settings("--help")
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for words in ("What it does.", "How it is trained", "--fast, --no-fast", "(default: 0.5)", "(default: 4,8)",
                  "of everything (default: 0)",
                  "one|two", "result folder (must be given)"):  # fmt: skip
        assert words in said
