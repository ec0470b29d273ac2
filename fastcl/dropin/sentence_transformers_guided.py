"""GISTEmbedLoss and CachedGISTEmbedLoss: the library's classes with their similarities of pairs left to fastcl.

    from fastcl.dropin.sentence_transformers import CachedGISTEmbedLoss, GISTEmbedLoss

Imported with these names only, since both are subclasses of sentence-transformers 6's own, which check the models, read texts anew
for the guide's tokenizer and cache gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import sentence_transformers.sentence_transformer.losses as originals
import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import batch_to_device
from torch import Tensor

from ..distributed import agreed
from ..equation import checks
from ..equation.intrinsics import softplus
from ..equation.masks import Mask, at_most, off_diagonal
from ..equation.problem import accumulation_dtype
from ..equation.reductions import merge
from ..functional.false_negatives import rounding
from ..functional.matching import row_dot
from ..functional.rows import normalize_rows
from ..ops import pair_reduce
from ..precision import stacked
from . import ranks

__all__ = ["CachedGISTEmbedLoss", "GISTEmbedLoss"]
Columns = Sequence[Tensor]


class _Guided:
    """What both classes make of columns that are embedded: anchors, positives, negatives, and the guide's embeddings of each.

    One softmax over the pairs of anchors with positives and negatives, and as asked for of anchors with anchors and of positives
    with positives, whose similarity by the guide is at most the positive's less the margin:

        L = mean_i log(sum of e^(s / tau) over these and the positive) - s(a_i, p_i) / tau
    """

    temperature: float
    margin: float
    margin_strategy: str
    contrast_anchors: bool
    contrast_positives: bool
    gather_across_devices: bool

    def _check(self, embeddings: Columns, guides: Columns) -> None:
        if len(embeddings) < 2 or len(guides) != len(embeddings):
            raise ValueError(
                f"embeddings: expected anchors, positives and as many by the guide, got {len(embeddings)} columns and "
                f"{len(guides)} of the guide"
            )
        for name, columns in (("embeddings", embeddings), ("guides", guides)):
            for i, column in enumerate(columns):
                checks.pair_of_matrices(f"{name}[0]", columns[0], f"{name}[{i}]", column, same_rows=True)
        if guides[0].shape[0] != embeddings[0].shape[0]:
            raise ValueError(
                f"guides: expected {embeddings[0].shape[0]} rows, as embeddings have, got {guides[0].shape[0]}"
            )
        checks.some_rows("embeddings", embeddings[0])

    def _across(self) -> dict[str, Any] | None:
        """What all ranks must share, where rows of all are taken in."""
        if not self.gather_across_devices:
            return None
        names = ("temperature", "margin", "margin_strategy", "contrast_anchors", "contrast_positives")
        return {name: getattr(self, name) for name in names}

    @agreed(_check, _across, even=("embeddings", "guides"))
    def compute_loss_from_embeddings(self, embeddings: Columns, guides: Columns) -> Tensor:
        """The loss of columns that are embedded already, by the model and by its guide.

        Args:
            embeddings: anchors, positives, then negatives, each (n, d) floating, of one dtype.
            guides: the guide's of the same, each (n, k) floating, without gradient.

        Returns:
            A scalar.

        Raises:
            ValueError: for fewer than 2 columns, shapes that do not fit, or no rows.
            TypeError: for unsupported or mixed dtypes.
        """
        self._check(embeddings, guides)
        anchors, *others = (normalize_rows(column) for column in embeddings)
        wide = accumulation_dtype(anchors.dtype)  # in which at_most holds them: limits are theirs
        s, *t = (normalize_rows(column.detach().to(wide)) for column in guides)
        start = 0
        if self.gather_across_devices and ranks.world_size() > 1:
            start = ranks.rank() * anchors.shape[0]
            others = [ranks.gathered_with_gradient(column) for column in others]
            t = [ranks.gathered(column) for column in t]
        own = slice(start, start + anchors.shape[0])
        limit = self._limit(row_dot(s, t[0][own]), s)

        def negatives(x: Tensor, y: Tensor, s: Tensor, t: Tensor, mask: str | Mask = "all") -> Tensor:
            within = at_most(limit, guide=(s, t), mask=mask)
            return pair_reduce(x, y, scale=1.0 / self.temperature, mask=within)

        # The positive is one column of all that are stacked, and never left out.
        r = negatives(anchors, stacked(*others), s, stacked(*t), off_diagonal(row_offset=start))
        if self.contrast_anchors:
            r = merge(r, negatives(anchors, anchors, s, s))
        if self.contrast_positives:
            r = merge(r, negatives(others[0][own], others[0], t[0][own], t[0]))
        return softplus(r - row_dot(anchors, others[0][own]) / self.temperature).mean()

    def _limit(self, similarity: Tensor, guide: Tensor) -> Tensor:
        """What the guide's similarity of a negative may be. Equal ones (of a text that comes twice) stay, however they round."""
        margin = self.margin * (similarity.abs() if self.margin_strategy == "relative" else 1.0)
        return similarity - margin + rounding(guide)


class GISTEmbedLoss(_Guided, originals.GISTEmbedLoss):  # type: ignore[misc]
    """GISTEmbedLoss, without its matrices of similarities: the guide's are formed tile by tile beside the model's.

    Source: Solatorio 2024 (arXiv 2402.16829).

    Args:
        model, guide, temperature, margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices: as the
            library has them.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch of anchors, positives and, if there is a third column, negatives."""
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(features)}")
        of_guide = [dict(column) for column in features]  # the model writes into its own
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                of_guide = [self._read_anew(column) for column in features]
            guides = embed_columns(self.guide, of_guide)
        return self.compute_loss_from_embeddings(embeddings, guides)

    def _read_anew(self, column: dict[str, Tensor]) -> Any:
        """The texts of a column by the guide's tokenizer."""
        ids: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:
            flat, ends = ids[0].tolist(), column["cu_seq_lens_q"].tolist()
            ids = [flat[start:end] for start, end in pairwise(ends)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(_Guided, originals.CachedGISTEmbedLoss):  # type: ignore[misc]
    """GISTEmbedLoss of any number of rows through models that hold a mini-batch at a time, with any number of negatives.

    The original evaluates the loss in slices of mini_batch_size anchors, each with its rows of the score matrices; here it is
    evaluated once, in O(n d) memory. Source: Gao et al. 2021 (arXiv 2101.06983).

    Args:
        model, guide, temperature, mini_batch_size, mini_batch_num_tokens, show_progress_bar, margin_strategy, margin,
            contrast_anchors, contrast_positives, gather_across_devices: as the library has them.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embedded mini-batches; with_backward, its gradients in them too."""
        columns = ([stacked(*column) for column in of] for of in (reps, reps_guided))
        value: Tensor = self.compute_loss_from_embeddings(*columns)
        if not with_backward:
            return value
        value.backward()
        return value.detach()
