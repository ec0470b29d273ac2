"""Run the interpreted tests where they can run: in a process that imports the kernels with TRITON_INTERPRET=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
CASES = ("tests/triton/interpreted.py", "tests/triton/interpreted_float16.py", "tests/triton/interpreted_intrinsics.py")


def test_every_combination_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, "nothing ran"
    assert "skipped" not in result.stdout, result.stdout[-2000:]
