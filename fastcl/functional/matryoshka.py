"""The softmax contrasts of several prefixes of the same rows, in one visit of each pair: products cost what the widest costs.

With widths d_1 < ... < d_L, u and v the rows and |.|_k the norm of a prefix, over strips of rows of u:

    P_k = P_{k-1} + <u_i, v_j>_{(d_{k-1}, d_k]},    z_k,ij = a P_k / (|u_i|_k |v_j|_k)
    L   = share sum_k w_k sum_i softplus(r_k,i - z_k,ii),    r_k,i = LSE_{j != i} z_k,ij,    or half of this and half of columns
    dU_{(d_{k-1}, d_k]} = sum_j (sum_{l >= k} Q_l,ij) v_j,    Q_l,ij = a (dL / dz_l,ij) / (|u_i|_l |v_j|_l)

less of each prefix its radial part, sum_j (dL / dz_l,ij) z_l,ij u_i / |u_i|_l^2. A strip holds the weights of every width until Q
is added up, from the widest on. In one direction the weights of a strip are known once it is reduced, so that value and gradients
come from three products; with columns, whose normalisers are known after the last strip, from four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import batch, derivatives
from ..backends import choice, extension
from ..backends.aligned import plain
from ..backends.sides import is_known
from ..backends.workspace import workspace
from ..equation.intrinsics import softplus
from . import rows as passes

STRIP_BYTES = 24 << 20
LEAST_ROWS = 64  # of a strip: of fewer a product is slow
# Of unit rows |z| <= a: up to here no sum of exponentials needs a shift, and rows and columns share theirs.
UNSHIFTED = 40.0
FAR = 2.0**20  # from 1, for a scale and for the length of a prefix within its row
LEAST_N, COLUMNS_FOR_A_WIDTH = 64, 48  # where one visit is quicker
LOG2E = 1.0 / math.log(2.0)  # z is held to base 2: torch's exp2 takes a third of its exp


class Prefixes(NamedTuple):
    """What is asked: the widths and their weights, times 1 or 1 over the rows; whether of both directions."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    columns: bool

    @property
    def segments(self) -> list[slice]:
        return [slice(a, b) for a, b in zip((0, *self.dims), self.dims, strict=False)]


class Side(NamedTuple):
    """Rows scaled to unit length over the widest prefix, the (n, 1) lengths they had, and of each width 1 / |.|_k, (L, n)."""

    unit: Tensor
    norm: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, x: Tensor, asked: Prefixes) -> Side:
        unit, norm = passes.unit_rows(x, 1e-12)
        parts = [torch.linalg.vector_norm(unit[:, s], dim=1).square() for s in asked.segments]
        return cls(unit, norm, torch.stack(parts).cumsum(0).rsqrt())

    @property
    def ordinary(self) -> bool:
        """Whether every prefix is longer than normalisation's least length, and not far shorter than its row. NaN is not."""
        longer = self.norm[:, 0] > 2e-12 * self.inverse
        return bool((longer & (self.inverse < FAR)).all() & (self.norm < 2.0**60).all())


