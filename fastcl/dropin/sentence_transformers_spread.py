"""GlobalOrthogonalRegularizationLoss as in sentence-transformers 6, without its matrix of similarities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..equation import checks
from ..equation.masks import off_diagonal
from ..functional.rows import normalize_rows
from ..ops import pair_total
from .sentence_transformers import _citation, _config, _similarity

__all__ = ["GlobalOrthogonalRegularizationLoss"]


class GlobalOrthogonalRegularizationLoss(nn.Module):
    """Similarities within each column as those of uniform directions, by their first two moments.

        gor_mean = w_1 M_1^2,   gor_second_moment = w_2 max(0, M_2 - 1 / d),   M_k = mean_{i != j} s(x_i, x_j)^k

    each the mean (or the sum) over the columns. Both moments are sums of rows and of d x d matrices where that is cheaper; one row
    alone has moments of 0. Source: Zhang et al. 2017 (arXiv 1708.06320); Schechter Vera et al. 2025 (arXiv 2509.20354).

    Args:
        model: a module that maps a dictionary of features to one with "sentence_embedding", (n, d).
        similarity_fct: None or the library's cos_sim for the cosine, its dot_score for the dot product.
        mean_weight: w_1; 0 or None leaves its term out.
        second_moment_weight: w_2; 0 or None leaves its term out.
        aggregation: "mean" or "sum" over the columns.

    Raises:
        NotImplementedError: for other similarities.
        ValueError: for two weights that are 0, or another aggregation.
    """

    def __init__(
        self,
        model: nn.Module,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        mean_weight: float | None = 1.0,
        second_moment_weight: float | None = 1.0,
        aggregation: str = "mean",
    ) -> None:
        super().__init__()
        self.model = model
        self.similarity_fct = similarity_fct
        self.normalize = _similarity(similarity_fct) == "cosine"
        for name, weight in (("mean_weight", mean_weight), ("second_moment_weight", second_moment_weight)):
            if weight is not None:
                checks.real(name, weight)
        if not mean_weight and not second_moment_weight:
            raise ValueError("mean_weight: expected a number other than 0, or such a second_moment_weight, got neither")
        self.mean_weight = mean_weight
        self.second_moment_weight = second_moment_weight
        self.aggregation = checks.one_of("aggregation", aggregation, ("mean", "sum"))

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of one batch; each column is embedded by a forward pass of its own.

        Args:
            sentence_features: any number of columns.
            labels: not part of this loss, as in the library.

        Returns:
            {"gor_mean": a scalar, "gor_second_moment": a scalar}, those whose weight is not 0.

        Raises:
            ValueError: for no columns, or embeddings that are no matrices.
            TypeError: for unsupported dtypes.
        """
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of columns that are embedded already; arguments as for `forward`."""
        if not len(embeddings):
            raise ValueError("embeddings: expected one or more columns, got none; pass the embeddings of each")
        found: dict[str, Tensor] = {}
        columns = [self.compute_gor(column) for column in embeddings]
        for name, weight, terms in zip(
            ("gor_mean", "gor_second_moment"),
            (self.mean_weight, self.second_moment_weight),
            zip(*columns, strict=True),
            strict=True,
        ):
            if weight:
                every = torch.stack(terms)
                found[name] = weight * (every.sum() if self.aggregation == "sum" else every.mean())
        return found

    def compute_gor(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of one column, (n, d), without their weights."""
        n, d = checks.matrix("embeddings", embeddings).shape
        x = normalize_rows(embeddings) if self.normalize else embeddings
        first, second = (
            pair_total(x, outer="sum", pair=pair, reduce="sum", mask=off_diagonal()) / max(n * (n - 1), 1)
            for pair in ("identity", "square")
        )
        return first.square(), torch.relu(second - 1.0 / max(d, 1))

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for model cards."""
        return _config(self, "similarity_fct", "mean_weight", "second_moment_weight", "aggregation")

    @property
    def citation(self) -> str:
        """For model cards."""
        return _citation(
            "Learning Spread-out Local Feature Descriptors",
            "Zhang, Xu and Yu, Felix X. and Kumar, Sanjiv and Chang, Shih-Fu",
            "1708.06320",
        )
