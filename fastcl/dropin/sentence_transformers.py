"""MultipleNegativesRankingLoss as in sentence-transformers 6, its symmetric and cached forms, GISTEmbedLoss, and the spread-out
regulariser.

    from sentence_transformers.losses import MultipleNegativesRankingLoss
    ->  from fastcl.dropin.sentence_transformers import MultipleNegativesRankingLoss

Queries q_i, their documents d_i, and any number of hard negatives for each, whose rows are documents of the same query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import transforms
from ..distributed import agreed
from ..equation import checks
from ..equation.arguments import meant
from ..equation.intrinsics import softplus
from ..equation.masks import Mask, across_groups, off_diagonal
from ..equation.reductions import merge
from ..functional.matching import row_dot
from ..functional.rows import normalize_rows, plain_number
from ..ops import pair_reduce
from ..precision import stacked
from . import ranks
from .contrast import cross_entropy, positives, symmetric_cross_entropy

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
BOTH_WAYS = ("query_to_doc", "doc_to_query")
ELSEWHERE = {
    "CachedMultipleNegativesRankingLoss": "sentence_transformers_cached",
    "CachedMultipleNegativesSymmetricRankingLoss": "sentence_transformers_cached",
    "GISTEmbedLoss": "sentence_transformers_guided",
    "CachedGISTEmbedLoss": "sentence_transformers_guided",
    "GlobalOrthogonalRegularizationLoss": "sentence_transformers_spread",
}
LOG_2 = math.log(2.0)

# Not what stands elsewhere, some of which imports the library.
__all__ = ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"]


def __getattr__(name: str) -> Any:
    """What stands in a module of its own: the cached classes import the library's own caching when they are first asked for."""
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant(name, {*__all__, *ELSEWHERE})}")
    return getattr(import_module(f".{ELSEWHERE[name]}", __package__), name)


