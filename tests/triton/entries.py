"""Every kernel that tuning.py can choose, in the variants that need the most registers, for the compile gate.

python -m tests.triton.entries [--missing] [sm_80 sm_90 ...]    compile them and write compiled.json
python -m tests.triton.entries --print                          the record as a table
python -m tests.triton.entries --try [--few] [sm_80 ...]        what this Triton makes of them, or of one of each kernel; nothing
                                                                is written

--missing keeps what was compiled from the kernels as they are now. Spills are STACK bytes and STL and LDL instructions (on
gfx942: spilled vector registers). No GPU is used and nothing is timed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastcl.triton_kernels import tuning
from fastcl.triton_kernels.fused_kernels import fused_gradient, fused_rows
from fastcl.triton_kernels.generated_pairs import PAIRS
from fastcl.triton_kernels.launching import FUSED_OPTIONS, STRIP_OPTIONS
from fastcl.triton_kernels.strip_kernels import strip_reduce, strip_weights

from .compiling import Report, compile_kernel, report

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "sm_86", "sm_89")
RECORD = Path(__file__).with_name("compiled.json")
KERNELS = Path(tuning.__file__).parent
DTYPE = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
EQUATION = {"SQDIST": False, "HAS_BX": False, "HAS_BY": False, "MASK": "off_diagonal"}
LSE = {"PAIR": PAIRS["identity"][0], "LSE": True}
SUM = {"PAIR": PAIRS["softplus"][0], "LSE": False}


# Addresses that wait in local memory while the loop over tiles runs: stored before it and loaded after it, none within (SASS).
BESIDE_THE_LOOP = {
    "sm_80 fused_gradient half 128x64 d = 256, 8 warps, 3 stages: log-sum-exp of itself, one exponential": (32, 7, 7)
}


class Entry(NamedTuple):
    """One compilation: an architecture, a kernel, and its constants."""

    arch: str
    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    needs_matrix: bool

    @property
    def key(self) -> str:
        return f"{self.arch} {self.name}"

    def compile(self) -> Report:
        built = compile_kernel(self.kernel, self.arch, self.dtype, self.constants, self.num_warps, self.num_stages)
        return report(built, self.arch, self.num_warps)


def entries(arch: str) -> Iterator[Entry]:
    """Every entry of the table that serves an architecture."""
    table = tuning.table_of(arch)
    for kind, rows_tiles in tuning.ROWS[table].items():
        for rows_tile in rows_tiles:
            yield from _rows(arch, kind, rows_tile)
    for kind_reduce, gradient_tiles in tuning.GRADIENT[table].items():
        for gradient_tile in gradient_tiles:
            yield from _gradient(arch, *kind_reduce.split(), gradient_tile)
    yield from _strip(arch)


def one_of_each(arch: str) -> Iterator[Entry]:
    """One of each kernel at d = 128, where users begin."""
    for entry in entries(arch):
        served = "strip" in entry.name or ("half" in entry.name and "d = 128" in entry.name)
        if served and not any(part in entry.name for part in ("itself", "two", "references")):
            yield entry


def _split(tile: Any) -> tuple[dict[str, Any], int, int]:
    constants = tile._asdict()
    return constants, constants.pop("num_warps"), constants.pop("num_stages")


def _rows(arch: str, kind: str, tile: tuning.RowsTile) -> Iterator[Entry]:
    constants, warps, stages = _split(tile)
    constants |= EQUATION | {"EVEN": True, "COLUMNS": True, "PRECISION": "tf32" if kind == "tf32" else "ieee"}
    where = f"fused_rows {kind} {tile.BM}x{tile.BN} d {'=' if tile.KEEP else 'by'} {tile.BD}, {warps} warps, {stages} stages"
    for label, extra in (
        ("log-sum-exp", LSE | {"SYMMETRIC": False, "SHARED": True}),
        ("log-sum-exp of itself", LSE | {"SYMMETRIC": True, "SHARED": True, "MASK": "off_diagonals"}),
        ("log-sum-exp, references of tiles", LSE | {"SYMMETRIC": False, "SHARED": False}),
        ("sum of softplus", SUM | {"SYMMETRIC": False, "SHARED": False}),
    ):
        yield Entry(
            arch, f"{where}: {label}", fused_rows, DTYPE[kind], constants | extra, warps, stages, kind != "ieee"
        )


def _gradient(arch: str, kind: str, reduce: str, tile: tuning.GradientTile) -> Iterator[Entry]:
    both = {"HAS_G": True, "HAS_H": True, "SLOPE": PAIRS["identity"][1], "ROW_SUMS": False, "VALUE": False}
    one = {"HAS_G": True, "HAS_H": False, "SLOPE": PAIRS["softplus"][1], "ROW_SUMS": True, "VALUE": True, "CLOSE": True}
    variants = [(tile, "sum of softplus, with its value", SUM | one)]
    if reduce == "logsumexp":
        apart = tuning.TWO_EXPONENTIALS.get((arch, tile), tile)
        variants = [
            (tile, "log-sum-exp, one exponential", LSE | both | {"CLOSE": True}),
            (apart, "log-sum-exp, two exponentials", LSE | both | {"CLOSE": False}),
            (tile, "log-sum-exp of itself, one exponential", LSE | both | {"CLOSE": True, "MASK": "off_diagonals"}),
        ]
    for served, label, extra in variants:
        constants, warps, stages = _split(served)
        constants |= EQUATION | {
            "EVEN": True, "PRECISION": "tf32" if kind == "tf32" else "ieee",
        }  # fmt: skip
        where = (
            f"fused_gradient {kind} {served.BM}x{served.BN} d {'=' if served.KEEP else 'in parts of'} {served.PART}, "
            f"{warps} warps, {stages} stages"
        )
        yield Entry(
            arch, f"{where}: {label}", fused_gradient, DTYPE[kind], constants | extra, warps, stages, kind != "ieee"
        )


def _strip(arch: str) -> Iterator[Entry]:
    weights = {"HAS_G": True, "HAS_H": True, "ROW_SUMS": True, "COL_SUMS": True}
    of_lse, of_sum = {"SLOPE": PAIRS["identity"][1], "VALUE": False}, {"SLOPE": PAIRS["softplus"][1], "VALUE": True}
    unlimited, limited = (dict.fromkeys(("HAS_LX", "HAS_LY", "HAS_GUIDE"), limits) for limits in (False, True))
    for kernel, block, label, extra in (
        (strip_reduce, tuning.STRIP_REDUCE, "log-sum-exp", LSE | {"COLUMNS": True}),
        (strip_weights, tuning.STRIP_WEIGHTS, "log-sum-exp", LSE | weights | of_lse),
        (strip_weights, tuning.STRIP_WEIGHTS, "softplus", SUM | weights | of_sum),
    ):
        for of_limits, said in ((unlimited, ""), (limited, ", limits of guides")):
            constants = {"BM": block[0], "BN": block[1]} | EQUATION | of_limits | extra
            name = f"{kernel.fn.__name__} {block[0]}x{block[1]}: {label}{said}"
            yield Entry(arch, name, kernel, torch.bfloat16, constants, tuning.STRIP_WARPS, 2, False)


def faults(entry: Entry, found: Report) -> str | None:
    """What keeps an entry out of the table."""
    if found.spills and (found.stack, found.stl, found.ldl) != BESIDE_THE_LOOP.get(entry.key):
        return f"spills: stack {found.stack}, STL {found.stl}, LDL {found.ldl}"
    if not found.blocks_per_sm:
        return f"{found.shared} bytes of shared memory do not fit"
    if entry.needs_matrix and not found.matrix:
        return "no matrix instruction"
    return None


def tried(entry: Entry) -> str:
    """Whether it builds here, and else why not."""
    try:
        return faults(entry, entry.compile()) or "builds"
    except Exception as error:  # a compiler's own, of any class
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def table(record: dict[str, Report]) -> str:
    """The record as people read it. Blocks: what registers, shared memory and warps let one multiprocessor hold."""
    lines = [
        "| architecture | kernel | registers | stack, STL, LDL | shared memory | blocks | matrix instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, r in record.items():
        arch, name = key.split(" ", 1)
        matrix = ", ".join(f"{count} {op}" for op, count in r.matrix.items()) or "none"
        spills = f"{r.stack}, {r.stl}, {r.ldl}"
        lines.append(f"| {arch} | {name} | {r.registers} | {spills} | {r.shared} | {r.blocks_per_sm} | {matrix} |")
    return "\n".join(lines)


def source_digest() -> str:
    """What the kernels' code is, comments and docstrings apart: a record of other code says nothing about this one."""
    digest = hashlib.sha256(repr((FUSED_OPTIONS, STRIP_OPTIONS)).encode())
    for name in ("equation", "intrinsics", "generated_pairs", "reductions", "strip_kernels", "fused_kernels"):
        before = tokenize.NEWLINE
        with tokenize.open(KERNELS / f"{name}.py") as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type in (tokenize.COMMENT, tokenize.NL):
                    continue
                docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
                if not docstring and token.string.strip():
                    digest.update(token.string.encode() + b"\0")
                before = token.type
    return digest.hexdigest()[:16]


