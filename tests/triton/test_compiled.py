"""Every kernel builds for every architecture of tuning.py: without local memory, and with its matrix instruction.

compiled.json is what the compiler reported when the table was chosen. A plain test run compiles a few entries again;
`make test-gpu-emulated` compiles all.
"""

from __future__ import annotations

import ast

import pytest

pytest.importorskip("triton")

from .emulation import EVERYTHING
from .entries import ARCHITECTURES, KERNELS, Entry, entries, faults, load_record, one_of_each, source_digest

SOURCES, RECORDED = load_record()
ALL = [entry for arch in ARCHITECTURES for entry in entries(arch)]
SUBSET = [entry for arch in ("sm_80", "sm_90") for entry in one_of_each(arch) if "sum of" not in entry.name]


def test_the_record_is_that_of_the_table() -> None:
    """An entry that is new, or gone, needs `python -m tests.triton.entries`."""
    assert [entry.key for entry in ALL] == [
        key for arch in ARCHITECTURES for key in RECORDED if key.startswith(arch + " ")
    ]


def test_the_record_is_that_of_the_kernels_as_they_are() -> None:
    """A kernel changed and not compiled again, for any architecture, fails here without compiling anything."""
    assert {arch: source_digest() for arch in ARCHITECTURES} == SOURCES


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.key)
def test_recorded_without_spills_and_with_matrix_instructions(entry: Entry) -> None:
    assert faults(entry, RECORDED[entry.key]) is None


@pytest.mark.parametrize("entry", ALL if EVERYTHING else SUBSET, ids=lambda entry: entry.key)
def test_compiles_as_recorded(entry: Entry) -> None:
    """No spill, no lost matrix instruction, no block lost from a multiprocessor, at most eight registers more."""
    found, before = entry.compile(), RECORDED[entry.key]
    assert faults(entry, found) is None
    assert found.blocks_per_sm >= before.blocks_per_sm
    assert found.registers <= before.registers + 8
    assert sum(found.matrix.values()) <= sum(before.matrix.values())


def test_no_kernel_chains_more_than_two_conditions() -> None:
    """Triton 3.3 refuses `a and b and c` and takes `(a and b) and c`."""
    chained = []
    for path in sorted(KERNELS.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            compiled = isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list)
            for node in ast.walk(function) if compiled else ():
                if isinstance(node, ast.BoolOp) and len(node.values) > 2:
                    chained.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not chained


def test_a_tile_that_is_too_large_is_a_fault() -> None:
    """The gate sees spills: four warps on the tile of eight."""
    entry = next(e for e in ALL if e.arch == "sm_80" and "fused_rows half 128x128 d = 128" in e.name)
    assert "spills" in (faults(entry, entry._replace(num_warps=4).compile()) or "")
