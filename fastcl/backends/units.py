"""Powers of two by which rows are multiplied where products of them leave their dtype and the scale brings them back.

    a u(x, y) = a / (s t) u(s x, t y)        dX = a W Y = a / t W (t Y)

The bounds are those of csrc/cpu/range.h, which derives them, and so are the rules.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..equation.problem import Problem

Units: TypeAlias = tuple[float | Tensor, float | Tensor]

SMALL = 2.0**-20  # with larger scales z is beyond 1e32 before u leaves float32
# With scales between these no length is asked for where u stays within its dtype (sides.py). What weights times rows lose below
# float32's smallest number is, times the larger, below that number still; a product that is beyond the largest is, times the
# smaller, within 16 of it.
USUAL = 2.0**-4, 2.0**10


class Range(NamedTuple):
    """Of a dtype, to base 2."""

    largest_u: int
    longest: int
    shortened: int
    shortest: int
    least_scale: int
    largest_z: int
    steep: int  # a slope, beyond which rows are scaled down the further: the weights' sum has the rest of the range


RANGES = {
    torch.float32: Range(120, longest=80, shortened=58, shortest=-60, least_scale=-120, largest_z=126, steep=40),
    torch.float64: Range(1000, longest=600, shortened=490, shortest=-500, least_scale=-1000, largest_z=1020, steep=400),
}


def of_rows(p: Problem, x: Tensor, y: Tensor, usual: bool = True) -> Units | None:
    """Those of x and of y, whose values may be looked at; alike for sqdist and for x with itself. None where both are 1.

    usual: whether a usual scale says so without a look at them.
    """
    scale = abs(float(p.scale))
    if not 0.0 <= scale < math.inf or (usual and USUAL[0] <= scale <= USUAL[1]):
        return None
    scale = scale or 2.0 ** RANGES[p.dtype].least_scale  # 0 times a u beyond the dtype is NaN; any power of two leaves it 0
    alike, length = x is y or p.operand == "sqdist", _length(x)
    lengths = length, length if x is y else _length(y)
    of = RANGES[p.dtype]
    u = 2.0 * (max(lengths) + 1.0) if p.operand == "sqdist" else sum(lengths)
    steep = max(0, _slope(p, math.log2(scale) + u) - of.steep)
    of_x, of_y = _powers(of, math.log2(scale), *lengths, u, alike, steep)
    return (2.0**of_x, 2.0**of_y) if of_x or of_y else None


def without(value: Tensor, units: Units) -> Tensor:
    """value / (s t), where either alone may take it out of its dtype."""
    s, t = units
    if isinstance(s, Tensor) or isinstance(t, Tensor):
        return value / s / t
    power = math.frexp(s)[1] + math.frexp(t)[1] - 2
    return value * 2.0 ** -(power // 2) * 2.0 ** -(power - power // 2)


def of_scale(scale: Tensor) -> Units:
    """Where they may not: powers of two near the square root of a small scale, by which rows lose no digit; at least 2^-32, and 1
    for other scales."""
    size = scale.abs()
    exponent = torch.round(0.5 * torch.log2(size)).clamp(min=-32.0)
    unit = torch.exp2(torch.where((size > 0) & (size < SMALL), exponent, 0.0))
    return unit, unit


def largest(rows: Tensor) -> float:
    """The largest size of an element; on a CPU these two take less than the infinity norm."""
    if not rows.numel():
        return 0.0
    least, most = rows.aminmax()
    return max(float(most), -float(least))


def _length(rows: Tensor) -> float:
    """What its largest finite element allows a row, to base 2; of zeros -inf."""
    size = largest(rows)
    if not math.isfinite(size):
        size = largest(torch.where(rows.isfinite(), rows, 0.0))
    return math.log2(size) + 0.5 * math.log2(rows.shape[1]) if size > 0.0 else -math.inf


def _slope(p: Problem, z: float) -> int:
    """What weights may be where |z| is as large as that, to base 2: 2 z of the square."""
    if p.reduce == "logsumexp" or not 0.0 < z < 1000.0:
        return 0
    most = torch.finfo(p.dtype).max
    slopes = p.pair.df(torch.tensor([-(2.0**z), 2.0**z], dtype=torch.float64)).abs().nan_to_num(0.0, most)
    return math.frexp(float(slopes.amax().clamp(max=most)))[1]


def _powers(of: Range, scale: float, x: float, y: float, u: float, alike: bool, steep: int) -> tuple[int, int]:
    """The exponents for rows of these lengths, whose largest product is u; steep: by how much more long ones are scaled down."""
    up = down = (0, 0)
    if u > of.largest_u or max(x, y) > of.longest:
        down = _shortening(of, math.floor(of.largest_z - scale), u, x, y, alike, steep)
    # The mirror image: no further than u allows, nor than leaves the scale its digits. Under a large scale products of rows far
    # shorter than the longest have digits too where these are 1.
    shortest = 0 if scale > 0.0 else of.shortest
    x, y, scale = x - down[0], y - down[1], scale + sum(down)
    if min(x, y) < shortest:
        room = min(of.largest_u, math.floor((scale - of.least_scale) / 2))

        def power(length: float, other: float) -> int:
            if not -math.inf < length < shortest:
                return 0
            return max(0, min(room, math.floor(min(0.0, of.largest_u - other) - length)))

        up = (power(max(x, y), 0.0),) * 2 if alike else (power(x, y), power(y, x))
    return up[0] - down[0], up[1] - down[1]


def _shortening(of: Range, room: int, u: float, x: float, y: float, alike: bool, steep: int) -> tuple[int, int]:
    """By how much rows are scaled down, so that neither u nor their products with weights overflow, as far as the scale, which
    takes it back, has room: beyond, z overflows."""
    by = [max(0, math.ceil(length - of.shortened)) if length > -math.inf else 0 for length in (x, y)]
    by = [max(by)] * 2 if alike else by
    if sum(by) > room:  # u alone
        power = max(0, min(math.ceil(u - of.largest_u) if u > -math.inf else 0, room))
        by = [-(-power // 2), -(-power // 2) if alike else power // 2]
    further = max(0, min(steep, (room - sum(by)) // 2, of.largest_u - max(by)))  # a power that the dtype holds
    return by[0] + further, by[1] + further
