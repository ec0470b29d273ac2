"""ClipLoss and SigLipLoss beside open_clip's, in one process."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from fastcl.dropin import contrast
from fastcl.dropin import open_clip as ours

from . import originals
from .compare import assert_agree, rows, two_views, unit

SIZES = [(1, 3), (2, 5), (13, 7), (40, 16)]
SCALES = [0.5, 14.3, 100.0]


def leaves(n: int, d: int, scale: float, bias: float) -> list[torch.Tensor]:
    x, y = (unit(v) for v in two_views(n, d))
    return [x, y, torch.tensor(scale).double(), torch.tensor([bias]).double()]


@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"])
def test_signatures(name: str) -> None:
    theirs, mine = getattr(originals.open_clip(), name), getattr(ours, name)
    for method in ("__init__", "forward"):
        a, b = inspect.signature(getattr(mine, method)), inspect.signature(getattr(theirs, method))
        assert [(p.name, p.default, p.kind) for p in a.parameters.values() if p.name != "chunk_size"] == [
            (p.name, p.default, p.kind) for p in b.parameters.values() if p.name != "chunk_size"
        ]  # open_clip 4 has chunk_size, 3 does not


def test_logits_in_chunks_are_no_logits_too() -> None:
    every = leaves(13, 7, 14.3, -10.0)
    assert_agree(ours.SigLipLoss(chunk_size=4), originals.open_clip().SigLipLoss(), every)
    with pytest.raises(ValueError, match="chunk_size: expected an integer > 0"):
        ours.SigLipLoss(chunk_size=0)


@pytest.mark.parametrize("part", ["contrastive_loss", "distill_loss"])
@pytest.mark.parametrize(("n", "block"), [(2, 2**20), (13, 2**20), (13, 40)])
def test_distillation(part: str, n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of student and teacher, whose widths differ; in one block of rows and in several."""
    monkeypatch.setattr(contrast, "BLOCK", block)
    teacher = [unit(v) for v in two_views(n, 9, seed=5)]
    every = [*leaves(n, 7, 14.3, 0.0)[:3], *teacher, torch.tensor(30.0).double()]
    mine, theirs = ours.DistillClipLoss(), originals.open_clip().DistillClipLoss()
    assert_agree(lambda *t: mine(*t, output_dict=True)[part], lambda *t: theirs(*t, output_dict=True)[part], every)


