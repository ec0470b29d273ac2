"""Peak memory of one method in a process of its own: `python -m bench.memory CASE METHOD N` prints bytes.

What one forward and backward adds to the resident memory that the process had with its inputs made and, at a small size, the
method run once (so that libraries are loaded and code is compiled).
"""

from __future__ import annotations

import resource
import sys

from .baselines import methods
from .cases import CASES
from .measure import step


def peak() -> int:
    """The highest resident memory of this process so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(case_name: str, method_name: str, n: int) -> None:
    case = CASES[case_name].resized(n)
    method = methods(case.loss, n)[method_name]()
    if method_name != "torch.compile":  # it would compile for the small size only
        step(method, *case.resized(256).inputs())
    x, y = case.inputs()
    before = peak()
    step(method, x, y)
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
