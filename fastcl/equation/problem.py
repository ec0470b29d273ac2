"""The one equation, as data: every backend receives a Problem and answers with r, c and gradients.

z_ij = a * u(x_i, y_j) + b + bx_i + by_j
r_i  = REDUCE_{j in M(i)} f(z_ij)          c_j = REDUCE_{i : j in M(i)} f(z_ij)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args, overload

import torch
from torch import Tensor

from .masks import Mask, by_groups
from .names import Operand, Outer, PairReduction
from .pairs import PairFunction

OPERANDS, REDUCTIONS, OUTERS = map(get_args, (Operand, PairReduction, Outer))


PROBLEM = (
    "Tensor x, Tensor? y, Tensor scale, Tensor shift, Tensor? bias_x, Tensor? bias_y, Tensor? group_x, Tensor? group_y, "
    "Tensor? limit_x, Tensor? limit_y, Tensor? guide_x, Tensor? guide_y, "
    "SymInt row_offset, SymInt col_offset, SymInt period, "
    "str mask, str operand, str pair, float[] constants, str reduce, bool columns"
)
# Of the CPU's ops for a whole loss (csrc/cpu/aligned.cpp).
ALIGNED = (
    "Tensor x, Tensor y, Tensor scale, Tensor shift, bool normalize, str sides, str operand, str reduce, str outer, bool columns, "
    "str pair, float[] pair_numbers, str positive, float[] positive_numbers, float linear, float constant, bool[] wanted"
)
# And of a GPU's (csrc/cuda/aligned.cpp): numbers as tensors or as they are, and what is asked of a device.
CUDA_ALIGNED = (
    "Tensor x, Tensor y, Tensor? scale, Tensor? shift, float scale_number, float shift_number, "
    "bool normalize, str sides, str operand, str reduce, str outer, bool columns, "
    "str pair, float[] pair_numbers, str positive, float[] positive_numbers, float linear, float constant, bool[] wanted, "
    "int multiprocessors, int shared_bytes"
)
SIGNATURES = f"{PROBLEM}; {ALIGNED}; {CUDA_ALIGNED}"  # what a library was built for
LENGTH = 21  # of PROBLEM
TENSORS = 12  # lead it
PAIR = 17  # the place of the pair function's key
REDUCE = 19  # and of the reduction's name
DIFFERENTIABLE = 6  # x, y, scale, shift, bias_x, bias_y lead it, in the order of Wanted and Gradients


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of r, c, totals and everything scalar: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """One pairwise reduction, checked: x (n, d), y (m, d) or None for x itself, and what to do with each pair."""

    x: Tensor
    y: Tensor | None
    scale: Tensor
    shift: Tensor
    bias_x: Tensor | None
    bias_y: Tensor | None
    mask: Mask
    operand: str
    pair: PairFunction
    reduce: str
    columns: bool

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def m(self) -> int:
        return self.x.shape[0] if self.y is None else self.y.shape[0]

    @property
    def limits(self) -> tuple[Tensor | None, Tensor | None]:
        """Of rows and of columns; of x with itself they are one. NaN too where a guide has a NaN."""
        m = self.mask
        of_rows = _marked(m.limit_x, m.guide_x)
        return of_rows, of_rows if self.y is None else _marked(m.limit_y, m.guide_y)

    @property
    def guides(self) -> tuple[Tensor, Tensor] | None:
        """Rows and columns of the product that limits are on, NaN where a limit is; None where they are on z itself."""
        m = self.mask
        if m.guide_x is None:
            return None
        of_rows = _marked(m.guide_x, m.limit_x)
        if self.y is None:
            return of_rows, of_rows
        assert m.guide_y is not None
        return of_rows, _marked(m.guide_y, m.limit_y)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.x.dtype)

    @property
    def marks_nan(self) -> bool:
        """Whether the weight of a logit of NaN is NaN: not where a slope is a number everywhere, as that of z is 1."""
        return self.reduce == "logsumexp" or bool(self.pair.df(torch.full((), math.nan, device="cpu")).isnan())

    def told_by_groups(self) -> Problem:
        """The same problem; of a mask with a period groups say which pairs it leaves out."""
        if not self.mask.period:
            return self
        return replace(self, mask=by_groups(self.mask, self.n, None if self.y is None else self.m, self.x.device))


@overload
def _marked(values: Tensor, by: Tensor | None) -> Tensor: ...
@overload
def _marked(values: Tensor | None, by: Tensor | None) -> Tensor | None: ...
def _marked(values: Tensor | None, by: Tensor | None) -> Tensor | None:
    """Limits with NaN where a guide has one, or guides where a limit is NaN: of what such a row has a say in nothing is known."""
    if by is None:
        return values
    bad = by.isnan() if by.dim() == 1 else by.isnan().any(1)
    if values is None:
        return torch.where(bad, math.nan, by.new_full((by.shape[0],), math.inf))
    return torch.where(bad if values.dim() == 1 else bad[:, None], math.nan, values)


def pack(p: Problem) -> tuple[Any, ...]:
    """The problem as the flat arguments of PROBLEM."""
    m = p.mask
    return (
        p.x, p.y, p.scale, p.shift, p.bias_x, p.bias_y, m.group_x, m.group_y, m.limit_x, m.limit_y, m.guide_x, m.guide_y,
        m.row_offset, m.col_offset, m.period, m.kind, p.operand, p.pair.key, list(p.pair.constants), p.reduce, p.columns,
    )  # fmt: skip


def unpack(arguments: tuple[Any, ...]) -> Problem:
    """The problem from the flat arguments of PROBLEM."""
    (x, y, scale, shift, bias_x, bias_y, group_x, group_y, limit_x, limit_y, guide_x, guide_y, row_offset, col_offset, period, mask,
     operand, pair, constants, reduce, columns) = arguments[:LENGTH]  # fmt: skip
    f = PairFunction.by_key[pair].of(constants)
    kept = Mask(mask, row_offset, col_offset, group_x, group_y, period, limit_x, limit_y, guide_x, guide_y)
    return Problem(x, y, scale, shift, bias_x, bias_y, kept, operand, f, reduce, columns)


class Wanted(NamedTuple):
    """Which gradients to compute."""

    x: bool
    y: bool
    scale: bool
    shift: bool
    bias_x: bool
    bias_y: bool


class Gradients(NamedTuple):
    """The gradients that were wanted; None for the others."""

    x: Tensor | None = None
    y: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    bias_x: Tensor | None = None
    bias_y: Tensor | None = None
