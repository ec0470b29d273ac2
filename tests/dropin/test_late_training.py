"""Late in training, where positives are near-duplicates and losses small: float32 beside the original in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.dropin import lightly, open_clip, sentence_transformers
from fastcl.dropin import pytorch_metric_learning as metric_learning
from fastcl.functional import positives

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


def metric_losses(name: str, temperature: float, reducer: str | None, **more: Any) -> tuple[Any, Any]:
    """The drop-in and the original."""
    library = originals.pytorch_metric_learning()
    more |= {"softmax_scale": 0.5 / temperature} if name == "NCALoss" else {"temperature": temperature}
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


@pytest.mark.parametrize("reducer", ["MeanReducer", "AvgNonZeroReducer"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "GeneralizedLiftedStructureLoss", "NPairsLoss"])
def test_metric_learning_without_a_temperature(name: str, temperature: float, reducer: str) -> None:
    """It is in the rows, which are as much longer."""
    library = originals.pytorch_metric_learning()
    distance = library.distances.DotProductSimilarity(normalize_embeddings=False)
    more = {"distance": distance, "reducer": getattr(library.reducers, reducer)()}
    settings = {"MultiSimilarityLoss": {"base": 0.5}, "GeneralizedLiftedStructureLoss": {"neg_margin": -0.7}}
    more |= {setting: value / temperature for setting, value in settings.get(name, {}).items()}
    x, labels = temperature**-0.5 * torch.cat(views()), LABELS.repeat(2)
    mine, theirs = (getattr(of, name)(**more) for of in (metric_learning, library.losses))
    assert_no_worse(lambda t: mine(t, labels), lambda t: theirs(t, labels), [x])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_pairs_of_a_row_with_itself_that_are_not_the_nearest(name: str, temperature: float) -> None:
    """References in another order, and rows beside ones that are twice as long."""
    mine, theirs = metric_losses(name, temperature, "MeanReducer")
    labels, x = LABELS.repeat(2), unit(rows(32, 64))
    y = unit(x + 0.0025 * rows(32, 64, seed=1)).roll(16, 0)
    call = [lambda t, u, loss=loss: loss(t, labels, None, u, labels) for loss in (mine, theirs)]
    assert_no_worse(*call, [x, y])
    distance = originals.pytorch_metric_learning().distances.DotProductSimilarity(normalize_embeddings=False)
    mine, theirs = metric_losses(name, temperature, "MeanReducer", distance=distance)
    assert_no_worse(lambda t: mine(t, labels), lambda t: theirs(t, labels), [torch.cat([views()[0], 2 * views()[1]])])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_single_positive_has_all_its_digits(temperature: float) -> None:
    """Where the original in float32 has but few."""
    mine, theirs = metric_losses("SupConLoss", temperature, "MeanReducer")
    x, labels = torch.cat(views()).float().double(), LABELS.repeat(2)
    right = evaluate(lambda t: theirs(t, labels), [x])
    picked = torch.arange(16), torch.arange(16, 32), *(t.flatten() for t in (1 - torch.eye(16)).nonzero().T)
    assert max(errors(lambda t: mine(t, labels), [x], right)) < 1e-5
    right = evaluate(lambda t: theirs(t, indices_tuple=picked), [x])
    assert max(errors(lambda t: mine(t, indices_tuple=picked), [x], right)) < 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("reducer", [None, "MeanReducer"])
def test_several_positives(reducer: str | None, temperature: float) -> None:
    mine, theirs = metric_losses("SupConLoss", temperature, reducer)
    for k in (3, 5):
        labels = LABELS.repeat(k)
        call = [lambda t, loss=loss, labels=labels: loss(t, labels) for loss in (mine, theirs)]
        assert_no_worse(*call, [torch.cat(views(k=k))], little=1e-4)


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


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_single_positive_through_class_sums(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where other classes have many rows."""
    monkeypatch.setattr(positives, "FEW", 0)
    test_metric_learning("SupConLoss", temperature, "MeanReducer")
    test_metric_learning("SupConLoss", temperature, None)
    test_rows_whose_loss_rounds_to_0_are_not_counted()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("references", [False, True])
