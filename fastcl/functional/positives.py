"""Positives by index: pairs (i_p, j_p) with weights w_p >= 0, any number of them in each row and each column.

    sum_p over the pairs of row i:   mean_i = sum_p w_p z_p / sum_p w_p,   each z_p formed once, O(k d) for k pairs

The normaliser of a row is the log-sum-exp over all its pairs. Where the positives of a row and those of its partners make a star (a
row with its columns, or a column with its rows, that have no others) a mask of groups leaves them out of the sweep, and they are
put back from z_p, so that a small loss is not the difference of large numbers; elsewhere they stay in the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import batch, transforms
from ..backends import choice
from ..backends.sides import is_known
from ..equation import checks
from ..equation.arguments import as_tensor, kind_of
from ..equation.intrinsics import softplus
from ..equation.masks import Mask, across_groups
from ..equation.problem import accumulation_dtype
from ..precision import swept, widened
from .matching import pair_dot
from .rows import normalize_rows, times

Positives: TypeAlias = Sequence[Tensor]
# Positives whose logits are formed, for each row (of 1,024 at least): one costs about as much as 200 pairs of a sweep.
FEW = 4


@dataclass(frozen=True)
class Pairs:
    """The pairs of a call, checked; `weight` in the accumulation dtype or a wider one of its own, without gradient.

    x, y: the rows, normalised, as sweeps take them. i, j: (k,) int64, of x and of y. weight: (k,).
    """

    x: Tensor
    y: Tensor
    i: Tensor
    j: Tensor
    weight: Tensor

    @classmethod
    def of(cls, positives: Any, groups: Any, x: Tensor, y: Tensor, normalize: bool) -> Pairs:
        """The checked pairs of rows, normalised when asked, those of a half dtype in float32 on a CPU (precision.widened: call this
        and what is made of it within rounded_once); groups, which say the same in another way, are not given beside them.

        Raises:
            TypeError: positives are no sequence of two or three tensors, or of other dtypes.
            ValueError: their lengths or devices differ, or groups are given too.
        """
        if isinstance(positives, (Tensor, str, bytes)) or not isinstance(positives, Sequence):
            kind = kind_of(positives)
            raise TypeError(
                f"positives: expected (rows, columns) or (rows, columns, weights), got {kind}; pass a tuple"
            )
        if len(positives) not in (2, 3):
            raise ValueError(
                f"positives: expected (rows, columns) or (rows, columns, weights), got {len(positives)} parts"
            )
        if groups is not None:
            raise ValueError(
                f"groups: expected None beside positives, which say which pairs match, got {kind_of(groups)}; leave one of them out"
            )
        if any(map(checks.is_dtensor, positives)):
            raise TypeError("positives: expected plain tensors, got DTensors; pass indices into own rows, and group=")
        i = _index("positives[0]", positives[0], None, x)
        j = _index("positives[1]", positives[1], i.shape[0], x)
        _within("positives[0]", i, x)
        _within("positives[1]", j, y)
        x, y = (of_sweeps(x, normalize),) * 2 if x is y else (of_sweeps(x, normalize), of_sweeps(y, normalize))
        dtype = accumulation_dtype(x.dtype)
        if len(positives) == 2 or positives[2] is None:
            return cls(x, y, i, j, torch.ones(i.shape[0], dtype=dtype, device=x.device))
        weight = checks.vector("positives[2]", positives[2], i.shape[0], "positives[0]", i)
        _refuse_where((weight < 0) | weight.isposinf(), weight, "positives[2]: expected finite weights >= 0")
        return cls(x, y, i, j, weight.detach().to(torch.promote_types(weight.dtype, dtype)))

    def products(self, scale: float | Tensor) -> Tensor:
        """(k,) scale <x_i, y_j> of each pair."""
        return times(scale, pair_dot(self.x, self.y, self.i, self.j))

    def exact(self, scale: float | Tensor, hidden: Tensor, backend: str | None) -> tuple[Pairs, Tensor, str | None]:
        """These, their products, and where to sweep: in float64 where the pairs that are visited too nearly are of one row each."""
        p = self.products(scale)
        if p.dtype == torch.float64:
            return self, p, backend
        if not transforms.values_are_here():
            # More pairs than stars have: some are visited.
            near = p.device.type == "cpu" and self.i.shape[0] > max(self.x.shape[0], self.y.shape[0])
        else:
            of_x, of_y = (torch.linalg.vector_norm(t.detach(), dim=1, dtype=p.dtype) for t in (self.x, self.y))
            own = times(scale, of_x.index_select(0, self.i) * of_y.index_select(0, self.j))
            near = nearly_points(p, own, ~(hidden | (self.weight <= 0)))
        if not near:
            return self, p, backend
        x = self.x.double()
        wide = replace(self, x=x, y=x if self.y is self.x else self.y.double())
        return wide, wide.products(scale), choice.of_float64(backend, self.x)

    def stars(self) -> tuple[Tensor, Tensor]:
        """A group for each row of x and of y: those of one star share theirs, every other row has one of its own."""
        n, m = self.x.shape[0], self.y.shape[0]
        partner_of_x, partner_of_y = _one_of(self.i, self.j, n), _one_of(self.j, self.i, m)
        single_x, single_y = counts(self.i, n) == 1, counts(self.j, m) == 1
        centre_x = _all_of(
            self.i, single_y.index_select(0, self.j), n
        )  # with all columns of the row having no other row
        centre_y = _all_of(self.j, single_x.index_select(0, self.i), m)
        own_x = 2 * (batch.first(self.x) + torch.arange(n, device=self.x.device))
        own_y = 2 * (batch.first(self.y) + torch.arange(m, device=self.x.device)) + 1
        joins = single_x & ~centre_x & _at(centre_y, partner_of_x)
        joined = single_y & _at(centre_x, partner_of_y)
        return torch.where(joins, _at(own_y, partner_of_x), own_x), torch.where(joined, _at(own_x, partner_of_y), own_y)

    def couples(self) -> Tensor:
        """A group for each row of x = y: two rows that are each other's only positives share theirs."""
        n = self.x.shape[0]
        index = torch.arange(n, device=self.x.device)
        partner, single = _one_of(self.i, self.j, n), counts(self.i, n) == 1
        both = single & _at(single, partner) & (_at(partner, partner) == index)
        return batch.first(self.x) + torch.where(both, torch.minimum(index, partner), index)

    def repeated(self) -> Tensor:
        """(k,) whether the pair stands before in the list."""
        key = self.i * max(self.y.shape[0], 1) + self.j
        ordered, order = key.sort(stable=True)
        again = torch.cat([ordered[:1] != ordered[:1], ordered[1:] == ordered[:-1]])
        return again.scatter(0, order, again)


