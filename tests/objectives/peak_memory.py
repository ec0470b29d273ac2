"""Forward and backward of every objective at n = 8192: the peak of memory after each. Run by test_memory.py in its own process.

python -m tests.objectives.peak_memory blocked
"""

import json
import resource
import sys

import torch

from .cases import CASES
from .witnesses import gradients, library

ROWS, WIDTH = 8192, 8


def peak_bytes() -> int:
    """The most resident memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(backend: str) -> None:
    """Print {case: bytes by which it raised the peak} as JSON, after a small run that loads whatever is loaded once."""
    growth = {}
    for n in (256, ROWS):
        for case in CASES:
            # Objectives over both views have 2n rows: half as many of each, so that every matrix would be n x n.
            count = n // 2 if case.rows == 2 or len(case.inputs(3, 2)[0]) == 6 else n
            rows = case.rows_of(count, WIDTH, torch.float32)
            arguments = case.arguments(0, count, WIDTH, rows[0])
            before = peak_bytes()
            gradients(library(case, rows, backend, **arguments), rows)
            growth[case.id] = peak_bytes() - before
    print(json.dumps(growth))


if __name__ == "__main__":
    main(sys.argv[1])