class _Visit:
    """The buffers of a strip, and what is known of each row of either side for each width; sums and tops of them to base 2."""

    def __init__(self, u: Side, v: Side, a: float, asked: Prefixes, wanted: Sequence[bool]) -> None:
        self.u, self.v, self.a, self.asked, self.gradients = u, v, a, asked, any(wanted)
        n, m, widths = u.unit.shape[0], v.unit.shape[0], len(asked.dims)
        new = u.unit.new_empty
        held = 2 + (widths if self.gradients else 1)
        rows = max(LEAST_ROWS, workspace(STRIP_BYTES) // (held * m * u.unit.element_size()))
        self.strips = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.product, self.spare, *self.weights = new(held, min(rows, n), m)
        self.positive, self.sum, self.top = new(3, widths, n)
        self.column_sum, self.column_top = torch.zeros_like(self.sum), torch.full_like(self.sum, -math.inf)
        self.shifted = a > UNSHIFTED
        if not self.shifted:
            self.top, self.column_top = torch.zeros(2, *self.sum.shape, dtype=self.sum.dtype, device=self.sum.device)
        self.radial = torch.zeros_like(u.inverse), torch.zeros_like(v.inverse)
        self.of = [torch.empty_like(side.unit) if of else None for side, of in zip((u, v), wanted, strict=False)]

    def logits(self, k: int, strip: slice) -> Tensor:
        """z of one width, after that of the one before; of the pairs that match it is kept and -inf here."""
        segment, rows = self.asked.segments[k], strip.stop - strip.start
        product, z = self.product[:rows], self.weights[k if self.gradients else 0][:rows]
        x, y = self.u.unit[strip, segment], self.v.unit[:, segment].T
        torch.mm(x, y, out=product) if k == 0 else torch.addmm(product, x, y, out=product)
        torch.mul(product, (self.u.inverse[k, strip] * (self.a * LOG2E))[:, None], out=z).mul_(self.v.inverse[k])
        matching = z.diagonal(strip.start)
        self.positive[k, strip] = matching
        matching.fill_(-math.inf)
        return z

    def of_columns(self, k: int, z: Tensor) -> Tensor:
        """2^(z - top) for the tops of columns."""
        return torch.sub(z, self.column_top[k], out=self.spare[: z.shape[0]]).exp2_()

    def of_rows(self, k: int, strip: slice, z: Tensor) -> Tensor:
        """2^(z - top), in the place of z."""
        return (z.sub_(self.top[k, strip, None]) if self.shifted else z).exp2_()

    def reduce(self, k: int, strip: slice, z: Tensor) -> None:
        """z becomes exponentials."""
        if self.shifted:
            torch.amax(z, 1, out=self.top[k, strip])
        if self.shifted and self.asked.columns:
            before = self.column_top[k].clone()
            torch.maximum(before, z.amax(0), out=self.column_top[k])
            e = self.of_columns(k, z)
            self.column_sum[k].mul_(torch.exp2(before - self.column_top[k])).add_(e.sum(0))
        e = self.of_rows(k, strip, z)
        torch.sum(e, 1, out=self.sum[k, strip])
        if self.asked.columns and not self.shifted:
            self.column_sum[k].add_(e.sum(0))

    def beyond(self, k: int, strip: slice, columns: bool = False) -> Tensor:
        """r_i - z_ii, or c_i - z_ii."""
        top, total = (self.column_top, self.column_sum) if columns else (self.top, self.sum)
        return (top[k, strip] + total[k, strip].log2() - self.positive[k, strip]) / LOG2E

    def weigh(self, k: int, strip: slice, z: Tensor) -> None:
        """Q in the place of exponentials, or where columns have a say of z; the radial parts, of Q P, are added up."""
        share, rows = self.asked.weights[k], strip.stop - strip.start
        matching = share * torch.sigmoid(self.beyond(k, strip))
        by_row = (matching / self.sum[k, strip])[:, None]
        scale_u, scale_v = (self.u.inverse[k, strip] * self.a)[:, None], self.v.inverse[k]
        if not self.asked.columns:
            w = z.mul_(by_row * scale_u)
        else:
            of_columns = share * torch.sigmoid(self.beyond(k, slice(None), columns=True))
            matching += of_columns[strip]
            by_column = of_columns / self.column_sum[k]
            if self.shifted:
                beside = self.of_columns(k, z).mul_(by_column)
                w = self.of_rows(k, strip, z).mul_(by_row).add_(beside).mul_(scale_u)
            else:
                both = torch.add(by_row, by_column, out=self.spare[:rows])
                w = self.of_rows(k, strip, z).mul_(both).mul_(scale_u)
        w.diagonal(strip.start).copy_(-matching).mul_(scale_u[:, 0])
        w.mul_(scale_v)
        parts = torch.mul(w, self.product[:rows], out=self.spare[:rows])
        torch.sum(parts, 1, out=self.radial[0][k, strip])
        self.radial[1][k] += parts.sum(0)

    def add_up(self, strip: slice) -> None:
        """The strip's part of both gradients, from the widest prefix on."""
        of_u, of_v = self.of
        held = [w[: strip.stop - strip.start] for w in self.weights]
        q = held.pop()
        for segment in reversed(self.asked.segments):
            if of_u is not None:
                torch.mm(q, self.v.unit[:, segment], out=of_u[strip, segment])
            if of_v is not None:
                part, x = of_v[:, segment], self.u.unit[strip, segment]
                torch.mm(q.T, x, out=part) if strip.start == 0 else torch.addmm(part, q.T, x, out=part)
            if held:
                q.add_(held.pop())

    def run(self) -> Tensor:
        """The loss; what its gradients are made of stays here."""
        at_once = self.gradients and not self.asked.columns
        for strip in self.strips:
            for k in range(len(self.asked.dims)):
                z = self.logits(k, strip)
                self.reduce(k, strip, z)
                if at_once:
                    self.weigh(k, strip, z)
            if at_once:
                self.add_up(strip)
        for strip in self.strips if self.gradients and not at_once else ():
            for k in range(len(self.asked.dims)):
                self.weigh(k, strip, self.logits(k, strip))
            self.add_up(strip)
        found = self.sum.new_zeros((), dtype=torch.float64)
        for k, share in enumerate(self.asked.weights):
            for columns in (False, True)[: 1 + self.asked.columns]:
                found += share * softplus(self.beyond(k, slice(None), columns)).sum(dtype=torch.float64)
        return found.to(self.sum.dtype)

    def gradient(self, side: int) -> Tensor | None:
        """Of the rows as they came."""
        of, rows, radial = self.of[side], (self.u, self.v)[side], self.radial[side]
        if of is None:
            return None
        along = (radial * rows.inverse.square()).flip(0).cumsum(0).flip(0)
        for k, segment in enumerate(self.asked.segments):
            part = of[:, segment]
            torch.addcmul(part, along[k, :, None], rows.unit[:, segment], value=-1.0, out=part)
        return of.div_(rows.norm)


class _InOneVisit(torch.autograd.Function):
    """The loss with its gradients, which a backward multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: float | Tensor, visit: _Visit) -> Tensor:
        value = visit.run()
        of_a = None
        if ctx.needs_input_grad[2] and isinstance(a, Tensor):
            of_a = (visit.radial[0].sum() / visit.a).reshape(a.shape)
        ctx.save_for_backward(visit.gradient(0), visit.gradient(1), of_a)
        ctx.dtypes, ctx.saved_dtype = (x.dtype, y.dtype, a.dtype if isinstance(a, Tensor) else None), value.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(derivatives.CREATE_GRAPH.format(name="auto"))
        saved = ctx.saved_tensors  # once: checkpoint's hooks unpack no tensor a second time
        passes.check_saved(ctx.saved_dtype, *saved)
        kept = zip(saved, ctx.dtypes, strict=True)
        return *(None if t is None else (upstream[0] * t).to(dtype) for t, dtype in kept), None


def in_one_visit(
    x: Any,
    y: Any,
    a: float | Tensor,
    dims: tuple[int, ...],
    weights: tuple[float, ...],
    *,
    columns: bool,
    reduction: str,
) -> Tensor | None:
    """The sum of the prefixes' losses, or None where it is to be taken loss by loss, which also says what is wrong with the rows.

    Args:
        x, y: (n, d_L) and (m, d_L), normalised here; m >= n, and with `columns` m = n.
        a: the scale, a number or a tensor with one element.
        dims, weights: d_k and w_k.
        columns: whether both directions are meant, as in clip, or the one of info_nce.
        reduction: "mean" or "sum"; "none" is not served.
    """
    if reduction == "none" or not (derivatives.nothing_watches() and plain(x, y) and _is_quicker(x, y, dims)):
        return None
    n, m = x.shape[0], y.shape[0]
    if x.dtype != y.dtype or not dims[-1] == x.shape[1] == y.shape[1] or n > m or (columns and n != m):
        return None
    if choice.requested(None) != "auto" or batch.beyond_this_process() or not _is_here(a):
        return None
    share = (0.5 if columns else 1.0) / (n if reduction == "mean" else 1)
    asked = Prefixes(dims, tuple(w * share for w in weights), columns)
    recording = torch.is_grad_enabled()
    wanted = [recording and isinstance(t, Tensor) and t.requires_grad for t in (x, y, a)]
    with torch.no_grad():
        u, v = Side.of(x, asked), Side.of(y, asked)
        if not (1.0 / FAR < float(a) < FAR and u.ordinary and v.ordinary):
            return None
        visit = _Visit(u, v, float(a), asked, wanted)
        if not visit.gradients:
            return visit.run()
    loss: Tensor = _InOneVisit.apply(x, y, a, visit)
    return loss


def _is_here(a: Any) -> bool:
    """Whether it is a number in memory."""
    if not isinstance(a, Tensor):
        return isinstance(a, (int, float))
    return is_known(a) and a.numel() == 1


def _is_quicker(x: Tensor, y: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether one visit takes less time than a loss for each width.

    A width takes 9 or 10 passes over z, which cost what the products of some 40 columns cost, and saves those of its own; below
    64 rows the calls of either cost as much. Measured on two cores of an AMD EPYC with AVX-512, one thread, float32, against the
    losses one by one: 0.50 to 0.72 of their time with widths (64, 128, 256, 512, 768) from 256 to 4,096 rows, 0.85 to 0.93 with
    (64, 128, 256), 1.02 to 1.23 with (32, 64, 128). By AMX the kernels' products are quicker than torch's in float32: nothing was
    measured there.
    """
    on_cpu = x.device.type == y.device.type == "cpu"
    if not (on_cpu and x.shape[0] >= LEAST_N and sum(dims[:-1]) >= COLUMNS_FOR_A_WIDTH * len(dims)):
        return False
    return extension.library is None or extension.library.chosen_isa() != "amx"
