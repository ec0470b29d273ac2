"""Log-sum-exps over a batch of two views stacked, z = [u; v] with itself:  r_i = LSE_{k in N(i)} a <z_i, z_k>.

Of many rows the CPU's kernels form gradients view by view, of u with itself, v with itself and u with v: as many pairs, and none of
the three needs z, which is not kept, or a gradient of z beside those of u and v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import batch, derivatives, ops
from ..backends import choice
from ..backends.aligned import plain
from ..backends.visits import PART
from ..equation import checks
from ..equation.masks import Mask, across_groups, off_diagonal
from ..equation.names import Backend
from ..equation.problem import pack
from ..precision import stacked
from . import energy
from .rows import check_saved, own_pairs_left_out

EXACT = 128.0  # of |r|: up to here csrc/cpu/range.h forms weights of r itself, whichever of its pairs they are of


class BothViews(NamedTuple):
    """Two checked views of n rows each, z (2n, d) of both, and N: the rows of other samples, or of other groups."""

    u: Tensor
    v: Tensor
    groups: Tensor | None
    backend: Backend | None
    z: Tensor
    mask: Mask

    def visits(self) -> Tensor:
        """(2n,) how many negatives each row has, without gradient."""
        return energy.visits(self.z, None, self.mask)

    def log_sum_exps(self, *scales: float | Tensor) -> tuple[Tensor, ...]:
        """(2n,) r for each scale a."""
        if self._view_by_view(scales):
            mask = self.mask._replace(group_x=None)  # of which the groups are given as they are
            factors = [checks.scalar("scale", a, self.u) for a in scales]
            by_views: tuple[Tensor, ...] = _ViewByView.apply(
                self.u, self.v, self.z.detach(), self.groups, mask, self.backend, *factors
            )
            return by_views
        return tuple(batch.pair_reduce(self.z, scale=a, mask=self.mask, backend=self.backend) for a in scales)

    def _view_by_view(self, scales: tuple[float | Tensor, ...]) -> bool:
        """Whether gradients are wanted of so many rows that it pays, and PyTorch's plain backward will form them."""
        if batch.beyond_this_process() or not derivatives.nothing_watches() or self.u.device.type != "cpu":
            return False
        wanted = torch.is_grad_enabled() and derivatives.any_requires_grad(self.u, self.v, *scales)
        many = wanted and plain(self.u, self.v) and 2 * self.u.numel() > PART
        return many and choice.choose(self.backend, self.u.device, self.u.dtype)[0] == "cpu"


def both_views(u: Tensor, v: Tensor, groups: Tensor | None, backend: Backend | None) -> BothViews:
    """Of two checked views."""
    z = stacked(u, v)
    return BothViews(u, v, groups, backend, z, own_pairs_left_out(groups, z, views=2))


class _ViewByView(torch.autograd.Function):
    """r of [u; v], saving u, v and r."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, z: Tensor, groups: Tensor | None, mask: Mask, backend: Backend | None, *scales: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if groups is not None:
            mask = mask._replace(group_x=groups.repeat(2))
        found = [ops.pair_reduce(z, scale=a, mask=mask, backend=backend) for a in scales]
        ctx.backend, ctx.dtype, ctx.mask = backend, u.dtype, mask._replace(group_x=None)
        # Beyond, the kernels find a row's normaliser anew: of a part of its pairs they cannot.
        ctx.apart = all(bool(((r.abs() <= EXACT) | (r == -torch.inf)).all()) for r in found)
        ctx.save_for_backward(u, v, groups, *scales, *found)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(derivatives.CREATE_GRAPH.format(name=choice.requested(ctx.backend or "auto")))
        u, v, groups, *saved = ctx.saved_tensors
        check_saved(ctx.dtype, u, v)
        k, n, of, of_scales = len(upstream), u.shape[0], ctx.needs_input_grad[:2], ctx.needs_input_grad[6:]
        found: list[Tensor | None] = [None] * (2 + k)  # of u, v and the scales
        for i, g in enumerate(upstream):
            if g is None:
                continue
            scale, r = saved[i], saved[k + i]
            for x, y, mask, of_x, of_y in _parts(u, v, groups, None if ctx.apart else ctx.mask):
                wanted = [any(of[j] for j in of_x), any(of[j] for j in of_y), of_scales[i], False, False, False]
                if not any(wanted):
                    continue
                p = ops.problem(
                    x, y, operand="dot", pair="identity", reduce="logsumexp", mask=mask, scale=scale, shift=0.0, bias_x=None,
                    bias_y=None, columns=y is not None,
                )  # fmt: skip
                rows, columns = (slice(n * j[0], n * (j[-1] + 1)) if j else slice(0) for j in (of_x, of_y))
                given = (r[rows], r[columns], g[rows].contiguous(), g[columns].contiguous(), wanted, True)
                dx, dy, da, *_ = torch.ops.fastcl.pair_reduce_backward(*pack(p), *given, ctx.backend or "auto")
                for side, rows_of in ((of_x, dx), (of_y, dy)):
                    for at, j in enumerate(side):
                        if of[j]:
                            found[j] = _added(found[j], rows_of if len(side) == 1 else rows_of[n * at : n * (at + 1)])
                if wanted[2]:
                    found[2 + i] = _added(found[2 + i], da)
                del dx, dy, rows_of  # before the next are formed
        du, dv = (None if t is None else t.to(ctx.dtype) for t in found[:2])
        return du, dv, None, None, None, None, *found[2:]


Part = tuple[Tensor, Tensor | None, Mask, tuple[int, ...], tuple[int, ...]]  # x, y, mask, which views they are


def _parts(u: Tensor, v: Tensor, groups: Tensor | None, whole: Mask | None) -> list[Part]:
    """The pairs of [u; v] in three parts, u with v first: it alone gives two gradients at once. In one under the mask `whole`."""
    if whole is not None:
        mask = whole if groups is None else whole._replace(group_x=groups.repeat(2))
        return [(stacked(u, v), None, mask, (0, 1), ())]
    own, across = off_diagonal(), off_diagonal()
    if groups is not None:
        own, across = across_groups(groups), across_groups(groups, groups)
    return [(u, v, across, (0,), (1,)), (u, None, own, (0,), ()), (v, None, own, (1,), ())]


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
