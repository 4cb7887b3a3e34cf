"""Ways in from outside: an installed wheel, and torch.hub. Each in a process that has everything but this project."""

import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from runs import exit_code

ROOT = Path(__file__).resolve().parents[1]


def leave(folder: Path) -> None:
    """Go to ``folder`` without the project: its modules are forgotten, and where they are found."""
    own = {path.stem for path in (*ROOT.iterdir(), *(ROOT / "tests").iterdir())} - {__name__}
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "tests")]
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    os.chdir(folder)
    assert importlib.util.find_spec("models") is None


def build(copy: Path) -> None:
    os.chdir(copy)
    importlib.import_module("setuptools.build_meta").build_wheel(".")


def import_from(site: Path) -> None:
    leave(site.parent)
    sys.path.insert(0, str(site))
    for name in ("models", "DDNM.main", "DDNM.guided_diffusion.prior"):
        assert Path(importlib.import_module(name).__file__).is_relative_to(site)


def test_a_wheel_holds_all_that_is_imported(tmp_path):
    """Built as pip does it, of a copy, and unpacked as pip does it."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    shutil.copytree(ROOT / "DDNM", copy / "DDNM", ignore=shutil.ignore_patterns("exp", "__pycache__"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(file, copy)
    assert exit_code(build, copy) == 0
    with zipfile.ZipFile(*copy.glob("*.whl")) as wheel:
        wheel.extractall(site)
    assert (site / "DDNM" / "configs" / "faces.yml").is_file()
    assert {path.stem for path in site.glob("*.py")} == {path.stem for path in ROOT.glob("*.py")} - {"hubconf"}
    assert exit_code(import_from, site) == 0


def load_from_hub(folder: Path) -> None:
    leave(folder)
    model, prior = (torch.hub.load(str(ROOT), name, source="local") for name in ("spnn", "prior"))
    again = torch.hub.load(str(ROOT), "spnn", str(ROOT / "DDNM/exp/logs/faces"), source="local")
    x = torch.randn(1, 3, 64, 64)
    assert len(model.notes["attributes"]) == 40 and prior(x, 10).shape == x.shape
    assert torch.equal(model(x), again(x))


def test_torch_hub_loads_from_a_clone(tmp_path):
    """From another folder: the repository is flat, and its modules have common names."""
    assert exit_code(load_from_hub, tmp_path) == 0
