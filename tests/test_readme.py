"""README: its Python runs, and every flag it names exists."""

import importlib
import re
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


def test_every_flag_named_exists(capsys):
    modules = "DDNM.main train_celeba DDNM.train_prior diagnostics procedural_faces judge".split()
    modules += ["benchmarks.growth", "benchmarks.speed", "benchmarks.throughput", "benchmarks.peak_memory"]
    for module, *command in [*zip(modules), ("invert", "train"), ("invert", "eval")]:
        with pytest.raises(SystemExit) as left:
            importlib.import_module(module).main([*command, "--help"])
        assert left.value.code == 0, module
    helps = capsys.readouterr().out + (ROOT / "experiments/digits.py").read_text()  # needs what not all have
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)):
        assert flag in helps, flag
