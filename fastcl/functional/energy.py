"""Energies: the mean of a potential over the visited pairs, from one sweep for its pair function and none for the rest.

    E = mean_{(i, j) in M} psi(v_ij),   psi(v) = c F(p v + q) + l v + k,   v_ij = a u(x_i, y_j) + b

F is a pair function; l v + k needs no sweep (closed_form.py). A mean over no pairs is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import batch
from ..batch import pair_reduce
from ..equation.masks import Mask
from ..equation.names import Backend, Operand, Reduction
from ..equation.pairs import PairFunction
from ..equation.problem import accumulation_dtype
from .reduction import PairTerm


@dataclass(frozen=True)
class Potential:
    """psi(v) = coefficient * pair(slope * v + offset) + linear * v + constant."""

    pair: PairFunction | None = None
    coefficient: float = 1.0
    slope: float = 1.0
    offset: float = 0.0
    linear: float = 0.0
    constant: float = 0.0

    def negated(self) -> Potential:
        """-psi"""
        return replace(self, coefficient=-self.coefficient, linear=-self.linear, constant=-self.constant)

    def __call__(self, v: Tensor) -> Tensor:
        """psi(v), elementwise."""
        terms = []
        if self.pair is not None:
            z = self.slope * v + self.offset
            terms.append(self.coefficient * self.pair.f(z))
        if self.linear != 0.0:
            terms.append(self.linear * v)
        return sum(terms[1:], terms[0]) + self.constant


@dataclass(frozen=True)
class Pairs:
    """The visited pairs of x (with y, of as many rows), v on each of them, and what a mean over them becomes.

    operand, scale, shift: v = scale * operand + shift.
    reduction: "mean" is the mean over pairs, "sum" n times that, and "none" (n,) values with that mean: each row's own sum over
        the mean number of pairs per row, which is n - 1 where only self-pairs are left out.
    """

    x: Tensor
    y: Tensor | None
    mask: Mask
    operand: Operand = "dot"
    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    reduction: Reduction = "mean"
    backend: Backend | None = None

    def energy(self, psi: Potential) -> Tensor:
        """The mean of the potential, as `reduction` says."""
        n, visited = batch.count(self.x), visits(self.x, self.y, self.mask)
        total = batch.total(visited)
        terms = []
        if psi.pair is not None:
            scale, shift = psi.slope * self.scale, psi.slope * self.shift + psi.offset
            terms.append(psi.coefficient * self._sum(psi.pair, scale, shift))
        if psi.linear != 0.0:
            terms.append(psi.linear * self._sum("identity", self.scale, self.shift))
        if psi.constant != 0.0:
            terms.append(psi.constant * (visited if self.reduction == "none" else total))
        share = 1.0 if self.reduction == "mean" else float(n)
        return sum(terms[1:], terms[0]) * (share / total.clamp(min=1.0))

    def _sum(self, pair: str | PairFunction, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        sweep: dict[str, Any] = {
            "operand": self.operand, "pair": pair, "reduce": "sum", "mask": self.mask, "scale": scale, "shift": shift,
            "backend": self.backend,
        }  # fmt: skip
        term = PairTerm(self.x, self.y, sweep=sweep)
        return term.rows() if self.reduction == "none" else term.total()


def visits(x: Tensor, y: Tensor | None, mask: Mask) -> Tensor:
    """(n,) how many pairs the mask visits in each row of x against y of at least as many rows; no host read, no gradient."""
    if mask.kind in ("all", "off_diagonal") and not mask.period:
        n = batch.count(x if y is None else y) - (mask.kind == "off_diagonal")
        return torch.full((x.shape[0],), n, dtype=accumulation_dtype(x.dtype), device=x.device)
    narrow = (x.detach()[:, :0], None if y is None else y.detach()[:, :0])
    return pair_reduce(*narrow, pair="identity", reduce="sum", mask=mask, scale=0.0, shift=1.0)
