"""Which tile serves which architecture, dtype and d; and which form is predicted to be faster where.

Every entry compiles without local memory for its architecture and carries its matrix instruction; tests/triton/compiled.json
holds the registers, spills and shared memory that the compiler reported (`python -m tests.triton.entries --print`), and
tests/triton/test_compiled.py holds the table to them. Nothing here was timed: the order of entries follows counted
instructions and bytes, until a GPU says better.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton

from ..equation.problem import Problem
from .availability import interpreted


class RowsTile(NamedTuple):
    """fused_rows: BM x BN logits; d in one piece of BD that stays (KEEP), or in pieces of BD that are loaded for each tile."""

    BM: int
    BN: int
    BD: int
    KEEP: bool
    num_warps: int
    num_stages: int

    def width(self, d: int) -> int | None:
        """Columns that one product multiplies, padding included; None where d does not fit."""
        if self.KEEP:
            return self.BD if d <= self.BD else None
        return -(-d // self.BD) * self.BD


class GradientTile(NamedTuple):
    """fused_gradient: BM x BN weights, PART columns of W Y in registers; KEEP as above, and BD the pieces where not."""

    BM: int
    BN: int
    BD: int
    PART: int
    KEEP: bool
    num_warps: int
    num_stages: int

    def width(self, d: int) -> int | None:
        """Half of the columns that its two products multiply, padding and repeated products included."""
        if self.KEEP:
            return self.PART if d <= self.PART else None
        parts = -(-d // self.PART)
        # A quarter on top: without KEEP the tile of y is read twice.
        return parts * (-(-d // self.BD) * self.BD + self.PART) * 5 // 8


def _kept(BM: int, BN: int, d: int, num_warps: int = 8, num_stages: int = 2) -> GradientTile:
    return GradientTile(BM, BN, d, d, True, num_warps, num_stages)


def _parts(BM: int, BN: int, BD: int, PART: int, num_warps: int = 8, num_stages: int = 2) -> GradientTile:
    return GradientTile(BM, BN, BD, PART, False, num_warps, num_stages)


_KINDS = ("half", "tf32", "ieee")
# architecture -> dtype (half: float16 and bfloat16; float32: tf32 or ieee) -> tiles, the narrowest width wins.
ROWS: dict[str, dict[str, tuple[RowsTile, ...]]] = {
    "sm_80": {
        "half": (
            RowsTile(128, 128, 64, True, 8, 2), RowsTile(128, 128, 128, True, 8, 2), RowsTile(128, 128, 256, True, 8, 2),
            RowsTile(128, 128, 64, False, 8, 3),
        ),
        "tf32": (RowsTile(128, 128, 32, False, 8, 3),),
        "ieee": (RowsTile(64, 32, 32, False, 4, 2),),
    },
    "sm_90": {
        "half": (
            RowsTile(128, 64, 64, True, 4, 2), RowsTile(128, 64, 128, True, 4, 2), RowsTile(128, 64, 256, True, 8, 2),
            RowsTile(128, 64, 512, True, 8, 1), RowsTile(256, 64, 64, False, 8, 3),
        ),
        "tf32": (RowsTile(128, 64, 32, False, 8, 3),),
        "ieee": (RowsTile(64, 32, 32, False, 4, 2),),
    },
    "sm_100": {
        "half": (
            RowsTile(128, 64, 64, True, 8, 1), RowsTile(128, 64, 128, True, 8, 1), RowsTile(128, 64, 256, True, 8, 1),
            RowsTile(64, 32, 512, True, 4, 1), RowsTile(128, 64, 64, False, 8, 3),
        ),
        "tf32": (RowsTile(128, 64, 32, False, 8, 3),),
        "ieee": (RowsTile(64, 32, 32, False, 4, 2),),
    },
    "sm_120": {
        "half": (RowsTile(128, 128, 64, True, 8, 2), RowsTile(128, 128, 128, True, 8, 2), RowsTile(128, 128, 64, False, 8, 2)),
        "tf32": (RowsTile(128, 64, 32, False, 8, 2),),
        "ieee": (RowsTile(32, 32, 32, False, 4, 1),),
    },
    "gfx942": {
        "half": (
            RowsTile(128, 128, 64, True, 8, 2), RowsTile(128, 128, 128, True, 8, 1), RowsTile(64, 64, 256, True, 4, 1),
            RowsTile(128, 128, 64, False, 8, 2),
        ),
        "tf32": (RowsTile(128, 64, 32, False, 8, 2),),
        "ieee": (RowsTile(64, 32, 32, False, 4, 2),),
    },
    "interpreter": dict.fromkeys(_KINDS, (RowsTile(32, 16, 32, True, 4, 1), RowsTile(32, 16, 32, False, 4, 1))),
}  # fmt: skip
# The same, by dtype, and by reduction where a sum, which forms value and slope, needs more registers than a log-sum-exp.
_GRADIENT: dict[str, dict[str, tuple[GradientTile, ...]]] = {
    "sm_80": {
        "half logsumexp": (
            _kept(128, 128, 64), _kept(128, 128, 128), _kept(128, 64, 256, 8, 3), _kept(64, 64, 512), _parts(64, 64, 64, 256),
        ),
        "half sum": (_kept(128, 64, 64), _kept(128, 64, 128), _kept(64, 64, 256), _kept(64, 64, 512), _parts(64, 64, 64, 256)),
        "tf32": (_kept(128, 64, 64), _kept(64, 64, 128), _parts(64, 32, 64, 256)),
        "ieee": (_parts(32, 32, 32, 64, 4, 2),),
    },
    "sm_90": {
        "half logsumexp": (
            _kept(128, 128, 64), _kept(128, 128, 128), _kept(128, 64, 256), _kept(64, 32, 512), _parts(64, 64, 64, 256),
        ),
        "half sum": (_kept(128, 64, 64), _kept(128, 64, 128), _kept(64, 64, 256), _parts(64, 64, 64, 256)),
        "tf32": (_kept(128, 64, 64), _kept(128, 64, 128), _parts(64, 64, 64, 256)),
        "ieee": (_parts(32, 32, 32, 32, 4, 1),),
    },
    "sm_100": {
        "half logsumexp": (
            _kept(128, 64, 64), _kept(128, 64, 128), _kept(64, 64, 256), _kept(64, 32, 512), _parts(128, 64, 64, 256),
        ),
        "half sum": (_kept(128, 64, 64), _kept(128, 64, 128), _kept(128, 64, 256, 8, 1), _parts(128, 64, 64, 256)),
        "tf32 logsumexp": (_kept(128, 64, 64), _kept(64, 64, 128, 8, 1), _parts(64, 64, 64, 256)),
        "tf32 sum": (_kept(128, 64, 64), _kept(64, 64, 128), _parts(64, 64, 64, 256)),
        "ieee": (_parts(32, 32, 32, 32, 4, 1),),
    },
    "sm_120": {
        "half logsumexp": (_kept(128, 64, 64), _kept(128, 64, 128), _kept(64, 64, 256), _parts(64, 32, 64, 256)),
        "half sum": (_kept(128, 64, 64), _kept(128, 64, 128), _kept(64, 64, 256), _parts(64, 32, 64, 128)),
        "tf32": (_kept(128, 64, 64), _kept(64, 32, 128), _parts(64, 32, 64, 128)),
        "ieee": (_parts(32, 32, 32, 32, 4, 1),),
    },
    "gfx942": {
        "half": (_kept(128, 64, 64), _kept(128, 64, 128, 8, 1), _kept(64, 32, 256, 8, 1), _parts(64, 64, 64, 256)),
        "tf32 logsumexp": (_kept(64, 64, 64, 4, 2), _kept(64, 64, 128, 4, 1), _parts(64, 64, 64, 128)),
        "tf32 sum": (_kept(128, 64, 64), _kept(64, 64, 128, 4, 1), _parts(64, 64, 64, 128)),
        "ieee": (_parts(64, 64, 64, 128, 4, 2),),
    },
    "interpreter": dict.fromkeys(_KINDS, (GradientTile(32, 16, 32, 32, True, 4, 1), GradientTile(32, 16, 32, 64, False, 4, 1))),
}  # fmt: skip
GRADIENT = {
    arch: {
        f"{kind} {reduce}": tiles.get(f"{kind} {reduce}") or tiles[kind]
        for kind in _KINDS
        for reduce in ("logsumexp", "sum")
    }
    for arch, tiles in _GRADIENT.items()
}

# What stands in for a tile where a log-sum-exp's weights take two exponentials: those need a few registers more.
TWO_EXPONENTIALS = {("sm_80", GradientTile(64, 64, 512, 512, True, 8, 2)): GradientTile(64, 32, 512, 512, True, 8, 2)}

# Blocks of the strip form's kernels: of those counted, the one that issues the fewest instructions a logit, and the one whose
# registers leave three blocks on a multiprocessor.
STRIP_REDUCE = (32, 256)
STRIP_WEIGHTS = (64, 32)
STRIP_WARPS = 4

# The largest d at which the fused form is predicted to be faster than the strip form (bounds from counted instructions and
# bytes at n = m = 65,536: at d = 512 the strip form leads by little). Predicted until measured. HIP has no 16-bit product
# with a float32 result, so that the strip form would widen its operands there.
FUSED_UP_TO = {
    "sm_80": {"half": 256, "tf32": 128, "ieee": 0},
    "sm_90": {"half": 256, "tf32": 128, "ieee": 0},
    "sm_100": {"half": 256, "tf32": 128, "ieee": 0},
    "sm_120": {"half": 256, "tf32": 64, "ieee": 0},
    "gfx942": {"half": 1 << 30, "tf32": 0, "ieee": 0},
    "interpreter": {"half": 32, "tf32": 32, "ieee": 32},
}

FENCED = "3.7.1"  # the first Triton whose fused kernels are free of a race wherever they are compiled for


def architecture(device: torch.device) -> str:
    """The row of the tables that serves a device (or the GPU that an emulator stands for)."""
    if interpreted():
        return "interpreter"
    from triton.runtime import driver

    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return table_of(f"sm_{target.arch}")


def table_of(name: str) -> str:
    """The row of the tables that serves an architecture by the compiler's name."""
    if not name.startswith("sm_"):
        return name
    capability = int(name.removeprefix("sm_"))
    if capability < 90:
        # 8.6 and 8.9 have the shared memory of 12.0, not that of an A100.
        return "sm_80" if capability in (80, 87) else "sm_120"
    return "sm_90" if capability < 100 else "sm_100" if capability < 120 else "sm_120"


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The tables' name of a dtype: half, or the precision in which float32 is multiplied."""
    return precision if dtype == torch.float32 else "half"