def main(arguments: list[str]) -> None:
    if arguments == ["--print"]:
        print(table(load_record().entries))
        return
    if arguments[:1] == ["--try"]:
        few = "--few" in arguments
        architectures = [a for a in arguments[1:] if a != "--few"] or ARCHITECTURES
        found = {entry.key: entry for arch in architectures for entry in (one_of_each if few else entries)(arch)}
        for entry in found.values():
            print(entry.key, "|", tried(entry), flush=True)
        return
    missing = "--missing" in arguments
    digest = source_digest()
    for arch in [a for a in arguments if a != "--missing"] or ARCHITECTURES:
        record = load_record()
        known = record.entries if missing and record.sources.get(arch) == digest else {}
        made = {}
        for entry in entries(arch):
            if entry.key in made:
                continue
            found = known.get(entry.key) or entry.compile()
            print(entry.key, "|", faults(entry, found) or tuple(found), flush=True)
            made[entry.key] = found
        # Read again: another process may have written another architecture meanwhile.
        record = load_record()
        others = {key: found for key, found in record.entries.items() if not key.startswith(arch + " ")}
        order = {a: k for k, a in enumerate(ARCHITECTURES)}
        every = dict(sorted((others | made).items(), key=lambda item: order[item[0].split(" ")[0]]))
        save_record(Record(dict(sorted({**record.sources, arch: digest}.items())), every))


class Record(NamedTuple):
    """By architecture, the code that was compiled; and what the compiler made of each entry."""

    sources: dict[str, str]
    entries: dict[str, Report]


def load_record() -> Record:
    found = json.loads(RECORD.read_text())
    return Record(found["sources"], {key: Report(*values) for key, values in found["entries"].items()})


def save_record(record: Record) -> None:
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(found)}" for key, found in record.entries.items())
    RECORD.write_text(f'{{\n  "sources": {json.dumps(record.sources)},\n  "entries": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
