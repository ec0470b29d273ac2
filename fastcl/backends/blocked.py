"""The fallback of every platform: row blocks in pure PyTorch, any device and dtype, O(block * m) memory, deterministic.

A block of rows of z is formed by one matmul into a reused buffer, reduced, and turned in place into weights; the gradients
are two more matmuls. With y None only the columns at and right of the block's own rows are formed: half the work, since the
block's columns stand for the rows that come later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted
from ..equation.reductions import merge
from .reference import outer_form
from .sides import Sides, Sums

# One buffer of z, and one as large beside it for a log-sum-exp. On a CPU both should stay near the cores' own caches (of 1, 2, 4,
# 8 and 16 MiB, 8 was the quickest at n = 2048 and 8192); elsewhere each block costs launches.
BUFFER_BYTES = {"cpu": 8 << 20}
BUFFER_BYTES_ELSEWHERE = 64 << 20


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: pure PyTorch runs everywhere."""
    return None


class Block(NamedTuple):
    """Rows [start, stop) of z against columns [first, m)."""

    start: int
    stop: int
    first: int
    z: Tensor


class Blocks(Sides):
    """The blocks of z, one after the other in one buffer; the shift of a log-sum-exp stays outside (see `shift`)."""

    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        budget = BUFFER_BYTES.get(p.x.device.type, BUFFER_BYTES_ELSEWHERE) // self.x.element_size()
        self.block = max(1, min(p.n, budget // max(1, p.m)))
        self.buffer = self.x.new_empty(self.block * p.m)
        # A second buffer for exponentials: memory fresh from the system costs its page faults anew at every block.
        self.spare = self.x.new_empty(self.block * p.m if p.reduce == "logsumexp" else 0)
        # log-sum-exp(z + b) = log-sum-exp(z) + b: n additions where every pair would take one.
        self.shift = p.shift if p.reduce == "logsumexp" else p.shift.new_zeros(())

    def __iter__(self) -> Iterator[Block]:
        """Every block in order; each overwrites the z of the one before."""
        p = self.p
        for start in range(0, p.n, self.block):
            stop = min(p.n, start + self.block)
            first = start if p.y is None else 0
            block = Block(start, stop, first, self._matrix(self.buffer, stop - start, p.m - first))
            self._fill(block)
            if p.reduce == "logsumexp":
                self.mask_(block, block.z, float("-inf"))
            yield block

    def mask_(self, block: Block, values: Tensor, value: float) -> Tensor:
        """Put `value` in place of what the mask leaves out of the block's values; off the diagonal only that is touched."""
        mask = self.p.mask
        if mask.kind == "off_diagonal":
            offset = block.start - block.first + mask.row_offset - mask.col_offset
            if -values.shape[0] < offset < values.shape[1]:
                values.diagonal(offset).fill_(value)
        elif mask.kind != "all":
            assert mask.group_x is not None
            groups = mask.group_x[block.start : block.stop, None]
            others = (mask.group_x if mask.group_y is None else mask.group_y)[None, block.first :]
            values.masked_fill_(groups == others if mask.kind == "across_groups" else groups != others, value)
        return values

    def exponentials(self, z: Tensor, minus: Tensor, in_place: bool = False) -> Tensor:
        """exp(z - minus), 0 where minus is -inf (there z is -inf everywhere); in the spare buffer or over z."""
        out = z if in_place else self._matrix(self.spare, *z.shape)
        return torch.sub(z, torch.where(torch.isneginf(minus), 0.0, minus), out=out).exp_()

    def logsumexp(self, z: Tensor, dim: int) -> Tensor:
        """-inf where nothing is left, NaN only from NaN."""
        if z.shape[dim] == 0:
            return z.sum(dim) - float("inf")
        top = z.amax(dim, keepdim=True)
        top.masked_fill_(torch.isinf(top), 0.0)
        return self.exponentials(z, top).sum(dim).log_().add_(top.squeeze(dim))

    @staticmethod
    def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
        return buffer[: rows * columns].view(rows, columns)

    def _fill(self, block: Block) -> None:
        p, z = self.p, block.z
        x, y = self.x[block.start : block.stop], self.y[block.first :]
        if p.operand == "dot":
            torch.mm(x * p.scale, y.T, out=z)
        else:
            assert self.norm_x is not None and self.norm_y is not None
            torch.addmm(self.norm_y[None, block.first :], x, y.T, alpha=-2.0, out=z)
            z.add_(self.norm_x[block.start : block.stop, None]).clamp_(min=0.0).mul_(p.scale)
        if p.bias_x is not None:
            z.add_((p.bias_x[block.start : block.stop] + p.shift - self.shift)[:, None])
        elif p.reduce == "sum":
            z.add_(p.shift)
        if p.bias_y is not None:
            z.add_(p.bias_y[None, :])


class BlockSums(Sums):
    """The four sums, gathered block by block."""

    def add(self, block: Block, w: Tensor) -> None:
        """Add the block's weights; with y None its columns right of the block stand for later rows too."""
        x, y = self.sides.x[block.start : block.stop], self.sides.y[block.first :]
        if self.wy is not None:
            self.wy[block.start : block.stop].addmm_(w, y)
        if self.w_rows is not None:
            self.w_rows[block.start : block.stop] += w.sum(1)
        own = block.stop - block.start if self.sides.p.y is None else 0
        later = slice(block.first + own, None)
        if self.wtx is not None:
            self.wtx[later].addmm_(w[:, own:].T, x)
        if self.w_cols is not None:
            self.w_cols[later] += w[:, own:].sum(0)


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    blocks = Blocks(p)
    nothing = float("-inf") if p.reduce == "logsumexp" else 0.0
    r = blocks.x.new_full((p.n,), nothing)
    c = r if p.y is None else (blocks.x.new_full((p.m,), nothing) if p.columns else None)
    for block in blocks:
        values = block.z if p.reduce == "logsumexp" else blocks.mask_(block, p.pair.f(block.z), 0.0)
        reduce, join = (blocks.logsumexp, merge) if p.reduce == "logsumexp" else (torch.sum, torch.add)
        if c is not None:
            own = block.stop - block.start if p.y is None else 0
            later = c[block.first + own :]
            later.copy_(join(later, reduce(values[:, own:], 0)))
        here = r[block.start : block.stop]
        here.copy_(join(here, reduce(values, 1)))
    r.add_(blocks.shift)
    if p.columns and c is not None:
        c.add_(blocks.shift)
    return r, c if p.columns else None


def gradients(p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted) -> Gradients:
    """The gradients of <g, r> + <h, c>, in one sweep that forms z again."""
    blocks = Blocks(p)
    sums = BlockSums(blocks, wanted)
    if p.y is None:
        c, h = r, g
    for block in blocks:
        here, there = slice(block.start, block.stop), slice(block.first, None)
        if p.reduce == "sum":
            w = p.pair.df(block.z)
            w *= g[here, None] if h is None else g[here, None] + h[None, there]
            blocks.mask_(block, w, 0.0)
        else:
            w = block.z
            columns = None
            if h is not None:
                assert c is not None
                columns = blocks.exponentials(w, (c[there] - blocks.shift)[None, :]).mul_(h[None, there])
            w = blocks.exponentials(w, (r[here] - blocks.shift)[:, None], in_place=True).mul_(g[here, None])
            if p.y is None:
                # z_ij and z_ji round apart, and r_j was reduced from z_ji: what takes r_j off must be z_ji too.
                assert columns is not None
                own = slice(0, block.stop - block.start)
                columns[:, own] = w[:, own].T
            if columns is not None:
                w += columns
        sums.add(block, w)
    return sums.gradients(p.x.dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients, in one sweep wherever a block knows its own weights: the log-sum-exp of x with itself does not."""
    if p.reduce == "logsumexp" and p.y is None:
        r, _ = rows(p)
        value, g, dpositive = outer_form(outer, r.double(), None if positive is None else positive.double())
        dx = gradients(p, r, None, g.to(p.dtype), None, wanted) if any(wanted) else Gradients()
        return value.to(p.dtype), dx._replace(x=_cast(dx.x, p.dtype)), _cast(dpositive, p.dtype)
    blocks = Blocks(p)
    sums = BlockSums(blocks, wanted)
    value = blocks.x.new_full((), float("-inf") if outer == "pooled" else 0.0, dtype=torch.float64)
    dpositive = torch.zeros_like(positive) if positive is not None else None
    for block in blocks:
        if p.reduce == "sum":
            value, w = value + _block_sum(blocks, block), _sum_weights(blocks, block) if any(wanted) else None
        else:
            here = slice(block.start, block.stop)
            unshifted = blocks.logsumexp(block.z, 1)
            r = unshifted + blocks.shift
            part, g, dp = outer_form(outer, r.double(), None if positive is None else positive[here].double())
            if dpositive is not None and dp is not None:
                dpositive[here] = dp.to(p.dtype)
            before, value = value, merge(value, part) if outer == "pooled" else value + part
            if outer == "pooled":
                # g is relative to the block: bring it, and all that was gathered, to the running log-sum-exp.
                finite = torch.where(torch.isneginf(value), 0.0, value)
                g = torch.exp(r.double() - finite)
                sums.scale_(torch.exp(before - finite).to(p.dtype))
            w = None
            if any(wanted):
                w = blocks.exponentials(block.z, unshifted[:, None], in_place=True).mul_(g.to(p.dtype)[:, None])
        if w is not None:
            sums.add(block, w)
    return value.to(p.dtype), sums.gradients(p.dtype), dpositive


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _block_sum(blocks: Blocks, block: Block) -> Tensor:
    """Sum of f over the block; with y None each pair right of the block's own square counts in both orders."""
    f = blocks.mask_(block, blocks.p.pair.f(block.z), 0.0)
    if blocks.p.y is not None:
        return f.sum(dtype=torch.float64)
    own = block.stop - block.start
    return f[:, :own].sum(dtype=torch.float64) + 2.0 * f[:, own:].sum(dtype=torch.float64)


def _sum_weights(blocks: Blocks, block: Block) -> Tensor:
    w = blocks.p.pair.df(block.z)
    if blocks.p.y is None:
        w *= 2.0
    return blocks.mask_(block, w, 0.0)
