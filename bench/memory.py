"""Peak memory of one method in a process of its own: `python -m bench.memory CASE METHOD N` prints bytes.

What one forward and backward adds to the resident memory that the process has with its inputs made and, at a small size, the
method run once (so that libraries are loaded and code is compiled). Linux only: the peak is reset in between, since importing
torch alone reaches higher than a small loss does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .baselines import methods
from .cases import CASES
from .measure import step


def reset_peak() -> None:
    """Let the peak start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The highest resident memory since the last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("VmHWM: expected in /proc/self/status, got none; peak memory is measured on Linux only")


def main(case_name: str, method_name: str, n: int) -> None:
    case = CASES[case_name].resized(n)
    method = methods(case.loss, n)[method_name]()
    if method_name != "torch.compile":  # it would compile for the small size only
        step(method, *case.resized(256).inputs())
    x, y = case.inputs()
    reset_peak()
    before = peak()
    step(method, x, y)
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
