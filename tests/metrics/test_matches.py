"""Retrieval with several matches a row against double loops: every order of a tie is equally likely."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl import metrics
from fastcl.metrics import sweep


def recall(s: Tensor, matches: list[set[int]], k: int) -> float:
    """The expected share of rows with a match among their first k, over the rows that have one."""
    found = []
    for row, own in zip(s.tolist(), matches, strict=True):
        if own:
            best = max(row[j] for j in own)
            above = sum(value > best for value in row)
            tied = [j for j, value in enumerate(row) if value == best]
            places = min(max(k - above, 0), len(tied))
            others = len(tied) - len(own.intersection(tied))
            found.append(1.0 - math.comb(others, places) / math.comb(len(tied), places))
    return sum(found) / len(found)


def check(x: Tensor, y: Tensor, owner: Tensor, **settings: bool) -> None:
    """Both directions are those of the double loop."""
    n, m = len(x), len(y)
    captions = [{j for j in range(m) if owner[j] == i} for i in range(n)]
    image = [{int(i)} if i >= 0 else set() for i in owner]
    ks = (1, 2, 5, 1000)
    got = metrics.retrieval_accuracy(x, y, k=ks, matches=owner, **settings)
    for shares, s, own in ((got.x_to_y, x @ y.T, captions), (got.y_to_x, y @ x.T, image)):
        assert shares == {k: pytest.approx(recall(s, own, k), abs=1e-12) for k in ks}


@pytest.mark.parametrize("tile", [(4, 7), (512, 1024)])
def test_five_captions(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TILE", tile)
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(11, 6, generator=g, dtype=torch.float64))
    owner = torch.arange(11).repeat_interleave(5)[torch.randperm(55, generator=g)]
    y = F.normalize(x[owner] + 0.6 * torch.randn(55, 6, generator=g, dtype=torch.float64))
    check(x, y, owner)
    one_each = metrics.retrieval_accuracy(x, y[:11], matches=torch.arange(11))
    assert one_each == metrics.retrieval_accuracy(x, y[:11])


@pytest.mark.parametrize("seed", range(5))
def test_ties_distractors_and_rows_without_captions(seed: int) -> None:
    """Small whole numbers tie exactly, within captions of one image and beyond."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-1, 2, (n, 3), generator=g).double() for n in (9, 31))
    owner = torch.randint(-1, 7, (31,), generator=g)
    check(x, y, owner, normalize=False)


def test_collapsed_rows() -> None:
    x, y = torch.ones(20, 3), torch.ones(100, 3)
    got = metrics.retrieval_accuracy(x, y, k=(1, 7), matches=torch.arange(20).repeat(5))
    assert got.x_to_y == {k: pytest.approx(1.0 - math.comb(95, k) / math.comb(100, k), abs=1e-10) for k in (1, 7)}
    assert got.y_to_x == pytest.approx({1: 0.05, 7: 0.35})
    got = metrics.retrieval_accuracy(x, y, k=(1,), matches=torch.zeros(100).long())
    assert got.x_to_y == {1: 1.0}


@pytest.mark.parametrize(
    "name", [name for name in metrics.__all__ if callable(getattr(metrics, name)) and name[0].islower()]
)
def test_autocast_leaves_products_as_they_are(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g)
    y = x + 2.0 * torch.randn(200, 64, generator=g)
    metric = getattr(metrics, name)
    rows = (x, y)[: 2 if "y" in inspect.signature(metric).parameters else 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = metric(*rows)
    assert inside == metric(*rows)


def test_rows_of_no_width_all_tie() -> None:
    x = torch.zeros(4, 0)
    assert metrics.retrieval_accuracy(x, x, k=(1,), normalize=False) == ({1: 0.25}, {1: 0.25})


def test_nan_anywhere_gives_nan() -> None:
    x, y, owner = torch.ones(3, 2), torch.ones(5, 2), torch.tensor([0, 1, 2, -1, -1])
    y[4, 0] = math.nan
    assert math.isnan(metrics.retrieval_accuracy(x, y, k=(1,), matches=owner).x_to_y[1])


@pytest.mark.parametrize(
    ("owner", "kind", "message"),
    [
        (torch.zeros(4).long(), ValueError, r"matches: expected shape \(5,\), one group for each row of y, got \(4,\)"),
        (torch.zeros(5), TypeError, "matches: expected an int64 tensor, got float32"),
        (torch.tensor([0, 1, 2, 3, 0]), ValueError, "matches: expected rows of x, 0 to 2, or -1 for none, got 0 to 3"),
        (torch.tensor([0, 1, -2, 2, 0]), ValueError, "matches: expected rows of x, 0 to 2, .* got -2 to 2"),
        (torch.full((5,), -1), ValueError, "matches: expected at least 1 row of y that matches"),
        (None, ValueError, "y: expected one row for each row of x, 3, got 5; pass matches="),
    ],
)
def test_errors(owner: Tensor | None, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        metrics.retrieval_accuracy(torch.ones(3, 2), torch.ones(5, 2), matches=owner)


@pytest.mark.parametrize("side", [0, 1])
def test_one_long_row_ties_with_nothing(side: int) -> None:
    """What its similarities round by is nothing to those of other rows."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.randn(40, 8, generator=g, dtype=torch.float64) for _ in range(2)]
    rows[side][5] *= 1e9
    x, y = (t.float() for t in rows)
    assert metrics.retrieval_accuracy(x, y, normalize=False) == metrics.retrieval_accuracy(
        x.double(), y.double(), normalize=False
    )
