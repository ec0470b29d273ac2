"""Memory is a promise: outside the definition nothing of size n x m is held, forward or backward.

Peak resident memory of a fresh process, above what it held with its inputs made and one small call done.
"""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROWS, WIDTH = 16384, 64
SCRIPT = """
import resource, sys, torch, fastcl
torch.set_num_threads(1)
on = {{"backend": "{backend}"}}
def rows_and_columns(x, y, mask="off_diagonal"):
    r, c = fastcl.pair_reduce(x, y, mask=mask, columns=True, **on)
    return r.sum() + c.sum()
call = {{
    "rows and columns": rows_and_columns,
    "contrast": lambda x, y: fastcl.pair_total(x, y, outer="contrast", positive=(x * y).sum(1), mask="off_diagonal", **on),
    "pooled": lambda x, y: fastcl.pair_total(x, y, outer="pooled", operand="sqdist", **on),
    "x with itself": lambda x, y: fastcl.pair_total(x, outer="sum", operand="sqdist", scale=-1.0, pair="exp", reduce="sum",
                                                    mask=fastcl.across_groups(torch.arange(x.shape[0]) // 2), **on),
    "guided": lambda x, y: rows_and_columns(x, y, fastcl.at_most(*x.new_zeros(2, len(x)), guide=(x, y))),
    "guided, with itself": lambda x, y: fastcl.pair_total(x, outer="pooled", **on,
                                                          mask=fastcl.at_most(x.new_zeros(len(x)), guide=y)),
}}["{case}"]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(n):
    x, y = torch.randn(n, {width}, requires_grad=True), torch.randn(n, {width}, requires_grad=True)
    before = peak()
    call(x, y).backward()
    return peak() - before
run(64)
print(run({rows}))
"""


CASES = ["rows and columns", "contrast", "pooled", "x with itself", "guided", "guided, with itself"]


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "blocked") for case in CASES), *((case, "cpu") for case in CASES[-2:])]
)
def test_no_matrix_of_pairs_is_held(case: str, backend: str) -> None:
    script = SCRIPT.format(case=case, rows=ROWS, width=WIDTH, backend=backend)
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300
    ).stdout
    matrix = ROWS * ROWS * 4  # 1 GiB in float32
    inputs = 2 * ROWS * WIDTH * 4
    # Blocks of 8 MiB, a few at a time (z, mask, weights and their temporaries), and a few copies of the inputs.
    assert int(output) < 12 * (8 << 20) + 8 * inputs < matrix / 5
