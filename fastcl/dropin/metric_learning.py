"""MultiSimilarityLoss, GeneralizedLiftedStructureLoss, NCALoss and NPairsLoss as in pytorch-metric-learning 2.9.

A row's positives and its negatives are two log-sum-exps; what each class makes of them is O(n).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..equation import checks
from ..equation.masks import off_diagonal
from ..functional.matching import row_dot, row_sqdist
from ..functional.rows import normalize_rows
from ..ops import pair_reduce
from .labelled import DISTANCES, LabelledPairs, LabelLoss, Measure, checked_labels, mean_of_positive, nothing
from .mined import Pairs, positives_and_negatives

WITH_SQUARES = (*DISTANCES, "LpDistance")


class _RowLoss(LabelLoss):
    """A loss that is a mean over rows."""

    reducers = ("MeanReducer", "AvgNonZeroReducer")
    distances = WITH_SQUARES


class _TwoSums(_RowLoss):
    """A function of a row's two log-sum-exps: of e^(a s + b) over its positives, and of another over its negatives."""

    both_kinds = False

    def exponents(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(a, b) of the positives, and of the negatives, for a similarity s."""
        raise NotImplementedError

    def of_row(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of each row; a log-sum-exp over nothing is -inf."""
        raise NotImplementedError

    def _of(self, pairs: LabelledPairs) -> Tensor:
        count = pairs.positives().sum()
        others = pairs.x.shape[0] * pairs.candidates() - count
        (a, b), (c, d) = self.exponents()
        sign = self.measure.sign
        losses = self.of_row(pairs.others_of_class(sign * a, b), pairs.negatives(sign * c, d))
        if not losses.numel():
            return nothing(pairs.x)
        return torch.where((count > 1) | (others > 1), self.reduced(losses), 0.0)

    def _of_mined(self, x: Tensor, y: Tensor, positive: Pairs, negative: Pairs) -> Tensor:
        n, m = x.shape[0], y.shape[0]
        positive, negative = positive.without_repeats(m), negative.without_repeats(m)
        positive.apart_from(negative, m)
        sums = []
        for pairs, (a, b) in zip((positive, negative), self.exponents(), strict=True):
            sums.append(pairs.log_sum_exp(self._logits(pairs, x, y, a) + b, n))
        return self.reduced(self.of_row(*sums))

    def _logits(self, pairs: Pairs, x: Tensor, y: Tensor, a: float) -> Tensor:
        if self.measure.operand == "dot":
            return pairs.logits(x, y, a)
        squares = row_dot(x, x).index_select(0, pairs.anchors) + row_dot(y, y).index_select(0, pairs.others)
        return -a * (squares - pairs.logits(x, y, 2.0))


class MultiSimilarityLoss(_TwoSums):
    """Each row's positives and its negatives, weighted by how hard they are.

        L = mean_i [ log(1 + sum_{p: label_i} e^{-alpha (s_ip - base)}) / alpha
                     + log(1 + sum_{n: other labels} e^{beta (s_in - base)}) / beta ]

    With a squared distance in place of a similarity both signs change. Source: Wang et al. 2019 (arXiv 1904.06627), eq. 17, without
    its own choice of pairs, which the library's MultiSimilarityMiner makes.

    Args:
        alpha: the factor of the positives, > 0.
        beta: the factor of the negatives, > 0.
        base: the similarity at which pairs begin to count.
        distance: None or CosineSimilarity(), DotProductSimilarity(...), or LpDistance(power=2) for the squared distance.
        reducer: None or MeanReducer(), or AvgNonZeroReducer().
        embedding_regularizer, embedding_reg_weight, collect_stats: as the library has them; no statistics are kept.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
        ValueError: for an alpha or a beta <= 0.
    """

    def __init__(self, alpha: float = 2, beta: float = 50, base: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.beta = checks.positive_number("alpha", alpha), checks.positive_number("beta", beta)
        self.base = checks.real("base", base)

    def exponents(self) -> Any:
        alpha, beta, base = self.alpha, self.beta, self.measure.sign * self.base
        return (-alpha, alpha * base), (beta, -beta * base)

    def of_row(self, positive: Tensor, negative: Tensor) -> Tensor:
        return self.log_1p_exp(positive) / self.alpha + self.log_1p_exp(negative) / self.beta


class GeneralizedLiftedStructureLoss(_TwoSums):
    """The hardest positive and the hardest negative of each row, softly, and a hinge.

        L = mean_i max(0, log sum_{p: label_i} e^{d_ip - pos_margin} + log sum_{n: other labels} e^{neg_margin - d_in})

    A logarithm over no pair is 0. With a similarity in place of a distance both signs change. Source: Hermans et al. 2017
    (arXiv 1703.07737), eq. 10. The library's distance where none is given is a square root, which no log-sum-exp of pairs has:
    a distance must be given here.

    Args:
        neg_margin: the margin of the negatives.
        pos_margin: the margin of the positives.
        distance: LpDistance(power=2) for the squared distance, CosineSimilarity() or DotProductSimilarity(...).
        reducer: None or MeanReducer(), or AvgNonZeroReducer().
        embedding_regularizer, embedding_reg_weight, collect_stats: as the library has them; no statistics are kept.

    Raises:
        NotImplementedError: without a distance, or for distances, reducers and statistics that are not supported.
        ValueError: for margins that are no finite numbers.
    """

    optional = False

    def __init__(self, neg_margin: float = 1, pos_margin: float = 0, **kwargs: Any) -> None:
        if kwargs.get("distance") is None:
            raise NotImplementedError(
                "distance: expected LpDistance(power=2), CosineSimilarity() or DotProductSimilarity(), got None, which stands for "
                "a square root; pass one of these, or use the library's own class"
            )
        super().__init__(**kwargs)
        self.neg_margin, self.pos_margin = checks.real("neg_margin", neg_margin), checks.real("pos_margin", pos_margin)

    def exponents(self) -> Any:
        sign = self.measure.sign
        return (-1.0, sign * self.pos_margin), (1.0, -sign * self.neg_margin)

    def of_row(self, positive: Tensor, negative: Tensor) -> Tensor:
        r = [torch.where(r == -torch.inf, 0.0, r) for r in (positive, negative)]
        return torch.relu(r[0] + r[1])


class NCALoss(_RowLoss):
    """Neighbourhood components analysis: each row finds a neighbour of its own label.

        L = mean over rows with a positive of -w_i log( sum_{p: label_i} e^{-a d_ip} / sum_{j} e^{-a d_ij} )

    d is the squared distance of unit rows; of embeddings alone the row itself is left out. w_i is 1, or with indices_tuple how
    often row i is in it, over the most of any row: all pairs count all the same. Source: Goldberger et al. 2004. A share of
    positives that is 0 in the library's dtype is dropped there, not here; where no row has a positive its mean is NaN, here 0.

    Args:
        softmax_scale: a > 0.
        distance: None or LpDistance(power=2), CosineSimilarity() or DotProductSimilarity(...), for e^{a s}.
        reducer: None or MeanReducer(), or AvgNonZeroReducer().
        embedding_regularizer, embedding_reg_weight, collect_stats: as the library has them; no statistics are kept.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
        ValueError: for a softmax_scale <= 0.
    """

    usual = Measure("sqdist")
    efficient = False

    def __init__(self, softmax_scale: float = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.softmax_scale = checks.positive_number("softmax_scale", softmax_scale)

    def _value(
        self, x: Tensor, labels: Tensor | None, indices: Any, y: Tensor | None, ref_labels: Tensor | None
    ) -> Tensor:
        if y is x:  # which the library tells by the object, whatever the labels' are
            _check_same_labels(labels, ref_labels)
            y = ref_labels = None
        pairs = self._pairs(x, labels, y, ref_labels, y is None)
        weights = _appearances(indices, x, x if y is None else y, y is not None)
        if x.shape[0] <= 1:
            return nothing(x)
        a = self.measure.sign * self.softmax_scale
        some = pairs.positives() > 0
        positive = torch.where(some, pairs.others_of_class(a), 0.0)
        losses = torch.where(some, self.log_1p_exp(pairs.negatives(a) - positive), 0.0)
        losses = losses if weights is None else losses * weights.to(losses.dtype)
        return (
            losses.sum() / some.sum().clamp(min=1) if self.reducer_name == "MeanReducer" else mean_of_positive(losses)
        )


def _check_same_labels(labels: Any, ref_labels: Any) -> None:
    """Of references that are the embeddings themselves: a row has one label."""
    tensors = isinstance(labels, Tensor) and isinstance(ref_labels, Tensor)
    if ref_labels is not labels and not (tensors and torch.equal(labels, ref_labels.to(labels.device))):
        raise ValueError(
            "ref_labels: expected labels' own values, since ref_emb is embeddings itself, got others; pass labels, or a copy of "
            "the embeddings as ref_emb"
        )


def _appearances(indices: Any, x: Tensor, y: Tensor, references: bool) -> Tensor | None:
    """How often each row is in the index, over the most of any; None where nothing is in it."""
    if indices is None:
        return None
    positive, negative = positives_and_negatives(indices, x, y)
    parts = [positive.anchors, *((negative.anchors,) if len(indices) == 4 else ())]
    if not references:
        parts += [positive.others, negative.others]
    counts = torch.bincount(torch.cat(parts), minlength=x.shape[0])
    return counts.double() / counts.max() if len(positive) or len(negative) else None


class NPairsLoss(_RowLoss):
    """One pair of rows for each label, each first row against the second rows of all labels.

        L = mean_k [ log sum_l e^{s(a_k, p_l)} - s(a_k, p_k) ]

    a_k and p_k are the first two rows of label k, or its first pair in indices_tuple. Source: Sohn 2016, eq. 8.

    Args:
        distance: None or DotProductSimilarity(...), which scales rows to unit length by default, CosineSimilarity(), or
            LpDistance(power=2), for -d.
        reducer: None or MeanReducer(), or AvgNonZeroReducer().
        embedding_regularizer, embedding_reg_weight, collect_stats: as the library has them; no statistics are kept.

    Raises:
        NotImplementedError: for distances, reducers and statistics that are not supported.
    """

    efficient = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def _value(
        self, x: Tensor, labels: Tensor | None, indices: Any, y: Tensor | None, ref_labels: Tensor | None
    ) -> Tensor:
        if y is not None and (y is not x or ref_labels is not labels):
            raise ValueError("ref_emb: expected None, got references; this loss has none, as in the library")
        checks.matrix("embeddings", x)
        labels = checked_labels("labels", labels, x, "embeddings")
        anchors, others = _first_of_each(labels, None if indices is None else positives_and_negatives(indices, x, x)[0])
        if not len(anchors):
            return nothing(x)
        rows = normalize_rows(x) if self.measure.normalize else x
        a, p = rows.index_select(0, anchors), rows.index_select(0, others)
        dot = self.measure.operand == "dot"
        aligned = row_dot(a, p) if dot else -row_sqdist(a, p)
        r = pair_reduce(a, p, operand=self.measure.operand, scale=self.measure.sign, mask=off_diagonal())
        return self.reduced(self.log_1p_exp(r - aligned))


def _first_of_each(labels: Tensor, positive: Pairs | None) -> Pairs:
    """The first pair of each label: of those given, or of all pairs of rows."""
    of = labels if positive is None else labels[positive.anchors]
    names, index = torch.unique(of, return_inverse=True)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=names.shape[0])
    first = torch.cumsum(counts, 0) - counts
    if positive is not None:
        picked = order[first]
        return Pairs(positive.anchors[picked], positive.others[picked])
    first = first[counts > 1]
    return Pairs(order[first], order[first + 1])
