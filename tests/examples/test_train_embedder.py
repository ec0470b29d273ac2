"""The sentence encoder learns from cached steps, from nothing or from weights in a folder, and says what it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from examples import texts, train_embedder

from . import small_bert

TINY = ["--batch-size", "24", "--chunk", "10", "--held-out", "12", "--device", "cpu"]


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample of pairs, whether WordNet is installed or not."""
    monkeypatch.setattr(texts, "FOLDERS", ())
    monkeypatch.delenv("WNSEARCHDIR", raising=False)


def test_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_embedder.main([*TINY, "--from-nothing", "--steps", "6", "--out", str(tmp_path)])
    assert result.losses[-1] < 0.9 * result.losses[0] and result.pairs == 12
    assert 0.0 <= result.recall_before <= 1.0 and 0.0 <= result.recall_after <= 1.0
    assert json.loads((tmp_path / "train_embedder.json").read_text())["losses"] == result.losses
    assert (tmp_path / "train_embedder.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "recall@1 of 12 held-out pairs" in said and "WordNet is not installed" in said
    assert train_embedder.HOW_TO_GET_IT not in said


def test_weights_from_a_folder(tmp_path: Path) -> None:
    """What transformers saved is loaded and read with its own tokenizer."""
    small_bert.save(texts.load(), tmp_path)
    model, tokens = train_embedder.encoder(tmp_path)
    found = tokens(["a ship", "a heavy hook that holds a ship in place"])
    assert found["attention_mask"].sum(1).tolist() == [4, 11] and model(**found).shape == (2, 16)
    out = tmp_path / "out"
    result = train_embedder.main([*TINY, "--weights", str(tmp_path), "--steps", "2", "--out", str(out)])
    assert result.start == str(tmp_path.name) and len(result.losses) == 2


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, train_embedder.PACKAGE, None)
    result = train_embedder.main([*TINY, "--steps", "1", "--out", str(tmp_path)])
    assert train_embedder.HOW_TO_GET_IT in capsys.readouterr().out and result.start == "nothing"


def test_words_are_hashed_and_padded() -> None:
    found = train_embedder.hashed(["One word", "one, WORD, and two more", ""])
    assert found["input_ids"].shape == (3, 5) and found["attention_mask"].sum(1).tolist() == [2, 5, 1]
    assert torch.equal(found["input_ids"][0, :2], found["input_ids"][1, :2])