def of_sweeps(rows: Tensor, normalize: bool) -> Tensor:
    """Rows as sweeps take them, of which no half dtype rounds a part on a CPU."""
    rows = widened(rows)
    return swept(normalize_rows(rows) if normalize else rows)


@dataclass(frozen=True)
class Side:
    """The pairs as one side sees them.

    index: (k,) the row of each pair. rows: how many rows there are. weight: (k,).
    """

    index: Tensor
    rows: int
    weight: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """(rows,) the sum over the pairs of each row."""
        return values.new_zeros(self.rows).index_add(0, self.index, values)

    def has(self) -> Tensor:
        """(rows,) whether a row has a positive of a weight > 0; a weight that is NaN counts, so that it is seen."""
        return ~(self._largest() <= 0)

    def mean(self, values: Tensor) -> Tensor:
        """(rows,) the weighted mean over the pairs of each row, 0 of none."""
        largest = self._largest()
        weight = self.weight / torch.where(largest <= 0, 1.0, largest).index_select(
            0, self.index
        )  # whose sum is in range
        total = self.sum(weight)
        share = weight / torch.where(total <= 0, 1.0, total).index_select(0, self.index)
        return self.sum(share.to(values.dtype) * values)

    def _largest(self) -> Tensor:
        """(rows,) the largest weight, 0 of none."""
        return self.weight.new_zeros(self.rows).scatter_reduce(0, self.index, self.weight, "amax")

    def cross_entropy(self, r: Tensor, p: Tensor, hidden: Tensor) -> Tensor:
        """(rows,) the log-sum-exp over all pairs minus the mean of the positives; 0 in a row without one.

        Args:
            r: (rows,) log-sum-exp of the visited pairs.
            p: (k,) logits of the positives.
            hidden: (k,) which of them were not visited; in each row all of them or none.
        """
        away = counts(self.index, self.rows, hidden) > 0
        p = p.to(r.dtype)
        apart = p.clone()
        mean = self.mean(apart)
        loss = torch.where(away, loss_apart(r, p, apart, mean, self.index, away, hidden), r - mean)
        return torch.where(self.has(), loss, 0.0)


