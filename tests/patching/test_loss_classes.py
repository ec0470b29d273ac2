"""fastcl.patch of open_clip and sentence-transformers, with the real libraries: their own programs get fastcl's losses."""

from __future__ import annotations

from threading import Barrier, Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastcl
from fastcl import dropin
from tests.dropin import originals
from tests.dropin.test_sentence_transformers_cached import Model, features

ARGUMENTS: dict[str, Any] = {
    "distill": False, "model": "ViT-B-32", "siglip": False, "local_loss": False, "gather_with_grad": False, "rank": 0,
    "world_size": 1, "horovod": False, "loss_dist_impl": None,
}  # fmt: skip


def clip_curve(siglip: bool) -> tuple[type, list[float]]:
    """create_loss of open_clip's training program, and three steps of a tiny model by it."""
    library = originals.whole_open_clip()
    torch.manual_seed(0)
    vision = {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4}
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = library.CLIP(8, vision, text, init_logit_bias=-5.0 if siglip else None, output_dict=True).double()
    loss = library.create_loss(SimpleNamespace(**ARGUMENTS | {"siglip": siglip}))
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        images = torch.randn(9, 3, 8, 8, generator=g, dtype=torch.float64)
        found = model(images, torch.randint(1, 50, (9, 6), generator=g))
        value = loss(**found, output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return type(loss), values


@pytest.mark.parametrize("siglip", [False, True])
def test_open_clips_training_program(siglip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = originals.whole_open_clip()
    monkeypatch.setitem(__import__("sys").modules, "open_clip", library)
    theirs = clip_curve(siglip)
    with fastcl.patch("open_clip") as patch:
        ours = clip_curve(siglip)
        assert "open_clip.factory.ClipLoss" in repr(patch)
        assert not fastcl.patch("open_clip").replaced
    assert ours[0] is getattr(dropin.open_clip, theirs[0].__name__)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-10)
    assert clip_curve(siglip)[0] is theirs[0]


def ranking(name: str) -> tuple[type, list[float]]:
    losses = originals.sentence_transformers().sentence_transformer.losses
    torch.manual_seed(0)
    model: nn.Module = Model()
    loss = getattr(losses, name)(model)
    value = loss(features(3), None)
    value.backward()
    return type(loss), [value.item(), *(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", [f"{cached}MultipleNegatives{kind}RankingLoss" for cached in ("", "Cached") for kind in ("", "Symmetric")]
)
def test_sentence_transformers_losses(name: str) -> None:
    theirs = ranking(name)
    with fastcl.patch("sentence_transformers"):
        ours = ranking(name)
        assert originals.sentence_transformers().sentence_transformer.losses.MatryoshkaLoss  # others are as they were
    assert ours[0] is getattr(dropin.sentence_transformers, name)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-10)
    assert ranking(name)[0] is theirs[0]


def test_a_patch_can_be_entered_again() -> None:
    """It said nothing, and the library's own losses ran."""
    losses = originals.sentence_transformers().sentence_transformer.losses
    theirs, patch = losses.MultipleNegativesRankingLoss, fastcl.patch("sentence_transformers")
    for _ in range(2):
        with patch:
            assert losses.MultipleNegativesRankingLoss is dropin.sentence_transformers.MultipleNegativesRankingLoss
        assert losses.MultipleNegativesRankingLoss is theirs


def test_a_patch_is_left_when_the_last_leaves() -> None:
    """A function entered it within its caller's context, or a thread beside another's: the first to leave took it from both."""
    losses = originals.sentence_transformers().sentence_transformer.losses
    theirs, patch = losses.MultipleNegativesRankingLoss, fastcl.patch("sentence_transformers")
    ours = dropin.sentence_transformers.MultipleNegativesRankingLoss
    with patch:
        with patch:
            assert losses.MultipleNegativesRankingLoss is ours
        assert losses.MultipleNegativesRankingLoss is ours
    assert losses.MultipleNegativesRankingLoss is theirs
    inside, leave = Barrier(2), Event()

    def other() -> None:
        with patch:
            inside.wait()
            leave.wait()

    thread = Thread(target=other)
    thread.start()
    with patch:
        inside.wait()
    assert losses.MultipleNegativesRankingLoss is ours
    leave.set()
    thread.join()
    assert losses.MultipleNegativesRankingLoss is theirs
