"""Masks: which pairs (i, j) a reduction visits. One object carries its own data; self-pairs are masked by index."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

KINDS = ("all", "off_diagonal", "across_groups", "within_groups")


class Mask(NamedTuple):
    """The set M of visited pairs; build one with all_pairs, off_diagonal, across_groups or within_groups."""

    kind: str = "all"
    row_offset: int = 0
    col_offset: int = 0
    group_x: Tensor | None = None
    group_y: Tensor | None = None


def all_pairs() -> Mask:
    """Every pair (i, j).

    Examples:
        >>> fastcl.pair_reduce(torch.eye(3), reduce="sum", mask=fastcl.all_pairs())
        tensor([1., 1., 1.])
    """
    return Mask("all")


def off_diagonal(row_offset: int = 0, col_offset: int = 0) -> Mask:
    """The pairs with i + row_offset != j + col_offset, so that shards of one batch keep out their own self-pairs.

    Args:
        row_offset: index of the first row of x within the whole batch, an integer.
        col_offset: index of the first row of y within the whole batch, an integer.

    Examples:
        >>> fastcl.pair_reduce(torch.eye(3), reduce="sum", mask=fastcl.off_diagonal())
        tensor([0., 0., 0.])
    """
    return Mask("off_diagonal", row_offset, col_offset)


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
