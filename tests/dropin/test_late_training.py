"""Late in training, where positives are near-duplicates and losses small: float32 beside the original in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.dropin import pytorch_metric_learning as metric_learning

from . import originals
from .compare import assert_agree, evaluate, rows, unit

TEMPERATURES = [0.1, 0.05, 0.03]
LABELS = torch.arange(16)


def views(n: int = 16, k: int = 2, d: int = 64) -> list[Tensor]:
    """k near-duplicates of each of n unit rows."""
    first = unit(rows(n, d))
    return [first, *(unit(first + 0.0025 * rows(n, d, seed=seed)) for seed in range(1, k))]


def errors(loss: Any, leaves: list[Tensor], right: list[Tensor]) -> list[float]:
    """What the loss of float32 leaves, and each gradient, is off by, over the largest entry of the right one."""
    found = evaluate(loss, [leaf.float() for leaf in leaves])
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True)]


def assert_no_worse(ours: Any, theirs: Any, leaves: list[Tensor], little: float = 2e-5) -> None:
    """The error of the value and of each gradient is at most that of the original in float32, and a little."""
    leaves = [leaf.float().double() for leaf in leaves]
    right = evaluate(theirs, leaves)
    for a, b in zip(errors(ours, leaves, right), errors(theirs, leaves, right), strict=True):
        assert a <= b + little


def metric_losses(name: str, temperature: float, reducer: str | None) -> tuple[Any, Any]:
    """The drop-in and the original."""
    library = originals.pytorch_metric_learning()
    more: dict[str, Any] = {"softmax_scale": 0.5 / temperature} if name == "NCALoss" else {"temperature": temperature}
    if reducer:
        more["reducer"] = getattr(library.reducers, reducer)()
    mine, theirs = (getattr(of, name)(**more) for of in (metric_learning, library.losses))
    return mine, theirs


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("name", "reducer"),
    [
        ("SupConLoss", None),
        ("SupConLoss", "MeanReducer"),
        ("NTXentLoss", None),
        ("NCALoss", "MeanReducer"),
        ("NCALoss", "AvgNonZeroReducer"),
    ],
)
def test_metric_learning(name: str, temperature: float, reducer: str | None) -> None:
    mine, theirs = metric_losses(name, temperature, reducer)
    x, labels = torch.cat(views()), LABELS.repeat(2)
    assert_no_worse(lambda t: mine(t, labels), lambda t: theirs(t, labels), [x])
    copy = LABELS.clone()  # so that row i and reference i are a pair
    assert_no_worse(lambda t, u: mine(t, LABELS, None, u, copy), lambda t, u: theirs(t, LABELS, None, u, copy), views())
    # One label of four rows, and references of which no row is a pair with its own.
    x, y = views(32)
    x[16:], y[16:] = y[:16], x[:16]
    labels = LABELS.repeat(2)
    labels[[3, 19]] = 5
    call = [lambda t, u, loss=loss: loss(t, labels, None, u, labels) for loss in (mine, theirs)]
    assert_agree(*call, [x, y])
    labels = LABELS.repeat(2)
    assert_no_worse(*call, [x, y])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_mined_pairs(name: str, temperature: float) -> None:
    anchors = torch.arange(16)
    negatives = torch.arange(16).repeat_interleave(8), (torch.arange(16)[:, None] + torch.arange(1, 9)).flatten() % 16
    picked = (anchors, anchors + 16, *negatives)
    mine, theirs = metric_losses(name, temperature, "MeanReducer")
    assert_no_worse(
        lambda t: mine(t, indices_tuple=picked), lambda t: theirs(t, indices_tuple=picked), [torch.cat(views())]
    )


def test_rows_whose_loss_rounds_to_0_are_not_counted() -> None:
    """Rows of any length, some of which have their positive far above all others: exactly those are left out of the mean."""
    library = originals.pytorch_metric_learning()
    distance = library.distances.DotProductSimilarity(normalize_embeddings=False)
    mine, theirs = (of.SupConLoss(distance=distance) for of in (metric_learning, library.losses))
    labels = torch.arange(32)
    for seed in range(4):
        x = rows(32, 8, seed=seed)
        y = x + 0.7 * rows(32, 8, seed=seed + 100)
        call = [lambda t, u, loss=loss: loss(t, labels, None, u, labels.clone()) for loss in (mine, theirs)]
        assert_agree(*call, [x, y])
