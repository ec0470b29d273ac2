"""What every launch shares: absent pointers, and the vectors and constants of the equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.sides import Sides
from ..backends.tiles import Weighting
from ..equation.pairs import PairFunction
from ..equation.problem import Problem
from . import own_pairs
from .generated_pairs import PAIRS

# Multiply and add as one instruction in the fused kernels, which issue slots can bind; said aloud since Triton 3.10 changes
# its default.
FUSED_OPTIONS = {"enable_fp_fusion": True}
# Not in the strip's kernels, which bytes bind. A block there may hold one element of a row in each lane, and e g + shuffled
# (e g), fused, is another number in each of two lanes that then store it to one address: seen under tools/ptxemu. The fused
# kernels' lanes hold two or more elements of each row and column, and add those first.
STRIP_OPTIONS = {"enable_fp_fusion": False}


def present(t: Tensor | None, absent: Tensor) -> Tensor:
    """t, or a pointer that no kernel reads."""
    return absent if t is None else t


def vectors(s: Sides, swapped: bool = False) -> dict[str, Any]:
    """The arguments that say what z is, by the kernels' parameter names; swapped: with the roles of x and y exchanged."""
    p, given = s.p, dict(zip(("NX", "NY", "BX", "BY", "GX", "GY"), s.vectors(swapped), strict=True))
    constants = (*p.pair.constants, 0.0, 0.0)[:2]
    return {
        **{name: present(t, p.scale) for name, t in given.items()},
        "A": p.scale,
        "B": p.shift,
        "k0": constants[0],
        "k1": constants[1],
        "period": p.mask.period,
        "SQDIST": p.operand == "sqdist",
        "HAS_BX": given["BX"] is not None,
        "HAS_BY": given["BY"] is not None,
        "MASK": "off_diagonals" if p.mask.period else p.mask.kind,
        "LSE": p.reduce == "logsumexp",
    }


def limits(p: Problem) -> dict[str, Any]:
    """Limits, which the strip's kernels alone take: the fused ones would pay for them in registers, and form no second product."""
    given = {name: None if t is None else t.contiguous() for name, t in zip(("X", "Y"), p.limits, strict=True)}
    return {
        **{f"L{name}": present(t, p.scale) for name, t in given.items()},
        **{f"HAS_L{name}": t is not None for name, t in given.items()},
        "HAS_GUIDE": p.mask.guided,
    }


def pair_value(s: Sides) -> Any:
    return _functions(s.p.pair)[0]


def pair_slope(s: Sides) -> Any:
    return _functions(s.p.pair)[1]


def _functions(pair: PairFunction) -> tuple[Any, Any]:
    return PAIRS[pair.name] if pair.built_in else own_pairs.functions(pair)


def difference(p: Problem) -> int:
    """row_offset - col_offset, clamped to what can meet: n and m are below 2^31."""
    bound = 2**31 - 1
    return max(-bound, min(bound, p.mask.row_offset - p.mask.col_offset))


def weight_arguments(by: Weighting, absent: Tensor) -> dict[str, object]:
    """The arguments that say what turns z into weights."""
    pointers = {"G": by.g, "H": by.h, "R": by.r, "C": by.c, "REFERENCE": by.reference}
    flags = {"HAS_G": by.g is not None, "HAS_H": by.h is not None}
    return {**{name: present(t, absent) for name, t in pointers.items()}, **flags}


def prepared(by: Weighting) -> Weighting:
    """The weighting as reductions.softmax_weights reads it where r and c meet, without reading a value on the host.

    (rho, close) as reference. close: g_i e^(rho - r_i) and h_j e^(rho - c_j) take the places of g and h; 0 where nothing was
    reduced.
    """
    if by.g is None or by.h is None or by.r is None or by.c is None:
        return by
    both = torch.cat((by.r, by.c))
    finite = torch.isfinite(both)
    high = torch.where(finite, both, float("-inf")).amax()
    low = torch.where(finite, both, float("inf")).amin()
    rho = (0.5 * (high + low)).nan_to_num(0.0)
    close = (high - low < 56.0) & torch.isfinite(high - low)
    factors = torch.where(torch.isneginf(both), 0.0, torch.exp(rho - both))
    upstream = torch.cat((by.g, by.h))
    g, h = torch.where(close, upstream * factors, upstream).split((len(by.r), len(by.c)))
    return Weighting(g, h, by.r, by.c, torch.stack((rho, close.to(rho.dtype))))