class MultipleNegativesRankingLoss(nn.Module):
    """Each query finds its document among all documents, and further directions as asked for.

        joint:          L = mean_i [ log(sum over all directions' pairs of e^z) - z_i ]
        per_direction:  L = mean_i mean_directions [ log(sum over the direction's pairs of e^z) - z_i ]
        z_i = scale s(q_i, d_i), z = scale s(., .)
        query_to_doc: s(q_i, all documents)   query_to_query: s(q_i, q_j), j != i
        doc_to_query: s(d_i, all queries)     doc_to_doc: s(d_i, documents of other queries)

    With hardness, alpha stop_gradient(s) is added to the logits of query_to_doc that the mode names.
    Source: van den Oord et al. 2018 (arXiv 1807.03748); Li et al. 2023 (arXiv 2308.03281); hardness: Lan et al. 2025
    (arXiv 2503.04812), eq. 5.

    Args:
        model: a module that maps a dictionary of features to one with "sentence_embedding", (n, d).
        scale: the factor of the similarities, 1 / temperature, > 0.
        similarity_fct: None or the library's cos_sim for the cosine, its dot_score for the dot product.
        gather_across_devices: whether the rows of all processes take part; gradients flow back to where rows came from.
        directions: of "query_to_doc" (always), "query_to_query", "doc_to_query", "doc_to_doc".
        partition_mode: "joint", or "per_direction" (with query_to_doc and doc_to_query only).
        hardness_mode: None, "in_batch_negatives" (documents of other queries), "hard_negatives" (the query's own hard
            negatives) or "all_negatives" (both).
        hardness_strength: alpha >= 0.

    Raises:
        NotImplementedError: for other similarities.
        ValueError: for values that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.scale = checks.positive_number("scale", scale)
        self.similarity_fct = similarity_fct
        self.normalize = _similarity(similarity_fct) == "cosine"
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(checks.one_of("directions", name, DIRECTIONS) for name in directions)
        if "query_to_doc" not in self.directions:
            raise ValueError(
                f"directions: expected 'query_to_doc' among them, got {directions}; it holds the positives"
            )
        self.partition_mode = checks.one_of("partition_mode", partition_mode, PARTITION_MODES)
        if partition_mode == "per_direction" and not {"query_to_query", "doc_to_doc"}.isdisjoint(directions):
            raise ValueError(
                f"directions: expected query_to_doc and doc_to_query only with partition_mode='per_direction', got {directions}; "
                "the others hold no positive, pass partition_mode='joint'"
            )
        if hardness_mode not in HARDNESS_MODES:
            raise ValueError(f"hardness_mode: expected one of {HARDNESS_MODES}, got {hardness_mode!r}")
        self.hardness_mode = hardness_mode
        self.hardness_strength = plain_number("hardness_strength", hardness_strength)
        if self.hardness_strength < 0.0:
            raise ValueError(f"hardness_strength: expected a number >= 0, got {hardness_strength}")

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; each column is embedded by a forward pass of its own.

        Args:
            sentence_features: the columns: queries, documents, hard negatives.
            labels: not part of this loss, as in the library.

        Returns:
            A scalar.

        Raises:
            ValueError: for fewer than 2 columns, shapes that do not fit, or no rows.
            TypeError: for unsupported or mixed dtypes.
        """
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def _check(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> None:
        if len(embeddings) < 2:
            raise ValueError(
                f"embeddings: expected queries and documents, got {len(embeddings)} columns; pass 2 or more"
            )
        for i, column in enumerate(embeddings[1:], 1):
            checks.pair_of_matrices("embeddings[0]", embeddings[0], f"embeddings[{i}]", column, same_rows=True)
        checks.some_rows("embeddings", embeddings[0])

    def _across(self) -> dict[str, Any] | None:
        """What all ranks must share, where rows of all are taken in."""
        return self.get_config_dict() if self.gather_across_devices else None

    @agreed(_check, _across, even=("embeddings",))
    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of columns that are embedded already.

        Args:
            embeddings: queries, documents, then hard negatives, each (n, d) floating, of one dtype.
            labels: not part of this loss, as in the library.

        Returns:
            A scalar.

        Raises:
            ValueError: for fewer than 2 columns, shapes that do not fit, or no rows.
            TypeError: for unsupported or mixed dtypes.
        """
        self._check(embeddings)
        columns = [normalize_rows(column) if self.normalize else column for column in embeddings]
        batch = _Batch.of(columns, self.gather_across_devices)
        if self.hardness_mode is None or self.hardness_strength == 0.0:
            if self.directions == ("query_to_doc",):
                return cross_entropy(batch.queries, batch.all_docs, batch.offset, self.scale)
            if self.partition_mode == "per_direction" and batch.queries is batch.all_queries:
                return symmetric_cross_entropy(batch.queries, batch.all_docs, self.scale)
        p = positives(batch.queries, batch.all_docs, batch.offset, self.scale)
        return self._joint(batch, p) if self.partition_mode == "joint" else self._per_direction(batch, p)

    def _joint(self, batch: _Batch, p: Tensor) -> Tensor:
        """One softmax; doc_to_query holds the positive a second time: log(k e^p + e^r) - p, k = 1 or 2."""
        r, twice = self._hard(batch), "doc_to_query" in self.directions
        if "query_to_query" in self.directions:
            r = merge(r, self._negatives(batch.queries, batch.all_queries, batch.others))
        if twice:
            r = merge(r, self._negatives(batch.docs, batch.all_queries, batch.others))
        if "doc_to_doc" in self.directions:
            r = merge(r, self._negatives(batch.docs, batch.all_docs, batch.of_other_queries))
        k = LOG_2 if twice else 0.0
        return (softplus(r - p - k) + k).mean()

    def _per_direction(self, batch: _Batch, p: Tensor) -> Tensor:
        losses = softplus(self._hard(batch) - p)
        if "doc_to_query" in self.directions:
            backward = self._negatives(batch.docs, batch.all_queries, batch.others)
            losses = 0.5 * (losses + softplus(backward - p))
        return losses.mean()

    def _hard(self, batch: _Batch) -> Tensor:
        """The log-sum-exp of query_to_doc without the positive, with the penalties."""
        alpha, mode = self.hardness_strength, self.hardness_mode
        if mode is None or alpha == 0.0:
            return self._negatives(batch.queries, batch.all_docs, batch.others)
        if mode == "all_negatives":
            return self._negatives(batch.queries, batch.all_docs, batch.others, alpha)
        in_batch, own = (alpha, 0.0) if mode == "in_batch_negatives" else (0.0, alpha)
        r = self._negatives(batch.queries, batch.all_docs, batch.of_other_queries, in_batch)
        for negatives in batch.hard_negatives:
            s = row_dot(batch.queries, negatives)
            r = merge(r, self.scale * s + own * s.detach())
        return r

    def _negatives(self, x: Tensor, y: Tensor, mask: Mask, alpha: float = 0.0) -> Tensor:
        """LSE_j (scale s_ij + alpha stop_gradient(s_ij)): scale + alpha in the value, scale alone in the gradients."""
        scale = self.scale + alpha
        if alpha != 0.0:
            share = self.scale / scale
            x, y = _attenuated(x, share), _attenuated(y, share)
        return pair_reduce(x, None if y is x else y, scale=scale, mask=mask)

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for model cards."""
        names = ("scale", "similarity_fct", "gather_across_devices", "directions", "partition_mode", "hardness_mode")
        return _config(self, *names, "hardness_strength")

    @property
    def temperature(self) -> float | Tensor:
        """1 / scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """For model cards: the paper of the directions and the partition."""
        if set(self.directions) == set(DIRECTIONS) and self.partition_mode == "joint":
            return _citation(
                "Towards General Text Embeddings with Multi-stage Contrastive Learning",
                "Li, Zehan and others",
                "2308.03281",
            )
        if set(self.directions) == set(BOTH_WAYS) and self.partition_mode == "per_direction":
            title = "Jina Embeddings 2: 8192-Token General-Purpose Text Embeddings for Long Documents"
            return _citation(title, "Günther, Michael and others", "2310.19923")
        title = "Representation Learning with Contrastive Predictive Coding"
        return _citation(title, "van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol", "1807.03748")


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss in both directions, each with a softmax of its own.

    Args:
        model, scale, similarity_fct, gather_across_devices: see MultipleNegativesRankingLoss.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, scale, similarity_fct, gather_across_devices, BOTH_WAYS, "per_direction")


def _config(loss: nn.Module, *names: str) -> dict[str, Any]:
    """What the loss has under these names, of its similarity the name."""
    given = {name: getattr(loss, name) for name in names}
    return given | {"similarity_fct": getattr(loss.similarity_fct, "__name__", "cos_sim")}


def _citation(title: str, author: str, arxiv: str) -> str:
    key = f"{author.split(',')[0].split()[-1].lower()}{2000 + int(arxiv[:2])}"
    fields = {"title": title, "author": author, "eprint": arxiv, "archivePrefix": "arXiv"}
    return "\n@misc{%s,\n%s\n}\n" % (key, ",\n".join(f"    {name}={{{value}}}" for name, value in fields.items()))  # noqa: UP031


@dataclass
class _Batch:
    """This process's queries and documents, and those of all; row i here is row offset + i there."""

    queries: Tensor
    docs: Tensor
    hard_negatives: list[Tensor]
    all_queries: Tensor
    all_docs: Tensor
    offset: int

    @classmethod
    def of(cls, columns: list[Tensor], gather: bool) -> _Batch:
        if not gather or ranks.world_size() == 1:
            return cls(columns[0], columns[1], columns[2:], columns[0], stacked(*columns[1:]), 0)
        offset = ranks.rank() * columns[0].shape[0]
        everyone = [ranks.gathered_with_gradient(column) for column in columns]
        own = [column[offset : offset + columns[0].shape[0]] for column in everyone]
        return cls(own[0], own[1], own[2:], everyone[0], stacked(*everyone[1:]), offset)

    @property
    def others(self) -> Mask:
        """All but the row's own partner among queries, or among documents."""
        return off_diagonal(row_offset=self.offset)

    @property
    def of_other_queries(self) -> Mask:
        """Documents and hard negatives that belong to other queries."""
        queries = torch.arange(self.all_queries.shape[0], device=self.queries.device)
        own = queries[self.offset : self.offset + self.queries.shape[0]]
        return across_groups(own, queries.repeat(self.all_docs.shape[0] // self.all_queries.shape[0]))


def _attenuated(rows: Tensor, share: float | Tensor) -> Tensor:
    """The rows as they are; their gradient times `share`."""
    if transforms.active():
        return rows.detach() + share * (rows - rows.detach())
    same: Tensor = _Attenuate.apply(rows, share)
    return same


class _Attenuate(torch.autograd.Function):
    """The rows as they are; their gradient times `share`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: float) -> Tensor:
        ctx.share = share
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] * ctx.share, None


def _similarity(function: Any) -> str:
    """ "cosine" or "dot", for None and the library's own functions; others raise."""
    if function is None:
        return "cosine"
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", type(function).__name__)
    if owner is not None and name == "similarity":
        name = getattr(owner, "similarity_fn_name", None)
        name = getattr(name, "value", name)
    elif not str(getattr(function, "__module__", "")).startswith("sentence_transformers."):
        name = f"{getattr(function, '__module__', '')}.{name}"
    known = {"cos_sim": "cosine", "pytorch_cos_sim": "cosine", "cosine": "cosine", "dot_score": "dot", "dot": "dot"}
    if name not in known:
        raise NotImplementedError(
            f"similarity_fct: expected None or the library's cos_sim or dot_score, got {name}; use the library's class for it"
        )
    return known[str(name)]
