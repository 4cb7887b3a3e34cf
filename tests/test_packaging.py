"""Ways in from outside: an installed wheel, and torch.hub."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, cwd: Path) -> str:
    """The last line that a fresh process prints that runs ``code`` in ``cwd``, where this project is not."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_wheel_holds_all_that_is_imported(tmp_path):
    """Built as pip does it, of a copy, and unpacked as pip does it."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    shutil.copytree(ROOT / "DDNM", copy / "DDNM", ignore=shutil.ignore_patterns("exp", "__pycache__"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(file, copy)
    name = run("from setuptools.build_meta import build_wheel; print(build_wheel('.'))", copy)
    with zipfile.ZipFile(copy / name) as wheel:
        wheel.extractall(site)
    assert (site / "DDNM" / "configs" / "faces.yml").is_file()
    modules = {path.stem for path in site.glob("*.py")}
    assert modules == {path.stem for path in ROOT.glob("*.py")} - {"hubconf"}
    code = "import models, DDNM.main, DDNM.guided_diffusion.prior; print(models.__file__)"
    assert run(f"import sys; sys.path.insert(0, {str(site)!r}); {code}", tmp_path) == str(site / "models.py")


def test_torch_hub_loads_from_a_clone(tmp_path):
    """In a fresh process and another folder: the repository is flat, and its modules have common names."""
    code = f"""import torch
model, prior = (torch.hub.load({str(ROOT)!r}, name, source="local") for name in ("spnn", "prior"))
again = torch.hub.load({str(ROOT)!r}, "spnn", {str(ROOT / "DDNM/exp/logs/faces")!r}, source="local")
x = torch.randn(1, 3, 64, 64)
print(len(model.notes["attributes"]), prior(x, 10).shape[-1], torch.equal(model(x), again(x)))"""
    assert run(code, tmp_path) == "40 64 True"
