"""The batch that an objective is taken over: this process's rows, or the union of the rows of every rank of a group.

A formula asks here for whatever reaches beyond its own rows (pairs, sums, counts), so that it is written once and holds for
both. Without a group every question is answered on the spot; inside a call with `group=` by fastcl.distributed.Shards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops


class Union(Protocol):
    """The union of all ranks' rows; fastcl.distributed.Shards is one."""

    def pair_reduce(self, x: Tensor, y: Tensor | None = None, **arguments: Any) -> Tensor | tuple[Tensor, Tensor]: ...
    def pair_total(self, x: Tensor, y: Tensor | None = None, *, outer: str, **arguments: Any) -> Tensor: ...
    def count(self, x: Tensor) -> int: ...
    def first(self, x: Tensor) -> int: ...
    def total(self, values: Tensor) -> Tensor: ...
    def softmax(self, values: Tensor) -> Tensor: ...
    def largest(self, value: Tensor) -> Tensor: ...
    def summed(self, matrix: Tensor) -> Tensor: ...


class _Current(threading.local):
    union: Union | None = None


_current = _Current()


@contextmanager
def over(union: Union) -> Iterator[None]:
    """Within the context, in this thread, the batch is that union."""
    before, _current.union = _current.union, union
    try:
        yield
    finally:
        _current.union = before


def beyond_this_process() -> bool:
    """Whether the batch is a union of ranks' rows."""
    return _current.union is not None


def pair_reduce(x: Tensor, y: Tensor | None = None, **arguments: Any) -> Tensor:
    """fastcl.pair_reduce of own rows against the rows of the whole batch."""
    union = _current.union
    r: Any = ops.pair_reduce(x, y, **arguments) if union is None else union.pair_reduce(x, y, **arguments)
    return r


def rows_and_columns(x: Tensor, y: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Both from one sweep: r of own rows against all columns, c of own columns against all rows."""
    both: Any = pair_reduce(x, y, columns=True, **arguments)
    return both


def pair_total(x: Tensor, y: Tensor | None = None, **arguments: Any) -> Tensor:
    """fastcl.pair_total of the whole batch."""
    union = _current.union
    return ops.pair_total(x, y, **arguments) if union is None else union.pair_total(x, y, **arguments)


def count(x: Tensor) -> int:
    """How many rows the whole batch has, of which those of x are this process's."""
    union = _current.union
    return x.shape[0] if union is None else union.count(x)


def first(x: Tensor) -> int:
    """The index, within the whole batch, of the first row of x."""
    union = _current.union
    return 0 if union is None else union.first(x)


def total(values: Tensor) -> Tensor:
    """The sum of one value for each row, over the whole batch."""
    union = _current.union
    return values.sum() if union is None else union.total(values)


def softmax(values: Tensor) -> Tensor:
    """That of one value for each row, over the whole batch; its sum is 1, which e^(z - r) of a rounded log-sum-exp's is not."""
    union = _current.union
    return torch.softmax(values, 0) if union is None else union.softmax(values)


def largest(values: Tensor) -> Tensor:
    """The largest of one value >= 0 for each row, over the whole batch, without gradient; 0 of none."""
    union, values = _current.union, values.detach()
    mine = values.amax() if values.shape[0] else values.sum()
    return mine if union is None else union.largest(mine)


def summed(matrix: Tensor) -> Tensor:
    """A matrix (or any tensor) that is a sum over rows, summed over the whole batch."""
    union = _current.union
    return matrix if union is None else union.summed(matrix)