def test_distillation_under_torch_func() -> None:
    every = [*leaves(13, 7, 14.3, 0.0)[:3], *(unit(v) for v in two_views(13, 9, seed=5)), torch.tensor(30.0).double()]

    def loss(*t: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = ours.DistillClipLoss()(*t)[1]
        return value

    wanted = torch.autograd.grad(loss(*(t.requires_grad_() for t in every)), every)
    found = torch.func.grad(loss, argnums=tuple(range(len(every))))(*(t.detach() for t in every))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("weights", [(2.0, 0.5), (1.0, 0.0)])
def test_captions(weights: tuple[float, float]) -> None:
    logits, labels = rows(13, 4, 11, seed=3), torch.arange(52).reshape(13, 4) % 11
    every = [*leaves(13, 7, 14.3, 0.0)[:3], logits]
    mine, theirs = ours.CoCaLoss(*weights), originals.open_clip().CoCaLoss(*weights)
    for k in (0, 1):
        a, b = (loss(*every[:2], logits, labels, every[2])[k] for loss in (mine, theirs))
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert_agree(
        lambda x, y, a, z: sum(mine(x, y, z, labels, a)), lambda x, y, a, z: sum(theirs(x, y, z, labels, a)), every
    )


def test_what_captions_and_a_teacher_must_be() -> None:
    x, y, a, _ = leaves(5, 4, 2.0, 0.0)
    labels = torch.zeros(5, 3, dtype=torch.long)
    for logits, kind in ((torch.zeros(5, 7), ValueError), ([[[0.0]]], TypeError), (None, TypeError)):
        with pytest.raises(kind, match=r"^logits: expected "):
            ours.CoCaLoss(1.0, 1.0)(x, y, logits, labels, a)
    with pytest.raises(ValueError, match="dist_image_features: expected the device of image_features, cpu, got meta"):
        ours.DistillClipLoss()(x, y, a, x.to("meta"), y.to("meta"), a)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_clip(n: int, d: int, scale: float) -> None:
    mine, theirs = ours.ClipLoss(), originals.open_clip().ClipLoss()
    x, y, a, _ = leaves(n, d, scale, 0.0)
    assert_agree(mine, theirs, [x, y, a])
    assert_agree(lambda *t: mine(*t, output_dict=True)["contrastive_loss"], theirs, [x, y, a])


@pytest.mark.parametrize("bias", [-10.0, 3.0])
def test_clip_bias_cancels(bias: float) -> None:
    mine, theirs = ours.ClipLoss(cache_labels=True), originals.open_clip().ClipLoss(cache_labels=True)
    every = leaves(13, 7, 14.3, bias)
    assert_agree(mine, theirs, every)
    b = every[-1].requires_grad_()
    mine(*every).backward()
    assert b.grad is not None and b.grad.item() == 0.0


@pytest.mark.parametrize("bias", [-10.0, 0.5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_siglip(n: int, d: int, scale: float, bias: float) -> None:
    mine, theirs = ours.SigLipLoss(cache_labels=True), originals.open_clip().SigLipLoss(cache_labels=True)
    every = leaves(n, d, scale, bias)
    assert_agree(mine, theirs, every)
    assert_agree(lambda *t: mine(*t, output_dict=True)["contrastive_loss"], theirs, every)
    assert_agree(lambda x, y, a: mine(x, y, a, None), lambda x, y, a: theirs(x, y, a, None), every[:3])


def test_duplicate_and_long_rows() -> None:
    x, y = two_views(9, 5)
    x[3], y[3] = x[4], y[4]
    scale = torch.tensor(1.0).double()
    for name in ("ClipLoss", "SigLipLoss"):
        for factor in (1.0, 1e3):
            assert_agree(
                lambda *t, name=name: getattr(ours, name)()(*t, torch.tensor(-2.0)),
                lambda *t, name=name: getattr(originals.open_clip(), name)()(*t, torch.tensor(-2.0)),
                [factor * x, factor * y, scale],
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_finite_and_near(dtype: torch.dtype) -> None:
    """The truth is the original in float64 on the same rounded rows; the bound is what the original itself is off by."""
    x, y = (unit(v).to(dtype) for v in two_views(33, 16))
    for name, bias in (("ClipLoss", None), ("SigLipLoss", -10.0)):
        theirs = getattr(originals.open_clip(), name)()
        truth = theirs(x.double(), y.double(), 14.3, bias).item()
        there = abs(theirs(x, y, 14.3, bias).item() - truth)
        assert abs(getattr(ours, name)()(x, y, 14.3, bias).item() - truth) <= there + 1e-6 * abs(truth)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "CoCaLoss"])
def test_an_error_names_what_its_caller_gave(name: str) -> None:
    loss = getattr(ours, name)(*((1.0, 1.0) if name == "CoCaLoss" else ()))
    more = {"logits": None, "labels": None} if name == "CoCaLoss" else {"logit_bias": None}
    for bad in (None, torch.ones(0, 3), torch.ones(4)):
        with pytest.raises((TypeError, ValueError), match=r"^image_features: expected"):
            loss(image_features=bad, text_features=torch.ones(0, 3), logit_scale=1.0, **more)
    for given in ({"rank": None}, {"world_size": "2"}):
        with pytest.raises(TypeError, match=f"^{next(iter(given))}: expected an integer"):
            ours.ClipLoss(**given)


def test_what_is_not_supported_raises() -> None:
    x, y = two_views(4, 3)
    with pytest.raises(NotImplementedError, match="use_horovod"):
        ours.ClipLoss(use_horovod=True)
    for name in ("ClipLoss", "SigLipLoss"):
        with pytest.raises(ValueError, match="rank: expected 0 <= rank < world_size"):
            getattr(ours, name)(rank=2, world_size=2)
        with pytest.raises(ValueError, match="init_process_group"):
            getattr(ours, name)(rank=1, world_size=2)(x, y, 1.0, 0.0)
        with pytest.raises(ValueError, match="at least 1 row"):
            getattr(ours, name)()(x[:0], y[:0], 1.0, 0.0)
        with pytest.raises(TypeError, match="dtype"):
            getattr(ours, name)()(x, y.float(), 1.0, 0.0)
    with pytest.raises(ValueError, match="one row for each row"):
        ours.SigLipLoss()(x, y[:3], 1.0, 0.0)
    with pytest.raises(ValueError, match="dist_impl"):
        ours.SigLipLoss(dist_impl="broadcast")
    with pytest.raises(ValueError, match="logit_scale"):
        ours.ClipLoss()(x, y, -1.0)


@pytest.mark.parametrize(("n", "m"), [(9, 14), (14, 9)])
def test_clip_with_rows_that_match_nothing(n: int, m: int) -> None:
    """The original's two cross entropies, each of the rows that have a label; it takes as many of both itself."""
    x, y = (unit(v) for v in two_views(14, 6))
    x, y, labels = x[:n], y[:m], torch.arange(9)

    def dense(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        z = scale * x @ y.T
        return (F.cross_entropy(z[:9], labels) + F.cross_entropy(z.T[:9], labels)) / 2

    assert_agree(ours.ClipLoss(), dense, [x, y, torch.tensor(14.3).double()])
