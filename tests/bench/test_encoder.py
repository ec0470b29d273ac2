"""One step of an encoder, plain and cached, by both libraries: the same loss five times, each with its time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import texts
from tests.examples import small_bert

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_all_ways_have_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "FOLDERS", ())
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    small_bert.save(texts.load(), tmp_path)
    command = [sys.executable, "-m", "bench.encoder", "--weights", str(tmp_path), "--batch-sizes", "12", "20", "--chunk", "7"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "does not fit" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "loss" in line]
    assert len(lines) == 10
    for n in ("12", "20"):
        found = [float(line.split()[-1]) for line in lines if line.split()[0] == n]
        assert len(found) == 5 and max(found) - min(found) < 2e-3 and 0.5 < found[0] < 4.0
