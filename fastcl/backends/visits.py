"""Sums over the pairs that a mask visits, without a pass over pairs: of everything, of all but one, of groups from their table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..equation.problem import Problem
from .sides import is_known

FEW = 8  # rows of which every sum of all but one is formed by itself
MANY = 32  # rows of a group on average, from where their sums are taken in float64
PART = 2**19  # numbers, of which a pass over rows has two or three copies on its way


class Visits:
    """Sums over the visited pairs: across(Q)_i = sum_{j in M(i)} Q_j, and back(Q)_j = sum_{i: j in M(i)} Q_i.

    Those of matrices are read part by part, since of groups they are rows of a smaller table.
    """

    def __init__(self, p: Problem) -> None:
        mask = p.told_by_groups().mask
        self.p, self.kind = p, mask.kind
        if mask.group_x is not None:
            index = classes(mask.group_x if mask.group_y is None else torch.cat([mask.group_x, mask.group_y]))
            self.classes = int(index.max()) + 1 if is_known(index) and len(index) else len(index)
            self.of_x, self.of_y = index[: p.n], index[len(index) - p.m :]

    def across(self, q: Tensor) -> Tensor:
        return self.read(q, None, False)(slice(None))

    def back(self, q: Tensor) -> Tensor:
        return self.read(q, None, True)(slice(None))

    def read(self, q: Tensor, weight: Tensor | None, back: bool) -> Callable[[slice], Tensor]:
        """What gives a part of across(diag(weight) Q), or of back."""
        if self.kind in ("within_groups", "across_groups"):
            source, target = (self.of_x, self.of_y) if back else (self.of_y, self.of_x)
            # Added one after the other, many rows of a group would lose digits that a sum by halves keeps.
            dtype = torch.float64 if self.classes * MANY <= q.shape[0] else q.dtype
            sums = q.new_zeros(self.classes, *q.shape[1:], dtype=dtype)
            for part in parts(q):
                rows = q[part] if weight is None else weight[part, None] * q[part]
                sums.index_add_(0, source[part], rows.to(dtype))
            table = (sums if self.kind == "within_groups" else all_but_one(sums)).to(q.dtype)
            return lambda part: table[target[part]]
        length, offset = self.p.n, self.p.mask.row_offset - self.p.mask.col_offset
        if back:
            length, offset = self.p.m, -offset
        if self.kind == "all":
            each = [(q[part] if weight is None else weight[part, None] * q[part]).sum(0) for part in parts(q)]
            others = torch.stack(each or [q.sum(0)]).sum(0).expand(length, *q.shape[1:])
        else:
            others = self._others(q if weight is None else weight[:, None] * q, length, offset)
        return lambda part: others[part]

    @staticmethod
    def _others(q: Tensor, length: int, offset: int) -> Tensor:
        start, stop = partners(length, q.shape[0], offset)
        others = q.sum(0).repeat(length, *(1 for _ in q.shape[1:]))
        if stop > start:
            others[start:stop] = all_but_one(q)[start + offset : stop + offset]
        return others


def parts(rows: Tensor, count: int | None = None, most: int = PART) -> Iterator[slice]:
    """Parts of the rows, or of `count` of their width, of `most` numbers, so that what is made of one on its way is small."""
    step = max(1, most // max(1, rows[:1].numel()))
    return (slice(begin, begin + step) for begin in range(0, len(rows) if count is None else count, step))


def all_but_one(q: Tensor) -> Tensor:
    """Row k of the result is the sum of all rows of q but row k, from sums of halves, quarters, ... that row k is not in.

    Never everything minus row k, which leaves eps of everything: the sum of no rows is 0, and few small ones keep their digits.
    """
    n = q.shape[0]
    if n <= FEW:
        left = 1 - torch.eye(n, dtype=torch.int64, device=q.device)
        return torch.where(left.view(n, n, *(1 for _ in q.shape[1:])) > 0, q, 0.0).sum(1)
    halves = (q if n % 2 == 0 else torch.cat([q, torch.zeros_like(q[:1])])).unflatten(0, (-1, 2))
    return (all_but_one(halves.sum(1)).unsqueeze(1) + halves.flip(1)).flatten(0, 1)[:n]


def partners(length: int, rows: int, offset: int) -> tuple[int, int]:
    """The range of those i of `length` for which i + offset is one of the `rows`."""
    return max(0, -offset), min(length, rows - offset)


def classes(groups: Tensor) -> Tensor:
    """The groups as numbers from 0 to at most len(groups) - 1, equal where they are equal.

    torch.unique would wait for the device to say how many there are, which a CUDA graph's capture forbids.
    """
    ordered, order = groups.sort()
    number = torch.zeros_like(groups)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(groups).scatter_(0, order, number)


def shifted(q: Tensor, length: int, offset: int) -> Tensor:
    """Row i of the result is row i + offset of q, and 0 where q has none: the partner on the left-out diagonal."""
    result = q.new_zeros(length, *q.shape[1:])
    start, stop = partners(length, q.shape[0], offset)
    if stop > start:
        result[start:stop] = q[start + offset : stop + offset]
    return result
