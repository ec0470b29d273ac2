"""What every backend in PyTorch shares: the two sides of a problem, and the gradients that follow from four sums.

W Y (n, d)   W^T X (m, d)   W 1 (n,)   W^T 1 (m,)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted


class Sides:
    """x and y in the accumulation dtype; for sqdist both minus a common centre, with their squared norms."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.x = p.x.to(p.dtype)
        self.y = self.x if p.y is None else p.y.to(p.dtype)
        self.norm_x = self.norm_y = None
        if p.operand == "sqdist":
            centre = self.y.mean(0) if p.m else 0.0
            self.x = self.x - centre
            self.y = self.x if p.y is None else self.y - centre
            self.norm_x = self.x.square().sum(1)
            self.norm_y = self.norm_x if p.y is None else self.y.square().sum(1)


class Sums:
    """The four sums, those that the wanted gradients need, and the gradients."""

    def __init__(self, sides: Sides, wanted: Wanted, filled: bool = True) -> None:
        """filled: whether W Y and W^T X begin with zeros; else whoever asked writes them whole."""
        self.sides, self.wanted = sides, wanted
        p = sides.p
        new = Tensor.new_zeros if filled else Tensor.new_empty
        self.wy = new(sides.x, sides.x.shape) if wanted.x or wanted.scale else None
        self.wtx = self.wy if p.y is None else (new(sides.y, sides.y.shape) if wanted.y else None)
        ones = any(wanted[2:]) or (p.operand == "sqdist" and any(wanted))
        self.w_rows = sides.x.new_zeros(p.n) if ones else None
        self.w_cols = self.w_rows if p.y is None else (sides.y.new_zeros(p.m) if ones else None)

    def scale_(self, factor: Tensor) -> None:
        """Multiply all that was gathered so far (x against y; with x itself the sums are shared)."""
        assert self.sides.p.y is not None
        for sums in (self.wy, self.wtx, self.w_rows, self.w_cols):
            if sums is not None:
                sums.mul_(factor)

    def gradients(self, dtype: torch.dtype) -> Gradients:
        """Read reference.py's header: the same four sums, the same formulas, dX and dY formed in place."""
        p, s, wanted = self.sides.p, self.sides, self.wanted
        half = 0.5 if p.y is None else 1.0
        da = db = None
        if wanted.shift:
            assert self.w_rows is not None
            db = half * self.w_rows.sum()
        if wanted.scale:
            assert self.wy is not None and self.w_rows is not None and self.w_cols is not None
            da = (s.x * self.wy).sum()
            if s.norm_x is not None and s.norm_y is not None:
                da = (self.w_rows * s.norm_x).sum() + (self.w_cols * s.norm_y).sum() - 2.0 * da
            da = half * da
        dx = self._finish(self.wy, self.w_rows, s.x, dtype) if wanted.x else None
        return Gradients(
            x=dx,
            y=self._finish(self.wtx, self.w_cols, s.y, dtype) if wanted.y else None,
            scale=da,
            shift=db,
            bias_x=self.w_rows if wanted.bias_x else None,
            bias_y=self.w_cols if wanted.bias_y else None,
        )

    def _finish(self, sums: Tensor | None, weights: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
        assert sums is not None
        if self.sides.p.operand == "sqdist":
            assert weights is not None
            sums.addcmul_(weights[:, None], rows, value=-1.0).mul_(-2.0)
        return sums.mul_(self.sides.p.scale).to(dtype)
