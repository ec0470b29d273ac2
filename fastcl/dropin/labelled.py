"""What the losses of pytorch-metric-learning share: rows with labels, or pairs by index, under a distance and a reducer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import merge
from ..equation import checks
from ..equation.intrinsics import softplus
from ..equation.masks import Mask, across_groups, within_groups
from ..equation.names import Operand
from ..equation.problem import accumulation_dtype
from ..functional.matching import row_dot
from ..functional.positives import may_be_counted
from ..functional.rows import beyond_range, normalize_rows, times
from ..ops import pair_reduce
from ..transforms import of_keepable
from .mined import Pairs, positives_and_negatives

DISTANCES = ("CosineSimilarity", "DotProductSimilarity")


class Measure(NamedTuple):
    """A distance as the engine has it: s = sign * operand of rows, of unit length or not."""

    operand: Operand = "dot"
    normalize: bool = True

    @property
    def sign(self) -> float:
        return 1.0 if self.operand == "dot" else -1.0


@dataclass
class LabelledPairs:
    """Rows against references (None: the rows themselves) with their classes.

    `own` says that row i and reference i are one and the same, hence no pair.
    """

    x: Tensor
    y: Tensor | None
    class_x: Tensor
    class_y: Tensor
    classes: int
    own: bool
    operand: Operand = "dot"

    @property
    def references(self) -> Tensor:
        return self.x if self.y is None else self.y

    def mask(self, kind: Callable[..., Mask]) -> Mask:
        return kind(self.class_x) if self.y is None else kind(self.class_x, self.class_y)

    def without_only_positives(self) -> Mask:
        """All pairs but those that are the one positive of their row."""
        if not self.own:  # a row of a group that no reference is of has them all
            return across_groups(torch.where(self.positives() == 1, self.class_x, self.classes), self.class_y)
        size = torch.bincount(self.class_y, minlength=self.classes)[self.class_y]
        alone = self.classes + torch.arange(len(size), device=size.device)
        groups = torch.where(size == 2, self.class_y, alone)
        return across_groups(groups) if self.y is None else across_groups(groups[: self.x.shape[0]], groups)

    def self_logits(self, scale: float | Tensor) -> Tensor:
        return times(scale, row_dot(self.x, self.references[: self.x.shape[0]]))

    def negatives(self, scale: float | Tensor, shift: float = 0.0) -> Tensor:
        """The log-sum-exp of scale u + shift over the rows of other classes, (n,); -inf over none."""
        return pair_reduce(self.x, self.y, operand=self.operand, scale=scale, shift=shift, mask=self.mask(across_groups))

    def others_of_class(self, scale: float | Tensor, shift: float = 0.0) -> Tensor:
        """The same over the rows of its own class, without the row itself where that is a reference."""
        n, y = self.x.shape[0], self.references
        total = torch.full((n,), -torch.inf, dtype=accumulation_dtype(y.dtype), device=y.device)
        for mask in self.masks_of_class():
            r = pair_reduce(self.x, y, operand=self.operand, scale=scale, shift=shift, mask=mask)
            total = merge(total, r)
        return total

    def masks_of_class(self) -> list[Mask]:
        """Masks of x and the references that visit each row's others of its class once between them.

        No mask says both. But the places of two rows of a class differ in some bit, and those for which the highest such bit is the
        b-th are one half of a group against the other half: as many sweeps as the size of the largest class has bits.
        """
        if not self.own:
            return [within_groups(self.class_x, self.class_y)]
        (place, largest), masks = self._places(), []
        for b in range(max(largest - 1, 0).bit_length()):
            group, half = self.class_y * largest + (place >> (b + 1)), (place >> b) & 1
            masks.append(within_groups((2 * group + half)[: self.x.shape[0]], 2 * group + 1 - half))
        return masks

    def positive_pairs(self, most: int) -> Pairs | None:
        """The positives of all rows, row by row, where there are `most` of them at most, and they may be counted."""
        if not may_be_counted(self.class_y):
            return None
        order, count, first = self._by_class()
        of_row = count[self.class_x]
        if int(of_row.sum()) > most:
            return None
        anchors = torch.repeat_interleave(torch.arange(len(of_row), device=of_row.device), of_row)
        before = torch.cumsum(of_row, 0) - of_row
        place = torch.arange(len(anchors), device=of_row.device) - before[anchors]
        others = order[first[self.class_x[anchors]] + place]
        if self.own:
            apart = anchors != others
            anchors, others = anchors[apart], others[apart]
        return Pairs(anchors, others)

    def _by_class(self) -> tuple[Tensor, Tensor, Tensor]:
        """The references one class after the other, how many each class has, and where it begins."""
        counts = torch.bincount(self.class_y, minlength=self.classes)
        return torch.argsort(self.class_y, stable=True), counts, torch.cumsum(counts, 0) - counts

    def _places(self) -> tuple[Tensor, int]:
        """The place of each reference among those of its class, from 0, and the size of the largest class."""
        order, counts, first = self._by_class()
        place = torch.arange(len(order), device=order.device) - first[self.class_y[order]]
        return place.scatter(0, order, place), int(counts.max()) if counts.numel() else 0

    def positives(self) -> Tensor:
        """How many positives each row has, (n,)."""
        count = torch.bincount(self.class_y, minlength=self.classes)[self.class_x]
        return count - 1 if self.own else count

    def candidates(self) -> int:
        """How many pairs each row is in."""
        return self.references.shape[0] - (1 if self.own else 0)

    def if_any(self, value: Tensor, positives: Tensor) -> Tensor:
        """The value, or 0 where the library gives 0: no positives, no negatives, or at most one of each."""
        count = positives.sum()
        negatives = self.x.shape[0] * self.candidates() - count
        some = (count > 0) & (negatives > 0) & ((count > 1) | (negatives > 1))
        return torch.where(some, value, 0.0)


class LabelLoss(nn.Module):
    """What all of them take, and what they refuse."""

    reducers: tuple[str, ...] = ()
    usual = Measure()  # the distance where none is given
    distances: tuple[str, ...] = DISTANCES
    both_kinds = True  # whether without positives, or without negatives, the loss is 0
    efficient = True  # whether DistributedLossWrapper may give it own rows against all
    optional = True  # whether it has a distance where none is given

    def __init__(
        self,
        *,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Callable[[Tensor], Tensor] | None = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        if collect_stats:
            raise NotImplementedError(
                "collect_stats: expected None or False, got True; no statistics are kept, use the library's own class for them"
            )
        self.distance = distance
        self.measure = measure(distance, self.usual, self.distances, self.optional)
        self.reducer = reducer
        self.reducer_name = self.reducers[0] if reducer is None else type(reducer).__name__
        if self.reducer_name not in self.reducers:
            raise NotImplementedError(
                f"reducer: expected None or one of {', '.join(self.reducers)}, got {self.reducer_name}; "
                "use the library's own class for others"
            )
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight

    @of_keepable
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            embeddings: (n, d) floating.
            labels: (n,), any dtype that equality makes sense for; not needed beside indices_tuple.
            indices_tuple: None for all pairs, or those of a miner: (anchors, positives, anchors, negatives), vectors of
                integers, or triplets (anchors, positives, negatives). Anchors are rows of embeddings, the others of ref_emb.
            ref_emb: (m, d), dtype of embeddings, what they are compared with; None for the embeddings themselves.
            ref_labels: (m,); the same object as labels says that row i and reference i are not a pair.

        Returns:
            A scalar.

        Raises:
            ValueError: for shapes or indices that do not fit, missing labels, or (SupConLoss) a pair that is both.
            TypeError: for unsupported or mixed dtypes.
        """

        def value(x: Tensor, y: Tensor | None) -> Tensor:
            return self._value(x, labels, indices_tuple, y, ref_labels)

        return self._regularised(in_range(value, embeddings, ref_emb), embeddings)

    @of_keepable
    def loss(
        self, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None, own: bool
    ) -> Tensor:
        """The loss with its regulariser; `own` says that row i and reference i are not a pair."""

        def value(x: Tensor, y: Tensor | None) -> Tensor:
            return self._of(self._pairs(x, labels, y, ref_labels, own))

        return self._regularised(in_range(value, embeddings, ref_emb), embeddings)

    def _value(
        self, x: Tensor, labels: Tensor | None, indices: Any, y: Tensor | None, ref_labels: Tensor | None
    ) -> Tensor:
        if indices is not None:
            return self._of_indices(x, indices, y)
        return self._of(self._pairs(x, labels, y, ref_labels, y is None or ref_labels is labels))

    def _regularised(self, value: Tensor, embeddings: Tensor) -> Tensor:
        if self.embedding_regularizer is not None:
            value = value + self.embedding_reg_weight * self.embedding_regularizer(embeddings)
        return value

    def reduced(self, losses: Tensor) -> Tensor:
        """The mean over all rows, or over those above 0."""
        return losses.mean() if self.reducer_name == "MeanReducer" else mean_of_positive(losses)

    def log_1p_exp(self, z: Tensor) -> Tensor:
        """log(1 + e^z). AvgNonZeroReducer counts what is above 0: for it 0 where 1 + e^z is 1 in the dtype, as in the library.

        The gradient there is e^z all the same, as in the library: beside another term of its row it may be all that there is.
        """
        value = softplus(z)
        if self.reducer_name == "MeanReducer":
            return value
        return torch.where(z < math.log(torch.finfo(z.dtype).eps / 2.0), value - value.detach(), value)

    def rows(self, x: Tensor) -> Tensor:
        """As they are compared."""
        return normalize_rows(x) if self.measure.normalize else x

    def _of_indices(self, x: Tensor, indices: Any, y: Tensor | None) -> Tensor:
        checks.matrix("embeddings", x)
        if y is not None:
            checks.pair_of_matrices("embeddings", x, "ref_emb", y)
        positive, negative = positives_and_negatives(indices, x, x if y is None else y)
        least = min(len(positive), len(negative)) if self.both_kinds else 1
        if not least or max(len(positive), len(negative)) <= 1:
            return nothing(x)
        x = self.rows(x)
        return self._of_mined(x, x if y is None else self.rows(y), positive, negative)

    def _of(self, pairs: LabelledPairs) -> Tensor:
        raise NotImplementedError

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        raise NotImplementedError

    def _pairs(
        self, x: Tensor, labels: Tensor | None, y: Tensor | None, ref_labels: Tensor | None, own: bool
    ) -> LabelledPairs:
        checks.matrix("embeddings", x)
        labels = checked_labels("labels", labels, x, "embeddings")
        if y is None:
            names, index = torch.unique(labels, return_inverse=True)
            return LabelledPairs(self.rows(x), None, index, index, names.shape[0], True, self.measure.operand)
        checks.pair_of_matrices("embeddings", x, "ref_emb", y)
        ref_labels = checked_labels("ref_labels", ref_labels, y, "ref_emb")
        names, index = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
        n = x.shape[0]
        x, y = self.rows(x), self.rows(y)
        return LabelledPairs(x, y, index[:n], index[n:], names.shape[0], own, self.measure.operand)


