"""MultiSimilarityLoss, GeneralizedLiftedStructureLoss, NCALoss and NPairsLoss beside pytorch-metric-learning's, in one process."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl.dropin import pytorch_metric_learning as ours

from . import originals
from .compare import assert_agree, rows, two_views
from .test_mined_pairs import FEW, index, miner
from .test_pytorch_metric_learning import LABELS


def pml() -> Any:
    return originals.pytorch_metric_learning()


def squares(**more: Any) -> Any:
    return pml().distances.LpDistance(power=2, **more)


# The class, and what it is made with: each argument away from its default somewhere; a distance where there must be one.
MADE: list[tuple[str, dict[str, Any]]] = [
    ("MultiSimilarityLoss", {}),
    ("MultiSimilarityLoss", {"alpha": 5.0, "beta": 10.0, "base": -0.2}),
    ("GeneralizedLiftedStructureLoss", {"distance": "squares"}),
    ("GeneralizedLiftedStructureLoss", {"distance": "squares", "neg_margin": 0.3, "pos_margin": 1.7}),
    ("NCALoss", {}),
    ("NCALoss", {"softmax_scale": 8.0}),
    ("NPairsLoss", {}),
]
ONCE = [made for k, made in enumerate(MADE) if made[0] not in [name for name, _ in MADE[:k]]]
INDEXED = [made for made in ONCE if made[0] != "NPairsLoss"]


def both(made: tuple[str, dict[str, Any]], **more: Any) -> tuple[Any, Any]:
    """The drop-in and the original."""
    name, arguments = made[0], made[1] | more
    if arguments.get("distance") == "squares":
        arguments["distance"] = squares()
    return getattr(ours, name)(**arguments), getattr(pml().losses, name)(**arguments)


def agree(made: tuple[str, dict[str, Any]], leaves: list[Tensor], call: Any, **more: Any) -> None:
    mine, theirs = both(made, **more)
    assert_agree(lambda *t: call(mine, *t), lambda *t: call(theirs, *t), leaves)


def name_of(value: Any) -> str:
    return f"{value[0]}-{len(value[1])}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("made", ONCE, ids=name_of)
def test_signatures(made: Any) -> None:
    theirs, mine = getattr(pml().losses, made[0]), getattr(ours, made[0])
    for method in ("__init__", "forward"):
        a, b = inspect.signature(getattr(mine, method)), inspect.signature(getattr(theirs, method))
        assert [(p.name, p.default, p.kind) for p in a.parameters.values()] == [
            (p.name, p.default, p.kind) for p in b.parameters.values()
        ]


@pytest.mark.parametrize("labels", [*LABELS, "sizes"])
@pytest.mark.parametrize("made", MADE, ids=name_of)
def test_labels(made: Any, labels: str) -> None:
    """Classes of 1 to 9 rows among them: as many sweeps as 9 has bits."""
    value = torch.repeat_interleave(torch.arange(9), torch.arange(9) + 1) if labels == "sizes" else LABELS[labels]
    if made[0] == "NCALoss" and len(value) > 1 and len(value.unique()) == len(value):
        assert both(made)[0](rows(len(value), 6), value) == 0  # theirs is NaN, the mean of nothing
        return
    order = torch.randperm(len(value), generator=torch.Generator().manual_seed(1))
    agree(made, [rows(len(value), 6)], lambda loss, x: loss(x, value[order]))


@pytest.mark.parametrize("made", INDEXED, ids=name_of)
def test_references(made: Any) -> None:
    labels, references = torch.arange(9) % 4, torch.arange(14) % 6
    leaves = [rows(9, 6), rows(14, 6, seed=1)]
    agree(made, leaves, lambda loss, x, y: loss(x, labels, None, y, references))
    agree(made, [leaves[0], rows(1, 6)], lambda loss, x, y: loss(x, labels, ref_emb=y, ref_labels=references[:1]))
    labels, leaves = torch.arange(12) % 5, two_views(12, 6)
    agree(made, leaves, lambda loss, x, y: loss(x, labels, None, y, labels))
    agree(made, leaves, lambda loss, x, y: loss(x, labels, None, y, labels.clone()))


@pytest.mark.parametrize("made", INDEXED, ids=name_of)
def test_references_that_are_the_embeddings_themselves(made: Any) -> None:
    """NCALoss leaves a row's pair with itself out by the object of the rows, the others by that of the labels."""
    labels, index = (
        torch.arange(12) % 5,
        (torch.tensor([0, 2]), torch.tensor([5, 7]), torch.tensor([0, 3]), torch.tensor([1, 4])),
    )
    agree(made, [rows(12, 6)], lambda loss, x: loss(x, labels, None, x, labels))
    agree(made, [rows(12, 6)], lambda loss, x: loss(x, labels, None, x, labels.clone()))
    agree(made, [rows(12, 6)], lambda loss, x: loss(x, labels, index, x, labels))


