"""n = 50,000 rows, in a process of its own, whose peak memory tells whether anything of size n x n was formed.

An n x n matrix of float32 would take 10 GB at 50,000 rows and 1.6 GB at 20,000, where the last two metrics are measured: they
go through the same blocks and tiles, and this keeps the test to a quarter of a minute on one core.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the resource module does not exist there"),
]

PROGRAM = """
import json, resource, sys
import torch
from fastcl import metrics

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)

def views(n, d=8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g)
    return x, x + torch.randn(n, d, generator=g)

x, y = views(50_000)
metrics.uniformity(x[:3000])
before, found = peak_mib(), {}
for name, call in {
    "alignment": lambda: metrics.alignment(x, y),
    "effective_rank": lambda: metrics.effective_rank(x),
    "rank": lambda: metrics.rank(x),
    "uniformity": lambda: metrics.uniformity(x, progress=True),
    "wasserstein_uniformity": lambda: metrics.wasserstein_uniformity(x, progress=True),
    "mean_log_sum_exp": lambda: metrics.mean_log_sum_exp(*views(20_000), progress=True),
    "retrieval_accuracy": lambda: metrics.retrieval_accuracy(*views(20_000), progress=True)[0][1],
}.items():
    found[name] = call(), peak_mib() - before
print(json.dumps(found))
"""


def test_fifty_thousand_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    # Rows, their unit copies and one float64 copy are 3 x 3 MiB; tiles and blocks take 8 MiB or so each.
    assert {name: more for name, (_, more) in found.items() if more > 128} == {}
    value = {name: number for name, (number, _) in found.items()}
    # Standard normal rows of dimension 8: what the limit n -> infinity gives, within sampling error; the uniformity is
    # log int e^{-4 (1 - c)} (1 - c^2)^{5/2} dc / int (1 - c^2)^{5/2} dc = -3.0825.
    assert value["effective_rank"] == pytest.approx(8.0, rel=1e-3)
    assert value["rank"] == 8
    assert value["wasserstein_uniformity"] < 1e-4
    assert value["uniformity"] == pytest.approx(-3.0825, abs=1e-3)
    assert value["alignment"] == pytest.approx(0.62, abs=0.02)
    assert 0.0 < value["retrieval_accuracy"] < 0.1
    for name in ("uniformity", "wasserstein uniformity", "mean log-sum-exp", "retrieval accuracy"):
        assert f"{name}: 100%" in done.stderr