def test_sums_of_many_positives_round_a_gradient_once(references: bool, autocast: bool) -> None:
    """In bfloat16, of classes that are nearly points: the log-sum-exp and the mean of the positives have gradients that cancel."""
    mine, theirs = metric_losses("SupConLoss", 0.05, "MeanReducer")
    distance = originals.pytorch_metric_learning().distances.DotProductSimilarity(normalize_embeddings=False)
    as_it_is = metric_losses("SupConLoss", 0.05, "MeanReducer", distance=distance)[1]
    labels = torch.arange(100) % 2
    centres = rows(2, 16, seed=9)[labels]
    leaves = [(centres + 0.05 * rows(100, 16, seed=seed)).bfloat16() for seed in range(1 + references)]

    def called(loss: Any, *tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and loss is mine):
            value: Tensor = loss(tensors[0], labels, None, *tensors[1:], *([labels.clone()] if references else []))
            return value

    def rounded(*tensors: Tensor) -> Tensor:
        return called(as_it_is, *(unit(x).bfloat16().float() for x in tensors))

    right = evaluate(lambda *t: called(theirs, *t), [leaf.double() for leaf in leaves])
    plain = evaluate(rounded, [x.float() for x in leaves])
    found = evaluate(lambda *t: called(mine, *t), [leaf.float() if autocast else leaf for leaf in leaves])
    for a, b, p in zip(found, right, plain, strict=True):
        assert (a.double() - b).abs().max() <= 2.0 * (p.double() - b).abs().max() + 2.0**-7 * b.abs().max()


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


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # the library's DCLWLoss's own
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["NTXentLoss", "DirectCLRLoss", "DCLLoss", "DCLWLoss", "MACLLoss", "HypersphereLoss"])
def test_lightly(name: str, temperature: float) -> None:
    arguments = {"DirectCLRLoss": (32, temperature), "HypersphereLoss": ()}.get(name, (temperature,))
    assert_no_worse(*(getattr(of, name)(*arguments) for of in (lightly, originals.lightly())), views())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_open_clip(temperature: float) -> None:
    scale, bias, library = torch.tensor(1 / temperature), torch.tensor(-0.5 / temperature), originals.open_clip()
    assert_no_worse(open_clip.ClipLoss(), library.ClipLoss(), [*views(), scale])
    assert_no_worse(open_clip.SigLipLoss(), library.SigLipLoss(), [*views(), scale, bias])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_student_that_agrees_with_its_teacher(temperature: float) -> None:
    scale = torch.tensor(1 / temperature)
    teacher = [unit(view + 0.001 * rows(16, 64, seed=seed)) for seed, view in enumerate(views(), 70)]
    losses = open_clip.DistillClipLoss(), originals.open_clip().DistillClipLoss()
    assert_no_worse(*(lambda *t, loss=loss: loss(*t)[1] for loss in losses), [*views(), scale, *teacher, scale])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "partition_mode": "joint"},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0},
    ],
    ids=["one way", "both ways", "joint", "hard"],
)
def test_sentence_transformers(more: dict[str, Any], temperature: float) -> None:
    name, library = "MultipleNegativesRankingLoss", originals.sentence_transformers().sentence_transformer.losses
    losses = (
        getattr(of, name)(torch.nn.Identity(), scale=1 / temperature, **more) for of in (sentence_transformers, library)
    )
    assert_no_worse(
        *(lambda *t, loss=loss: loss.compute_loss_from_embeddings(list(t), None) for loss in losses), views()
    )


def test_a_term_that_rounds_to_0_keeps_its_slope() -> None:
    """Beside one of 1e-6 that of a negative, 4e-8, has a value of 0 in float32, and 4% of the gradient."""
    angles = torch.tensor([0.0, 39.1, 119.9, 159.0], dtype=torch.float64).deg2rad()
    x, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1])
    library = originals.pytorch_metric_learning()
    given: dict[str, Any] = {"alpha": 50.0, "beta": 50.0, "base": 0.5, "reducer": library.reducers.AvgNonZeroReducer()}
    mine, theirs = (of.MultiSimilarityLoss(**given) for of in (metric_learning, library.losses))
    assert_no_worse(lambda e: mine(e, labels), lambda e: theirs(e, labels), [x], little=1e-4)


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_classes_that_are_nearly_points(spread: float, temperature: float, references: bool) -> None:
    """The end of supervised training, of more positives than are listed."""
    mine, theirs = metric_losses("SupConLoss", temperature, "MeanReducer")
    labels = torch.arange(200) % 4
    leaves = [torch.eye(32)[labels] + spread * rows(200, 32, seed=seed) / 32**0.5 for seed in range(1 + references)]
    more = [labels.clone()] if references else []
    call = [lambda *t, loss=loss: loss(t[0], labels, None, *t[1:], *more) for loss in (mine, theirs)]
    assert_no_worse(*call, leaves)
