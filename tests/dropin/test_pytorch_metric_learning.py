"""NTXentLoss and SupConLoss beside pytorch-metric-learning's, in one process."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.dropin import pytorch_metric_learning as ours
from fastcl.functional import positives

from . import originals
from .compare import assert_agree, rows, two_views

NAMES = ["NTXentLoss", "SupConLoss"]
LABELS = {
    "classes": torch.arange(17) % 5,
    "one alone": torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4]),
    "two views": torch.arange(8).repeat(2),
    "all alone": torch.arange(6),
    "all alike": torch.zeros(6, dtype=torch.int64),
    "two alike": torch.tensor([3, 3]),
    "two alone": torch.tensor([3, 4]),
    "one": torch.tensor([7]),
    "none": torch.tensor([], dtype=torch.int64),
    "floats": torch.tensor([0.5, 0.25, 0.5, 0.25, -1.0]),
    "int32": torch.tensor([5, -2, 5, -2, 5], dtype=torch.int32),
}


def pml() -> Any:
    return originals.pytorch_metric_learning()


def both(name: str, **arguments: Any) -> tuple[Any, Any]:
    """The drop-in and the original."""
    return getattr(ours, name)(**arguments), getattr(pml().losses, name)(**arguments)


def agree(name: str, leaves: list[Tensor], call: Any, **arguments: Any) -> None:
    mine, theirs = both(name, **arguments)
    assert_agree(lambda *t: call(mine, *t), lambda *t: call(theirs, *t), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    theirs, mine = getattr(pml().losses, name), getattr(ours, name)
    for method in ("__init__", "forward"):
        a, b = inspect.signature(getattr(mine, method)), inspect.signature(getattr(theirs, method))
        assert [(p.name, p.default, p.kind) for p in a.parameters.values()] == [
            (p.name, p.default, p.kind) for p in b.parameters.values()
        ]


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", NAMES)
def test_labels(name: str, labels: str, temperature: float) -> None:
    value = LABELS[labels]
    agree(name, [rows(len(value), 6)], lambda loss, x: loss(x, value), temperature=temperature)


@pytest.mark.parametrize("name", NAMES)
def test_defaults(name: str) -> None:
    agree(name, [rows(17, 6)], lambda loss, x: loss(x, LABELS["classes"]))


@pytest.mark.parametrize("name", NAMES)
def test_references_with_labels_of_their_own(name: str) -> None:
    labels, references = torch.arange(9) % 4, torch.arange(14) % 6
    leaves = [rows(9, 6), rows(14, 6, seed=1)]
    agree(name, leaves, lambda loss, x, y: loss(x, labels, None, y, references))
    agree(name, leaves, lambda loss, x, y: loss(x, labels, ref_emb=y, ref_labels=references + 100))
    agree(name, [leaves[0], rows(1, 6)], lambda loss, x, y: loss(x, labels, ref_emb=y, ref_labels=references[:1]))
    one = [rows(1, 6), rows(2, 6, seed=1)]
    agree(name, one, lambda loss, x, y: loss(x, labels[:1], ref_emb=y, ref_labels=references[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_labels_leave_out_each_row_with_its_reference(name: str) -> None:
    """The library compares the two label tensors by identity; an equal copy keeps those pairs."""
    labels, leaves = torch.arange(12) % 5, two_views(12, 6)
    agree(name, leaves, lambda loss, x, y: loss(x, labels, None, y, labels))
    agree(name, leaves, lambda loss, x, y: loss(x, labels, None, y, labels.clone()))
    mine, _ = both(name)
    apart = mine(leaves[0], labels, None, leaves[1], labels) - mine(leaves[0], labels, None, leaves[1], labels.clone())
    assert apart.abs() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_distances(name: str) -> None:
    labels = LABELS["one alone"]
    for distance in (
        pml().distances.CosineSimilarity(),
        pml().distances.DotProductSimilarity(),
        pml().distances.DotProductSimilarity(normalize_embeddings=False),
    ):
        agree(name, [rows(12, 6)], lambda loss, x: loss(x, labels), distance=distance, temperature=0.7)
        leaf = rows(4, 6).requires_grad_()  # no positives at all
        (gradient,) = torch.autograd.grad(both(name, distance=distance)[0](leaf, torch.arange(4)), leaf)
        assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_reducers_and_regularizers(name: str) -> None:
    labels, reducers, regularizers = LABELS["one alone"], pml().reducers, pml().regularizers
    call = lambda loss, x: loss(x, labels)  # noqa: E731
    agree(name, [rows(12, 6)], call, reducer=reducers.MeanReducer())
    agree(name, [rows(12, 6)], call, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.3)
    if name == "SupConLoss":
        agree(name, [rows(12, 6)], call, reducer=reducers.AvgNonZeroReducer())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inside_the_librarys_own_wrapper_of_two_views(name: str, symmetric: bool) -> None:
    wrapper = pml().losses.SelfSupervisedLoss
    mine, theirs = (wrapper(loss, symmetric=symmetric) for loss in both(name))
    assert_agree(mine, theirs, two_views(11, 6))


@pytest.mark.parametrize("name", NAMES)
def test_duplicate_rows(name: str) -> None:
    x, labels = rows(12, 6), LABELS["one alone"]
    x[3], x[7] = x[2], x[5]
    agree(name, [x], lambda loss, x: loss(x, labels))
    agree(name, [1e5 * x], lambda loss, x: loss(x, labels))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_near(name: str, dtype: torch.dtype) -> None:
    """The truth is the original in float64 on the same rounded rows; the bound is rounding the unit rows to the dtype."""
    x, labels = rows(32, 16).to(dtype), torch.arange(32) % 7
    mine, theirs = both(name, temperature=0.5)
    assert abs(mine(x, labels).item() - theirs(x.double(), labels).item()) <= 4 * torch.finfo(dtype).eps


def test_a_large_loss_is_not_cut_off() -> None:
    """The original adds the smallest number inside its logarithm, so that no pair's loss passes 708 (87 in float32)."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    mine, theirs = both("NTXentLoss", temperature=1e-3)
    cosine = 1.0 / math.sqrt(1.0 + 1e-6)
    pairs = (1000.0 * cosine + 1000.0, math.log1p(math.exp(1000.0 - 1000.0 * cosine)))
    assert mine(x, labels).item() == pytest.approx(sum(pairs) / 2, rel=1e-12)
    assert theirs(x, labels).item() < 360


