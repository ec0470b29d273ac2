"""Pairs by index, as miners and CrossBatchMemory pass them, beside pytorch-metric-learning's own losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.dropin import mined
from fastcl.dropin import pytorch_metric_learning as ours

from . import originals
from .compare import assert_agree, rows

NAMES = ["NTXentLoss", "SupConLoss"]
LABELS = torch.arange(20) % 6


def pml() -> Any:
    return originals.pytorch_metric_learning()


def both(name: str, **arguments: Any) -> tuple[Any, Any]:
    """The drop-in and the original."""
    return getattr(ours, name)(**arguments), getattr(pml().losses, name)(**arguments)


def miner(name: str) -> Any:
    return getattr(originals.pytorch_metric_learning_miners(), name)()


@pytest.mark.parametrize("gathered", [mined.GATHERED, 20])
@pytest.mark.parametrize("which", ["MultiSimilarityMiner", "BatchHardMiner", "TripletMarginMiner", "PairMarginMiner"])
@pytest.mark.parametrize("name", NAMES)
def test_miners(name: str, which: str, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs and triplets, many and few, picked out at once and in parts."""
    monkeypatch.setattr(mined, "GATHERED", gathered)
    mine, theirs = both(name, temperature=0.2)
    x, y = rows(20, 6), rows(31, 6, seed=1)
    picked = miner(which)(x, LABELS)
    assert_agree(lambda t: mine(t, LABELS, picked), lambda t: theirs(t, LABELS, picked), [x])
    assert_agree(lambda t: mine(t, indices_tuple=picked), lambda t: theirs(t, indices_tuple=picked), [x])
    references = torch.arange(31) % 7
    picked = miner(which)(x, LABELS, y, references)
    assert_agree(lambda t, u: mine(t, LABELS, picked, u, references),
                 lambda t, u: theirs(t, LABELS, picked, u, references), [x, y])  # fmt: skip


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


FEW = {
    "repeated": (index(0, 0, 3), index(6, 6, 9), index(0, 0, 0, 3), index(1, 1, 2, 4)),
    "an anchor without negatives": (index(0, 3), index(6, 9), index(0, 0), index(1, 2)),
    "an anchor without positives": (index(0, 0), index(6, 12), index(0, 3, 3), index(1, 2, 4)),
    "one of each": (index(0), index(6), index(0), index(1)),
    "no negatives": (index(0, 3), index(6, 9), index(), index()),
    "no positives": (index(), index(), index(0, 3), index(1, 1)),
    "nothing": (index(), index(), index(), index()),
    "triplets": (index(0, 0, 3), index(6, 12, 9), index(1, 1, 2)),
    "int32": tuple(t.int() for t in (index(0, 3), index(6, 9), index(0, 3), index(1, 2))),
}


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("name", NAMES)
def test_few_pairs(name: str, case: str) -> None:
    mine, theirs = both(name)
    given = tuple(t.long() for t in FEW[case])  # the original takes no other integers
    x = rows(20, 6)
    assert_agree(lambda t: mine(t, LABELS, FEW[case]), lambda t: theirs(t, LABELS, given), [x])
    if name == "SupConLoss":
        mine, theirs = both(name, reducer=pml().reducers.MeanReducer())
        assert_agree(lambda t: mine(t, LABELS, FEW[case]), lambda t: theirs(t, LABELS, given), [x])


@pytest.mark.parametrize("which", [None, "MultiSimilarityMiner", "TripletMarginMiner"])
@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory(name: str, which: str | None) -> None:
    """Seven batches pass the end of the memory twice; then rows by enqueue_mask, and pairs of one's own."""
    memories = [
        pml().losses.CrossBatchMemory(loss, 6, memory_size=28, miner=which and miner(which)).double()
        for loss in both(name, temperature=0.3)
    ]
    for step in range(7):
        labels = (torch.arange(10) + step) % 4
        assert_agree(*(lambda t, m=m, y=labels: m(t, y) for m in memories), [rows(10, 6, seed=step)])
    if which is None:
        keep = torch.arange(10) % 3 > 0
        assert_agree(*(lambda t, m=m: m(t, labels, enqueue_mask=keep) for m in memories), [rows(10, 6, seed=99)])
        own = (index(0, 1), index(4, 5), index(0, 1), index(2, 3))
        assert_agree(*(lambda t, m=m: m(t, labels, own) for m in memories), [rows(10, 6, seed=98)])


def test_no_matrix_for_few_pairs() -> None:
    """20,000 rows against 20,000: their matrix takes 1.6 GB."""
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a = torch.arange(20_000)
    picked = (a, (a + 10_000) % 20_000, a, (a + 1) % 20_000)
    for name in NAMES:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            getattr(ours, name)()(x, indices_tuple=picked).backward()
        assert max(event.cpu_memory_usage for event in found.events()) < 10e6


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (5, ValueError, r"indices_tuple: expected \(anchors, positives, anchors, negatives\) or triplets .*, got int"),
        ((index(0),) * 2, ValueError, "got 2 of them; pass what a miner returns"),
        ((index(0), index(6), index(0), index(20)), ValueError, "expected rows of what they .*, 0 to 19, got 20 to 20"),
        ((index(0), index(-1), index(0), index(2)), ValueError, "0 to 19, got -1 to -1"),
        ((index(0, 1), index(6), index(0), index(2)), ValueError, r"got shapes \(2,\) and \(1,\)"),
        ((index(0), torch.tensor([1.0]), index(0), index(2)), TypeError, "expected tensors of integers, got float32"),
        (([0], [6], [0], [1]), TypeError, "expected tensors of integers, got list"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str, given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        both(name)[0](rows(20, 6), LABELS, given)


def test_a_pair_is_positive_or_negative() -> None:
    both_ways = (index(0, 1), index(6, 7), index(0, 1), index(6, 2))
    with pytest.raises(ValueError, match="got one in both"):
        ours.SupConLoss()(rows(20, 6), LABELS, both_ways)
    with pytest.raises(AssertionError):
        pml().losses.SupConLoss()(rows(20, 6), LABELS, both_ways)


@pytest.mark.parametrize("name", NAMES)
def test_few_pairs_under_torch_func(name: str) -> None:
    """torch.func knows no checkpoint, by which few pairs are formed again in the backward pass."""
    x, index = rows(20, 5), (torch.tensor([0, 2]), torch.tensor([6, 8]), torch.tensor([0, 2]), torch.tensor([5, 7]))
    mine = both(name)[0]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(mine(leaf, LABELS, index), leaf)
    torch.testing.assert_close(torch.func.grad(lambda rows: mine(rows, LABELS, index))(x), want)
