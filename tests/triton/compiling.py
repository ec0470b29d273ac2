"""Compile the kernels for any GPU on a machine without one, and read back what the compiler made of them."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fastcl.triton_kernels.launching import FUSED_OPTIONS, STRIP_OPTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory of a multiprocessor, and the most one block may take (CUDA C programming guide, compute capabilities).
SHARED = {
    "sm_80": (167936, 166912),
    "sm_90": (233472, 232448),
    "sm_100": (233472, 232448),
    "sm_120": (102400, 101376),
    "sm_86": (102400, 101376),
    "sm_89": (102400, 101376),
    "gfx942": (65536, 65536),
}
WARPS = {"sm_120": 48, "sm_86": 48, "sm_89": 48}
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Arguments of each kind; every other argument that is no constexpr is a pointer to float32.
INTEGERS = {
    "n", "m", "d", "diff", "period", "sx", "sy", "swy", "pitch", "i0", "j0", "rows_pitch", "cols_pitch", "columns_pitch",
    "count", "size", "programs",
}  # fmt: skip
FLOATS = {"k0", "k1", "factor"}
OPERANDS = {"X", "Y", "W"}
GROUPS = {"GX", "GY"}
DIVISIBLE = {"d", "sx", "sy", "swy", "pitch"}


class Report(NamedTuple):
    """What the compiler made of one kernel; spills are local memory: stack bytes, STL and LDL instructions."""

    registers: int
    stack: int
    stl: int
    ldl: int
    shared: int
    blocks_per_sm: int
    matrix: dict[str, int]

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.stl or self.ldl)


def compile_kernel(
    kernel: Any, arch: str, dtype: torch.dtype, constants: dict[str, Any], num_warps: int, num_stages: int = 2
) -> Any:
    """The compiled kernel, its aligned arguments as the launches of fused.py and strip.py give them."""
    names = kernel.arg_names
    even = constants.get("EVEN", True)

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        if name in INTEGERS:
            return "i32"
        if name in GROUPS and "groups" in constants.get("MASK", ""):
            return "*i64"
        return "*" + (ELEMENT[dtype] if name in OPERANDS else "fp32")

    signature = {name: kind(name) for name in names}
    divisible = {name for name in names if signature[name][0] == "*" or name in DIVISIBLE - (set() if even else {"d"})}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constants},
    )
    options = FUSED_OPTIONS if kernel.__name__.startswith("fused") else STRIP_OPTIONS
    return triton_compile(
        source, target=TARGETS[arch], options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )


def report(compiled: Any, arch: str, num_warps: int) -> Report:
    """Registers, spills, shared memory, occupancy and matrix instructions of a compiled kernel."""
    return _amd_report(compiled) if arch.startswith("gfx") else _nvidia_report(compiled, arch, num_warps)


def _nvidia_report(compiled: Any, arch: str, num_warps: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    ops = Counter(
        op.split(".")[0] for op in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    )
    shared = compiled.metadata.shared
    pool, most = SHARED[arch]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * num_warps)
    blocks = min(pool // (shared + 1024), by_registers, WARPS.get(arch, 64) // num_warps) if shared <= most else 0
    return Report(registers, stack, ops["STL"], ops["LDL"], shared, blocks, {op: ops[op] for op in MATRIX if ops[op]})


def _amd_report(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]
    number = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}  # type: ignore[index]
    mfma = len(re.findall(r"v_mfma\w+", text))
    return Report(
        number["vgpr_count"], number["vgpr_spill_count"], 0, 0, compiled.metadata.shared,
        65536 // max(1, compiled.metadata.shared) if compiled.metadata.shared <= 65536 else 0, {"MFMA": mfma} if mfma else {},
    )  # fmt: skip


@functools.cache
def _tool(name: str) -> str:
    path = TOOLS / name
    return str(path) if path.exists() else name


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True, env=os.environ)
    return result.stdout
