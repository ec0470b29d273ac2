"""Gradients of sums that are beyond their dtype: infinite with their sign, where infinity less infinity would be NaN.

They are formed once more in float64, which holds e^z to z = 709; beyond, the weights that count are equals. Asked where no device
is waited for, and of results that are infinite: of others it costs one look at r.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted
from .blocked import Blocks
from .sides import is_known, may_hold_nan
from .tiles import Tile, Weighting

EQUAL = 2.0**800  # the weight of those that are beyond: times rows of float32 their sums are numbers
HUGE = 2.0**500  # what has such a weight in it


class _Wide(Blocks):
    """The tiles in float64, with weights of at most EQUAL."""

    def sum_weights(self, tile: Tile, by: Weighting | None) -> Tensor:
        return super().sum_weights(tile, by).clamp_(-EQUAL, EQUAL)


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, found: Gradients
) -> Gradients:
    """What was found, or what it is in place of NaN."""
    if not (is_infinite(p, r) or (c is not None and is_infinite(p, c))) or not _holds_nan(found):
        return found
    r, c, g, h = (None if t is None else t.double() for t in (r, c, g, h))  # type: ignore[assignment]
    return _as(found, _Wide(_widened(p)).gradients(r, c, g, h, wanted))


def of_total(p: Problem, value: Tensor, outer: str, wanted: Wanted, found: Gradients) -> Gradients:
    """Likewise, of the total form."""
    if not is_infinite(p, value) or not _holds_nan(found):
        return found
    return _as(found, _Wide(_widened(p)).total(None, outer, wanted)[1])


def is_infinite(p: Problem, values: Tensor) -> bool:
    """Whether results of sums are beyond their dtype, where they may be looked at."""
    return p.reduce == "sum" and is_known(values) and bool(values.isinf().any())


def _holds_nan(found: Gradients) -> bool:
    return any(t is not None and may_hold_nan(t) for t in found)


def _widened(p: Problem) -> Problem:
    def wide(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    given = {name: wide(value) for name, value in vars(p).items() if name != "mask"}
    return replace(p, mask=type(p.mask)(*map(wide, p.mask)), **given)


def _as(found: Gradients, wide: Gradients) -> Gradients:
    """Those formed in float64 in the dtypes of the others."""
    ended = (None if w is None else torch.where(w.abs() < HUGE, w, w * math.inf) for w in wide)
    return Gradients(*(t if t is None or w is None else w.to(t.dtype) for t, w in zip(found, ended, strict=True)))
