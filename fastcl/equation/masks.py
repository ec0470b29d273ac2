"""Masks: which pairs (i, j) a reduction visits. One object carries its own data; self-pairs are masked by index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("all", "off_diagonal", "across_groups", "within_groups")


class Mask(NamedTuple):
    """The set M of visited pairs; build one with all_pairs, off_diagonal, across_groups or within_groups."""

    kind: str = "all"
    row_offset: int = 0
    col_offset: int = 0
    group_x: Tensor | None = None
    group_y: Tensor | None = None
    period: int = 0


def all_pairs() -> Mask:
    """Every pair (i, j).

    Examples:
        >>> fastcl.pair_reduce(torch.eye(3), reduce="sum", mask=fastcl.all_pairs())
        tensor([1., 1., 1.])
    """
    return Mask("all")


def off_diagonal(row_offset: int = 0, col_offset: int = 0, period: int = 0) -> Mask:
    """The pairs with i + row_offset != j + col_offset, so that shards of one batch keep out their own self-pairs.

    With a period p, those whose two indices differ modulo p: a batch of n rows stacked with its second view (p = n) keeps out
    each row's two views, on two diagonals that few tiles of pairs meet, where groups would be compared in every tile.

    Args:
        row_offset: index of the first row of x within the whole batch, an integer.
        col_offset: index of the first row of y within the whole batch, an integer.
        period: how many rows lie between a row and its next view, an integer; 0 for one diagonal.

    Examples:
        >>> fastcl.pair_reduce(torch.eye(3), reduce="sum", mask=fastcl.off_diagonal())
        tensor([0., 0., 0.])
        >>> fastcl.pair_reduce(torch.ones(4, 2), reduce="sum", mask=fastcl.off_diagonal(period=2))  # [u; v] of two rows each
        tensor([4., 4., 4., 4.])
    """
    return Mask("off_diagonal", row_offset, col_offset, period=period)


def across_groups(group_x: Tensor, group_y: Tensor | None = None) -> Mask:
    """The pairs with group_x[i] != group_y[j]: labels or duplicate ids kept out of the negatives.

    Args:
        group_x: (n,) int64, one group per row of x.
        group_y: (m,) int64, one group per row of y; None takes group_x.

    Examples:
        >>> fastcl.pair_reduce(torch.ones(3, 2), reduce="sum", mask=fastcl.across_groups(torch.tensor([0, 0, 1])))
        tensor([2., 2., 4.])
    """
    return Mask("across_groups", 0, 0, group_x, group_y)


def within_groups(group_x: Tensor, group_y: Tensor | None = None) -> Mask:
    """The pairs with group_x[i] == group_y[j] (self-pairs included).

    Args:
        group_x: (n,) int64, one group per row of x.
        group_y: (m,) int64, one group per row of y; None takes group_x.

    Examples:
        >>> fastcl.pair_reduce(torch.ones(3, 2), reduce="sum", mask=fastcl.within_groups(torch.tensor([0, 0, 1])))
        tensor([4., 4., 2.])
    """
    return Mask("within_groups", 0, 0, group_x, group_y)


def by_groups(mask: Mask, n: int, m: int | None, device: torch.device) -> Mask:
    """A mask with a period, told by groups: for n rows against m, or against themselves where m is None."""
    rows, cols = (
        None if size is None else (torch.arange(size, device=device) + offset % mask.period) % mask.period
        for size, offset in ((n, mask.row_offset), (m, mask.col_offset))
    )
    return Mask("across_groups", 0, 0, rows, cols)


def three_diagonals(mask: Mask, n: int, m: int | None, device: torch.device) -> Mask:
    """A mask with a period as kernels take it, for n rows against m, or against themselves where m is None.

    They leave out the diagonals at row_offset - col_offset and a period from there, and the period is less than what the sides
    have together. Where no more than one diagonal meets the pairs it is 0, and where more than three do groups say the same.
    """
    period, columns = mask.period, n if m is None else m
    if mask.row_offset == mask.col_offset and n <= 2 * period and columns <= 2 * period:
        return mask if n > period or columns > period else mask._replace(period=0)
    first = 1 - n + (mask.row_offset - mask.col_offset + n - 1) % period  # the least j - i that is left out
    if first >= columns:
        return Mask("all")
    if m is None or first + 3 * period < columns:
        return by_groups(mask, n, m, device)
    if first + period >= columns:
        return Mask("off_diagonal", first, 0)
    return Mask("off_diagonal", first + period if first + 2 * period < columns else first, 0, period=period)
