"""Plain PyTorch in place of the engine: the n x m matrix in the accumulation dtype, by autograd. Its error is the dtype's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastcl import ops
from fastcl.backends import closed_form, extension
from fastcl.backends.reference import centre, within
from fastcl.equation import checks
from fastcl.equation.pairs import Identity
from fastcl.equation.problem import Problem, accumulation_dtype
from fastcl.functional import kernel
from fastcl.functional.rows import normalize_rows
from fastcl.functional.spectral import clip_norms
from fastcl.metrics import retrieval

from .formula import rows

SHARED = 60.0  # _ROOM of triton_kernels/reductions.py; beyond four of it every row has a reference of its own
# Beyond this |r| no weight is formed of what is stored; over ranks, whose visits have that alone, all are.
EXACT = 128.0
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(ops.pair_reduce).parameters.items()
    if name not in ("x", "y", "backend")
}


class Plain:
    """pair_reduce and pair_total by the matrix; u is moved by up to `units` of `eps` of its terms, differently for each `seed`.

    What is moved is what a sum in another order moves: <x, y> by eps |x| |y|, and |x - y|^2, which is formed from norms and a dot
    product about the mean of y, by eps (|x|^2 + |y|^2). `largest` is the largest |z|, or |u| or term that it is formed from, that
    was met, `largest_exponent` the largest term of a z of log-sum-exps. With `rounds_weights` those of half-precision rows are in
    the rows' dtype, as GPUs multiply them. With `unscaled` <x, y> is formed before it is scaled, as GPUs do, and objectives for
    their positives; elsewhere it may be beyond the dtype where z is not.
    With `unit` rows that are brought to a length are rounded to it. With `uncentred` the squared norms of |x - y|^2 may be those of
    rows as they are: GPUs centre 16-bit rows only where that rounds none.
    """

    def __init__(
        self,
        seed: int = 0,
        units: float = 0.0,
        eps: float | None = None,
        dot: bool = True,
        rounds_weights: bool = False,
        unscaled: bool = False,
        unit: float = 0.0,
        uncentred: bool = False,
        exact: float = EXACT,
    ) -> None:
        self.seed, self.units, self.eps, self.dot, self.largest = seed, units, eps, dot, 0.0
        self.largest_exponent, self.reductions = 0.0, 0
        self.rounds_weights, self.unscaled, self.unit, self.uncentred = rounds_weights, unscaled, unit, uncentred
        self.exact = exact

    def rounded(self, bring: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same with each entry of a row that is brought to a length moved by up to `unit` of itself, alike for the same rows.

        Its gradient moves by as much of what it was before its radial part was taken out, which may be all of it.
        """

        def call(x: Tensor, *limit: Tensor) -> Tensor:
            found = bring(x, *limit)
            if not self.unit:
                return found
            before, after = (torch.linalg.vector_norm(t.detach(), dim=1, keepdim=True) for t in (x, found))
            slope = torch.where(before > 0.0, after / before, 0.0)
            # Sums over rows of equal entries round alike at each addition.
            slope = slope * torch.where(_are_equal(x.detach()), max(1.0, len(x) / 32), 1.0).to(slope)
            return found + self.unit * rows(*x.shape, self.seed).to(found.dtype) * (
                found.detach() + slope * (x - x.detach())
            )

        return call

    def pair_reduce(self, x: Tensor, y: Tensor | None = None, *, backend: str | None = None, **given: Any) -> Any:
        p = self._problem(x, y, given)
        with torch.autocast("cpu", enabled=False):
            f, keep = self._pairs(p)
            r = self._reduced(p, f, keep, 1)
            return (r, self._reduced(p, f, keep, 0)) if p.columns else r

    def pair_total(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        outer: str,
        positive: Tensor | None = None,
        backend: str | None = None,
        **given: Any,
    ) -> Tensor:
        p = self._problem(x, y, given)
        checks.outer(outer, p.reduce, positive, x)
        with torch.autocast("cpu", enabled=False):
            f, keep = self._pairs(p)
            if positive is not None and positive.numel():  # a z too
                self.largest = max(self.largest, float(positive.detach().abs().max()))
            if outer == "pooled":
                return self._reduced(p, f.reshape(1, -1), None if keep is None else keep.reshape(1, -1), 1)[0]
            r = self._reduced(p, f, keep, 1)
            return r.sum() if positive is None else contrast(r - positive.to(p.dtype)).sum()

    def _problem(self, x: Tensor, y: Tensor | None, given: dict[str, Any]) -> Problem:
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
            x, y = x.to(dtype), None if y is None else y.to(dtype)
        return ops.problem(x, y, **(DEFAULTS | given))

    def _pairs(self, p: Problem) -> tuple[Tensor, Tensor | None]:
        """f(z_ij), and which pairs are visited."""
        x = p.x.to(p.dtype)
        y = x if p.y is None else p.y.to(p.dtype)
        scale, unit = p.scale, p.scale.new_ones(())
        if p.operand == "dot":
            if not self.unscaled:
                unit_x, unit_y = unit_of(x), unit_of(y)
                scale, unit = scale * unit_x * unit_y, unit_x * unit_y
                x, y = shortened(x), shortened(y)
            u, size = x @ y.T, torch.linalg.vector_norm(x, dim=1)[:, None] * torch.linalg.vector_norm(y, dim=1)
        else:
            middle = centre(x, y)
            if self.uncentred and p.n and p.m:
                norms = (t.detach().square().sum(1).max() * p.scale.detach().abs().clamp(min=1.0) for t in (x, y))
                self.largest = max(self.largest, float(sum(norms)))
            x, y = x - middle, y - middle
            size = self._squares(x, 60)[:, None] + self._squares(y, 70)
            u = (size - 2.0 * (x @ y.T)).clamp(min=0.0)
        error = u.new_zeros(())
        if self.units and (self.dot or p.operand == "sqdist"):
            noise = rows(p.n, p.m, self.seed).to(p.dtype)
            if self.seed % 4 == 3:  # rows that are alike may err alike
                noise = torch.ones_like(noise)
            # Of equal terms each addition rounds alike.
            steps = torch.where(_are_equal(p.x), max(1.0, x.shape[1] / 8), 1.0).to(p.dtype)
            # A norm and a product err by one each; a draw of the definition has no rounding but this.
            units = self.units if self.dot else 2.0 * self.units
            noise = noise * (steps * units * (self.eps or precision(p.dtype)))
            if p.y is None:  # a row's distance from itself may also come out as the 0 that it is
                noise = torch.triu(noise, self.seed % 2) + torch.triu(noise, 1).T
            error = noise * size
            u = u + error
            if (
                p.operand == "sqdist"
            ):  # below 0 it is 0, of a slope that some evaluations take from there and others do not
                held = u.clamp(min=0.0)
                u = u + (held - u).detach() if self.seed % 2 else held
        # The gradient of the scale comes from the same terms as u, and is as far off, also where u is clamped.
        z = scale * u + p.shift + (scale - scale.detach()) * error.detach()
        for bias, dim in ((p.bias_x, 1), (p.bias_y, 0)):
            z = z if bias is None else z + bias.unsqueeze(dim)
        index = torch.arange(max(p.n, p.m))
        z, keep = within(p, z, index[: p.n], index[: p.m])
        if z.numel():
            # Of sums of z closed forms add up <x, y> before they are scaled; sqdist comes from squares.
            by_logits = p.operand == "dot" and not (
                self.unscaled or (p.reduce == "sum" and isinstance(p.pair, Identity))
            )
            formed = scale.abs() if by_logits else torch.maximum(scale.abs(), unit)
            if p.operand == "sqdist" and self.unscaled:  # |x|^2 + |y|^2 - 2 <x, y> of opposed rows, before it is scaled
                formed = 2.0 * formed
            reach = (formed * size + p.shift.abs()).detach()
            largest = float(z.detach().abs().max())
            self.largest = max(self.largest, float(reach.max()), largest)
            if p.reduce == "logsumexp":
                exponent = float((scale.abs() * size + p.shift.abs()).detach().max())
                self.largest_exponent = max(self.largest_exponent, largest, exponent)
            elif p.pair.name == "square" and p.operand == "dot":  # its closed form goes through sum_j y_j y_j^T
                self.largest = max(self.largest, *(float(t.detach().square().sum()) for t in (x, y)))
        if self.rounds_weights and z.requires_grad:
            z.register_hook(lambda w: in_dtype(w, p.x.dtype, 1.0 + 0.37 * self.seed % 1.0))
        return p.pair.f(z if keep is None else torch.where(keep, z, 1.0)), keep

    def _squares(self, rows_: Tensor, k: int) -> Tensor:
        """|x_i|^2, whose gradient diag(W 1) X is off by a rounding of its own, also where W Y takes all of it out again."""
        squares = rows_.square().sum(1)
        if self.units and squares.requires_grad:
            noise = rows(len(squares), 1, self.seed + k)[:, 0].to(squares.dtype)
            unit = self.units * (self.eps or precision(squares.dtype))
            squares.register_hook(lambda w: w * (1.0 + unit * noise))
        return squares

    def _reduced(self, p: Problem, f: Tensor, keep: Tensor | None, dim: int) -> Tensor:
        self.reductions += 1
        if p.reduce == "sum":
            r = (f if keep is None else torch.where(keep, f, 0.0)).sum(dim)
            if self.units and p.pair.name == "square" and closed_form.applies(p):
                # Gram matrices have every row whole, as pair_reduce says.
                x, y = p.x.to(p.dtype), (p.x if p.y is None else p.y).to(p.dtype)
                rows_, others = (x, y) if dim else (y, x)
                # They are the same for all rows, which may err alike.
                noise = self._noise(p, r)
                noise = noise.abs().amax() if self.seed % 4 == 3 and noise.numel() else noise
                r = r + noise * (p.scale * torch.linalg.vector_norm(rows_, dim=1)).square() * others.square().sum()
            # Of products it is their own error, which rows that are moved make. Pairs that are alike may err alike.
            noise = self._noise(p, r)
            noise = noise.abs().amax() if self.seed % 4 == 3 and noise.numel() else noise
            return r * (1.0 + noise) if self.dot or not isinstance(p.pair, Identity) else r
        masked = torch.isneginf(f) if keep is None else ~keep | torch.isneginf(f)
        empty = masked.all(dim, keepdim=True)
        found = torch.logsumexp(torch.where(empty, 0.0, torch.where(masked, float("-inf"), f)), dim)
        # The logarithm of a sum is known to eps, however small it is; and it is stored, which rounds it, and with it the weights
        # that are formed of it, e^(z - r), as long as that is small.
        held, noise = found.detach(), self._noise(p, found)
        size = held.abs().nan_to_num(0.0, 0.0, 0.0)
        if (
            self.rounds_weights
        ):  # GPU kernels take all exponentials from one reference, as far as it is from what rows may reach
            size = size + min(self.largest, 4.0 * SHARED)
        of_weights = torch.where(held.isfinite(), found - held, 0.0) * (1.0 + 0.5 * size.clamp(max=self.exact))
        found = found + noise * (1.0 + 0.5 * size + of_weights)
        return torch.where(empty.squeeze(dim), float("-inf"), found) if f.shape[dim] else f.sum(dim) - float("inf")

    def _noise(self, p: Problem, r: Tensor) -> Tensor:
        """For each of r a rounding or less, another one in each reduction: differences of two do not lose it."""
        noise = rows(len(r), 1, self.seed + 50 + 100 * self.reductions)[:, 0]
        return noise.to(p.dtype) * (self.units * (self.eps or precision(p.dtype)))


