"""Shared helpers: one-instruction kernels, and skips for tools that are not installed."""

import importlib.util

import numpy as np
import pytest

from tools.ptxemu import Module

HEAD = ".version 8.7\n.target {arch}\n.address_size 64\n"
DECL = """    .reg .pred %p<8>; .reg .b16 %h<32>; .reg .b32 %r<160>; .reg .b64 %rd<64>; .reg .f32 %f<64>; .reg .f64 %fd<16>;\n"""


def ptx(body, params=3, arch="sm_80", shared="", block=None):
    """A kernel 'k' whose 64-bit parameters are in %rd1.. and whose global thread index is in %r1."""
    plist = ", ".join(f".param .u64 p{i}" for i in range(1, params + 1))
    load = "".join(f"    ld.param.u64 %rd{i}, [p{i}];\n" for i in range(1, params + 1))
    return (
        HEAD.format(arch=arch) + f".visible .entry k({plist})\n{{\n{DECL}    {shared}\n{load}"
        "    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r1, %r2, %r3, %r1;\n"
        f"{body}\n    ret;\n}}\n"
    )


def launch(body, args, grid=1, block=32, shared_bytes=0, arch="sm_80", shared="", **kw):
    kw.setdefault("max_instructions", 20_000_000)
    return Module(ptx(body, len(args), arch, shared)).launch("k", grid, block, shared_bytes, list(args), **kw)


REG = {1: ("%h", "u8"), 2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%rd", "b64")}


def apply(instruction, out_dtype, *inputs, arch="sm_80", block=128):
    """Run one instruction per element. '{d}', '{a}', '{b}', '{c}', '{e}' in the instruction are registers of the operands' widths;
    {d} is a predicate if out_dtype is bool."""
    n = len(inputs[0])
    out = np.zeros(n, np.uint32 if out_dtype == bool else out_dtype)
    lines, names = [], {}
    for k, x in enumerate(inputs):
        size = x.dtype.itemsize
        reg, kind = REG[size]
        names["abce"[k]] = f"{reg}{10 + k}"
        lines.append(
            f"mul.wide.s32 %rd20, %r1, {size}; add.s64 %rd20, %rd20, %rd{k + 1}; ld.global.{kind} {reg}{10 + k}, [%rd20];"
        )
    osize = out.dtype.itemsize
    reg, kind = REG[osize]
    names["d"] = "%p1" if out_dtype == bool else f"{reg}20" if reg != "%rd" else "%rd30"
    lines.append(instruction.format(**names))
    if out_dtype == bool:
        lines.append("selp.b32 %r20, 1, 0, %p1;")
    store = "%r20" if out_dtype == bool else names["d"]
    lines.append(
        f"mul.wide.s32 %rd20, %r1, {osize}; add.s64 %rd20, %rd20, %rd{len(inputs) + 1}; st.global.{kind} [%rd20], {store};"
    )
    grid = (n + block - 1) // block
    assert n % block == 0
    launch("\n".join(lines), [*inputs, out], grid=grid, block=block, arch=arch)
    return out.astype(bool) if out_dtype == bool else out


def has_nvcc():
    from tools.ptxemu import nvcc

    try:
        return bool(nvcc.nvcc_path())
    except RuntimeError:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="triton is not installed",
)
