"""The losses of the cases by row chunks, d x d products and other functions of torch; fastcl.bench.losses has their eager forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl.bench.losses import (
    ALPHA,
    BETA,
    EAGER,
    KCL_GAMMA,
    KCL_T,
    LOG_2,
    SCALE,
    SIGLIP_BIAS,
    SIGLIP_SCALE,
    TEMPERATURE,
    Method,
    clipped,
    js_positive,
    labels,
    ours,
    units,
)

FASTCL = {loss: ours(loss) for loss in EAGER}


def spectral_gram(x: Tensor, y: Tensor) -> Tensor:
    """Five lines of d x d: the honest baseline of a quadratic loss."""
    x, y = clipped(x), clipped(y)
    n, d = x.shape[0], (x * y).sum(1)
    every = ((x.T @ x) * (y.T @ y)).sum()
    return -2.0 * d.mean() + (every - d.square().sum()) / (n * (n - 1))


# ---- row chunks: the backward of a chunk at once, so that one chunk of the matrix lives at a time ---------------------------


class _RowChunks(torch.autograd.Function):
    """As sentence-transformers' cached losses do it: every chunk of rows runs forward and backward, gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, loss_of_rows: Callable[..., Tensor], chunk: int) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        total = x.new_zeros(())
        with torch.enable_grad():
            for start in range(0, x.shape[0], chunk):
                value = loss_of_rows(*leaves, start, min(start + chunk, x.shape[0]))
                value.backward()  # type: ignore[no-untyped-call]
                total += value.detach()
        ctx.save_for_backward(*(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy = ctx.saved_tensors
        return upstream[0] * dx, upstream[0] * dy, None, None


def _off_diagonal(z: Tensor, start: int, value: float) -> Tensor:
    """Rows start, start + 1, ... of the matrix, without their own columns."""
    z.diagonal(start).fill_(value)
    return z


def _info_nce_rows(x: Tensor, y: Tensor, start: int, stop: int) -> Tensor:
    wanted = torch.arange(start, stop, device=x.device)
    return F.cross_entropy(SCALE * x[start:stop] @ y.T, wanted, reduction="sum") / x.shape[0]


def _nt_xent_rows(z: Tensor, _: Tensor, start: int, stop: int) -> Tensor:
    wanted = (torch.arange(start, stop, device=z.device) + z.shape[0] // 2) % z.shape[0]
    logits = _off_diagonal(z[start:stop] @ z.T / TEMPERATURE, start, float("-inf"))
    return F.cross_entropy(logits, wanted, reduction="sum") / z.shape[0]


def _siglip_rows(x: Tensor, y: Tensor, start: int, stop: int) -> Tensor:
    z = SIGLIP_SCALE * x[start:stop] @ y.T + SIGLIP_BIAS
    return (F.softplus(z).sum() - z.diagonal(start).sum()) / x.shape[0]


def _js_rows(x: Tensor, y: Tensor, start: int, stop: int) -> Tensor:
    n = x.shape[0]
    pairs = F.softplus(_off_diagonal(2.0 * BETA * x[start:stop] @ x.T - 2.0 * BETA, start, float("-inf")))
    energy = pairs.sum() / (n * (n - 1)) - LOG_2 * (stop - start) / n
    return ALPHA * energy - js_positive(x[start:stop], y[start:stop]).sum() / n


def _kcl_rows(x: Tensor, y: Tensor, start: int, stop: int) -> Tensor:
    n = x.shape[0]
    energies = [
        _off_diagonal(2.0 * KCL_T * u[start:stop] @ u.T - 2.0 * KCL_T, start, float("-inf")).exp().sum() for u in (x, y)
    ]
    positive = torch.exp(-KCL_T * (x[start:stop] - y[start:stop]).square().sum(1)).sum()
    return KCL_GAMMA * (energies[0] + energies[1]) / (n * (n - 1)) - 2.0 * positive / n


_OF_ROWS = {
    "info_nce": _info_nce_rows, "nt_xent": _nt_xent_rows, "siglip": _siglip_rows, "f_micl_js": _js_rows, "kcl": _kcl_rows,
}  # fmt: skip


def row_chunks(loss: str, chunk: int) -> Method:
    """The loss by chunks of rows; every one whose columns need no sum of their own."""

    def method(x: Tensor, y: Tensor) -> Tensor:
        x, y = units(x, y)
        if loss == "nt_xent":
            x = torch.cat([x, y])
        return _RowChunks.apply(x, y, _OF_ROWS[loss], chunk)  # type: ignore[no-any-return]

    return method


class _ChunkedClip(torch.autograd.Function):
    """Row chunks of the logits, twice: once for the two log-sum-exps, once more for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, size: int) -> Tensor:
        rows, columns = [], x.new_full((x.shape[0],), float("-inf"))
        for chunk in x.split(size):
            z = SCALE * chunk @ y.T
            rows.append(z.logsumexp(1))
            columns = torch.logaddexp(columns, z.logsumexp(0))
        r = torch.cat(rows)
        ctx.save_for_backward(x, y, r, columns)
        ctx.size = size
        return ((r + columns) / 2 - SCALE * (x * y).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, r, columns = ctx.saved_tensors
        dx, dy = -y, -x
        for start in range(0, x.shape[0], ctx.size):
            rows = slice(start, start + ctx.size)
            z = SCALE * x[rows] @ y.T
            w = (z - r[rows, None]).exp_().add_((z - columns).exp_()).mul_(0.5)
            dx[rows].addmm_(w, y)
            dy.addmm_(w.T, x[rows])
        factor = upstream[0] * SCALE / x.shape[0]
        return dx * factor, dy * factor, None


def chunked_clip(chunk: int) -> Method:
    """The least memory that pure PyTorch gets for CLIP."""
    return lambda x, y: _ChunkedClip.apply(*units(x, y), chunk)  # type: ignore[no-any-return]


def linear_cross_entropy(chunk: int, both: bool) -> Method:
    """F.linear_cross_entropy is one-directional InfoNCE: the rows are inputs, the other side is the weight."""

    def method(x: Tensor, y: Tensor) -> Tensor:
        x, y = units(x, y)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        loss = F.linear_cross_entropy(SCALE * x, y, labels(x), options=options)
        return (loss + F.linear_cross_entropy(SCALE * y, x, labels(x), options=options)) / 2 if both else loss

    return method
