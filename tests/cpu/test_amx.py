"""The AMX kernels: all of float32 by name, rows of 16 bits by default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcl import extension

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    extension.library is None or "amx" not in extension.library.usable_isas(),
    reason="this processor has no AMX for bfloat16, or the compiler does not know it",
)


@pytest.mark.parametrize("name", ["amx_cases.py", "test_extremes.py"])
def test_float32_by_name(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    run = subprocess.run(
        command, env={**os.environ, "FASTCL_CPU_ISA": "amx"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]


CODE = """
import hashlib, torch, fastcl
g = torch.Generator().manual_seed(3)
for dtype in (torch.float32, torch.bfloat16):
    x, y = (torch.randn(70, 40, generator=g).to(dtype) for _ in range(2))
    print(hashlib.sha256(fastcl.pair_reduce(x, y, backend="cpu").numpy().tobytes()).hexdigest())
"""


def test_by_default_rows_of_16_bits_alone() -> None:
    """Bits of AVX-512 for float32, of AMX for bfloat16."""
    bits = {}
    for isa in ("", "amx", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, "FASTCL_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        bits[isa] = run.stdout.split()
    assert bits["amx"][0] != bits["avx512"][0] and bits["amx"][1] != bits["avx512"][1]
    assert bits[""] == [bits["avx512"][0], bits["amx"][1]]