def loss_apart(
    negatives: Tensor,
    p: Tensor,
    apart: Tensor,
    mean: Tensor,
    index: Tensor,
    some: Tensor,
    which: Tensor | None = None,
    log_1p_exp: Callable[[Tensor], Tensor] = softplus,
) -> Tensor:
    """(rows,) log(sum_p e^p + e^negatives) - mean_p p over the pairs of each row; 0 in a row without any.

    That is how far the negatives are below the positives, and how these differ: of near-duplicates neither is a difference of
    large numbers.

    Args:
        negatives: (rows,) the log-sum-exp of all other pairs of a row.
        p: (k,) logits of the pairs.
        apart: p.clone(), where gradients (of a single positive 1 and -1) meet before the negatives' small ones are added.
        mean: (rows,) of `apart` over the pairs of each row.
        index: (k,) the row of each pair.
        some: (rows,) which rows have any.
        which: (k,) the pairs that count; None for all. A row has all of its own or none.
        log_1p_exp: log(1 + e^z).
    """
    rows = some.shape[0]
    below = torch.where(some, negatives - log_sum_exp(p, index, rows, which), 0.0)
    return torch.where(some, log_1p_exp(below) + log_sum_exp(apart, index, rows, which, mean), 0.0)


def log_sum_exp(z: Tensor, index: Tensor, rows: int, which: Tensor | None = None, less: float | Tensor = 0.0) -> Tensor:
    """(rows,) over the values of each row, of those pairs alone, less a number; -inf over none."""
    z = z if which is None else torch.where(which, z, -torch.inf)
    top = z.detach().new_full((rows,), -torch.inf).scatter_reduce(0, index, z.detach(), "amax")
    none = torch.isneginf(top)
    total = z.new_zeros(rows).index_add(0, index, torch.exp(z - torch.where(none, 0.0, top).index_select(0, index)))
    return torch.where(none, 1.0, total).log() + (top - less)


def may_be_counted(labels: Tensor) -> bool:
    """Whether what they hold may decide what is done: not in a graph or a transform, nor where a device is waited for."""
    return transforms.values_are_here() and is_known(labels)


def nearly_points(mean: Tensor, own: Tensor, some: Tensor) -> bool:
    """Whether rows of a label nearly are one: of a tenth of those that have positives, their mean logit is above 3/4 of `own`.

    There the gradients of the log-sum-exp and of that mean cancel, down to the spread of a class: float32 rounds its log-sum-exp,
    and with it all weights of a row, to 5e-8 of the sum that cancels. Where values may not be looked at a CPU, on which float64
    takes twice the time, is on the safe side, and a GPU is not.
    """
    if not (transforms.values_are_here() and is_known(mean) and is_known(own)):
        return mean.device.type == "cpu"
    near = some & (mean.detach() > 0.75 * own.detach())
    found, all_of_them = (batch.total(which.to(own.dtype)) for which in (near, some))
    return bool(found > 0.1 * all_of_them)


def few(n: int, m: int) -> int:
    """How many pairs of n rows with m others have their logits formed, rather than summed by class."""
    return FEW * max(1024, n + m)


def loss_of_few(
    negatives: Tensor,
    p: Tensor,
    index: Tensor,
    count: Tensor,
    log_1p_exp: Callable[[Tensor], Tensor] = softplus,
) -> Tensor:
    """loss_apart with the plain mean over the pairs of each row, of which there are `count`."""
    apart = p.clone()
    mean = apart.new_zeros(count.shape).index_add(0, index, apart) / count.clamp(min=1)
    return loss_apart(negatives, p, apart, mean, index, count > 0, log_1p_exp=log_1p_exp)