def test_a_row_has_one_label() -> None:
    x, labels = rows(6, 4), torch.arange(6) // 2
    for others in (labels.flip(0), None):
        with pytest.raises(ValueError, match="ref_labels: expected labels' own values"):
            ours.NCALoss()(x, labels, None, x, others)


@pytest.mark.parametrize("made", ONCE, ids=name_of)
def test_distances_reducers_and_regularizers(made: Any) -> None:
    labels, distances = LABELS["one alone"], pml().distances
    call = lambda loss, x: loss(x, labels)  # noqa: E731
    for distance in (
        distances.CosineSimilarity(),
        distances.DotProductSimilarity(),
        distances.DotProductSimilarity(normalize_embeddings=False),
        squares(),
        squares(normalize_embeddings=False),
    ):
        agree(made, [rows(12, 6)], call, distance=distance)
    for more in (
        {"reducer": pml().reducers.MeanReducer()},
        {"reducer": pml().reducers.AvgNonZeroReducer()},
        {"embedding_regularizer": pml().regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    ):
        agree(made, [rows(12, 6)], call, **more)


@pytest.mark.parametrize("which", ["MultiSimilarityMiner", "BatchHardMiner", "TripletMarginMiner", "PairMarginMiner"])
@pytest.mark.parametrize("made", ONCE, ids=name_of)
def test_miners(made: Any, which: str) -> None:
    labels, x, y = torch.arange(20) % 6, rows(20, 6), rows(31, 6, seed=1)
    picked = miner(which)(x, labels)
    for distance in ({}, {"distance": squares(normalize_embeddings=False)}):
        agree(made, [x], lambda loss, t: loss(t, labels, picked), **distance)
    if made in INDEXED:
        references = torch.arange(31) % 7
        some = miner(which)(x, labels, y, references)
        agree(made, [x, y], lambda loss, t, u: loss(t, labels, some, u, references))


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("made", INDEXED, ids=name_of)
def test_few_pairs(made: Any, case: str) -> None:
    labels = torch.arange(20) % 6
    agree(made, [rows(20, 6)], lambda loss, x: loss(x, labels, FEW[case]))


@pytest.mark.parametrize("made", INDEXED, ids=name_of)
def test_inside_the_librarys_memory_and_wrapper(made: Any) -> None:
    memories = [pml().losses.CrossBatchMemory(loss, 6, memory_size=25).double() for loss in both(made)]
    for step in range(4):
        labels = (torch.arange(10) + step) % 4
        assert_agree(*(lambda t, m=m, y=labels: m(t, y) for m in memories), [rows(10, 6, seed=step)])
    for symmetric in (True, False):
        wrapped = [pml().losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in both(made)]
        assert_agree(*wrapped, two_views(11, 6))


@pytest.mark.parametrize("made", ONCE, ids=name_of)
def test_training(made: Any) -> None:
    """Ten steps of the library's own loss and of the drop-in: the same curve, and it falls."""
    x, labels = rows(40, 8), torch.arange(40) % 8
    x = x + 2.0 * rows(8, 8, seed=1)[labels]
    curves = []
    for loss in both(made):
        torch.manual_seed(0)
        model = nn.Linear(8, 4).double()
        optimizer, curve = torch.optim.Adam(model.parameters(), lr=0.03), []
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(model(x), labels)
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-8) and curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", ONCE, ids=name_of)
def test_narrow_dtypes_are_near(made: Any, dtype: torch.dtype) -> None:
    x, labels = rows(32, 16).to(dtype), torch.arange(32) % 7
    mine, theirs = both(made)
    assert abs(mine(x, labels).item() - theirs(x.double(), labels).item()) <= 8 * torch.finfo(dtype).eps


