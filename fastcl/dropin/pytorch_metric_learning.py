"""The losses of pytorch-metric-learning 2.9 that are log-sum-exps over pairs, and its DistributedLossWrapper.

    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss, MultiSimilarityLoss, NCALoss, NPairsLoss
    ->  from fastcl.dropin.pytorch_metric_learning import NTXentLoss, SupConLoss, MultiSimilarityLoss, NCALoss, NPairsLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
    ->  from fastcl.dropin.pytorch_metric_learning import DistributedLossWrapper

Positives are pairs of equal labels, negatives pairs of different ones; embeddings alone (or with the very same tensor of
labels for the references) leave out each row's pair with itself. With `indices_tuple` they are the pairs that it names, so that
the library's miners and its CrossBatchMemory work around these classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import transforms
from ..distributed import agreed
from ..equation import checks
from ..equation.arguments import absent
from ..equation.intrinsics import softplus
from ..equation.masks import within_groups
from ..equation.problem import accumulation_dtype
from ..functional.positives import few, loss_of_few, nearly_points
from ..functional.rows import times
from ..ops import pair_reduce, pair_total
from ..precision import rounded_once, widened
from . import ranks
from .labelled import LabelledPairs, LabelLoss, checked_labels
from .metric_learning import GeneralizedLiftedStructureLoss, MultiSimilarityLoss, NCALoss, NPairsLoss
from .mined import Pairs

__all__ = [
    "DistributedLossWrapper",
    "GeneralizedLiftedStructureLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "SupConLoss",
]

if not TYPE_CHECKING:  # to type checkers it would say that any name is there
    __getattr__ = absent(__name__)


class NTXentLoss(LabelLoss):
    """Every positive pair against the negatives of its anchor; the mean over positive pairs.

        L = mean_{(i, p) positive} [ log(e^{s_ip / tau} + sum_{j: label_j != label_i} e^{s_ij / tau}) - s_ip / tau ]

    With r_i the log-sum-exp of the negatives this is the mean of softplus(r_i - s_ip / tau): a second reduction, in which r
    is a row bias. Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1, as the library extends it to labels.

    Args:
        temperature: tau > 0.
        distance: None or CosineSimilarity() for unit rows, DotProductSimilarity(normalize_embeddings=...).
        reducer: None or MeanReducer().
        embedding_regularizer, embedding_reg_weight, collect_stats: as the library has them; no statistics are kept.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
        ValueError: for a temperature <= 0.
    """

    reducers = ("MeanReducer",)

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = checks.positive_number("temperature", temperature)

    def _of(self, pairs: LabelledPairs) -> Tensor:
        a = 1.0 / self.temperature
        r = pairs.negatives(a)
        # A row's class visits its pair with itself too. Of unit rows that term is the smallest of the row, and is taken out again;
        # of others in a graph, where none can depend on how large classes are.
        smallest = pairs.own and ((pairs.y is None and self.measure.normalize) or not transforms.values_are_here())
        masks = [within_groups(pairs.class_x, pairs.class_y)] if smallest else pairs.masks_of_class()
        total = -softplus(r - pairs.self_logits(a)).sum() if smallest else r[:0].sum()
        for mask in masks:
            total = total + pair_total(
                pairs.x, pairs.references, outer="sum", pair="softplus", reduce="sum", scale=-a, bias_x=r, mask=mask
            )
        count = pairs.positives()
        return pairs.if_any(total / count.sum().clamp(min=1), count)

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        r = negative.log_sum_exp(negative.logits(x, y, 1.0 / self.temperature), x.shape[0])
        return softplus(r[positive.anchors] - positive.logits(x, y, 1.0 / self.temperature)).mean()


class SupConLoss(LabelLoss):
    """Every anchor's positives among all its pairs; the mean over anchors whose loss is not 0.

        L_i = -(1 / |P(i)|) sum_{p in P(i)} [ s_ip / tau - LSE_{a != i} s_ia / tau ]

    Few positives have their logits formed; those of larger classes are summed through class sums, in O(n d). Source: Khosla et al.
    2020 (arXiv 2004.11362), eq. 2.

    Args:
        temperature: tau > 0.
        distance: None or CosineSimilarity() for unit rows, DotProductSimilarity(normalize_embeddings=...).
        reducer: None or AvgNonZeroReducer(), or MeanReducer() for the mean over all anchors.
        embedding_regularizer, embedding_reg_weight, collect_stats: as the library has them; no statistics are kept.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
        ValueError: for a temperature <= 0.
    """

    reducers = ("AvgNonZeroReducer", "MeanReducer")

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = checks.positive_number("temperature", temperature)

    def rows(self, x: Tensor) -> Tensor:
        return super().rows(widened(x))

    def _of(self, pairs: LabelledPairs) -> Tensor:
        a, count = 1.0 / self.temperature, pairs.positives()
        found = pairs.positive_pairs(few(pairs.x.shape[0], pairs.references.shape[0]))
        if found is not None:
            losses = self._of_few(found, found.logits(pairs.x, pairs.references, a), pairs.negatives(a), count)
            return pairs.if_any(self.reduced(losses), count)
        with rounded_once(pairs.x.device):
            return pairs.if_any(self.reduced(self._of_class_sums(pairs, a, count)), count)

    def _of_class_sums(self, pairs: LabelledPairs, a: float | Tensor, count: Tensor) -> Tensor:
        """Each row's loss, its positives summed by class; 0 without positives."""
        # A row's own term is taken out again. That of a long row drowns the others of its class, so that both are float64.
        wide = replace(pairs, x=pairs.x.double(), y=None if pairs.y is None else pairs.y.double())
        s = pair_reduce(wide.x, wide.y, scale=a, pair="identity", reduce="sum", mask=pairs.mask(within_groups))
        if pairs.own:
            s = s - wide.self_logits(a)
        mean, some = s / count.clamp(min=1), count > 0
        of_x, of_y = (torch.linalg.vector_norm(t.detach(), dim=1) for t in (wide.x, wide.references))
        near = nearly_points(mean, times(a, of_x * of_y.mean()), some)
        swept = wide if near else pairs
        r = pair_reduce(swept.x, swept.y, scale=a, mask=pairs.without_only_positives())
        # Rows of several positives have a loss of at least the log of their number. A single one is not in r.
        losses = (r - mean.to(r.dtype)).to(accumulation_dtype(pairs.x.dtype))  # the dtype that says which are 0
        return torch.where(some, torch.where(count == 1, self.log_1p_exp(losses), losses), 0.0)

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        n, m, a = x.shape[0], y.shape[0], 1.0 / self.temperature
        positive, negative = positive.without_repeats(m), negative.without_repeats(m)
        positive.apart_from(negative, m)
        r = negative.log_sum_exp(negative.logits(x, y, a), n)
        count = torch.bincount(positive.anchors, minlength=n)
        return self.reduced(self._of_few(positive, positive.logits(x, y, a), r, count))

    def _of_few(self, positive: Pairs, p: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """Each row's loss, of its positives' logits and the log-sum-exp of its negatives; 0 without positives."""
        return loss_of_few(negatives, p, positive.anchors, count, self.log_1p_exp)


class DistributedLossWrapper(nn.Module):
    """One of the losses above over the embeddings of all processes, times their number.

    Others' embeddings carry no gradient: the factor makes up for the mean that DistributedDataParallel takes.

    Args:
        loss: a loss of this module, or the library's CrossBatchMemory around one.
        efficient: whether each process takes its own rows against all, instead of all against all; not with CrossBatchMemory.

    Raises:
        TypeError: for another loss.
        ValueError: for CrossBatchMemory with efficient=True.
    """

    def __init__(self, loss: Any, efficient: bool = False) -> None:
        super().__init__()
        self.memory = type(loss).__name__ == "CrossBatchMemory"
        if not isinstance(loss.loss if self.memory else loss, LabelLoss):
            raise TypeError(
                f"loss: expected a loss of this module, got {type(loss).__name__}; "
                "wrap other losses with the library's own DistributedLossWrapper"
            )
        self.efficient = checks.boolean("efficient", efficient)
        if self.memory and self.efficient:
            raise ValueError("efficient: expected False with CrossBatchMemory, as in the library, got True")
        if self.efficient and not loss.efficient:
            raise NotImplementedError(
                f"efficient: expected False with {type(loss).__name__}, whose pairs are those of one batch with itself, got True"
            )
        self.loss: Any = loss

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
            checked_labels("labels", labels, embeddings, "embeddings")
        if ref_emb is not None:
            checks.pair_of_matrices("embeddings", embeddings, "ref_emb", ref_emb)
            if ref_labels is not None or indices_tuple is None:
                checked_labels("ref_labels", ref_labels, ref_emb, "ref_emb")

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
            else checked_labels("labels", labels, embeddings, "embeddings")
        )
        everyone, all_labels = _gathered(embeddings, own_labels)
        if ref_emb is not None:
            if ref_labels is not None or indices_tuple is None:
                ref_labels = checked_labels("ref_labels", ref_labels, ref_emb, "ref_emb")
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
        assert isinstance(self.loss, LabelLoss)
        return self.loss.loss(embeddings, own_labels, everyone, all_labels, True) * ranks.world_size()

    def _of_memory(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, enqueue_mask: Any
    ) -> Tensor:
        if ref_emb is not None or ref_labels is not None:
            raise ValueError(
                "ref_emb: expected None with CrossBatchMemory, whose memory is the reference, got references"
            )
        if ranks.world_size() > 1:
            embeddings, labels = _gathered(embeddings, checked_labels("labels", labels, embeddings, "embeddings"))
            if enqueue_mask is not None:
                enqueue_mask = ranks.gathered_own_first(enqueue_mask.to(embeddings.device))
        value: Tensor = self.loss(embeddings, labels, indices_tuple, enqueue_mask) * ranks.world_size()
        return value


def _gathered(rows: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows and labels of all processes, own first."""
    return ranks.gathered_own_first(rows), None if labels is None else ranks.gathered_own_first(labels)
