"""No objective holds a matrix of all pairs, forward or backward, on any backend but the definition."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import CASES
from .peak_memory import ROWS
from .witnesses import served

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", served(torch.float32, definition=False))
def test_no_matrix_of_all_pairs(backend: str) -> None:
    command = [sys.executable, "-m", "tests.objectives.peak_memory", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    assert set(growth) == {case.id for case in CASES}
    # The workspace of `blocked` (96 MiB were seen) does not grow with n; one byte for each pair would be 64 MiB more.
    workspace = 2 * ROWS * ROWS if backend == "blocked" else ROWS * ROWS
    assert sum(growth.values()) < workspace, growth