def test_what_is_not_supported_raises() -> None:
    x, labels = rows(12, 6), LABELS["one alone"]
    for made in ONCE:
        loss = getattr(ours, made[0])
        for distance in (pml().distances.LpDistance(), pml().distances.LpDistance(p=1, power=2)):
            none = "" if loss is ours.GeneralizedLiftedStructureLoss else "None, "
            with pytest.raises(
                NotImplementedError, match=rf"distance: expected {none}Cos.*LpDistance with p=2 and power=2"
            ):
                loss(distance=distance)
        with pytest.raises(NotImplementedError, match="reducer: expected None or one of MeanReducer"):
            loss(distance=squares(), reducer=pml().reducers.PerAnchorReducer())
        with pytest.raises(ValueError, match="labels: expected a tensor"):
            both(made)[0](x)
    with pytest.raises(NotImplementedError, match="got None, which stands for a square root"):
        ours.GeneralizedLiftedStructureLoss()
    with pytest.raises(ValueError, match="ref_emb: expected None"):
        ours.NPairsLoss()(x, labels, ref_emb=x.clone(), ref_labels=labels)
    for name, argument in (
        ("MultiSimilarityLoss", "alpha"),
        ("MultiSimilarityLoss", "beta"),
        ("NCALoss", "softmax_scale"),
    ):
        with pytest.raises(ValueError, match=f"{argument}: expected a number > 0"):
            getattr(ours, name)(**{argument: 0.0})
    with pytest.raises(ValueError, match="got one in both"):
        ours.MultiSimilarityLoss()(x, labels, (index(0, 1), index(6, 7), index(0, 1), index(6, 2)))
    for loss in (ours.NCALoss(), ours.NPairsLoss()):
        with pytest.raises(NotImplementedError, match="efficient: expected False"):
            ours.DistributedLossWrapper(loss, efficient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "more"), [("MultiSimilarityLoss", {}), ("NPairsLoss", {}), ("NCALoss", {"softmax_scale": 60.0})]
)
def test_losses_that_round_to_0_are_no_losses_to_average(name: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.nn.functional.normalize(rows(64, 2048), dim=1).to(dtype)
    labels = torch.cat([torch.arange(60), torch.zeros(4, dtype=torch.int64)])
    ours_, theirs = (
        getattr(of, name)(reducer=pml().reducers.AvgNonZeroReducer(), **more) for of in (ours, pml().losses)
    )
    torch.testing.assert_close(ours_(x, labels), theirs(x, labels), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_that_round_to_0_have_their_gradients(dtype: torch.dtype) -> None:
    """Rows of different classes only, well apart: e^{beta (s - base)} is far below eps, and the whole of the gradient."""
    x = torch.nn.functional.normalize(torch.eye(6, dtype=dtype) + 0.1 * rows(6, 6).to(dtype), dim=1)
    labels = torch.arange(6)
    found = []
    for of in (ours, pml().losses):
        leaf = x.clone().requires_grad_()
        value = of.MultiSimilarityLoss(base=0.9)(leaf, labels)
        assert float(value.detach()) < 1e-14
        found += torch.autograd.grad(value, leaf)
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found[0] / found[1].abs().max(), found[1] / found[1].abs().max(), rtol=1e-3, atol=1e-4)
