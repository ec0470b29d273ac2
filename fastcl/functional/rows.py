"""What every objective does to its rows: check them, normalise, pair with positives, count pairs, take the mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import batch, transforms
from ..backends import choice
from ..backends.row_dot import in_one_pass
from ..backends.sides import is_known
from ..equation import checks
from ..equation.masks import Mask, across_groups, off_diagonal
from ..equation.problem import accumulation_dtype
from ..precision import full_precision

UNIT = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of cpu_unit_rows


class _Normalize(torch.autograd.Function):
    """x / max(|x|, 1e-12), saving x alone; no norm overflows, be it in double or scaled by the largest entry first.

    The bound is a literal: torch.compile(dynamic=True) cannot lift a module's float out of an autograd.Function.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if in_one_pass(x, dtypes=UNIT):
            one_pass: Tensor = torch.ops.fastcl.cpu_unit_rows(x)
            return one_pass
        unit = unit_rows(x, 1e-12)[0]
        # torch.compile of torch 2.11 gives no gradient at all to a Function that writes over what it returns, or returns it by a
        # second name, as .to() of its own dtype does.
        return unit if unit.dtype == x.dtype else unit.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        g, (x,) = upstream[0], ctx.saved_tensors
        check_saved(g.dtype, x)
        return gradient_of_unit(g, x)


def check_saved(dtype: torch.dtype, *saved: Tensor | None) -> None:
    """What the forward saved is what it was: hooks may have packed it in another dtype.

    Raises:
        TypeError: it is of another dtype now.
    """
    for t in saved:
        if t is not None and t.dtype != dtype:
            raise TypeError(
                f"saved tensor: expected {dtype}, in which the forward saved it, got {t.dtype}; let the unpack hook of "
                "torch.autograd.graph.saved_tensors_hooks return the dtype that its pack hook was given"
            )


