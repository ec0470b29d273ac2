"""MultipleNegativesRankingLoss beside sentence-transformers', in one process."""

import inspect
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl.dropin.sentence_transformers import MultipleNegativesRankingLoss

from . import originals
from .compare import assert_agree, rows

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *more) for k in range(4) for more in combinations(OTHERS, k)]
MODES = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def original() -> Any:
    return originals.sentence_transformers().sentence_transformer.losses.MultipleNegativesRankingLoss


def columns(count: int, n: int = 9, d: int = 6) -> list[Tensor]:
    """Queries, their documents near them, and hard negatives a little less near."""
    q = rows(n, d)
    return [q, *(q + (0.5 + 0.5 * k) * rows(n, d, seed=k) for k in range(1, count))]


def agree(count: int, n: int = 9, similarity: Any = None, **arguments: Any) -> None:
    mine = MultipleNegativesRankingLoss(nn.Identity(), similarity_fct=similarity, **arguments)
    given = {} if similarity is None else {"similarity_fct": similarity}
    theirs = original()(nn.Identity(), **given, **arguments)
    assert_agree(
        lambda *t: mine.compute_loss_from_embeddings(list(t), None),
        lambda *t: theirs.compute_loss_from_embeddings(list(t), None),
        columns(count, n),
    )


def test_signatures() -> None:
    for method in ("__init__", "forward", "compute_loss_from_embeddings"):
        a = inspect.signature(getattr(MultipleNegativesRankingLoss, method)).parameters
        b = inspect.signature(getattr(original(), method)).parameters
        assert list(a) == list(b)
        differ = {k for k in a if a[k].default != b[k].default}
        assert differ <= {"similarity_fct", "labels"}  # None is the cosine; labels may be left out
    mine, theirs = MultipleNegativesRankingLoss(nn.Identity()), original()(nn.Identity())
    assert mine.get_config_dict() == theirs.get_config_dict()
    assert mine.temperature == theirs.temperature


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_default(count: int, scale: float) -> None:
    agree(count, scale=scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_joint(directions: tuple[str, ...], count: int, mode: str | None) -> None:
    agree(count, directions=directions, hardness_mode=mode, hardness_strength=0.0 if mode is None else 5.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")])
def test_per_direction(directions: tuple[str, ...], count: int, mode: str | None) -> None:
    strength = 0.0 if mode is None else 5.0
    agree(count, directions=directions, partition_mode="per_direction", hardness_mode=mode, hardness_strength=strength)


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_rows(n: int) -> None:
    for count in (2, 3):
        agree(count, n=n)
        agree(count, n=n, directions=DIRECTIONS[-1])
        agree(count, n=n, hardness_mode="in_batch_negatives", hardness_strength=3.0)


def test_similarities() -> None:
    util = originals.sentence_transformers().util
    for function in (util.cos_sim, util.pytorch_cos_sim, util.dot_score):
        agree(3, similarity=function, scale=2.0)
        agree(3, similarity=function, scale=2.0, hardness_mode="all_negatives", hardness_strength=1.5)


class Columns(nn.Module):
    """A model: features to embeddings through a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.map(features["rows"])}


def test_forward_trains_the_model() -> None:
    torch.manual_seed(0)
    model, features = Columns(), [{"rows": column} for column in columns(3)]
    gradients = []
    for loss in (MultipleNegativesRankingLoss(model), original()(model)):
        model.zero_grad()
        value = loss(iter(features), torch.zeros(9))
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max() + 1e-14


def test_what_is_not_supported_raises() -> None:
    model, util = nn.Identity(), originals.sentence_transformers().util

    def cos_sim(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    for other in (util.euclidean_sim, cos_sim, torch.nn.CosineSimilarity()):
        with pytest.raises(NotImplementedError, match="similarity_fct: expected None"):
            MultipleNegativesRankingLoss(model, similarity_fct=other)
    for arguments, match in (
        ({"scale": 0.0}, "scale"),
        ({"directions": ()}, "directions: expected 'query_to_doc'"),
        ({"directions": ("doc_to_query",)}, "directions: expected 'query_to_doc'"),
        ({"directions": ("query_to_doc", "doc_to_queries")}, "did you mean 'doc_to_query'"),
        ({"partition_mode": "both"}, "partition_mode"),
        ({"partition_mode": "per_direction", "directions": DIRECTIONS[-1]}, "partition_mode='joint'"),
        ({"hardness_mode": "hard"}, "hardness_mode"),
        ({"hardness_strength": -1.0}, "hardness_strength"),
    ):
        with pytest.raises(ValueError, match=match):
            MultipleNegativesRankingLoss(model, **arguments)
    loss = MultipleNegativesRankingLoss(model)
    for given in ("hard", torch.tensor(1.0), True):
        with pytest.raises(TypeError, match="hardness_strength: expected a number"):
            MultipleNegativesRankingLoss(model, hardness_strength=given)
    with pytest.raises(ValueError, match="expected queries and documents"):
        loss.compute_loss_from_embeddings(columns(1))
    with pytest.raises(ValueError, match="one row for each row"):
        loss.compute_loss_from_embeddings([rows(4, 3), rows(3, 3)])
    with pytest.raises(ValueError, match="at least 1 row"):
        loss.compute_loss_from_embeddings([rows(0, 3), rows(0, 3)])
