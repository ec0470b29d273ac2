"""The fallback of every platform: the tiles in pure PyTorch, any device and dtype, O(n d) memory, deterministic.

A tile of z is formed by one matmul into a reused buffer, reduced, and turned in place into weights; the gradients are two more
matmuls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted
from .products import product
from .sides import is_known
from .tiles import State, Tile, Tiles, Weighting
from .units import SMALL

# Of z, and as much beside it for a log-sum-exp. On a CPU both should stay near the cores' own caches (of 1, 2, 4, 8 and 16 MiB,
# 8 was the quickest at n = 2048 and 8192); elsewhere each tile costs launches.
BUFFER_BYTES = {"cpu": 8 << 20}
BUFFER_BYTES_ELSEWHERE = 64 << 20


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: pure PyTorch runs everywhere."""
    return None


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    return Blocks(p).rows()


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>, in one sweep that forms z again."""
    return Blocks(p).gradients(r, c, g, h, wanted, dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients, in one sweep wherever a tile knows its own weights: the log-sum-exp of x with itself does not."""
    return Blocks(p).total(positive, outer, wanted)


class Blocks(Tiles):
    """The operations on a tile, which holds z."""

    align = one_sweep_rows = 1
    rows_in_unit = True

    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        self.lse = p.reduce == "logsumexp"
        self.sides.marks_limited = p.mask.limited
        self.limits = p.limits
        # Added to z, never to what was reduced: of a large r - b weights would be off by the rounding of (r + b) - b.
        self.shifted = not is_known(p.shift) or float(p.shift) != 0.0
        self.above: Tensor | None = None
        self.is_nan = self.is_infinite = False
        # x a leaves the range where z does not: rows of 10 and of 1e-38 with a scale of 1e38. Such a scale comes after the product.
        scale = self.sides.scale
        self.before: Tensor = scale
        self.after: Tensor | None = None
        if not is_known(scale) or not abs(float(scale)) < 1.0 / SMALL:
            small = scale.abs() < 1.0 / SMALL
            self.before, self.after = torch.where(small, scale, 1.0), torch.where(small, 1.0, scale)
        # A second buffer for exponentials: memory fresh from the system costs its page faults anew at every tile.
        self.spare = self.dot

    @property
    def element_bytes(self) -> int:
        return super().element_bytes + (self.p.dtype.itemsize if self.lse and not self.p.mask.guided else 0)

    def default_workspace(self) -> int:
        return (2 if self.lse or self.p.mask.guided else 1) * BUFFER_BYTES.get(
            self.p.x.device.type, BUFFER_BYTES_ELSEWHERE
        )

    def product(self, tile: Tile) -> None:
        """z, with its shift and biases."""
        p, s, z = self.p, self.sides, tile.dot
        x, y = s.x[tile.rows], s.y[tile.cols]
        if s.norm_x is None or s.norm_y is None:
            product(x * self.before, y.T, z)
            if self.after is not None:
                z.mul_(self.after)
        else:
            torch.addmm(s.norm_y[None, tile.cols], x, y.T, alpha=-2.0, out=z)
            z.add_(s.norm_x[tile.rows, None]).clamp_(min=0.0).mul_(s.scale)
        if p.bias_x is not None:
            z.add_((p.bias_x[tile.rows] + p.shift)[:, None])
        elif self.shifted:
            z.add_(p.shift)
        if p.bias_y is not None:
            z.add_(p.bias_y[None, tile.cols])
        if tile.guided is not None:
            self.above = self.above_limits(tile, tile.guided)
        elif self.lse and z.device.type == "cpu":
            self.lower_above_limits(tile)
        elif p.mask.limited:
            self.above = self.above_limits(tile, z)
        if self.lse:
            self.mask_(tile, z, float("-inf"))

    def reduce(self, tile: Tile, columns: bool) -> tuple[Tensor, Tensor | None]:
        values = tile.dot if self.lse else self.mask_(tile, self.p.pair.f(tile.dot), 0.0)
        parts = self.logsumexp if self.lse else _sums
        return parts(values, 1), parts(values, 0) if columns else None

    def weigh(
        self, tile: Tile, by: Weighting | None, rows: bool, cols: bool, value: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        f = _sums(self.mask_(tile, self.p.pair.f(tile.dot), 0.0), 1) if value else None
        w = self.softmax_weights(tile, by) if by is not None and self.lse else self.sum_weights(tile, by)
        sums = _sums(w, 1) if rows else None, _sums(w, 0) if cols else None
        if self.sides.marks_limited and not self.p.marks_nan and is_known(self.p.scale):
            w = torch.where(tile.dot.isnan() & (w != 0.0), tile.dot, w)  # whatever its slope is, and rows of NaN are 0
        return w, *sums, f

    def join(self, parts: Tensor, state: State, factor: float = 1.0) -> None:
        if state.top is None:
            state.sum.add_(parts[0, 0], alpha=factor)
            return
        top, total = parts[:, 0]
        higher = torch.maximum(state.top, top)
        reference = torch.where(torch.isinf(higher), 0.0, higher)
        total = total * torch.exp(top - reference)
        state.sum.mul_(torch.exp(state.top - reference)).add_(total)
        state.top.copy_(higher)

    def gradients(
        self, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
    ) -> Gradients:
        """Those of large normalisers after one more sweep, which says how they were rounded."""
        asked = [t for t, of in ((r, g), (c, h)) if t is not None and of is not None] if any(wanted) else []
        if self.p.n and self.p.m and any(map(self.is_large, asked)):
            of_rows, of_cols = self.states(len(asked) == 2)
            g = g * torch.exp(of_rows.rounding(r))
            if c is not None and h is not None and of_cols is not None:
                h = h * torch.exp(of_cols.rounding(c))
        return super().gradients(r, c, g, h, wanted, dtype)

    def held(self, g: Tensor, state: State, normaliser: Tensor) -> Tensor:
        return g * torch.exp(state.rounding(normaliser)) if self.is_large(normaliser) else g

    def is_large(self, normaliser: Tensor) -> bool:
        """Whether its rounding would show in weights that are formed of it: by half of 1e-4 of them, or more."""
        if not (self.lse and is_known(normaliser)) or not normaliser.numel():
            return False
        size = torch.where(normaliser.isfinite(), normaliser, 0.0).abs().amax()
        return bool(size * torch.finfo(normaliser.dtype).eps > 1e-4)

    def sum_weights(self, tile: Tile, by: Weighting | None) -> Tensor:
        """f'(z_ij) (g_i + h_j); by None both are 1."""
        w = self.p.pair.df(tile.dot)
        if by is not None:
            assert by.g is not None
            w *= by.g[tile.rows, None] if by.h is None else by.g[tile.rows, None] + by.h[None, tile.cols]
        elif self.sides.symmetric:
            w *= 2.0
        return self.mask_(tile, w, 0.0)

    def softmax_weights(self, tile: Tile, by: Weighting) -> Tensor:
        """g_i e^(z_ij - r_i) + h_j e^(z_ij - c_j), over z."""
        z, columns = tile.dot, None
        assert by.r is not None and by.g is not None
        left_out = z.isneginf() if self.is_nan else None
        if self.is_infinite:
            z.clamp_(max=torch.finfo(z.dtype).max)
        square = not self.has_own_columns(tile)
        if by.h is not None and by.c is not None and not square:
            columns = self.exponentials(z, by.c[None, tile.cols]).mul_(by.h[None, tile.cols])
        w = self.exponentials(z, by.r[tile.rows, None], in_place=True).mul_(by.g[tile.rows, None])
        if square:
            # z_ij and z_ji round apart, and r_j was reduced from z_ji: what takes r_j off must be z_ji too.
            columns = self.beside(w).copy_(w.T)
        w = w if columns is None else w.add_(columns)
        return w if left_out is None else w.masked_fill_(left_out, 0.0)

    def prepared(self, by: Weighting) -> Weighting:
        """The weighting itself, with no normaliser beyond the dtype: an infinite one takes off what an infinite z is then. Whether
        there is one, or one that is NaN, and pairs are left out, whose weights are 0 all the same, is asked once a sweep, where no
        device is waited for."""
        normalisers = [t for t in (by.r, by.c) if t is not None] if self.lse and is_known(self.p.scale) else []
        beyond = any(not bool(t.amax() < math.inf) for t in normalisers if t.numel())  # NaN too
        mask = self.p.mask
        asked = beyond and (mask.kind != "all" or mask.limited)
        self.is_nan = asked and any(bool(t.isnan().any()) for t in normalisers)
        self.is_infinite = beyond and any(bool(t.isposinf().any()) for t in normalisers)
        if not self.is_infinite:
            return by
        most = torch.finfo(self.p.dtype).max
        return by._replace(**{name: t.clamp(max=most) for name in ("r", "c") if (t := getattr(by, name)) is not None})

    def mask_(self, tile: Tile, values: Tensor, value: float) -> Tensor:
        """Put `value` in place of what the mask leaves out of the tile's values; off the diagonal only that is touched."""
        mask = self.p.mask
        if mask.kind == "off_diagonal":
            offset = tile.i0 - tile.j0 + mask.row_offset - mask.col_offset
            for left_out in {offset, offset - mask.period, offset + mask.period}:
                if -values.shape[0] < left_out < values.shape[1]:
                    values.diagonal(left_out).fill_(value)
        elif mask.kind != "all":
            assert mask.group_x is not None
            groups = mask.group_x[tile.rows, None]
            others = (mask.group_x if mask.group_y is None else mask.group_y)[None, tile.cols]
            values.masked_fill_(groups == others if mask.kind == "across_groups" else groups != others, value)
        return values if self.above is None else values.masked_fill_(self.above, value)

    def lower_above_limits(self, tile: Tile) -> None:
        """z of -inf above a limit, in four passes of vectors: on a CPU masked_fill_ takes 20 times one of them."""
        z, (of_rows, of_cols) = tile.dot, self.limits
        for limit in (
            None if of_rows is None else of_rows[tile.rows, None],
            None if of_cols is None else of_cols[None, tile.cols],
        ):
            if limit is not None:
                above = torch.gt(z, limit, out=self.beside(z))
                largest = torch.finfo(z.dtype).max
                torch.minimum(z, limit, out=z).add_(above, alpha=-largest).add_(above, alpha=-largest)

    def above_limits(self, tile: Tile, decides: Tensor) -> Tensor | None:
        """Which pairs have a z, or a product of guides, above a limit; asked before anything takes its place, as f(z) = z may."""
        of_rows, of_cols = self.limits
        above = None if of_rows is None else decides > of_rows[tile.rows, None]
        if of_cols is None:
            return above
        over = decides > of_cols[None, tile.cols]
        return over if above is None else above.logical_or_(over)

    def exponentials(self, z: Tensor, minus: Tensor, in_place: bool = False) -> Tensor:
        """exp(z - minus), 0 where minus is -inf (there z is -inf everywhere); in the spare buffer or over z."""
        out = z if in_place else self.beside(z)
        return torch.sub(z, torch.where(torch.isneginf(minus), 0.0, minus), out=out).exp_()

    def logsumexp(self, z: Tensor, dim: int) -> Tensor:
        """Its parts: NaN only from NaN, and a top of infinity where one is."""
        top = z.amax(dim, keepdim=True)
        reference = torch.where(torch.isinf(top), 0.0, top)
        total = self.exponentials(z, reference).sum(dim)
        return torch.stack((top.squeeze(dim), total))[:, None]

    def beside(self, z: Tensor) -> Tensor:
        """Room for as many elements as z has: that of the products of guides, where those were."""
        if self.spare.numel() < self.dot.numel():
            self.spare = self.guided if self.p.mask.guided else torch.empty_like(self.dot)
        return self.matrix(self.spare, *z.shape)


def _sums(values: Tensor, dim: int) -> Tensor:
    return values.sum(dim)[None, None]
