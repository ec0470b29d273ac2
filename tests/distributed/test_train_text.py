"""The text example: its pairs and bags, and a short training by one process and by two under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import texts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORDNET = """  1 a licence in lines that begin with two spaces | not a gloss
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which has its own existence
02084071 05 n 02 dog 0 domestic_dog(a) 0 001 @ 02083346 n 0000 | a tame animal that barks; "the dog barked"; "two dogs"
"""


def test_pairs_of_wordnet(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(WORDNET)
    pairs = texts.load(str(tmp_path))
    assert pairs.words == ["entity", "dog, domestic dog"]
    assert pairs.glosses == ["that which has its own existence", "a tame animal that barks"]
    with pytest.raises(FileNotFoundError, match="wordnet-base"):
        texts.load(str(tmp_path / "nowhere"))


def test_sample_says_how_to_get_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "FOLDERS", ())
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    pairs = texts.load()
    assert len(pairs) > 50 and "apt install wordnet-base" in pairs.note
    assert len(set(pairs.words)) == len(pairs)


def test_bags_take_rows() -> None:
    made = texts.bags(["a dog", "", "dog dog"], 1 << 20)
    ids, offsets = made.take(torch.tensor([2, 1, 0]))
    dog = texts.bags(["dog"], 1 << 20).ids
    assert offsets.tolist() == [0, 2 * len(dog), 2 * len(dog)]
    assert torch.equal(ids[: 2 * len(dog)], torch.cat([dog, dog]))
    assert torch.equal(ids[-len(dog) :], dog)


@pytest.mark.parametrize("processes", [1, 2])
def test_short_training(processes: int, tmp_path: Path) -> None:
    # A WordNet of its own: whether this machine has one must not matter.
    lines = (f"{k:08d} 03 n 01 thing{k} 0 000 | what is number {k}" for k in range(60))
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes > 1 else []
    sizes = [
        "--batch-sizes",
        "15",
        "1000",
        "--seconds",
        "2",
        "--buckets",
        "512",
        "--dim",
        "16",
        "--wordnet",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "examples.train_text", *sizes, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "train_text.json").read_text())
    n = len(texts.load(str(tmp_path)))
    assert n == 60
    assert [r["batch_size"] for r in results] == [15, n - n // 4]  # no batch is larger than what there is to train on
    for r in results:
        assert r["steps"] > 0 and 0 < r["loss_share"] < 1 and 0 <= r["recall_1"] <= r["recall_10"] <= 1
    assert (tmp_path / "train_text.png").stat().st_size > 1000
