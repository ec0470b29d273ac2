"""The spectral loss of ordinary float32 rows on a CPU, through d x d matrices, in two passes over the rows.

With u' and v' the clipped rows, s_i = <u'_i, v'_i>, G_u = U'^T U', G_v likewise, N the number of negative pairs:

    L       = (1 / mu) [ (<G_u, G_v> - sum_i s_i^2) / N - (2 / n) sum_i s_i ]         (biased: without sum_i s_i^2)
    dL/du'  = (2 / mu) [ G_v u'_i / N - (s_i / N + 1 / n) v'_i ]                      (biased: without s_i / N)

A loss of so few flops is bound by its passes over n x d: block by block its clipped rows stay in the cache, where the general
form (spectral.py) writes them, their gradients and the gradients' parts to memory. Which rows are ordinary is looked at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import derivatives, transforms
from ..backends import choice, closed_form
from ..backends.row_dot import in_one_pass, row_dot
from ..precision import full_precision

BLOCK = 1 << 18  # elements of a block of rows: 1 MiB of each view
# Norms of clipped rows, whose fourth powers are summed over n^2 pairs: far from float32's ends.
LEAST_NORM, MOST_NORM = 2.0**-15, 2.0**15


class Clip(NamedTuple):
    """Of rows of which some reach the limit: the factor of each, 1 or limit / |x_i|, and which do, both (n, 1)."""

    factor: Tensor
    reach: Tensor


class Ordinary(NamedTuple):
    """What was found out about the rows: how u's and v's are clipped, None where none is."""

    u: Clip | None
    v: Clip | None
    limit: float
    biased: bool

    def pairs(self, n: int) -> float:
        """N."""
        return float(n) * (n if self.biased else n - 1)


def ordinary(u: Tensor, v: Tensor, mu: Tensor, biased: bool, backend: str | None) -> Ordinary | None:
    """What PlainSpectral needs to know, or None where the general form must serve: by shapes, dtypes and norms."""
    n, d = u.shape
    if not in_one_pass(u, v) or mu.requires_grad or not derivatives.nothing_watches():
        return None
    if d == 0 or not closed_form.gram_is_cheaper(n, n, d):
        return None
    if choice.choose(backend, u.device, u.dtype)[0] == "reference":
        return None
    limit = mu.sqrt()  # rounded as the general form rounds it
    (clip_u, norm_u), (clip_v, norm_v) = _clip(u, limit), _clip(v, limit)
    plain = float(limit) > LEAST_NORM and all(_ordinary(norm, d, biased) for norm in (norm_u, norm_v))
    return Ordinary(clip_u, clip_v, float(limit), biased) if plain else None


def _clip(x: Tensor, limit: Tensor) -> tuple[Clip | None, Tensor]:
    """What clips each row, and the norms of the clipped rows; of all rows as they are where one is far beyond, or NaN."""
    norm = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    largest = float(norm.amax())
    if largest < float(limit) or not largest < 2.0**60:
        return None, norm
    reach = ~(norm < limit)
    return Clip(torch.where(reach, limit / norm, 1.0), reach), norm.minimum(limit)


def _ordinary(norm: Tensor, d: int, biased: bool) -> bool:
    if not float(norm.amax()) < MOST_NORM:
        return False
    return biased or closed_form.balanced(*closed_form.squares_of(norm), d)


class PlainSpectral(torch.autograd.Function):
    """L, saving the rows, how they are clipped, s and the two matrices.

    general: the loss of u and v in its general form, for batched gradients, and for second derivatives, which it refuses with the
        reason.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, mu: Tensor, found: Ordinary, general: Callable[..., Tensor]) -> Tensor:
        n, d = u.shape
        s, gram_u, gram_v = u.new_empty(n), u.new_zeros(d, d), u.new_zeros(d, d)
        for i, j in blocks(n, d):
            x, y = clipped(u, found.u, i, j), clipped(v, found.v, i, j)
            torch.addmm(gram_u, x.T, x, out=gram_u)  # addmm_ is unknown to torch's flop counter
            torch.addmm(gram_v, y.T, y, out=gram_v)
            s[i:j] = row_dot(x, y)
        ctx.save_for_backward(u, v, mu, s, gram_u, gram_v)
        ctx.found, ctx.general = found, general
        squares = (gram_u.double() * gram_v.double()).sum()
        if not found.biased:
            squares -= s.double().square().sum()
        value = squares / found.pairs(n) - 2.0 * s.mean(dtype=torch.float64)
        return (value / mu.double()).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        u, v, mu, s, gram_u, gram_v = ctx.saved_tensors
        found, n, (of_u, of_v) = ctx.found, u.shape[0], ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or transforms.of_gradients():
            graph = torch.is_grad_enabled()
            with torch.enable_grad(), full_precision(u.device):
                u, v = u.detach().requires_grad_(), v.detach().requires_grad_()
                answer = torch.autograd.grad(ctx.general(u, v), (u, v), upstream, create_graph=graph)
            return *answer, None, None, None
        factor = in_two(float(upstream[0]) / float(mu))
        a = 2.0 / found.pairs(n)
        b = -2.0 / n if found.biased else s * -a - 2.0 / n
        b = torch.as_tensor(b, dtype=u.dtype).expand(n).unsqueeze(1)
        du = _gradient(u, v, found.u, found.v, gram_v * a, b, factor, found.limit) if of_u else None
        dv = _gradient(v, u, found.v, found.u, gram_u * a, b, factor, found.limit) if of_v else None
        return du, dv, None, None, None


def _gradient(
    u: Tensor,
    v: Tensor,
    of_u: Clip | None,
    of_v: Clip | None,
    a: Tensor,
    b: Tensor,
    factor: tuple[float, float],
    limit: float,
) -> Tensor:
    """factor du: a u'_i + b_i v'_i, less its part along u_i where that reaches the limit."""
    out = torch.empty_like(u)
    for i, j in blocks(*u.shape):
        x, y, g = clipped(u, of_u, i, j), clipped(v, of_v, i, j), out[i:j]
        torch.mm(x, a, out=g)
        g.addcmul_(b[i:j], y)
        if of_u is None:
            g.mul_(factor[0]).mul_(factor[1])
            continue
        # Of a row that reaches it, the limit is the length: x / limit is its direction.
        along = torch.where(of_u.reach[i:j], row_dot(g, x).unsqueeze(1) / limit / limit, 0.0)
        g.addcmul_(along, x, value=-1.0).mul_(of_u.factor[i:j] * factor[0]).mul_(factor[1])
    return out


def in_two(factor: float) -> tuple[float, float]:
    """Floats whose product it is, or 2^200: what overflows by it is infinite with its sign, and 0 stays 0."""
    if not abs(factor) > 2.0**100:
        return factor, 1.0
    return math.copysign(min(abs(factor), 2.0**200) * 2.0**-100, factor), 2.0**100


def blocks(n: int, d: int) -> list[tuple[int, int]]:
    """[0, n) by rows of BLOCK elements, at least d of them, so that a product reads more than its d x d matrix."""
    rows = max(BLOCK // d, d)
    return [(i, min(i + rows, n)) for i in range(0, n, rows)]


def clipped(x: Tensor, clip: Clip | None, i: int, j: int) -> Tensor:
    """Rows [i, j), those beyond the limit brought to it."""
    return x[i:j] if clip is None else x[i:j] * clip.factor[i:j]
