"""Masks with a period on CUDA's forms: which diagonal meets a block at the ends of the indices, and what is told by groups."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from fastcl.backends import cuda
from fastcl.backends.cuda import fused, hopper, strip
from fastcl.equation.masks import Mask
from tests.triton.problems import problem
from tools.ptxemu import nvcc

from .emulation import CSRC, EXTRA, emulated
from .fused_launching import I64, Launcher, P, Struct

BLOCK, LAST = 128, 2**31 - 3 * 128  # of rows and of columns; where the last block that the fused kernels take begins
EDGES = (0, BLOCK, 2**30, LAST - BLOCK, LAST)
FAR = (2**31 - 1, 2**31, 2**31 + BLOCK, 2**32, 2**62)


class Met(Struct):
    _fields_: ClassVar = [("asked", P), ("count", I64), ("met", P)]


def met(asked: list[tuple[int, int, int, int]]) -> list[int]:
    """Column less row within the block of the pairs that (diff, period, row0, col0) leaves out, by the kernels' own code."""
    source = CSRC.parent / "tests" / "cuda" / "diagonals.cu"
    launch = Launcher(nvcc.load_host_library(source, arch="sm_80", include_dirs=[CSRC / "cuda"], extra=EXTRA))
    found = torch.empty(len(asked), dtype=torch.int64)
    launch("met", Met, fresh=[found], asked=torch.tensor(asked), count=len(asked), met=found)
    return [int(k) for k in found]


def expected(diff: int, period: int, row0: int, col0: int) -> int | None:
    here = [diff + shift + row0 - col0 for shift in {0, period, -period}]
    inside = [k for k in here if -BLOCK < k < BLOCK]
    assert len(inside) < 2
    return inside[0] if inside else None


def test_the_diagonal_that_meets_a_block_up_to_the_last_index() -> None:
    """Of one diagonal, wherever it lies, and of several as the host tells them: the one at diff meets the pairs."""
    size = LAST + BLOCK
    single = [(d, 0, i, j) for e in (*EDGES, *FAR) for d in (e, -e, e + 5, -e - 5) for i in EDGES for j in EDGES]
    diffs = [s * d for s in (1, -1) for d in (0, 5, 2**30 + 1, size - 1)]
    periods = (2 * BLOCK, 2**31 - 1, 2**31, 2**31 + 7, 2 * size - 2, 2**32 - 1, 2**32, 2**62)
    several = [(d, p, i, j) for d in diffs for p in periods for i in EDGES for j in EDGES]
    # Where the diagonal a period away is the one that meets the block.
    several += [
        (j - i + s * p + k, p, i, j)
        for p in periods for i in EDGES for j in EDGES for s in (1, -1) for k in (-127, -5, 0, 127)
        if abs(j - i + s * p + k) < size
    ]  # fmt: skip
    asked, crossed = [*single, *several], 0
    for first in range(0, len(asked), 1024):
        part = asked[first : first + 1024]
        for question, answer in zip(part, met(part), strict=True):
            want = expected(*question)
            crossed += want is not None
            assert answer == (-(2**30) if want is None else want), question
    assert crossed > 200


@pytest.mark.parametrize(("form", "least"), [("fused", 256), ("hopper", 320)])
@pytest.mark.parametrize("further", [-1, 0])
def test_diagonals_too_close_for_a_block_are_told_by_groups(
    form: str, least: int, further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no others: of those no tile pays for groups."""
    monkeypatch.setenv("FASTCL_CUDA", form)
    assert least == {"fused": fused, "hopper": hopper}[form].LEAST_PERIOD
    p = problem(40, 50, 16, dtype=torch.bfloat16)
    told = p.__class__(**{**p.__dict__, "mask": Mask("off_diagonal", 3, 0, period=least + further)})
    with emulated(90), cuda._serving(told, gradients=False) as (served, taken):
        assert served.__name__.endswith(form)
        assert taken.mask.kind == ("across_groups" if further else "off_diagonal")


@pytest.mark.parametrize(
    ("op", "least"), [("strip_reduce", None), ("fused_rows", 256), ("fused_gradient", 256), ("hopper_rows", 320)]
)
def test_a_period_that_a_kernel_would_not_keep_is_refused(op: str, least: int | None) -> None:
    """Of the ops' callers too."""
    one = torch.ones(())
    equation = [one, one, *(None,) * 6, 0]
    rest = ["off_diagonal", "dot", "identity", 0.0, 0.0, "logsumexp"]
    assert strip.LEAST_PERIOD == 1  # its tiles are told one diagonal each
    words = "0, diff telling the diagonal that meets the tile" if least is None else f"0 or at least {least}, so that one"
    with emulated(90):
        called = getattr(torch.ops.fastcl_emulated, op).default
        arguments = [*equation, (least or 1000) - 1, *rest]
        filled = {"Tensor": torch.zeros(8, 8), "int": 0, "bool": False}
        arguments += [filled.get(str(a.type)) for a in called._schema.arguments[len(arguments) :]]
        with pytest.raises(ValueError, match=f"period: expected {words}"):
            called(*arguments)
