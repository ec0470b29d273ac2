"""off_diagonal with a period: a row's own views left out by two diagonals say what groups say, at every backend's tile borders."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.equation.masks import Mask, by_groups, on_tile, three_diagonals
from tests.objectives.witnesses import gradients, served
from tests.oracle import pairwise

CPU = torch.device("cpu")


def keeps(mask: Mask, i: int, j: int) -> bool:
    """What a kernel makes of a mask that `three_diagonals` made."""
    if mask.kind == "all":
        return True
    if mask.kind == "off_diagonal":
        return i + mask.row_offset - j - mask.col_offset not in (0, mask.period, -mask.period)
    assert mask.group_x is not None
    return bool(mask.group_x[i] != (mask.group_x if mask.group_y is None else mask.group_y)[j])


@pytest.mark.parametrize("period", [1, 2, 3, 5, 9])
def test_kernels_are_told_the_same_pairs(period: int) -> None:
    """Every small size and offset; no more than three diagonals, and a period only where two of them meet the pairs."""
    kinds = set()
    for n, m, row_offset in itertools.product((0, 1, 4, 6), (None, 0, 1, 5, 7), (-3, 0, 5)):
        for col_offset in (row_offset,) if m is None else (-2, 0, 4):
            asked = fastcl.off_diagonal(row_offset, col_offset, period)
            told = three_diagonals(asked, n, m, CPU)
            keep = pairwise.off_diagonal(row_offset, col_offset, period)
            pairs = list(itertools.product(range(n), range(n if m is None else m)))
            assert [keeps(told, i, j) for i, j in pairs] == [keep(i, j) for i, j in pairs], (asked, n, m, told)
            if told.kind == "off_diagonal" and told.period and pairs:
                assert told.period < n + (n if m is None else m) and (
                    m is not None or told.row_offset == told.col_offset
                )
            kinds.add((told.kind, told.period > 0))
    assert ("across_groups", False) in kinds or period > 3


@pytest.mark.parametrize("period", [3, 5, 9])
def test_a_tile_is_told_its_diagonal(period: int) -> None:
    """That which meets it, if any; several are left to groups."""
    several = 0
    for diff, i0, height, j0, width in itertools.product((-6, 0, 2), (0, 4), (1, 3), (0, 5, 7), (1, 4)):
        mask, rows, cols = Mask("off_diagonal", diff, 0, period=period), range(i0, i0 + height), range(j0, j0 + width)
        left_out = [(i, j) for i, j in itertools.product(rows, cols) if not keeps(mask, i, j)]
        told = on_tile(mask, rows, cols)
        if told is None:
            several += 1
            assert len({j - i for i, j in left_out}) > 1
        else:
            assert told.period == 0
            assert left_out == [(i, j) for i, j in itertools.product(rows, cols) if not keeps(told, i, j)]
    assert several > 0 or period > 6


@pytest.mark.parametrize("m", [None, 7])
def test_groups_keep_the_limits(m: int | None) -> None:
    """Kernels on a GPU take groups where diagonals lie close together: limits that fell off there made a loss silently another."""
    limits = torch.rand(6), None if m is None else torch.rand(m)
    guide = torch.rand(6, 2) if m is None else (torch.rand(6, 2), torch.rand(m, 2))
    mask = fastcl.at_most(*limits, guide=guide, mask=fastcl.off_diagonal(period=3))
    told = by_groups(mask, 6, m, CPU)
    assert told.guide_x is mask.guide_x is not None and told.guide_y is mask.guide_y
    assert told.kind == "across_groups" and told.period == 0
    for mine, given in zip((told.limit_x, told.limit_y), limits, strict=True):
        assert (mine is None) == (given is None) and (mine is None or torch.equal(mine, given))


# n, m (None: x itself), offsets, period: within a tile, across tiles, three diagonals, more than three, beyond all pairs.
PROBLEMS = [
    (80, None, (0, 0), 40),
    (602, None, (5, 5), 301),
    (301, 602, (0, 0), 301),
    (150, 290, (7, 0), 130),
    (290, 150, (0, 41), 140),
    (130, 140, (900, 3), 410),
    (120, None, (0, 0), 7),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m", "offsets", "period"), PROBLEMS)
def test_the_same_as_groups(n: int, m: int | None, offsets: tuple[int, int], period: int, dtype: torch.dtype) -> None:
    """Values and gradients, rows and columns: by the definition they are equal, by a backend to its last digits."""
    g = torch.Generator().manual_seed(n)
    x, y = (torch.randn(size, 16, generator=g).div(4.0).to(dtype) for size in (n, m or 1))
    rows, cols = ((torch.arange(size) + offset) % period for size, offset in zip((n, m or 1), offsets, strict=True))
    masks = fastcl.off_diagonal(*offsets, period), fastcl.across_groups(rows, None if m is None else cols)
    tight = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    for backend, call in itertools.product(served(dtype), CALLS):
        found = [call(x, None if m is None else y, mask, backend) for mask in masks]
        for mine, theirs in zip(*found, strict=True):
            scale = float(theirs[theirs.isfinite()].abs().max()) if theirs.numel() else 1.0
            torch.testing.assert_close(
                mine, theirs, rtol=tight, atol=tight * scale, msg=lambda e, b=backend: f"{b}: {e}"
            )


def _rows(x: Tensor, y: Tensor | None, mask: Mask, backend: str) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, y) if t is not None]
    found = fastcl.pair_reduce(*leaves, scale=3.0, mask=mask, columns=y is not None, backend=backend)
    found = found if isinstance(found, tuple) else (found,)
    weighed = sum((t * torch.linspace(-1.0, 2.0, len(t), dtype=t.dtype)).sum() for t in found)
    return [*(t.detach() for t in found), *gradients(weighed, leaves)]


def _total(x: Tensor, y: Tensor | None, mask: Mask, backend: str) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, y) if t is not None]
    value = fastcl.pair_total(
        *leaves, operand="sqdist", pair="softplus", reduce="sum", outer="sum", mask=mask, backend=backend
    )
    return [value.detach(), *gradients(value / len(x), leaves)]


def _identity(x: Tensor, y: Tensor | None, mask: Mask, backend: str) -> list[Tensor]:
    found = fastcl.pair_reduce(
        *((x,) if y is None else (x, y)), pair="square", reduce="sum", mask=mask, backend=backend
    )
    assert isinstance(found, Tensor)
    same = fastcl.pair_reduce(
        *((x,) if y is None else (x, y)), pair="identity", reduce="sum", mask=mask, backend=backend
    )
    return [found, same]


CALLS = (_rows, _total, _identity)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "hard_negative", "debiased"])
@pytest.mark.parametrize("backend", served(torch.float32))
def test_losses_of_two_views_are_those_of_one_group_each(name: str, backend: str) -> None:
    u, v = (torch.randn(70, 9, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    loss = getattr(fastcl.functional, name)
    more: list[dict[str, Any]] = [{}, {"symmetric": False}] if name == "dcl" else [{}]
    for arguments in more:
        leaves = [t.clone().requires_grad_() for t in (u, v)]
        found = [loss(*leaves, groups=groups, backend=backend, **arguments) for groups in (None, torch.arange(70))]
        torch.testing.assert_close(*found, rtol=2e-6, atol=0.0)
        for mine, theirs in zip(*(gradients(value, leaves) for value in found), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("period", "error"), [(-1, ValueError), (1.5, TypeError), (torch.tensor(2), TypeError)])
def test_a_wrong_period(period: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^period: expected "):
        fastcl.pair_reduce(torch.randn(4, 2), mask=fastcl.off_diagonal(period=period))
