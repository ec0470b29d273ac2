"""No drop-in forms a matrix of all pairs: each runs, backward too, in a process whose peak memory is far below one."""

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

ROWS = 8_000  # one matrix of float32: 244 MiB; 2n x 2n, as NT-Xent has it, four times that
PROGRAM = """
import json, resource, sys
import torch
from torch import nn
from fastcl.dropin import lightly, open_clip, pytorch_metric_learning as pml, sentence_transformers as st

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)

def views(n, d=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=g).requires_grad_() for _ in range(3)]

def ranking(**arguments):
    loss = st.MultipleNegativesRankingLoss(nn.Identity(), **arguments)
    return lambda *columns: loss.compute_loss_from_embeddings(columns)

every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
cases = {
    "open_clip ClipLoss": lambda x, y, z: open_clip.ClipLoss()(x, y, 1.0),
    "open_clip SigLipLoss": lambda x, y, z: open_clip.SigLipLoss()(x, y, 1.0, -1.0),
    "open_clip DistillClipLoss": lambda x, y, z: sum(open_clip.DistillClipLoss()(x, y, 1.0, z, x, 1.0)),
    "lightly MACLLoss": lambda x, y, z: lightly.MACLLoss()(x, y),
    "lightly HypersphereLoss": lambda x, y, z: lightly.HypersphereLoss()(x, y),
    "lightly NTXentLoss": lambda x, y, z: lightly.NTXentLoss()(x, y),
    "lightly NTXentLoss with a bank": lambda x, y, z: lightly.NTXentLoss(0.5, (len(x), 8))(x, y),
    "lightly DCLLoss": lambda x, y, z: lightly.DCLLoss()(x, y),
    "lightly DCLWLoss": lambda x, y, z: lightly.DCLWLoss()(x, y),
    "pytorch_metric_learning NTXentLoss": lambda x, y, z: pml.NTXentLoss()(x, torch.arange(len(x)) % 10),
    "pytorch_metric_learning SupConLoss": lambda x, y, z: pml.SupConLoss()(x, torch.arange(len(x)) % 10),
    **{
        f"pytorch_metric_learning {loss.__name__}": lambda x, y, z, loss=loss: loss()(x, torch.arange(len(x)) // 3)
        for loss in (pml.MultiSimilarityLoss, pml.NCALoss, pml.NPairsLoss)
    },
    "sentence_transformers": ranking(),
    "sentence_transformers, every direction": ranking(directions=every),
    "sentence_transformers, per direction": ranking(**both),
    "sentence_transformers, hardness": ranking(hardness_mode="in_batch_negatives", hardness_strength=3.0),
}
for case in cases.values():
    case(*views(64)).backward()
found = {}
for name, case in cases.items():
    before = peak_mib()
    case(*views(int(sys.argv[1]))).backward()
    found[name] = peak_mib() - before
print(json.dumps(found))
"""


def test_no_matrix_of_all_pairs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROWS)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    # Peaks only grow: what a case adds to those before it. A block of the pure PyTorch fallback takes 8 MiB a buffer.
    assert {name: more for name, more in found.items() if more > 60} == {}
    assert len(found) == 18
