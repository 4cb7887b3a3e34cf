"""README, docs and the example: their Python runs, their links lead somewhere, and every flag they name exists."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import example

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{i}")
    for page in PAGES
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
COMMANDS = """evaluate app DDNM.main train_celeba DDNM.train_prior diagnostics procedural_faces judge train_operator
benchmarks.growth benchmarks.speed benchmarks.peak_memory experiments.segmentation experiments.train_stylegan""".split()


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs(snippet, capsys, tmp_path, monkeypatch, small_32):
    for path in [ROOT / "DDNM", *ROOT.glob("*.py")]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)  # as in a clone, where it may leave pictures
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "moved" in names:  # the errors it prints are rounding
        errors = re.findall(r"tensor\(([\d.e-]+)", capsys.readouterr().out)
        assert errors and all(float(error) < 1e-3 for error in errors)


def test_the_example_draws_a_face_and_changes_an_attribute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # from any folder
    monkeypatch.setattr(sys, "argv", ["example.py", "--steps", "8", "--out", str(tmp_path / "example.png")])
    example.main()
    assert float(capsys.readouterr().out.split()[-1]) > 0.5  # g sees the attribute
    assert Image.open(tmp_path / "example.png").width >= 3 * 64
    assert len(Path(example.__file__).read_text().splitlines()) <= 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_flag_named_exists(capsys):
    for module, *command in [*zip(COMMANDS), *(("invert", name) for name in ("find", "train", "eval"))]:
        with pytest.raises(SystemExit) as left:
            importlib.import_module(module).main([*command, "--help"])
        assert left.value.code == 0, module
    helps = capsys.readouterr().out
    for name in ("digits", "identity", "deepinv_samplers", "deepinv_physics"):  # they need what not all have
        helps += (ROOT / f"experiments/{name}.py").read_text()
    helps += "--nproc_per_node --gres --requeue --signal --time"  # of torchrun and Slurm
    for page in PAGES:
        for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8"))):
            assert flag in helps, f"{page.name}: {flag}"
