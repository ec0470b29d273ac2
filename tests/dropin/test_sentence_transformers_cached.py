"""The cached and the symmetric ranking losses beside sentence-transformers' own."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl.dropin import sentence_transformers as ours

from . import originals
from .compare import rows

pytestmark = pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")
SYMMETRIC = "MultipleNegativesSymmetricRankingLoss"
NAMES = ("CachedMultipleNegativesRankingLoss", f"Cached{SYMMETRIC}", SYMMETRIC)
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    (NAMES[0], {"directions": EVERY, "hardness_mode": "hard_negatives", "hardness_strength": 4.0}),
    (NAMES[0], {"directions": EVERY[::2], "partition_mode": "per_direction", "scale": 7.0}),
    (NAMES[0], {"mini_batch_num_tokens": 7}),
]


class Embed(nn.Module):
    """Features to embeddings; dropout as in a model that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.dropout = nn.Linear(6, 4, dtype=torch.float64), nn.Dropout(0.2)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features["sentence_embedding"] = self.dropout(self.map(features["rows"]))
        return features


class Model(nn.Sequential):
    """What the library's losses ask of a model."""

    def __init__(self) -> None:
        super().__init__(Embed())

    def get_embedding_dimension(self) -> int:
        return 4


def original(name: str) -> Any:
    return getattr(originals.sentence_transformers().sentence_transformer.losses, name)


def features(columns: int, n: int = 11) -> list[dict[str, Tensor]]:
    """Columns of rows, with masks that say how many tokens each has."""
    mask = (torch.arange(4) < 1 + torch.arange(n)[:, None] % 4).long()
    return [{"rows": rows(n, 6, seed=k), "attention_mask": mask.clone()} for k in range(columns)]


def trained(wrap: Any) -> list[Tensor]:
    """Value and gradients of a step."""
    torch.manual_seed(0)
    model = Model()
    loss = wrap(model)
    value = loss(iter(features(3)), torch.zeros(11))
    (value / 2).backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(wrap_ours: Any, wrap_theirs: Any) -> None:
    for a, b in zip(trained(wrap_ours), trained(wrap_theirs), strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max() + 1e-14


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda value: str(value))
def test_value_and_gradients(name: str, settings: dict[str, Any]) -> None:
    if "Cached" in name:
        settings = {"mini_batch_size": 4} | settings
    same(lambda model: getattr(ours, name)(model, **settings), lambda model: original(name)(model, **settings))


def test_inside_matryoshka() -> None:
    """The library truncates embeddings inside the loss of a cached class."""
    nested = original("MatryoshkaLoss")
    settings: dict[str, Any] = {"mini_batch_size": 4}
    same(
        lambda model: nested(model, getattr(ours, NAMES[0])(model, **settings), [4, 2]),
        lambda model: nested(model, original(NAMES[0])(model, **settings), [4, 2]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_cards(name: str) -> None:
    mine, theirs = getattr(ours, name), original(name)
    assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs.__init__).parameters)[1:]
    model = Model()
    cards = [loss(model) for loss in (mine, theirs)]
    shared = cards[0].get_config_dict().items() & cards[1].get_config_dict().items()
    assert {"scale", "similarity_fct", "gather_across_devices"} <= dict(shared).keys()
    paper = [re.search(r"eprint=\{(.*)\}", card.citation) for card in cards]
    assert all(paper) and paper[0][1] == paper[1][1]  # type: ignore[index]


def test_evaluation_needs_no_gradient() -> None:
    loss = getattr(ours, NAMES[0])(Model().eval(), mini_batch_size=4)
    with torch.no_grad():
        value = loss(features(2))
    assert not value.requires_grad
    assert value.item() == pytest.approx(ours.MultipleNegativesRankingLoss(loss.model)(features(2)).item(), rel=1e-12)


def test_errors() -> None:
    model = Model()
    with pytest.raises(ValueError, match="mini_batch_size: expected a number >= 1, got 0"):
        getattr(ours, NAMES[0])(model, mini_batch_size=0)
    with pytest.raises(ValueError, match="mini_batch_num_tokens: expected a number >= 1"):
        getattr(ours, NAMES[0])(model, mini_batch_num_tokens=-1)
    static = originals.sentence_transformers().sentence_transformer.modules.StaticEmbedding
    model = nn.Sequential(static.__new__(static))
    with pytest.raises(ValueError, match="got static embeddings; use MultipleNegativesRankingLoss"):
        getattr(ours, NAMES[0])(model)
    with pytest.raises(AttributeError, match="no attribute 'CachedRankingLoss'"):
        ours.CachedRankingLoss  # noqa: B018
