"""Masks: which pairs (i, j) a reduction visits. One object carries its own data; self-pairs are masked by index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("all", "off_diagonal", "across_groups", "within_groups")


class Mask(NamedTuple):
    """The set M of visited pairs; build one with all_pairs, off_diagonal, across_groups, within_groups or at_most."""

    kind: str = "all"
    row_offset: int = 0
    col_offset: int = 0
    group_x: Tensor | None = None
    group_y: Tensor | None = None
    period: int = 0
    limit_x: Tensor | None = None
    limit_y: Tensor | None = None
    guide_x: Tensor | None = None
    guide_y: Tensor | None = None

    @property
    def limited(self) -> bool:
        """Whether a pair's logit, or another similarity of it, has a say in it."""
        return self.limit_x is not None or self.limit_y is not None

    @property
    def guided(self) -> bool:
        """Whether that is a product of guides."""
        return self.guide_x is not None

    def unlimited(self) -> Mask:
        """What it says of indices alone."""
        return self._replace(limit_x=None, limit_y=None, guide_x=None, guide_y=None)


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


def at_most(
    limit_x: Tensor | None = None,
    limit_y: Tensor | None = None,
    *,
    guide: Tensor | tuple[Tensor, Tensor] | None = None,
    mask: str | Mask = "all",
) -> Mask:
    """The pairs of a mask whose logit is at most the limits of its row and of its column, so that likely false negatives stay out.

        (i, j) in M  where  z_ij <= limit_x_i  and  z_ij <= limit_y_j,   z_ij = a u(x_i, y_j) + b + bx_i + by_j

    With a guide, rows of another model for instance (a teacher's), its similarity is held against the limits in place of the logit:

        (i, j) in M  where  <s_i, t_j> <= limit_x_i  and  <s_i, t_j> <= limit_y_j

    No gradient flows through limits or guides. z is rounded as the backend that serves the call rounds it, the same in a forward
    and its backward: a logit within a few eps of its limit may fall on either side of it, and on another one in forward mode,
    which forms z in float64. Limits that pairs meet exactly (duplicates of the positive, with its own logit as the limit) want a
    margin. A logit of NaN is left out by no limit, and a limit of NaN makes all results that it has a say in NaN. So it is with
    guides: their products are in the dtype of the results, rounded as z is, one of NaN (of infinite guides) leaves out nothing,
    and a row of a guide that holds a NaN is as a limit of NaN.

    Source: Zhang et al. 2025 (Qwen3 Embedding, arXiv 2506.05176); Moreira et al. 2024 (NV-Retriever, arXiv 2407.15831); guides:
    Solatorio 2024 (GISTEmbed, arXiv 2402.16829).

    Args:
        limit_x: (n,) floating, one limit for each row of x; inf for none, -inf to leave out the row; None for no row's.
        limit_y: (m,) floating, one limit for each row of y; None for none. Of x with itself (y=None) limit_x is both.
        guide: (s, t), s (n, k) and t (m, k), floating, of any width k of their own, held in the dtype of the results; of x with
            itself s alone; None for the logit.
        mask: which pairs there are besides, "all", "off_diagonal" or another mask without limits.

    Raises:
        ValueError: no limit is given, or the mask has limits already.
        TypeError: the guide or the mask is something else.

    Examples:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> within = fastcl.at_most(torch.tensor([2.5, 4.5, 1.0]))  # of z = [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
        >>> fastcl.pair_reduce(x, x, reduce="sum", mask=within)
        tensor([3., 6., 0.])
        >>> fastcl.pair_reduce(x, reduce="sum", mask=fastcl.at_most(torch.full((3,), 5.0), mask=fastcl.off_diagonal()))
        tensor([5., 2., 3.])
        >>> guide = torch.tensor([[1.0], [2.0], [0.0]])  # similarities [[1, 2, 0], [2, 4, 0], [0, 0, 0]]
        >>> fastcl.pair_reduce(x, x, reduce="sum", mask=fastcl.at_most(torch.full((3,), 1.5), guide=(guide, guide)))
        tensor([ 4.,  6., 18.])
    """
    if limit_x is None and limit_y is None:
        raise ValueError("at_most: expected limits of the rows, the columns or both, got none; pass limit_x")
    within = Mask(mask) if isinstance(mask, str) else mask
    if not isinstance(within, Mask):
        raise TypeError(
            f"mask: expected a name or a fastcl.Mask, got {type(mask).__name__}; build one with fastcl.off_diagonal()"
        )
    if within.limited:
        raise ValueError(
            "mask: expected one without limits, got limits already; take the smaller of both by torch.minimum"
        )
    guides = guide if isinstance(guide, (tuple, list)) else (guide, None)
    if len(guides) != 2 or (guides[0] is None and guide is not None):
        raise TypeError(
            f"guide: expected two tensors (s, t), of rows and of columns, or one of x with itself, got {len(guides)} in a "
            f"{type(guide).__name__}; pass guide=(s, t)"
        )
    of_x, of_y, s, t = (t.detach() if isinstance(t, Tensor) else t for t in (limit_x, limit_y, *guides))
    return within._replace(limit_x=of_x, limit_y=of_y, guide_x=s, guide_y=t)


def by_groups(mask: Mask, n: int, m: int | None, device: torch.device) -> Mask:
    """A mask with a period, told by groups: for n rows against m, or against themselves where m is None. Its limits stay."""
    rows, cols = (
        None if size is None else (torch.arange(size, device=device) + offset % mask.period) % mask.period
        for size, offset in ((n, mask.row_offset), (m, mask.col_offset))
    )
    return Mask("across_groups", 0, 0, rows, cols, 0, *mask[6:])


def on_tile(mask: Mask, rows: range, cols: range) -> Mask | None:
    """A mask with a period on a tile of pairs: the diagonal that it leaves out there, if any; None where there are several."""
    near = mask.row_offset - mask.col_offset
    met = [
        d for d in (near, near - mask.period, near + mask.period) if cols.start - rows.stop < d < cols.stop - rows.start
    ]
    return None if len(met) > 1 else Mask("off_diagonal", met[0], 0) if met else Mask("all")


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