def rows_tiles(arch: str, kind: str, d: int) -> list[RowsTile]:
    """The tiles of fused_rows that take rows of d, best first: fewest columns multiplied, then those that keep x."""
    fitting = [(width, not tile.KEEP, tile) for tile in ROWS[arch][kind] if (width := tile.width(d)) is not None]
    return [tile for *_, tile in sorted(fitting)]


def gradient_tiles(arch: str, kind: str, reduce: str, d: int) -> list[GradientTile]:
    """The same for fused_gradient."""
    tiles = GRADIENT[arch][f"{kind} {reduce}"]
    fitting = [(width, not tile.KEEP, tile) for tile in tiles if (width := tile.width(d)) is not None]
    return [tile for *_, tile in sorted(fitting)]


def programs(device: torch.device) -> int:
    """Programs of fused_rows, each with column results of its own: one for each multiprocessor."""
    if device.type == "cpu":
        return 3  # enough to share row blocks unevenly where the kernels are tested
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def least_period(device: torch.device) -> int:
    """The shortest period of a mask of which one diagonal at most crosses any tile, whatever its kernel."""
    arch = architecture(device)
    tiles = chain(*ROWS[arch].values(), *GRADIENT[arch].values())
    blocks = (epilogue(block) for block in (STRIP_REDUCE, STRIP_WEIGHTS))
    return max(*(tile.BM + tile.BN for tile in tiles), *(block["BM"] + block["BN"] for block in blocks))


def epilogue(block: tuple[int, int]) -> dict[str, Any]:
    """The block of a kernel of the strip form."""
    rows, cols = (32, 32) if interpreted() else block
    return {"BM": rows, "BN": cols, "num_warps": STRIP_WARPS}


def predicted_form(p: Problem, precision: str) -> str:
    """strip or fused, whichever is predicted to be faster; strip where the compiler makes a race of the fused form."""
    arch, kind = architecture(p.x.device), kind_of(p.x.dtype, precision)
    if unfenced(arch, kind):
        return "strip"
    return "fused" if p.x.shape[1] <= FUSED_UP_TO[arch][kind] else "strip"


def unfenced(arch: str, kind: str) -> bool:
    """Whether this Triton leaves unordered what asynchronous copies write and matrix instructions read through another proxy.

    The fused kernels for sm_90 hold one fence.proxy.async under 3.6.0 and 3.7.0, before the loop alone, and the tiles that
    cp.async brings within it are read without one (tools/ptxemu: SharedRace); under FENCED they hold two. For sm_100 it is
    3 of 5. Older architectures multiply registers, and so does float32 without tf32.
    """
    return arch in ("sm_90", "sm_100") and kind != "ieee" and numbers(triton.__version__) < numbers(FENCED)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
