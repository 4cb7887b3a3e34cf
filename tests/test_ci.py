""".ci/oldest: it skips where the oldest set cannot be had, says why, and fails where a bound is wrong."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# stands for the system's Python, and copies itself into the environment it "makes", whose pip then says $SAYS
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c import sys;"*) exit "$VERSION" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *" pip install "*) echo "$SAYS"; sleep "$TAKES"; [ -z "$SAYS" ] ;;
  *" pytest "*) echo "tested: $*" ;;
esac
"""
NOWHERE = "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)"


@pytest.fixture
def oldest(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "oldest", tmp_path / ".ci")
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def oldest(
        *arguments: str, says: str = "", version: int = 0, takes: int = 0, minutes: str = "1"
    ) -> tuple[int, str]:
        own = {"SAYS": says, "VERSION": str(version), "TAKES": str(takes), "OLDEST_MINUTES": minutes}
        shown = subprocess.run(
            ["bash", tmp_path / ".ci" / "oldest", *arguments], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHON": str(tmp_path / "python"), "OLDEST_VENV": str(tmp_path / "venv"), **own},
        )  # fmt: skip
        return shown.returncode, shown.stdout + shown.stderr

    return oldest


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"version": 1}, "no Python 3.10 or 3.11 here"),
        ({"says": NOWHERE}, "it cannot be installed: ERROR: Could not find a version"),
        ({"says": "Killed"}, "it cannot be installed: Killed"),
        ({"takes": 30, "minutes": "0.01"}, "the installation took more than 0.01 minutes"),
    ],
)
def test_what_cannot_be_installed_is_skipped_and_said(oldest, settings, said):
    status, text = oldest(**settings)
    assert status == 0 and f"SKIPPED: the oldest supported set was not tested: {said}" in text
    assert "tested: -m pytest" not in text


@pytest.mark.parametrize(
    "says, said",
    [
        ("ERROR: ResolutionImpossible: for help visit", "contradict each other"),
        (NOWHERE.replace("none", "2.3.0, 2.4.1"), "names a version that there is not"),
    ],
)
def test_a_bound_that_is_wrong_fails(oldest, says, said):
    status, text = oldest(says=says)
    assert status == 1 and said in text and "SKIPPED" not in text


def test_bounds_that_differ_between_the_files_fail(oldest, tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(path.read_text().replace("numpy>=1.24", "numpy>=1.26"))
    status, text = oldest()
    assert status == 1 and "name different versions" in text


def test_an_environment_is_made_once_for_the_same_requirements(oldest, tmp_path):
    for arguments, tests in (((), "tests/test_laws.py"), (("tests/test_utils.py",), "tests/test_utils.py")):
        status, text = oldest(*arguments)
        assert status == 0 and tests in text.split("tested: -m pytest")[1], text
        assert ("installing" in text) == (not arguments)
    with open(tmp_path / "requirements-dev.txt", "a") as file:
        file.write("another\n")
    assert "installing" in oldest()[1]


def test_every_test_it_names_is_there():
    text = (ROOT / ".ci" / "oldest").read_text()
    named = text[text.index("TESTS=(") : text.index(")", text.index("TESTS=("))].replace("TESTS=(", "").split()
    assert len(named) > 5 and all((ROOT / name).is_file() for name in named)
