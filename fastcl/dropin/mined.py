"""Pairs that a caller picked by index, as miners and memories do: memory is that of the index, never n x m for few pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import transforms
from ..equation.problem import accumulation_dtype
from ..functional.matching import row_dot
from ..functional.positives import log_sum_exp
from ..functional.rows import times
from ..precision import product

GATHERED = 2**22  # entries of rows that are held at once, picked out for their pairs
INDEX = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Pairs(NamedTuple):
    """Rows `anchors` of x with rows `others` of y, (k,) int64 each; a pair may come several times."""

    anchors: Tensor
    others: Tensor

    def logits(self, x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        """scale <x_a, y_j> of each pair, (k,), in the accumulation dtype.

        An index of a quarter of all pairs takes as much memory as the float32 matrix of all of them, which is quicker to form.
        """
        dtype, k, d = accumulation_dtype(x.dtype), self.anchors.shape[0], max(x.shape[1], 1)
        if 4 * k >= x.shape[0] * y.shape[0]:
            z = product(x.to(dtype), y.to(dtype).T).flatten()
            return times(scale, z.index_select(0, self.anchors * y.shape[0] + self.others))
        if transforms.active():  # torch.func knows no checkpoint
            return times(scale, _dots(x, y, *self))
        parts = zip(*(index.split(max(1, GATHERED // d)) for index in self), strict=True)
        return times(scale, torch.cat([checkpoint(_dots, x, y, *part, use_reentrant=False) for part in parts]))

    def log_sum_exp(self, z: Tensor, n: int) -> Tensor:
        """Over the pairs of each of n anchors, (n,); -inf over none."""
        return log_sum_exp(z, self.anchors, n)

    def without_repeats(self, m: int) -> Pairs:
        """Each pair once, by anchor; y has m rows."""
        flat = torch.unique(self.anchors * m + self.others)
        return Pairs(flat // max(m, 1), flat % max(m, 1))

    def apart_from(self, negative: Pairs, m: int) -> None:
        """Raise where a pair is in both; y has m rows, and neither repeats one."""
        every = self + negative
        if len(every.without_repeats(m)) < len(every):
            raise ValueError(
                "indices_tuple: expected each pair among the positives or among the negatives, got one in both; "
                "do not mix labels of several kinds"
            )

    def __add__(self, more: Any) -> Pairs:
        return Pairs(torch.cat([self.anchors, more.anchors]), torch.cat([self.others, more.others]))

    def __len__(self) -> int:
        return self.anchors.shape[0]


def _dots(x: Tensor, y: Tensor, anchors: Tensor, others: Tensor) -> Tensor:
    return row_dot(x.index_select(0, anchors), y.index_select(0, others))


def positives_and_negatives(indices: Any, x: Tensor, y: Tensor) -> tuple[Pairs, Pairs]:
    """The pairs of a tuple (anchors, positives, anchors, negatives), or of triplets (anchors, positives, negatives).

    Raises:
        ValueError: it is neither, or an index is not that of a row.
        TypeError: for vectors that are no integers.
    """
    if not isinstance(indices, Sequence) or len(indices) not in (3, 4):
        got = f"{len(indices)} of them" if isinstance(indices, Sequence) else type(indices).__name__
        raise ValueError(
            "indices_tuple: expected (anchors, positives, anchors, negatives) or triplets (anchors, positives, negatives), "
            f"got {got}; pass what a miner returns"
        )
    a1, p, *rest = indices
    a2, n = rest if len(rest) == 2 else (a1, rest[0])
    return _checked(a1, p, x, y), _checked(a2, n, x, y)


def _checked(anchors: Any, others: Any, x: Tensor, y: Tensor) -> Pairs:
    found = []
    for index, rows, of in ((anchors, x, "embeddings"), (others, y, "what they are compared with")):
        if not isinstance(index, Tensor) or (index.dtype not in INDEX and index.numel()):
            got = str(index.dtype).removeprefix("torch.") if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"indices_tuple: expected tensors of integers, got {got}; convert them with .long()")
        if index.dim() != 1 or index.shape != anchors.shape:
            raise ValueError(
                f"indices_tuple: expected vectors, as many anchors as positives or negatives, got shapes {tuple(anchors.shape)} "
                f"and {tuple(index.shape)}"
            )
        index = index.to(device=x.device, dtype=torch.int64)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows.shape[0]:
            raise ValueError(
                f"indices_tuple: expected rows of {of}, 0 to {rows.shape[0] - 1}, got {int(index.min())} to {int(index.max())}"
            )
        found.append(index)
    return Pairs(*found)
