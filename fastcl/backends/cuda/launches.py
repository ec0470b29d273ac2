"""The launches of csrc/cuda, and what those of every form take: the equation, sides, weights, and the facts of a device.

`ops` has one op for each launch (csrc/cuda/launches.cpp has their schemas): a kernel on the current stream, whose results go to
memory that is given.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...equation.masks import Mask
from ...equation.problem import Problem
from ..extension import CUDA, REBUILD
from ..sides import Sides
from ..tiles import Weighting

ops: Any = torch.ops.fastcl
FARTHEST = 2**62  # of a diagonal: n and m are far below
# How many arguments each op takes; those of a whole loss are among what a library was built for (problem.SIGNATURES).
ARGUMENTS = {
    "strip_reduce": 21, "strip_weights": 28, "strip_reduce_limited": 24, "strip_weights_limited": 31, "merge_parts": 4,
    "fused_pack": 2, "fused_rows": 25, "fused_merge": 7, "fused_factors": 11, "fused_gradient": 24,
}  # fmt: skip
ARGUMENTS_OF_HOPPER = {
    "hopper_rows": 35, "hopper_weights": 35, "hopper_sweep": 35, "hopper_product": 6, "hopper_merge": 10, "hopper_careful": 26,
    "hopper_replace": 14,
}  # fmt: skip


class Facts(NamedTuple):
    """What a form asks of a device; shared_bytes: the shared memory that one block may ask for."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int


@cache
def stale() -> str | None:
    """Why the library that was opened cannot be called from here, with what mends it; None where it is of this version."""
    hopper = ARGUMENTS_OF_HOPPER if hasattr(ops, "hopper_rows") else {}
    for name, count in (ARGUMENTS | hopper).items():
        op = getattr(ops, name, None)
        found = "there is none in it" if op is None else f"it takes {len(op.default._schema.arguments)}"
        if found != f"it takes {count}":
            expected = f"expected {name} with {count} arguments, and {found}"
            return f"{CUDA} was built of another version: {expected}; rebuild it: {REBUILD}"
    return None


@cache
def facts_of(device: torch.device) -> Facts:
    found = torch.cuda.get_device_properties(device)
    shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Facts((found.major, found.minor), found.multi_processor_count, shared)


def equation(s: Sides, swapped: bool = False, mask: Mask | None = None) -> tuple[Any, ...]:
    """What z is, as the ops take it; swapped: with the roles of x and y exchanged; mask: that of the problem unless told."""
    p, mask = s.p, mask or s.p.mask
    diff = max(-FARTHEST, min(FARTHEST, mask.row_offset - mask.col_offset))
    constants = (*p.pair.constants, 0.0, 0.0)[:2]
    return (
        p.scale, p.shift, *s.vectors(swapped, mask), -diff if swapped else diff, mask.period, mask.kind, p.operand, p.pair.name,
        *constants, p.reduce,
    )  # fmt: skip


def prepared(by: Weighting) -> Weighting:
    """The weighting of a log-sum-exp with (rho, close) as its reference, where r and c meet, without reading a value on the host.

    Where close is not 0, every r and c lies within 28 of rho, and one exponential serves both terms.
    """
    if by.g is None or by.h is None or by.r is None or by.c is None:
        return by
    both = torch.cat((by.r, by.c))
    finite = both.isfinite()
    high = torch.where(finite, both, float("-inf")).amax()
    low = torch.where(finite, both, float("inf")).amin()
    close = (high - low < 56.0).to(both.dtype)
    return by._replace(reference=torch.stack((0.5 * (high + low), close)).nan_to_num(0.0))


def factors(p: Problem, n: int, m: int, by: Weighting) -> tuple[Tensor, Tensor, Tensor]:
    """What the weights of n rows against m multiply, and whether one exponential serves both terms."""
    x, y = (p.scale.new_empty((-(-size // 128) * 128, 2)) for size in (n, m))
    single = p.scale.new_ones(1, dtype=torch.int32)
    ops.fused_factors(n, m, p.reduce == "logsumexp", *by, x, y, single)
    return x, y, single