def mean_of_positive(losses: Tensor) -> Tensor:
    """The mean of those above 0; 0 where there are none. Asked this way round, NaN is not hidden."""
    none = losses <= 0
    return torch.where(none, 0.0, losses).sum() / (~none).sum().clamp(min=1)


def in_range(of: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    """of(x, y); taken in float64 where that is not finite though the rows are, and values may be looked at: logits of long rows, or
    of small temperatures, pass the end of float32, where the loss and its gradients need not.
    """
    value = of(x, y)
    if not beyond_range(value, x, *(() if y is None else (y,))):
        return value
    wide = x.double()
    return of(wide, wide if y is x else None if y is None else y.double()).to(value.dtype)


def checked_labels(name: str, labels: Any, rows: Tensor, of: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{name}: expected a tensor, one label for each row of {of}, got {type(labels).__name__}; pass it"
        )
    if labels.dim() != 1 or labels.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{name}: expected shape ({rows.shape[0]},), one label for each row of {of}, got {tuple(labels.shape)}"
        )
    return labels.to(rows.device)


def measure(distance: Any, usual: Measure, allowed: tuple[str, ...], optional: bool = True) -> Measure:
    """A distance of the library, where it is one of those that the loss takes; None, where `optional`, stands for the usual."""
    if distance is None:
        return usual
    name = type(distance).__name__
    if name in allowed and distance.p == 2:
        if name in DISTANCES and distance.power == 1 and distance.is_inverted:
            return Measure("dot", bool(distance.normalize_embeddings))
        if name == "LpDistance" and distance.power == 2 and not distance.is_inverted:
            return Measure("sqdist", bool(distance.normalize_embeddings))
    squared = " (or LpDistance with p=2 and power=2)" if "LpDistance" in allowed else ""
    raise NotImplementedError(
        f"distance: expected {'None, ' * optional}{' or '.join(DISTANCES)} with p=2 and power=1{squared}, got {name}; "
        "use the library's own class for others"
    )


def nothing(x: Tensor) -> Tensor:
    """0, as in the library, with a gradient of 0."""
    return x[:0].sum(dtype=accumulation_dtype(x.dtype))
