"""Processes that fail say why, to every test that asks for their results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import launch


def test_what_failed_is_said_to_every_test(tmp_path: Path) -> None:
    """The second call once found the folder of the first, and said that alone."""
    for folder in (tmp_path / "new", tmp_path / "no" / "such"):
        said = [launch.results(2, folder, "tests.distributed.nothing") for _ in range(2)]
        assert said[0] == said[1] and isinstance(said[0], str)
        assert "No such file" in said[0] if folder.parent != tmp_path else said[0].count("No module named") == 2


def test_what_takes_too_long_has_its_output() -> None:
    program = "import time; print('so far', flush=True); time.sleep(60)"
    slow = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE)
    ((code, said),) = launch.finish([slow], timeout=3)
    assert code < 0 and said.startswith("so far") and said.endswith("killed after 3 s")
