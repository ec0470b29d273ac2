"""Gradients of sums that are beyond their dtype: infinite with their sign, where infinity less infinity would be NaN.

They are formed once more in float64, which holds e^z to z = 709; beyond, the weights that count are equals. Asked where no device
is waited for, and of results that are large: of others it costs one look at r.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted
from .blocked import Blocks
from .sides import is_known
from .tiles import Tile, Weighting

EQUAL = 2.0**800  # the weight of those that are beyond: times rows of float32 their sums are numbers
HUGE = 2.0**500  # what has such a weight in it
LARGE = {torch.float32: 2.0**60, torch.float64: 2.0**500}  # weights, of which products with rows of 2^68 are within float32


class _Wide(Blocks):
    """The tiles in float64, with weights of at most EQUAL."""

    def sum_weights(self, tile: Tile, by: Weighting | None) -> Tensor:
        return super().sum_weights(tile, by).clamp_(-EQUAL, EQUAL)


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, found: Gradients
) -> Gradients:
    """What was found, or what it is in place of infinities and NaN."""
    if not _is_beyond(p, found, r, c):
        return found
    r, c, g, h = (None if t is None else t.double() for t in (r, c, g, h))  # type: ignore[assignment]
    return _as(found, _Wide(_widened(p)).gradients(r, c, g, h, wanted))


def of_total(p: Problem, value: Tensor, outer: str, wanted: Wanted, found: Gradients) -> Gradients:
    """Likewise, of the total form."""
    return _as(found, _Wide(_widened(p)).total(None, outer, wanted)[1]) if _is_beyond(p, found, value) else found


def may_be_beyond(reduce: str, scale: Tensor | None, *results: Tensor | None) -> bool:
    """Whether results of a sum are so large that gradients may not be numbers, or that of its scale is none.

    Asked of values that are here, in few operations: a loss of a few rows takes as long as ten of them.
    """
    if reduce != "sum":
        return False
    if scale is not None and scale.numel() and not math.isfinite(scale.item()):
        return True
    sizes = ((t if t.dim() == 0 else t.norm(math.inf), t.dtype) for t in results if t is not None and t.numel())
    return any(abs(size.item()) > LARGE[dtype] for size, dtype in sizes)


def _is_beyond(p: Problem, found: Gradients, *results: Tensor | None) -> bool:
    """Whether there are gradients of infinite results, or of the scale, that are no numbers."""
    if not all(t is None or is_known(t) for t in (*found, *results)):
        return False
    beyond = may_be_beyond(p.reduce, found.scale, *results)
    return beyond and any(t is not None and not bool(t.sum().isfinite()) for t in found)


def _widened(p: Problem) -> Problem:
    def wide(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    given = {name: wide(value) for name, value in vars(p).items() if name != "mask"}
    return replace(p, mask=type(p.mask)(*map(wide, p.mask)), **given)


def _as(found: Gradients, wide: Gradients) -> Gradients:
    """Those formed in float64 in the dtypes of the others."""
    ended = (None if w is None else torch.where(w.abs() < HUGE, w, w * math.inf) for w in wide)
    return Gradients(*(t if t is None or w is None else w.to(t.dtype) for t, w in zip(found, ended, strict=True)))
