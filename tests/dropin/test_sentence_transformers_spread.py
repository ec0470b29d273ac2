"""GlobalOrthogonalRegularizationLoss beside sentence-transformers', alone and with the ranking loss in its trainer's form."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl.dropin.sentence_transformers import GlobalOrthogonalRegularizationLoss, MultipleNegativesRankingLoss

from . import originals
from .compare import assert_agree, rows
from .test_sentence_transformers import Columns

SETTINGS: list[dict[str, Any]] = [
    {},
    {"aggregation": "sum", "mean_weight": 0.3, "second_moment_weight": 2.0},
    {"mean_weight": None},
    {"second_moment_weight": 0},
]


def library() -> Any:
    return originals.sentence_transformers().sentence_transformer.losses


def columns(count: int = 2, n: int = 9) -> list[Tensor]:
    """Near (2, ..., 2): similarities above those of uniform directions."""
    return [2.0 + rows(n, 6, seed=k) for k in range(count)]


def both(**arguments: Any) -> tuple[Any, Any]:
    """The drop-in and the original."""
    return tuple(
        loss(nn.Identity(), **arguments)
        for loss in (GlobalOrthogonalRegularizationLoss, library().GlobalOrthogonalRegularizationLoss)
    )  # type: ignore[return-value]


def test_signatures() -> None:
    mine, theirs = GlobalOrthogonalRegularizationLoss, library().GlobalOrthogonalRegularizationLoss
    for method in ("__init__", "forward", "compute_loss_from_embeddings", "compute_gor"):
        a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (mine, theirs))
        assert list(a) == list(b)
        assert {k for k in a if a[k].default != b[k].default} <= {"similarity_fct"}  # None is the cosine
    one, other = both()
    assert one.get_config_dict() == other.get_config_dict() and "1708.06320" in one.citation


@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "default")
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_terms(n: int, settings: dict[str, Any], similarity: str) -> None:
    mine, theirs = both(similarity_fct=getattr(originals.sentence_transformers().util, similarity), **settings)
    for count in (1, 3):
        leaves = columns(count, n)
        assert mine.compute_loss_from_embeddings(leaves).keys() == theirs.compute_loss_from_embeddings(leaves).keys()
        for name in theirs.compute_loss_from_embeddings(leaves):
            assert_agree(
                *(lambda *t, m=m, k=name: m.compute_loss_from_embeddings(list(t))[k] for m in (mine, theirs)), leaves
            )


def test_training_beside_a_ranking_loss() -> None:
    """A few steps, both terms added to a ranking loss: the curves of the library and of the drop-ins are the same."""
    curves = []
    for ranking, spread in (
        (MultipleNegativesRankingLoss, GlobalOrthogonalRegularizationLoss),
        (library().MultipleNegativesRankingLoss, library().GlobalOrthogonalRegularizationLoss),
    ):
        torch.manual_seed(0)
        model, curve = Columns(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        losses = ranking(model), spread(model)
        for step in range(8):
            batch = [{"rows": t + step} for t in columns()]
            optimizer.zero_grad()
            value = losses[0](batch, torch.zeros(9)) + sum(losses[1](batch, None).values())
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-8) and curves[0][-1] < curves[0][0]


def test_no_matrix_of_all_pairs() -> None:
    """20,000 rows: their matrix takes 1.6 GB."""
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        sum(GlobalOrthogonalRegularizationLoss(nn.Identity()).compute_loss_from_embeddings([x]).values()).backward()
    assert max(event.cpu_memory_usage for event in found.events()) < 10e6


def test_errors() -> None:
    loss, util = GlobalOrthogonalRegularizationLoss, originals.sentence_transformers().util
    for arguments, kind, said in (
        ({"similarity_fct": util.euclidean_sim}, NotImplementedError, "similarity_fct: expected None"),
        ({"mean_weight": 0, "second_moment_weight": None}, ValueError, "mean_weight: expected a number other than 0"),
        ({"aggregation": "max"}, ValueError, "aggregation: expected one of 'mean', 'sum'"),
        ({"mean_weight": float("nan")}, ValueError, "mean_weight: expected a finite number"),
    ):
        with pytest.raises(kind, match=said):
            loss(nn.Identity(), **arguments)
    with pytest.raises(ValueError, match="embeddings: expected one or more columns"):
        loss(nn.Identity()).compute_loss_from_embeddings([])
    with pytest.raises(ValueError, match="embeddings: expected a matrix"):
        loss(nn.Identity()).compute_loss_from_embeddings([rows(4, 1)[:, 0]])
