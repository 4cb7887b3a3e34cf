"""The modules of a wheel are the files at the root: pyproject.toml has the rest, and cannot say this."""

from pathlib import Path

from setuptools import setup

setup(
    py_modules=sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("setup", "hubconf"))
)
