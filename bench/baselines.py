"""What fastcl is compared with: the strongest honest way to each loss that a PyTorch user has.

Every method is a function of the two views that returns the loss; `methods(loss)` gives those of one loss by name, fastcl first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from tests.dropin import originals

Method = Callable[[Tensor, Tensor], Tensor]

SCALE, TEMPERATURE, SIGLIP_SCALE, SIGLIP_BIAS = 14.0, 0.5, 10.0, -10.0
BETA, ALPHA, KCL_T, KCL_GAMMA = 1.0, 40.0, 2.0, 16.0


def _units(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(x), F.normalize(y)


def _labels(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


def _no_diagonal(z: Tensor, value: float = float("-inf")) -> Tensor:
    return z.masked_fill(torch.eye(z.shape[0], dtype=torch.bool, device=z.device), value)


# ---- eager PyTorch: what people write -------------------------------------------------------------------------------------


def clip(x: Tensor, y: Tensor) -> Tensor:
    x, y = _units(x, y)
    logits = SCALE * x @ y.T
    return (F.cross_entropy(logits, _labels(x)) + F.cross_entropy(logits.T, _labels(x))) / 2


def info_nce(x: Tensor, y: Tensor) -> Tensor:
    x, y = _units(x, y)
    return F.cross_entropy(SCALE * x @ y.T, _labels(x))


def nt_xent(x: Tensor, y: Tensor) -> Tensor:
    z, n = torch.cat(_units(x, y)), x.shape[0]
    return F.cross_entropy(_no_diagonal(z @ z.T / TEMPERATURE), torch.cat([_labels(x) + n, _labels(x)]))


def siglip(x: Tensor, y: Tensor) -> Tensor:
    x, y = _units(x, y)
    z = SIGLIP_SCALE * x @ y.T + SIGLIP_BIAS
    return (F.softplus(z).sum() - z.diagonal().sum()) / x.shape[0]


def f_micl_js(x: Tensor, y: Tensor) -> Tensor:
    x, y = _units(x, y)
    log_2, n = 0.6931471805599453, x.shape[0]
    positive = log_2 - F.softplus(BETA * (x - y).square().sum(1))
    energy = _no_diagonal(F.softplus(-BETA * (2.0 - 2.0 * x @ x.T)), 0.0).sum() / (n * (n - 1)) - log_2
    return ALPHA * energy - positive.mean()


def kcl(x: Tensor, y: Tensor) -> Tensor:
    x, y = _units(x, y)
    n = x.shape[0]
    energies = [_no_diagonal(torch.exp(-KCL_T * (2.0 - 2.0 * u @ u.T)), 0.0).sum() / (n * (n - 1)) for u in (x, y)]
    return -2.0 * torch.exp(-KCL_T * (x - y).square().sum(1)).mean() + KCL_GAMMA * (energies[0] + energies[1])


def spectral(x: Tensor, y: Tensor) -> Tensor:
    x, y = _clipped(x), _clipped(y)
    n, s = x.shape[0], x @ y.T
    return -2.0 * s.diagonal().mean() + _no_diagonal(s.square(), 0.0).sum() / (n * (n - 1))


def spectral_gram(x: Tensor, y: Tensor) -> Tensor:
    """Five lines of d x d: the honest baseline of a quadratic loss."""
    x, y = _clipped(x), _clipped(y)
    n, d = x.shape[0], (x * y).sum(1)
    every = ((x.T @ x) * (y.T @ y)).sum()
    return -2.0 * d.mean() + (every - d.square().sum()) / (n * (n - 1))


def _clipped(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm < 1.0, x, x / norm)


# ---- chunked recompute: the least memory that pure PyTorch gets -----------------------------------------------------------


class _ChunkedClip(torch.autograd.Function):
    """Row chunks of the logits, twice: once for the two log-sum-exps, once more for the gradients."""

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        rows, columns = [], torch.full((x.shape[0],), float("-inf"), dtype=x.dtype)
        for chunk in x.split(_ChunkedClip.CHUNK):
            z = SCALE * chunk @ y.T
            rows.append(z.logsumexp(1))
            columns = torch.logaddexp(columns, z.logsumexp(0))
        r = torch.cat(rows)
        ctx.save_for_backward(x, y, r, columns)
        return ((r + columns) / 2 - SCALE * (x * y).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, y, r, columns = ctx.saved_tensors
        dx, dy = torch.empty_like(x), torch.zeros_like(y)
        for start in range(0, x.shape[0], _ChunkedClip.CHUNK):
            rows = slice(start, start + _ChunkedClip.CHUNK)
            z = SCALE * x[rows] @ y.T
            w = (z - r[rows, None]).exp_().add_((z - columns).exp_()).mul_(0.5)
            dx[rows] = w @ y - y[rows]
            dy.addmm_(w.T, x[rows]).sub_(F.pad(x[rows], (0, 0, start, y.shape[0] - start - w.shape[0])))
        factor = upstream[0] * SCALE / x.shape[0]
        return dx * factor, dy * factor


def chunked_clip(x: Tensor, y: Tensor) -> Tensor:
    return _ChunkedClip.apply(*_units(x, y))  # type: ignore[no-any-return]


# ---- torch's own fused linear cross entropy -------------------------------------------------------------------------------


def linear_cross_entropy(chunk: int, both: bool) -> Method:
    """F.linear_cross_entropy is one-directional InfoNCE: the rows are inputs, the other side is the weight."""

    def method(x: Tensor, y: Tensor) -> Tensor:
        x, y = _units(x, y)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        loss = F.linear_cross_entropy(SCALE * x, y, _labels(x), options=options)
        return (loss + F.linear_cross_entropy(SCALE * y, x, _labels(x), options=options)) / 2 if both else loss

    return method


# ---- libraries ------------------------------------------------------------------------------------------------------------


def open_clip_loss() -> Method:
    loss = originals.open_clip().ClipLoss()
    return lambda x, y: loss(*_units(x, y), SCALE)


def lightly_nt_xent() -> Method:
    loss = originals.lightly().NTXentLoss(temperature=TEMPERATURE)
    return lambda x, y: loss(x, y)


# ---- all of one loss ------------------------------------------------------------------------------------------------------

FASTCL: dict[str, Method] = {
    "clip": lambda x, y: fastcl.functional.clip(x, y, logit_scale=SCALE),
    "info_nce": lambda x, y: fastcl.functional.info_nce(x, y, temperature=1.0 / SCALE),
    "nt_xent": lambda x, y: fastcl.functional.nt_xent(x, y, temperature=TEMPERATURE),
    "siglip": lambda x, y: fastcl.functional.siglip(x, y, logit_scale=SIGLIP_SCALE, logit_bias=SIGLIP_BIAS),
    "f_micl_js": lambda x, y: fastcl.functional.f_micl(x, y, divergence="js", beta=BETA, alpha=ALPHA),  # type: ignore[dict-item]
    "kcl": lambda x, y: fastcl.functional.kcl(x, y, t=KCL_T, gamma=KCL_GAMMA),
    "spectral": lambda x, y: fastcl.functional.spectral(x, y),
}
EAGER: dict[str, Method] = {
    "clip": clip, "info_nce": info_nce, "nt_xent": nt_xent, "siglip": siglip, "f_micl_js": f_micl_js, "kcl": kcl,
    "spectral": spectral,
}  # fmt: skip
CHUNKS = (256, 1024)


def methods(loss: str, n: int) -> dict[str, Callable[[], Method]]:
    """Name -> maker of the method, since some import a library or compile. The n x n ones are left out where they do not fit."""
    found: dict[str, Callable[[], Method]] = {"fastcl": lambda: FASTCL[loss]}
    if n <= 16384:
        found["eager"] = lambda: EAGER[loss]
        found["torch.compile"] = lambda: torch.compile(EAGER[loss], dynamic=False)
    if loss == "clip":
        found["chunked recompute"] = lambda: chunked_clip
        found["open_clip"] = open_clip_loss
    if loss in ("clip", "info_nce"):
        for chunk in CHUNKS:
            found[f"F.linear_cross_entropy, chunk {chunk}"] = lambda chunk=chunk: linear_cross_entropy(
                chunk, loss == "clip"
            )  # type: ignore[misc]
    if loss == "nt_xent":
        found["lightly"] = lightly_nt_xent
    if loss == "spectral":
        found["torch Gram"] = lambda: spectral_gram
    return found
