"""NTXentLoss, SupConLoss and DistributedLossWrapper as in pytorch-metric-learning 2.9.

    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
    ->  from fastcl.dropin.pytorch_metric_learning import NTXentLoss, SupConLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
    ->  from fastcl.dropin.pytorch_metric_learning import DistributedLossWrapper

Positives are pairs of equal labels, negatives pairs of different ones; embeddings alone (or with the very same tensor of
labels for the references) leave out each row's pair with itself. With `indices_tuple` they are the pairs that it names, so that
the library's miners and its CrossBatchMemory work around these classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import agreed
from ..equation import checks
from ..equation.masks import Mask, across_groups, off_diagonal, within_groups
from ..equation.problem import accumulation_dtype
from ..functional.rows import normalize_rows, row_dot, softplus, times
from ..ops import pair_reduce, pair_total
from . import ranks
from .mined import Pairs, positives_and_negatives

DISTANCES = ("CosineSimilarity", "DotProductSimilarity")


@dataclass
class _Pairs:
    """Rows against references (None: the rows themselves) with their classes.

    `own` says that row i and reference i are one and the same, hence no pair.
    """

    x: Tensor
    y: Tensor | None
    class_x: Tensor
    class_y: Tensor
    classes: int
    own: bool
    scale: float | Tensor

    @property
    def references(self) -> Tensor:
        return self.x if self.y is None else self.y

    def mask(self, kind: Callable[..., Mask]) -> Mask:
        return kind(self.class_x) if self.y is None else kind(self.class_x, self.class_y)

    def self_logits(self) -> Tensor:
        return times(self.scale, row_dot(self.x, self.references[: self.x.shape[0]]))

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


class _LabelLoss(nn.Module):
    """What both losses take, and what they refuse."""

    reducers: tuple[str, ...] = ()

    def __init__(
        self,
        temperature: float,
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
        self.temperature = checks.positive_number("temperature", temperature)
        self.distance = distance
        self.normalize = _normalizes(distance)
        self.reducer = reducer
        self.reducer_name = self.reducers[0] if reducer is None else type(reducer).__name__
        if self.reducer_name not in self.reducers:
            raise NotImplementedError(
                f"reducer: expected None or one of {', '.join(self.reducers)}, got {self.reducer_name}; "
                "use the library's own class for others"
            )
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight

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
        if indices_tuple is not None:
            return self._regularised(self._of_indices(embeddings, indices_tuple, ref_emb), embeddings)
        own = ref_emb is None or ref_labels is labels
        return self.loss(embeddings, labels, ref_emb, ref_labels, own)

    def loss(
        self, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None, own: bool
    ) -> Tensor:
        """The loss with its regulariser; `own` says that row i and reference i are not a pair."""
        return self._regularised(self._of(self._pairs(embeddings, labels, ref_emb, ref_labels, own)), embeddings)

    def _regularised(self, value: Tensor, embeddings: Tensor) -> Tensor:
        if self.embedding_regularizer is not None:
            value = value + self.embedding_reg_weight * self.embedding_regularizer(embeddings)
        return value

    def _of_indices(self, x: Tensor, indices: Any, y: Tensor | None) -> Tensor:
        checks.matrix("embeddings", x)
        if y is not None:
            checks.pair_of_matrices("embeddings", x, "ref_emb", y)
        positive, negative = positives_and_negatives(indices, x, x if y is None else y)
        if not len(positive) or not len(negative) or max(len(positive), len(negative)) <= 1:
            return x[:0].sum(dtype=accumulation_dtype(x.dtype))  # 0, as in the library, with a gradient of 0
        if self.normalize:
            x, y = normalize_rows(x), None if y is None else normalize_rows(y)
        return self._of_mined(x, x if y is None else y, positive, negative)

    def _of(self, pairs: _Pairs) -> Tensor:
        raise NotImplementedError

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        raise NotImplementedError

    def _pairs(
        self, x: Tensor, labels: Tensor | None, y: Tensor | None, ref_labels: Tensor | None, own: bool
    ) -> _Pairs:
        checks.matrix("embeddings", x)
        labels = _labels("labels", labels, x, "embeddings")
        if y is None:
            names, index = torch.unique(labels, return_inverse=True)
            rows = normalize_rows(x) if self.normalize else x
            return _Pairs(rows, None, index, index, names.shape[0], True, 1.0 / self.temperature)
        checks.pair_of_matrices("embeddings", x, "ref_emb", y)
        ref_labels = _labels("ref_labels", ref_labels, y, "ref_emb")
        names, index = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
        n = x.shape[0]
        if self.normalize:
            x, y = normalize_rows(x), normalize_rows(y)
        return _Pairs(x, y, index[:n], index[n:], names.shape[0], own, 1.0 / self.temperature)


class NTXentLoss(_LabelLoss):
    """Every positive pair against the negatives of its anchor; the mean over positive pairs.

        L = mean_{(i, p) positive} [ log(e^{s_ip / tau} + sum_{j: label_j != label_i} e^{s_ij / tau}) - s_ip / tau ]

    With r_i the log-sum-exp of the negatives this is the mean of softplus(r_i - s_ip / tau): a second reduction, in which r
    is a row bias. Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1, as the library extends it to labels.

    Args:
        temperature: tau > 0.
        distance: None or CosineSimilarity() for unit rows, DotProductSimilarity(normalize_embeddings=...).
        reducer: None or MeanReducer().
        embedding_regularizer: called with the embeddings, its value is added.
        embedding_reg_weight: its weight.
        collect_stats: None or False.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
        ValueError: for a temperature <= 0.
    """

    reducers = ("MeanReducer",)

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _of(self, pairs: _Pairs) -> Tensor:
        r = pair_reduce(pairs.x, pairs.y, scale=pairs.scale, mask=pairs.mask(across_groups))
        assert isinstance(r, Tensor)
        total = pair_total(
            pairs.x, pairs.references, outer="sum", pair="softplus", reduce="sum", scale=-pairs.scale, bias_x=r,
            mask=within_groups(pairs.class_x, pairs.class_y),
        )  # fmt: skip
        if pairs.own:
            # A row's class visits its pair with itself too; on unit rows that term is the smallest of the row.
            total = total - softplus(r - pairs.self_logits()).sum()
        count = pairs.positives()
        return pairs.if_any(total / count.sum().clamp(min=1), count)

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        r = negative.log_sum_exp(negative.logits(x, y, 1.0 / self.temperature), x.shape[0])
        return softplus(r[positive.anchors] - positive.logits(x, y, 1.0 / self.temperature)).mean()


class SupConLoss(_LabelLoss):
    """Every anchor's positives among all its pairs; the mean over anchors whose loss is not 0.

        L_i = -(1 / |P(i)|) sum_{p in P(i)} [ s_ip / tau - LSE_{a != i} s_ia / tau ]

    The positives' logits are summed through class sums, in O(n d). Source: Khosla et al. 2020 (arXiv 2004.11362), eq. 2.

    Args:
        temperature: tau > 0.
        distance: None or CosineSimilarity() for unit rows, DotProductSimilarity(normalize_embeddings=...).
        reducer: None or AvgNonZeroReducer(), or MeanReducer() for the mean over all anchors.
        embedding_regularizer: called with the embeddings, its value is added.
        embedding_reg_weight: its weight.
        collect_stats: None or False.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
        ValueError: for a temperature <= 0.
    """

    reducers = ("AvgNonZeroReducer", "MeanReducer")

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _of(self, pairs: _Pairs) -> Tensor:
        a = pairs.scale
        r = pair_reduce(pairs.x, pairs.y, scale=a, mask=off_diagonal() if pairs.own else "all")
        # A row's own term is taken out again. That of a long row drowns the others of its class, so that both are float64.
        wide = replace(pairs, x=pairs.x.double(), y=None if pairs.y is None else pairs.y.double())
        s = pair_reduce(wide.x, wide.y, scale=a, pair="identity", reduce="sum", mask=pairs.mask(within_groups))
        assert isinstance(r, Tensor) and isinstance(s, Tensor)
        count = pairs.positives()
        if pairs.own:
            s = s - wide.self_logits()
        losses = r - (s / count.clamp(min=1)).to(r.dtype)
        # A row whose only pair is positive has loss 0, whatever the rounding.
        losses = torch.where((count > 0) & (pairs.candidates() > 1), losses, 0.0)
        if self.reducer_name == "MeanReducer":
            return pairs.if_any(losses.mean(), count)
        return pairs.if_any(_mean_of_positive(losses), count)

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        n, m = x.shape[0], y.shape[0]
        positive, negative = positive.without_repeats(m), negative.without_repeats(m)
        every = positive + negative
        if len(every.without_repeats(m)) < len(every):
            raise ValueError(
                "indices_tuple: expected each pair among the positives or among the negatives, got one in both; "
                "do not mix labels of several kinds"
            )
        z = every.logits(x, y, 1.0 / self.temperature)
        r = every.log_sum_exp(z, n)
        count = torch.bincount(positive.anchors, minlength=n)
        s = z.new_zeros(n).index_add(0, positive.anchors, z[: len(positive)])
        losses = torch.where(count > 0, torch.where(count > 0, r, 0.0) - s / count.clamp(min=1), 0.0)
        return losses.mean() if self.reducer_name == "MeanReducer" else _mean_of_positive(losses)


def _mean_of_positive(losses: Tensor) -> Tensor:
    """The mean of those above 0; 0 where there are none."""
    losses = torch.where(losses > 0, losses, 0.0)
    return losses.sum() / (losses > 0).sum().clamp(min=1)


class DistributedLossWrapper(nn.Module):
    """One of the losses above over the embeddings of all processes, times their number.

    Others' embeddings carry no gradient: the factor makes up for the mean that DistributedDataParallel takes.

    Args:
        loss: an NTXentLoss or SupConLoss of this module, or the library's CrossBatchMemory around one.
        efficient: whether each process takes its own rows against all, instead of all against all; not with CrossBatchMemory.

    Raises:
        TypeError: for another loss.
        ValueError: for CrossBatchMemory with efficient=True.
    """

    def __init__(self, loss: nn.Module, efficient: bool = False) -> None:
        super().__init__()
        self.memory = type(loss).__name__ == "CrossBatchMemory"
        if not isinstance(loss.loss if self.memory else loss, _LabelLoss):
            raise TypeError(
                f"loss: expected NTXentLoss or SupConLoss of this module, got {type(loss).__name__}; "
                "wrap other losses with the library's own DistributedLossWrapper"
            )
        if self.memory and efficient:
            raise ValueError("efficient: expected False with CrossBatchMemory, as in the library, got True")
        self.loss: Any = loss
        self.efficient = checks.boolean("efficient", efficient)

    def _check(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Any = None,
    ) -> None:
        checks.matrix("embeddings", embeddings)
        if labels is not None or indices_tuple is None:
            _labels("labels", labels, embeddings, "embeddings")
        if ref_emb is not None:
            checks.pair_of_matrices("embeddings", embeddings, "ref_emb", ref_emb)
            if ref_labels is not None or indices_tuple is None:
                _labels("ref_labels", ref_labels, ref_emb, "ref_emb")

    def _across(self) -> dict[str, Any] | None:
        """What all ranks must share."""
        return {"efficient": self.efficient, "loss": repr(self.loss)}

    @agreed(_check, _across, even=("embeddings", "ref_emb"))
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Any = None,
    ) -> Tensor:
        """The loss of one batch; arguments as for the loss itself, indices those of the rows of all processes, own first.

        Raises:
            NotImplementedError: for references without indices_tuple together with efficient=True.
            ValueError: for shapes that do not fit, missing labels, enqueue_mask without CrossBatchMemory, or references with it.
            TypeError: for unsupported or mixed dtypes.
        """
        if self.memory:
            return self._of_memory(embeddings, labels, indices_tuple, ref_emb, ref_labels, enqueue_mask)
        if enqueue_mask is not None:
            raise ValueError("enqueue_mask: expected None, got one; it goes with CrossBatchMemory")
        if ranks.world_size() == 1:
            value: Tensor = self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return value
        checks.matrix("embeddings", embeddings)
        own_labels = (
            None
            if labels is None and indices_tuple is not None
            else _labels("labels", labels, embeddings, "embeddings")
        )
        everyone, all_labels = _gathered(embeddings, own_labels)
        if ref_emb is not None:
            if ref_labels is not None or indices_tuple is None:
                ref_labels = _labels("ref_labels", ref_labels, ref_emb, "ref_emb")
            ref_emb, ref_labels = _gathered(ref_emb, ref_labels)
        if not self.efficient:
            return self.loss(everyone, all_labels, indices_tuple, ref_emb, ref_labels) * ranks.world_size()
        if indices_tuple is not None:
            others = everyone if ref_emb is None else ref_emb
            return self.loss(embeddings, own_labels, indices_tuple, others) * ranks.world_size()
        if ref_emb is not None:
            raise NotImplementedError(
                "ref_emb: expected None with efficient=True, got references; pass efficient=False, or indices_tuple"
            )
        assert isinstance(self.loss, _LabelLoss)
        return self.loss.loss(embeddings, own_labels, everyone, all_labels, True) * ranks.world_size()

    def _of_memory(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, enqueue_mask: Any
    ) -> Tensor:
        if ref_emb is not None or ref_labels is not None:
            raise ValueError(
                "ref_emb: expected None with CrossBatchMemory, whose memory is the reference, got references"
            )
        if ranks.world_size() > 1:
            embeddings, labels = _gathered(embeddings, _labels("labels", labels, embeddings, "embeddings"))
            if enqueue_mask is not None:
                enqueue_mask = ranks.gathered_own_first(enqueue_mask.to(embeddings.device))
        value: Tensor = self.loss(embeddings, labels, indices_tuple, enqueue_mask) * ranks.world_size()
        return value


def _gathered(rows: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows and labels of all processes, own first."""
    return ranks.gathered_own_first(rows), None if labels is None else ranks.gathered_own_first(labels)


def _labels(name: str, labels: Any, rows: Tensor, of: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{name}: expected a tensor, one label for each row of {of}, got {type(labels).__name__}; pass it"
        )
    if labels.dim() != 1 or labels.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{name}: expected shape ({rows.shape[0]},), one label for each row of {of}, got {tuple(labels.shape)}"
        )
    return labels.to(rows.device)


def _normalizes(distance: Any) -> bool:
    """Whether rows are scaled to unit length, for the distances that are dot products."""
    if distance is None:
        return True
    name = type(distance).__name__
    if name not in DISTANCES or (distance.p, distance.power) != (2, 1) or not distance.is_inverted:
        raise NotImplementedError(
            f"distance: expected None, {' or '.join(DISTANCES)} with p=2 and power=1, got {name}; "
            "use the library's own class for others"
        )
    return bool(distance.normalize_embeddings)
