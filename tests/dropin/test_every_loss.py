"""What holds of every drop-in: selective checkpoints, several gradients at once, and NaN, which is not hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastcl.dropin import contrast, lightly, open_clip, sentence_transformers
from fastcl.dropin import pytorch_metric_learning as metric_learning
from fastcl.functional import positives

from . import originals
from .compare import rows, unit
from .test_sentence_transformers_guided import Model

pytestmark = pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")
N, D = 14, 5
LABELS, OTHERS = torch.arange(N) % 4, torch.arange(N) % 3
MINED = tuple(torch.tensor(index) for index in ((0, 0, 5, 2), (4, 8, 1, 6), (0, 5, 5, 2), (1, 2, 3, 3)))
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
Loss = Callable[..., Tensor]
ELSEWHERE = {"DistributedLossWrapper"}  # which of one process is the loss itself


def metric(name: str, way: str, **more: Any) -> Loss:
    """A loss of labelled rows."""
    distances = originals.pytorch_metric_learning().distances
    if way == "any length":
        more["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
    elif name == "GeneralizedLiftedStructureLoss":
        more["distance"] = distances.LpDistance(power=2)
    loss = getattr(metric_learning, name)(**more)
    if way == "mined":
        return lambda x, y, scale: loss(x, LABELS, MINED)
    if way == "references":
        return lambda x, y, scale: loss(x, LABELS, None, y, OTHERS)
    if way == "references, one by one":
        return lambda x, y, scale: loss(x, LABELS, None, y, LABELS)
    return lambda x, y, scale: loss(x, LABELS)


def two_views(name: str, *arguments: Any) -> Loss:
    loss = getattr(lightly, name)(*arguments)
    return lambda x, y, scale: loss(x, y)


def ranking(name: str, **more: Any) -> Loss:
    model = Model() if "Cached" in name else nn.Identity()
    loss = getattr(sentence_transformers, name)(model, **more)
    if "Cached" in name:
        return lambda x, y, scale: loss.calculate_loss([[x[:9], x[9:]], [y[:9], y[9:]]])
    return lambda x, y, scale: loss.compute_loss_from_embeddings([x, y, y.flip(0)])


def guided(name: str) -> Loss:
    loss, guides = getattr(sentence_transformers, name)(Model(), Model()), [rows(N, 3), rows(N, 3, seed=5)]
    if "Cached" in name:
        return lambda x, y, scale: loss.calculate_loss([[x], [y]], [[g] for g in guides])
    return lambda x, y, scale: loss.compute_loss_from_embeddings([x, y], guides)


def spread(name: str) -> Loss:
    loss = getattr(sentence_transformers, name)(nn.Identity())
    return lambda x, y, scale: sum(loss.compute_loss_from_embeddings([x, y]).values())


def distilled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """A student and a teacher that both want gradients."""
    of_teacher: Tensor = sum(open_clip.DistillClipLoss()(x, y, scale, y.flip(1)[:, 1:], x[:, 1:], 2.0 * scale))
    return of_teacher


def captioned(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    both: Tensor = sum(
        open_clip.CoCaLoss(2.0, 0.5)(x, y, x[:, None] * y.clone()[:, :, None], LABELS[:, None].expand(N, D), scale)
    )
    return both


LABELLED = ("SupConLoss", "NTXentLoss", "MultiSimilarityLoss", "NCALoss", "GeneralizedLiftedStructureLoss")
CASES: dict[str, Callable[[], Loss]] = {
    "ClipLoss": lambda: open_clip.ClipLoss(),
    "SigLipLoss": lambda: lambda x, y, scale: open_clip.SigLipLoss()(x, y, scale, -scale),
    "DistillClipLoss": lambda: distilled,
    "CoCaLoss": lambda: captioned,
    "lightly NTXentLoss": partial(two_views, "NTXentLoss"),
    "lightly DCLLoss": partial(two_views, "DCLLoss"),
    "lightly DCLLoss, weighted": partial(two_views, "DCLLoss", 0.1, lambda a, b: (a * b).sum(1).exp()),
    "DCLWLoss": partial(two_views, "DCLWLoss"),
    "DirectCLRLoss": partial(two_views, "DirectCLRLoss", 3),
    "MACLLoss": partial(two_views, "MACLLoss"),
    "HypersphereLoss": partial(two_views, "HypersphereLoss"),
    **{
        f"{name}, {way}": partial(metric, name, way)
        for name in LABELLED
        for way in ("unit rows", "any length", "references", "references, one by one", "mined")
    },
    **{
        f"{name}, above 0": lambda name=name: metric(
            name, "any length", reducer=originals.pytorch_metric_learning().reducers.AvgNonZeroReducer()
        )
        for name in (*LABELLED, "NPairsLoss")
        if name != "NTXentLoss"
    },
    **{f"NPairsLoss, {way}": partial(metric, "NPairsLoss", way) for way in ("unit rows", "any length")},
    "MultipleNegativesRankingLoss": partial(ranking, "MultipleNegativesRankingLoss"),
    "MultipleNegativesRankingLoss, joint": partial(ranking, "MultipleNegativesRankingLoss", directions=EVERY),
    "MultipleNegativesRankingLoss, hard": partial(
        ranking, "MultipleNegativesRankingLoss", hardness_mode="in_batch_negatives", hardness_strength=3.0
    ),
    **{
        name: partial(ranking, name)
        for name in (
            "MultipleNegativesSymmetricRankingLoss",
            "CachedMultipleNegativesRankingLoss",
            "CachedMultipleNegativesSymmetricRankingLoss",
        )
    },
    **{name: partial(guided, name) for name in ("GISTEmbedLoss", "CachedGISTEmbedLoss")},
    "GlobalOrthogonalRegularizationLoss": partial(spread, "GlobalOrthogonalRegularizationLoss"),
}


def leaves() -> list[Tensor]:
    """Rows, rows near them, and a scale."""
    x = unit(rows(N, D))
    y = unit(x + 0.3 * rows(N, D, seed=1))
    return [t.requires_grad_() for t in (x, y, torch.tensor(3.0, dtype=torch.float64))]


def gradients(value: Tensor, of: list[Tensor], **more: Any) -> list[Tensor]:
    """Those of the leaves that the loss is one of."""
    return [g for g in torch.autograd.grad(value, of, allow_unused=True, **more) if g is not None]


@pytest.fixture(params=["few", "many"], autouse=True)
def sizes(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are small, and what is done of large ones: class sums, and several blocks of rows."""
    if request.param == "many":
        monkeypatch.setattr(positives, "FEW", 0)
        monkeypatch.setattr(contrast, "BLOCK", 4 * N)