def within_classes(labels: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Each pair of two rows of one label once, (i, j) with int64 (k,) each, where there are `most` of them at most.

    Values are looked at, so that no device should have to be waited for.
    """
    ordered, order = labels.sort(stable=True)
    size = torch.unique_consecutive(ordered, return_counts=True)[1]
    place = torch.arange(labels.shape[0], device=labels.device)
    later = torch.repeat_interleave(size.cumsum(0), size) - place - 1  # how many of its label stand behind each
    k = int(later.sum())
    if k > most:
        return None
    first = torch.repeat_interleave(place, later)
    second = torch.arange(k, device=labels.device) - (later.cumsum(0) - later - place - 1).index_select(0, first)
    return order.index_select(0, first), order.index_select(0, second)


def counts(index: Tensor, rows: int, which: Tensor | None = None) -> Tensor:
    """(rows,) how many of the pairs are of each row."""
    ones = torch.ones_like(index) if which is None else which.to(index.dtype)
    return torch.zeros(rows, dtype=index.dtype, device=index.device).index_add(0, index, ones)


def mean_over(losses: Tensor, side: Side, reduction: str) -> Tensor:
    """The losses of a side, their sum, or their mean over the rows that have positives."""
    if reduction == "none":
        return losses
    total = batch.total(losses)
    return total if reduction == "sum" else total / batch.total(side.has().to(losses.dtype)).clamp(min=1.0)


def some(pairs: Pairs, objective: str) -> None:
    """A mean needs something to be taken over."""
    if batch.count(pairs.i) < 1:
        raise ValueError(f"{objective}: expected at least 1 row with a positive, got an empty list; skip such batches")


def between(pairs: Pairs) -> tuple[Mask, Tensor]:
    """The mask of two sides, and which pairs it leaves out."""
    of_x, of_y = pairs.stars()
    return across_groups(of_x, of_y), of_x.index_select(0, pairs.i) == of_y.index_select(0, pairs.j)


def _index(name: str, index: Any, length: int | None, x: Tensor) -> Tensor:
    """An int64 vector of indices on the device of x."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        advice = as_tensor(name, index, ", dtype=torch.int64") or "; convert it with .long()"
        raise TypeError(f"{name}: expected an int64 tensor, got {kind_of(index)}{advice}")
    checks.dense(name, index)
    if index.dim() != 1 or (length is not None and index.shape[0] != length):
        wanted = "(k,), one index for each pair" if length is None else f"({length},), as many as positives[0]"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"{name}: expected the device of the rows, {x.device}, got {index.device}; move it")
    return index


def _within(name: str, index: Tensor, rows: Tensor) -> None:
    """Indices of rows."""
    if not may_be_counted(index):  # a message that names a size of a graph would make it one of that size alone
        return
    n = rows.shape[0]
    _refuse_where((index < 0) | (index >= n), index, f"{name}: expected indices of own rows, 0 to {n - 1}")


def _refuse_where(wrong: Tensor, values: Tensor, message: str) -> None:
    """An error on every rank where there are any; on a CPU, whose values may be looked at."""
    if not may_be_counted(values):
        return
    if float(batch.largest(wrong.to(torch.float32))):
        got = ", ".join(map(str, values[wrong][:3].tolist())) or "others on another rank"
        raise ValueError(f"{message}, got {got}; pass those that are")


def _one_of(index: Tensor, other: Tensor, rows: int) -> Tensor:
    """(rows,) the largest `other` among the pairs of a row: its only one where it has one, 0 where it has none."""
    return torch.zeros(rows, dtype=index.dtype, device=index.device).scatter_reduce(0, index, other, "amax")


def _all_of(index: Tensor, which: Tensor, rows: int) -> Tensor:
    """(rows,) whether a row has pairs, and all of them are of those."""
    return (counts(index, rows) > 0) & (counts(index, rows, ~which) == 0)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[index]; where there are no values nothing asks."""
    return values.index_select(0, index) if values.shape[0] else index.new_zeros(index.shape, dtype=values.dtype)
