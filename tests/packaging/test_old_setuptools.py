"""The setuptools that a new environment of an older Python comes with: `pip install --no-build-isolation` runs on it."""

from __future__ import annotations

import ensurepip
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import run

BUNDLED = [*Path(ensurepip.__file__).parent.glob("_bundled/setuptools-*.whl")]  # none from Python 3.12 on
METADATA = "from setuptools import build_meta; build_meta.get_requires_for_build_wheel()"


@pytest.mark.skipif(not BUNDLED, reason="this Python brings no setuptools of its own")
def test_it_reads_the_project(make_tree: Callable[[], Path], tmp_path: Path) -> None:
    """Before 77 it refuses an SPDX license in pyproject.toml: "`project.license` must be valid exactly by one definition"."""
    zipfile.ZipFile(BUNDLED[0]).extractall(tmp_path)
    tree = make_tree()
    run([sys.executable, "-c", METADATA], tree, {"PYTHONPATH": str(tmp_path)})
    (said,) = tree.glob("*.egg-info/PKG-INFO")
    assert {"Name: fastcl", "License: MIT"} <= set(said.read_text().splitlines())