def test_every_drop_in_is_a_case() -> None:
    modules = ("lightly", "metric_learning", "open_clip", "pytorch_metric_learning", "sentence_transformers")
    modules += ("sentence_transformers_cached", "sentence_transformers_guided", "sentence_transformers_spread")
    every = {
        name
        for module in modules
        for name in getattr(import_module(f"fastcl.dropin.{module}"), "__all__", ())
        if name[0].isupper()
    }
    assert {case.split(",")[0].removeprefix("lightly ") for case in CASES} == every - ELSEWHERE


@pytest.mark.parametrize("case", CASES)
def test_checkpointed_with_every_result_saved(case: str) -> None:
    """Selective checkpoints refuse what changes in place a result that they hold."""
    loss, at = CASES[case](), leaves()
    saved = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    plain = loss(*at)
    value = checkpoint(loss, *at, use_reentrant=False, context_fn=saved)
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=0.0)
    for got, want in zip(gradients(value, at), gradients(plain, at), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_batched_gradients_are_those_one_by_one(case: str) -> None:
    loss, at = CASES[case](), leaves()
    value, upstream = loss(*at), torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = gradients(value, at, grad_outputs=upstream, is_grads_batched=True, retain_graph=True)
    for got, want in zip(found, gradients(value, at), strict=True):
        torch.testing.assert_close(got, torch.stack([want, -2.0 * want]), rtol=1e-10, atol=1e-14)


# Weights or teachers without gradient: differences of gradients see them move, derivatives do not.
HELD = ("DistillClipLoss", "DCLWLoss", "MACLLoss", "MultipleNegativesRankingLoss, hard")


@pytest.mark.parametrize("case", [case for case in CASES if case not in HELD])
def test_second_derivatives_by_the_advice_of_their_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no backend: FASTCL_BACKEND says it."""
    loss, at = CASES[case](), leaves()
    along = [rows(N, D, seed=5), rows(N, D, seed=6), torch.tensor(0.7, dtype=torch.float64)]
    monkeypatch.setenv("FASTCL_BACKEND", "reference")

    def slope(step: float) -> Tensor:
        moved = [(t.detach() + step * a).requires_grad_() for t, a in zip(at, along, strict=True)]
        return sum(g.sum() for g in gradients(loss(*moved), moved))

    first = gradients(loss(*at), at, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), at, allow_unused=True)
    found = sum((s * a).sum() for s, a in zip(second, along, strict=True) if s is not None)
    h = 1e-5
    want = (slope(h) - slope(-h)) / (2.0 * h)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_nan_gives_nan(case: str) -> None:
    loss, (x, *others) = CASES[case](), leaves()
    with torch.no_grad():
        x[0] = math.nan
    assert loss(x, *others).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_features_made_under_inference_mode(case: str, dtype: torch.dtype) -> None:
    """No graph keeps a tensor that was made there, such as a teacher's features."""
    loss, (x, *others) = CASES[case](), [t.detach().to(dtype) for t in leaves()]
    with torch.inference_mode():
        teacher = [t.clone() for t in others]
    assert all(t.is_inference() for t in teacher)
    found = []
    for given in (others, teacher):
        at = x.clone().requires_grad_()
        value = loss(at, *given)
        found.append([value.detach(), *gradients(value, [at])])
    assert all(map(torch.equal, *found))


def test_captions_made_under_inference_mode() -> None:
    x, y, scale = leaves()
    with torch.inference_mode():
        tokens = LABELS[:, None].repeat(1, D)
    for loss in open_clip.CoCaLoss(2.0, 0.5)(x, y, x[:, None] * y[:, :, None], tokens, scale):
        assert gradients(loss, [x, y])


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith(("any length", "above 0"))])
def test_logits_beyond_float32_are_those_of_float64(case: str) -> None:
    """The value, infinite where float32 has no number for it, and the gradients, which have one."""
    loss, found = CASES[case](), []
    for dtype in (torch.float32, torch.float64):
        x = (1e20 * rows(N, D)).float().to(dtype).requires_grad_()
        value = loss(x, None, None)
        found.append([value.float(), *(g.float() for g in gradients(value, [x]))])
    assert not found[1][0].isnan()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)
