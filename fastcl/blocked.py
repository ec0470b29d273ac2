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

from .problem import Gradients, Problem, Wanted
from .reductions import merge
from .reference import outer_form, visited
from .sides import Sides, Sums

# One buffer of z. On a CPU it should stay near the cores' own caches; elsewhere each block costs launches.
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
    keep: Tensor | None


class Blocks(Sides):
    """The blocks of z, one after the other in one buffer."""

    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        budget = BUFFER_BYTES.get(p.x.device.type, BUFFER_BYTES_ELSEWHERE) // self.x.element_size()
        self.block = max(1, min(p.n, budget // max(1, p.m)))
        self.buffer = self.x.new_empty(self.block * p.m)

    def __iter__(self) -> Iterator[Block]:
        """Every block in order; each overwrites the z of the one before."""
        p = self.p
        index = torch.arange(max(p.n, p.m), device=p.x.device) if p.mask.kind != "all" else None
        for start in range(0, p.n, self.block):
            stop = min(p.n, start + self.block)
            first = start if p.y is None else 0
            z = self.buffer[: (stop - start) * (p.m - first)].view(stop - start, p.m - first)
            self._fill(z, start, stop, first)
            keep = None if index is None else visited(p.mask, index[start:stop], index[first : p.m])
            yield Block(start, stop, first, z, keep)

    def _fill(self, z: Tensor, start: int, stop: int, first: int) -> None:
        p, x, y = self.p, self.x[start:stop], self.y[first:]
        if p.operand == "dot":
            torch.mm(x * p.scale, y.T, out=z)
        else:
            assert self.norm_x is not None and self.norm_y is not None
            torch.addmm(self.norm_y[None, first:], x, y.T, alpha=-2.0, out=z)
            z.add_(self.norm_x[start:stop, None]).clamp_(min=0.0).mul_(p.scale)
        if p.bias_x is not None:
            z.add_((p.bias_x[start:stop] + p.shift)[:, None])
        else:
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
        z = _mask_logits(p, block) if p.reduce == "logsumexp" else _masked_values(p, block)
        if c is not None:
            own = block.stop - block.start if p.y is None else 0
            _join(p, c[block.first + own :], _reduce(p, z[:, own:], 0))
        _join(p, r[block.start : block.stop], _reduce(p, z, 1))
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
            if block.keep is not None:
                w.masked_fill_(~block.keep, 0.0)
        else:
            z = _mask_logits(p, block)
            w = _softmax(z, r[here, None]).mul_(g[here, None])
            if h is not None:
                assert c is not None
                w += _softmax(z, c[None, there]).mul_(h[None, there])
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
            value, w = value + _block_sum(p, block), _sum_weights(p, block) if any(wanted) else None
        else:
            here = slice(block.start, block.stop)
            z = _mask_logits(p, block)
            r = _logsumexp(z, 1)
            part, g, dp = outer_form(outer, r.double(), None if positive is None else positive[here].double())
            if dpositive is not None and dp is not None:
                dpositive[here] = dp.to(p.dtype)
            before, value = value, merge(value, part) if outer == "pooled" else value + part
            if outer == "pooled":
                # g is relative to the block: bring it, and all that was gathered, to the running log-sum-exp.
                finite = torch.where(torch.isneginf(value), 0.0, value)
                g = torch.exp(r.double() - finite)
                sums.scale_(torch.exp(before - finite).to(p.dtype))
            w = _softmax(z, r[:, None], out=z).mul_(g.to(p.dtype)[:, None]) if any(wanted) else None
        if w is not None:
            sums.add(block, w)
    return value.to(p.dtype), sums.gradients(p.dtype), dpositive


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _mask_logits(p: Problem, block: Block) -> Tensor:
    return block.z if block.keep is None else block.z.masked_fill_(~block.keep, float("-inf"))


def _masked_values(p: Problem, block: Block) -> Tensor:
    f = p.pair.f(block.z)
    return f if block.keep is None else f.masked_fill(~block.keep, 0.0)


def _block_sum(p: Problem, block: Block) -> Tensor:
    """Sum of f over the block; with y None each pair right of the block's own square counts in both orders."""
    f = _masked_values(p, block)
    if p.y is not None:
        return f.sum(dtype=torch.float64)
    own = block.stop - block.start
    return f[:, :own].sum(dtype=torch.float64) + 2.0 * f[:, own:].sum(dtype=torch.float64)


def _sum_weights(p: Problem, block: Block) -> Tensor:
    w = p.pair.df(block.z)
    if p.y is None:
        w *= 2.0
    return w if block.keep is None else w.masked_fill_(~block.keep, 0.0)


def _reduce(p: Problem, z: Tensor, dim: int) -> Tensor:
    return _logsumexp(z, dim) if p.reduce == "logsumexp" else z.sum(dim)


def _join(p: Problem, into: Tensor, part: Tensor) -> None:
    into.copy_(merge(into, part)) if p.reduce == "logsumexp" else into.add_(part)


def _logsumexp(z: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(z, dim) if z.shape[dim] else z.sum(dim) - float("inf")


def _softmax(z: Tensor, normaliser: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(z - normaliser), 0 where nothing was reduced (normaliser -inf, hence z -inf)."""
    safe = torch.where(torch.isneginf(normaliser), 0.0, normaliser)
    return torch.sub(z, safe, out=out).exp_()
