"""What ptxas makes of the Hopper kernels: the committed record of all, and the machine code of a few."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tools.ptxemu import nvcc

from .compiled import recorded, tool
from .emulation import CSRC, EVERYTHING
from .hopper_launching import EXTRA

PAIRS = re.findall(r"::fastcl::pairs::(\w+)", (CSRC / "generated" / "pairs.h").read_text())
DTYPES = {"__nv_bfloat16", "__half"}


def test_every_instance_is_recorded_without_a_spill() -> None:
    """Every pair function, dtype and width of tile; one CTA of 384 threads has 168 registers a thread to deal out."""
    record = {key.removeprefix("sm_90a "): kernel for key, kernel in recorded().items() if key.startswith("sm_90a ")}
    for t in DTYPES:
        expected = [f"tiles<{t}, {nx}, hopper::Rows<{nx}, hopper::Exponential, false> >" for nx in (128, 192, 256)]
        expected += [
            f"tiles<{t}, {nx}, hopper::Weights<{t}, {nx}, hopper::Softmax, false, {b}> >"
            for nx, b in ((128, 1), (256, 4))
        ]
        for loop in ("tiles", "streamed"):
            rows = PAIRS if loop == "streamed" else [f for f in PAIRS if f != "Log1p"]
            expected += [f"{loop}<{t}, 128, hopper::Rows<128, hopper::PairFunction<{f}>, true> >" for f in rows]
            expected += [f"{loop}<{t}, 128, hopper::Weights<{t}, 128, {f}, true, 1> >" for f in PAIRS]
        assert not [name for name in expected if f"hopper::{name}" not in record]
    for name, kernel in record.items():
        assert not kernel.spills, name
        if "tiles<" in name or "streamed<" in name:
            assert kernel.registers == 168, name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[str]]]:
    """What ptxas said of hopper_few.cu, and the opcodes of each of its kernels."""
    cubin = tmp_path_factory.mktemp("hopper") / "few.cubin"
    source = Path(__file__).with_name("hopper_few.cu")
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-O3", *EXTRA, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-Xptxas", "-v"]
    command = [os.fspath(nvcc.nvcc_path()), *flags, "-cubin", str(source), "-o", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    text = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    opcodes = {}
    for part in text.split("Function : ")[1:]:
        opcodes[part.split()[0]] = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", part, re.MULTILINE
        )
    return said, {
        name: ops for name, ops in opcodes.items() if "hopper" in name and ("tiles" in name or "streamed" in name)
    }


needs_time = pytest.mark.skipif(not EVERYTHING, reason="ptxas takes half a minute: make test-gpu-emulated")


@needs_time
def test_ptxas_serialises_no_product_and_spills_nothing(made: tuple[str, dict[str, list[str]]]) -> None:
    said, kernels = made
    assert len(kernels) >= 8
    assert not re.findall(r"C75\d\d.*", said)
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}
    for name, ops in kernels.items():
        assert not [op for op in ops if op.startswith(("LDL", "STL"))], name


@needs_time
def test_the_products_of_a_chunk_follow_one_another(made: tuple[str, dict[str, list[str]]]) -> None:
    """Four a chunk, with nothing between them that waits or reads accumulators."""
    for name, ops in made[1].items():
        at = [k for k, op in enumerate(ops) if op.startswith("HGMMA")]
        assert len(at) == 4, name
        # A release to the whole cluster would wait for all memory at each arrival: twice, when clusters meet, and never in a loop.
        assert sum("MEMBAR" in op and "GPU" in op for op in ops) == 2, name
        between = {op.split(".")[0] for op in ops[at[0] : at[3]]}
        assert not between & {"WARPGROUP", "WARPGROUPSET", "BAR", "SYNCS", "DEPBAR", "FFMA", "FADD", "MUFU"}, name