def gradient_of_unit(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, from that of x / max(|x|, 1e-12)."""
    if in_one_pass(x, dtypes=UNIT) and not torch.is_grad_enabled():
        gradient: Tensor = torch.ops.fastcl.cpu_unit_rows_backward(g, x)
        return gradient
    unit, norm = unit_rows(x, 1e-12)
    g = g.to(accumulation_dtype(x.dtype))
    return tangent(g, unit, norm > 1e-12, norm.clamp(min=1e-12)).rows.to(x.dtype)


class Tangent(NamedTuple):
    """(g - radial unit) / divisor, and the radial part, (n, 1), in units of `scale`, which is infinite where g is."""

    rows: Tensor
    radial: Tensor
    scale: Tensor


def tangent(g: Tensor, unit: Tensor, along: Tensor, divisor: Tensor) -> Tangent:
    """The gradient g of rows less its radial part <g, unit>, that only in rows that are `along`; all over `divisor` > 0, (n, 1).

    No dot product of a finite g overflows: rows of g near the end of the range are scaled down by 2^-32 meanwhile. Where a g is
    infinite already its infinite entries alone count, as equals, and what is left of them is infinite with its sign, or 0: never
    NaN, which comes from NaN only. `unit` is written over, but where a graph or a transform wants it.
    """
    limits = torch.finfo(g.dtype)
    bound = limits.max * 2.0**-32
    with torch.no_grad():
        largest = torch.maximum(g.amax(1, keepdim=True), -g.amin(1, keepdim=True))
    scale = torch.where(largest > bound, 2.0**-32, 1.0).to(g.dtype)
    infinite = largest == float("inf")
    divisor = torch.where(infinite, limits.tiny, divisor * scale)
    unscaled = torch.where(infinite, float("inf"), 1.0 / scale)
    recorded = torch.is_grad_enabled() or transforms.of_gradients()
    g = (g * scale).clamp(-bound, bound) if recorded else (g * scale).clamp_(-bound, bound)
    with full_precision(g.device):
        radial = torch.where(along, torch.linalg.vecdot(g, unit).unsqueeze(1), 0.0)
    if recorded:
        return Tangent((g - radial * unit) / divisor, radial, unscaled)
    return Tangent(g.sub_(unit.mul_(radial)).div_(divisor), radial, unscaled)


def unit_rows(x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """x / max(|x|, least) and |x|, (n, 1), in the accumulation dtype; norms beyond the dtype's range are infinite, units right.

    In plain PyTorch, which every transform differentiates: neither result depends on the factor that rows are scaled by first.
    """
    x = x.to(accumulation_dtype(x.dtype))
    # Not the infinity norm: on a CPU it takes 15 to 20 times as long as these two.
    whole = x.detach()
    largest = torch.maximum(whole.amax(1, keepdim=True), -whole.amin(1, keepdim=True))
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = x / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norm = largest * length
    # Asked this way round, a row with an infinity (its norm is NaN here) becomes NaN, as in F.normalize, and is not hidden.
    short = norm <= least
    if (
        torch.is_grad_enabled() or transforms.active()
    ):  # a gradient over least / largest would leave the range on its way
        return torch.where(short, x / least, scaled / torch.where(short, 1.0, length)), norm
    divisor = torch.where(short, least / largest, length)
    apart = torch.compiler.is_compiling() or transforms.watched()
    return (scaled / divisor if apart else scaled.div_(divisor)), norm


class Plain(NamedTuple):
    """Norms of rows, (n, 1); which rows are far from the ends of float32's range, (n, 1); whether all are."""

    norm: Tensor
    rows: Tensor
    every: bool

    def otherwise(self, plainly: Tensor, carefully: Callable[[], Tensor]) -> Tensor:
        """Row by row, so that no row's bits depend on another: what is right for plain ones, else what is right for any."""
        return plainly if self.every else torch.where(self.rows, plainly, carefully())


def plain_norms(x: Tensor) -> Plain | None:
    """|x_i| in one pass, and where that is right, 0 too; None where nothing can be had in one pass.

    On a CPU the values may be looked at: that is what tells ordinary rows from those for unit_rows, which takes five passes.
    """
    if not in_one_pass(x):
        return None
    norm = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    rows = norm < 2.0**60
    return Plain(norm, rows, bool(rows.all()))


def plain_tangent(g: Tensor, x: Tensor, plain: Plain, factor: Tensor, along: Tensor) -> tuple[Tangent, Plain] | None:
    """tangent() of plain rows, times `factor`, in three passes, and the rows where nothing overflowed in it."""
    if not in_one_pass(g, x):
        return None
    radial = torch.ops.fastcl.cpu_row_dot(g, x).unsqueeze(1) / plain.norm
    by = radial / plain.norm
    rows = plain.rows & (by.abs() < 2.0**60)  # not NaN or infinite either
    rows |= plain.rows & ~along & (plain.norm == 0.0)
    by, radial = torch.where(along, by, 0.0), torch.where(along, radial, 0.0)
    found = Tangent(torch.addcmul(g, x, by, value=-1).mul_(factor), radial, torch.ones(()))
    return found, Plain(plain.norm, rows, bool(rows.all()))


def normalize_rows(x: Tensor) -> Tensor:
    """Rows of unit length, in the dtype of x: x_i / max(|x_i|, 1e-12)."""
    if not x.shape[1]:
        return x
    unit: Tensor = unit_rows(x, 1e-12)[0].to(x.dtype) if transforms.active() else _Normalize.apply(x)
    return unit


def views(
    x: Tensor, y: Tensor, normalize: bool, names: tuple[str, str] = ("x", "y"), same_rows: bool = True
) -> tuple[Tensor, Tensor]:
    """Two checked views, normalised when asked."""
    checks.pair_of_matrices(names[0], x, names[1], y, same_rows)
    return (normalize_rows(x), normalize_rows(y)) if normalize else (x, y)


def inverse(name: str, value: float | Tensor) -> float | Tensor:
    """1 / value for a positive number or a tensor with one element."""
    value = checks.positive_number(name, value)
    if not (isinstance(value, Tensor) and value.requires_grad) or (is_known(value) and value.detach().item() > 1e-18):
        return 1.0 / value
    return (1.0 / widest(value)).to(value.dtype)  # the gradient, g / value^2, is in range where that square is not


def logarithm(value: float | Tensor, like: Tensor) -> float | Tensor:
    """log value; compiled as a tensor, since math.log of a number that changes makes a graph for each."""
    if isinstance(value, Tensor):
        return value.log()
    return as_compiled(value, like).log() if torch.compiler.is_compiling() else math.log(value)


def log_of_rest(share: float, like: Tensor) -> float | Tensor:
    """log(1 - share), likewise."""
    return torch.log1p(-as_compiled(share, like)) if torch.compiler.is_compiling() else math.log1p(-share)


def as_compiled(value: float, like: Tensor) -> Tensor:
    """A number in a tensor without dimensions, in float64, one graph for all its values: torch.full makes one for each."""
    return torch.ones((), dtype=torch.float64, device=like.device) * value


def times(factor: float | Tensor, rows: Tensor) -> Tensor:
    """factor * rows in the dtype of rows, whatever the shape of a one-element factor."""
    return rows * checks.scalar("factor", factor, rows)


def widest(rows: Tensor) -> Tensor:
    """Rows in float64, where their device has it: what is taken out of a sum again may drown the rest of it in float32."""
    return rows if rows.device.type == "mps" else rows.double()


def beyond_range(values: Tensor, *rows: Tensor) -> bool:
    """Whether float32 has no number for something on the way from finite rows to these: they are not all finite. False where none
    may be looked at, or nothing is wider.
    """
    if values.dtype == torch.float64 or not transforms.values_are_here() or not all(map(is_known, (values, *rows))):
        return False
    return not bool(values.isfinite().all()) and all(bool(t.isfinite().all()) for t in rows)


def wide_enough(rows: Tensor, a: float | Tensor) -> Tensor:
    """Rows of which a row's own term, one of a <x_i, x_j>, can be taken out of a sum over rows like it: in float64 where it may be
    the largest of them by far. Looked at where no device and no rank is waited for: rows of unit length, normalised by the
    caller, would be copied for nothing.
    """
    if rows.dtype == torch.float32 and is_known(rows) and rows.numel() and not batch.beyond_this_process():
        least, most = (float(norm) for norm in torch.linalg.vector_norm(rows.detach(), dim=1).aminmax())
        size = abs(float(a)) if not isinstance(a, Tensor) or is_known(a) else math.inf
        if most <= 2.0 * least and size * (most * most - least * least) <= 1.0:
            return rows
    return widest(rows)


def every_row_matched(x: Tensor, y: Tensor) -> None:
    """y has a row for each row of x."""
    if y.shape[0] < x.shape[0]:
        raise ValueError(
            f"y: expected at least one row for each row of x, {x.shape[0]}, got {y.shape[0]}; y_i is the positive of x_i"
        )


def own_pairs_left_out(groups: Tensor | None, rows: Tensor, views: int = 1) -> Mask:
    """The mask of the negatives: other rows, or rows of other groups; with several stacked views, `groups` is repeated.

    Ranks stack their views each for itself, so that a row's index in the union does not tell its views: groups do.

    Args:
        groups: (n,) int64 or None.
        rows: (n * views, d) rows that the mask is for.
        views: how many stacked views of n rows each.
    """
    n = rows.shape[0] // views
    if groups is not None:
        checks.groups("groups", groups, n, "the batch", rows)
    elif views == 1:
        return off_diagonal()
    elif not batch.beyond_this_process():
        return off_diagonal(period=n)
    else:
        groups = batch.first(rows) // views + torch.arange(n, device=rows.device)
    return across_groups(groups if views == 1 else groups.repeat(views))


def negatives_of_each(groups: Tensor | None, x: Tensor, y: Tensor) -> Mask:
    """The mask of the negatives between two sides of any sizes, whose rows of equal index belong together.

    Args:
        groups: (max(n, m),) int64 or None; the group of row i of x and of row i of y.
        x: (n, d).
        y: (m, d).
    """
    if groups is None:
        return off_diagonal()
    longer = x if x.shape[0] > y.shape[0] else y
    checks.groups("groups", groups, longer.shape[0], "the longer side", longer)
    return across_groups(leading(groups, x.shape[0]), leading(groups, y.shape[0]))


def leading(rows: Tensor, n: int) -> Tensor:
    """The first n rows; all of them as they are, since the gradient of a slice is a copy of the whole."""
    return rows if rows.shape[0] == n else rows[:n]


def check_backend(backend: str | None) -> None:
    """A known name, for an objective that has no pairs to reduce."""
    if backend is not None:
        checks.one_of("backend", backend, choice.NAMES)


def plain_number(name: str, value: float | Tensor, positive: bool = False) -> float:
    """A finite Python number: a constant of a pair function, which takes no gradient."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, got a tensor; pass float({name}) (it takes no gradient)")
    return checks.positive_number(name, value) if positive else checks.number(name, value)  # type: ignore[return-value]
