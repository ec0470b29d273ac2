"""The example of a transformers model trains both ways to the same losses."""

from pathlib import Path

import pytest

from examples import train_clip_hf


def test_both_ways(tmp_path: Path) -> None:
    own, patched = (train_clip_hf.train(way, batch_size=64, steps=3) for way in train_clip_hf.WAYS)
    assert patched.losses == pytest.approx(own.losses, rel=1e-5)
    assert patched.accuracy == own.accuracy
    train_clip_hf.draw(tmp_path / "curves.png", [own, patched], 64)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_captions_end() -> None:
    assert train_clip_hf.tokens(["the digit seven"]).shape == (1, train_clip_hf.LENGTH)
    assert (train_clip_hf.tokens(["a drawing of seven", "seven by hand"]) == 1).sum(1).tolist() == [1, 1]
