"""README: its Python runs, and every flag it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet, capsys):
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "moved" in names:  # the three errors it prints are rounding
        errors = re.findall(r"tensor\(([\d.e-]+)", capsys.readouterr().out)
        assert len(errors) == 3 and all(float(error) < 1e-3 for error in errors)


def test_every_flag_named_exists():
    helps = ""
    commands = ["DDNM/main.py", "train_celeba.py", "DDNM/train_prior.py", "diagnostics.py", "procedural_faces.py"]
    for command in [*commands, "invert.py train", "invert.py eval", "experiments/digits.py"]:
        shown = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        helps += shown.stdout
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)):
        assert flag in helps, flag