def test_what_is_not_supported_raises() -> None:
    x, labels = rows(12, 6), LABELS["one alone"]
    for name in NAMES:
        loss = getattr(ours, name)
        with pytest.raises(NotImplementedError, match="distance: expected None"):
            loss(distance=pml().distances.LpDistance())
        with pytest.raises(NotImplementedError, match="distance: expected None"):
            loss(distance=pml().distances.CosineSimilarity(power=2))
        with pytest.raises(NotImplementedError, match="reducer: expected None"):
            loss(reducer=pml().reducers.PerAnchorReducer())
        with pytest.raises(NotImplementedError, match="collect_stats"):
            loss(collect_stats=True)
        with pytest.raises(TypeError, match="num_classes"):
            loss(num_classes=3)
        with pytest.raises(ValueError, match="temperature"):
            loss(temperature=0)
        with pytest.raises(ValueError, match="labels: expected a tensor"):
            loss()(x)
        with pytest.raises(ValueError, match="labels: expected shape"):
            loss()(x, labels[:3])
        with pytest.raises(ValueError, match="ref_labels: expected a tensor"):
            loss()(x, labels, ref_emb=x)
        with pytest.raises(TypeError, match="dtype"):
            loss()(x, labels, ref_emb=x.float(), ref_labels=labels)
    with pytest.raises(TypeError, match="library's own DistributedLossWrapper"):
        ours.DistributedLossWrapper(torch.nn.Identity())
    with pytest.raises(ValueError, match="enqueue_mask"):
        ours.DistributedLossWrapper(ours.SupConLoss())(x, labels, enqueue_mask=labels > 0)
    assert torch.equal(ours.DistributedLossWrapper(ours.SupConLoss())(x, labels), ours.SupConLoss()(x, labels))


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_positives_through_class_sums(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where classes have many rows."""
    monkeypatch.setattr(positives, "FEW", 0)
    for value in LABELS.values():
        agree("SupConLoss", [rows(len(value), 6)], lambda loss, x: loss(x, value), temperature=temperature)  # noqa: B023
    labels, leaves = torch.arange(12) % 5, two_views(12, 6)
    agree("SupConLoss", leaves, lambda loss, x, y: loss(x, labels, None, y, labels), temperature=temperature)
    agree("SupConLoss", leaves, lambda loss, x, y: loss(x, labels, None, y, labels.clone()), temperature=temperature)
    leaves, others = [rows(9, 6), rows(14, 6, seed=1)], torch.arange(14) % 6
    agree("SupConLoss", leaves, lambda loss, x, y: loss(x, labels[:9], None, y, others), temperature=temperature)


def test_many_positives_have_no_logits_of_their_own() -> None:
    """A class of 400 rows: the pairs of its 160,000 positives are not listed."""
    labels = torch.arange(800) % 2
    pairs = ours.SupConLoss()._pairs(rows(800, 4), labels, None, None, True)
    assert pairs.positive_pairs(positives.few(800, 800)) is None
    agree("SupConLoss", [rows(800, 4)], lambda loss, x: loss(x, labels))


@pytest.mark.parametrize("few", [0, 4])
def test_a_long_row_is_no_positive_of_its_own(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not normalised, one of them 1e6 times longer: its own term is not what is left of its class's sum."""
    monkeypatch.setattr(positives, "FEW", few)
    distance = pml().distances.DotProductSimilarity(normalize_embeddings=False)
    z, labels = torch.randn(24, 8), torch.arange(24) % 5
    z[5] *= 1e6
    loss = ours.SupConLoss(temperature=0.5, distance=distance)
    right = loss(z.double(), labels)
    assert abs(loss(z, labels) - right) <= 1e-6 * right


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("reducer", ["AvgNonZeroReducer", "MeanReducer"])
def test_logits_beyond_float32(reducer: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is infinite; gradients are those of the original in float64."""
    monkeypatch.setattr(positives, "FEW", few)
    given = {"reducer": getattr(pml().reducers, reducer)()}
    given["distance"] = pml().distances.DotProductSimilarity(normalize_embeddings=False)
    mine, theirs = both("SupConLoss", **given)
    z, labels = (1e20 * rows(12, 5)).float(), torch.arange(12) % 3
    leaves = z.clone().requires_grad_(), z.double().requires_grad_()
    values = mine(leaves[0], labels), theirs(leaves[1], labels)
    assert values[0] == math.inf
    assert 3.4e38 < values[1] < math.inf
    got, want = (torch.autograd.grad(v, t)[0] for v, t in zip(values, leaves, strict=True))
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0.0)