def contrast(z: Tensor) -> Tensor:
    """log(1 + e^z), whose second derivative F.softplus ends at its threshold: a part in e^40 of a slope may be 1e17."""
    below = torch.where(z > 0.0, -z, z)
    return torch.where(z > 0.0, z, 0.0) + torch.log1p(below.exp())


def _are_equal(x: Tensor) -> Tensor:
    """(n, 1) of which rows all entries are."""
    return torch.isclose(x, x[:, :1], rtol=1e-5, atol=0.0).all(1, keepdim=True)


def unit_of(rows: Tensor) -> Tensor:
    """A power of two near the largest entry of rows that are so long that products of theirs may overflow; 1 for others."""
    largest = rows.detach().abs().amax() if rows.numel() else rows.new_zeros(())
    return torch.where((largest > 1e15) & largest.isfinite(), torch.exp2(largest.log2().floor()), 1.0)


def shortened(rows: Tensor) -> Tensor:
    """Rows in that unit."""
    return rows / unit_of(rows)


def in_dtype(w: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Weights rounded to a dtype in a unit that is a kernel's own; float16's largest is near 2^12, so that few are subnormals."""
    largest = w.abs().amax() if w.numel() and dtype == torch.float16 else w.new_zeros(())
    unit = torch.where(largest > 0.0, largest * 2.0**-12, 1.0) * factor
    return (w / unit).to(dtype).to(w.dtype) * unit


def precision(dtype: torch.dtype) -> float:
    """eps; of float64 what is asked of it, since what it is compared with is no better."""
    return 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps


def unit_rows(x: Tensor) -> Tensor:
    """Rows over max(|x|, 1e-12), by autograd, in the accumulation dtype, in the range of which squares stay."""
    if not x.numel():
        return x
    wide = x.to(accumulation_dtype(x.dtype))
    largest = wide.detach().abs().amax(1, keepdim=True)
    largest = torch.where(
        largest > 0, torch.exp2(largest.log2().ceil().clamp(-120, 120)), 1.0
    )  # a power of 2 rounds nothing
    scaled = wide / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    least = 1e-12 / largest
    return torch.where(length > least, scaled / torch.where(length > least, length, 1.0), wide / 1e-12).to(x.dtype)


@contextmanager
def clamped_as(dtype: torch.dtype, ties: float = 1.0) -> Iterator[None]:
    """Within the context what is documented in roundings is in those of that dtype; of ties that many times the margin.

    Riesz kernels clamp |x - y|^2 (4 eps, as kcl says), and similarities tie (sqrt(d) eps, as retrieval_accuracy says): that of a
    row with its match may be rounded apart from that of the same pair among all.
    """
    floor, tie, product = kernel._floor, retrieval._tie, retrieval.row_dot

    def apart(x: Tensor, y: Tensor) -> Tensor:
        own = product(x, y)
        return own + (ties != 1.0) * tie(x.to(dtype)) * rows(len(own), 1, 5)[:, 0].to(own) * own.abs()

    with (
        patch.object(kernel, "_floor", lambda _: floor(dtype)),
        patch.object(retrieval, "_tie", lambda rows: ties * tie(rows.to(dtype))),
        patch.object(retrieval, "row_dot", apart),
    ):
        yield


@contextmanager
def plainly(engine: Plain | None) -> Iterator[None]:
    """Within the context every formula of fastcl runs on plain PyTorch: without the extension, and on that engine.

    Without an engine it is the rows that are brought to their lengths by plain PyTorch, and pairs are whose they were.
    """
    with patch.object(extension, "library", None):
        rounded = (engine or Plain()).rounded
        standing_in: dict[Any, Any] = {normalize_rows: rounded(unit_rows), clip_norms: rounded(clip_norms)}
        if engine is not None:
            standing_in |= {ops.pair_reduce: engine.pair_reduce, ops.pair_total: engine.pair_total}
        changed = [
            patch.object(module, original.__name__, ours)
            for original, ours in standing_in.items()
            for key, module in list(sys.modules.items())
            if key.partition(".")[0] == "fastcl" and module.__dict__.get(original.__name__) is original
        ]
        for each in changed:
            each.start()
        try:
            yield
        finally:
            for each in reversed(changed):
                each.stop()
