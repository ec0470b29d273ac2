"""A whole loss of two aligned views in one call of compiled kernels and one node of autograd.

    contrast    L = s sum_i softplus(r_i - z_ii), and with columns half of this and half of the same of c
    sum         L = s sum_i [ e sum_{j != i} psi(z_ij) + phi(z_ii) ],   z_ij = a u(x_i, y_j) + b

s is 1 over the number of rows, or 1. Below a few hundred rows on a CPU, more on a GPU, a loss's time goes into the calls and nodes
between its parts. What the kernels do not serve, or PyTorch looks on at, is left to the formula that each objective is written as:
`at_once` answers None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .. import batch, derivatives
from ..backends import aligned, choice
from ..backends.aligned import Engine, Found, Four, Told
from ..backends.row_dot import in_one_pass
from ..equation.names import Operand, Outer, PairReduction
from . import rows as passes
from .energy import Potential

Sides = Literal["xy", "xx", "xx+yy", "stacked"]
NOTHING = Potential()
BOUND = 2.0**100  # of numbers, so that no product of theirs leaves float32


@dataclass(frozen=True)
class Whole:
    """What csrc/cpu/aligned.cpp and csrc/cuda/aligned.cpp are told of a loss.

    Whose pairs (stacked: of [x; y] with itself), and what becomes of them.
    """

    sides: Sides = "xy"
    outer: Outer = "sum"
    reduce: PairReduction = "sum"
    columns: bool = False
    operand: Operand = "dot"
    negatives: Potential = NOTHING
    positives: Potential = NOTHING

    @property
    def rows(self) -> int:
        """How many rows of the loss there are for each of x."""
        return 2 if self.sides == "stacked" and self.outer == "contrast" else 1

    def serves(self, x: Tensor, y: Tensor) -> bool:
        """Whether the kernels serve it, of rows of these shapes."""
        n, m = x.shape[0], y.shape[0]
        if not (x.shape[1] == y.shape[1] > 0 and n > 1):
            return False
        swept = self.reduce == "logsumexp" or (self.negatives.pair is not None and self.negatives.linear == 0.0)
        known = all(psi.pair is None or psi.pair.built_in for psi in (self.negatives, self.positives))
        return swept and known and (n == m or (n < m and self.sides == "xy" and not self.columns))


def at_once(
    whole: Whole,
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    shift: float | Tensor = 0.0,
    *,
    normalize: bool,
    reduction: str,
    backend: str | None,
    energy: float = 1.0,
    unless: tuple[Any, ...] = (),
) -> Tensor | None:
    """The loss, or None where it is to be taken by its formula, which also says what is wrong with the arguments.

    Args:
        whole: the loss.
        x, y, scale, shift, normalize, reduction, backend: the objective's own.
        energy: e.
        unless: those of its arguments that are not served where they are not None.
    """
    if not derivatives.nothing_but_autocast() or reduction == "none" or any(a is not None for a in unless):
        return None
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and aligned.plain(x, y) and whole.serves(x, y)):
        return None
    if x.dtype != y.dtype or x.device != y.device or batch.beyond_this_process():
        return None
    engine = _engine(backend, x)
    if engine is None:
        return None
    a, b = engine.number(scale, x), engine.number(shift, x)
    if a is None or b is None:
        return None
    recording = torch.is_grad_enabled() and derivatives.any_requires_grad(x, y, a, b)
    told = _told(whole, normalize, 1.0 if reduction == "sum" else 1.0 / (x.shape[0] * whole.rows), energy, x, y)
    if not engine.serves(told, x, y, recording):
        return None
    if recording:
        loss: Tensor = _AtOnce.apply(engine, backend, x, y, a, b, told)
        # Of a sum of infinite weights the formula's gradients are infinite with their sign (backends/beyond.py).
        return None if engine is _CPU and whole.reduce == "sum" and math.isinf(loss.detach().item()) else loss
    value: Tensor = engine.loss(x, y, a, b, told, (False, False, False, False))[0]
    return value


def _engine(backend: str | None, x: Tensor) -> Engine | None:
    """Who has the ops of whole losses for these rows."""
    if x.dtype not in passes.UNIT:  # float64 is left out: there the definition is torch's alone
        return None
    name, module = choice.choose(backend, x.device, x.dtype)
    if name == "cpu":
        return _CPU
    found: Engine | None = module.aligned if name == "cuda" else None
    return found


def _told(whole: Whole, normalize: bool, share: float, energy: float, x: Tensor, y: Tensor) -> Told:
    """The loss as the ops take it."""
    n, m = x.shape[0], y.shape[0]

    def term(psi: Potential, weight: float) -> tuple[str, list[float]]:
        name, constants = ("identity", ()) if psi.pair is None else (psi.pair.name, psi.pair.constants)
        return name, [weight * psi.coefficient, psi.slope, psi.offset, *constants]

    own, matching = whole.negatives, whole.positives
    pairs = n * (m - 1) * (2 if whole.sides == "xx+yy" else 1)
    constant = share * (energy * pairs * own.constant + n * matching.constant)
    of_others, of_matching = term(own, share * energy), term(matching, 0.0 if matching.pair is None else share)
    reduction = whole.sides, whole.operand, whole.reduce, whole.outer, whole.columns
    return Told(normalize, *reduction, *of_others, *of_matching, share * matching.linear, constant)


class _AtOnce(torch.autograd.Function):
    """The loss and what its gradients need from one call; these for the upstream gradient from another."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, backend: str | None, *given: Any) -> Tensor:
        x, y, a, b, told = given
        ctx.engine, ctx.backend, ctx.told, ctx.shape = engine, backend, told, x.shape
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[2:6]
        value, *found = engine.loss(x, y, a, b, told, needed)
        # As in torch a change in place of what the gradient is made of is an error; a queue that wants none may change.
        kept = [t if of or not told.normalize else None for t, of in zip((x, y), needed, strict=False)]
        ctx.dtypes = [x.dtype, y.dtype, *(t.dtype for t in found)]
        ctx.save_for_backward(*kept, *found)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        g, needed = upstream[0], ctx.needs_input_grad[2:6]
        if g is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            raise RuntimeError(derivatives.CREATE_GRAPH.format(name=choice.requested(ctx.backend)))
        x, y, *saved = ctx.saved_tensors
        for dtype, t in zip(ctx.dtypes, (x, y, *saved), strict=True):
            passes.check_saved(dtype, t)
        found = ctx.engine.gradients(g, x, y, saved, ctx.told, needed, ctx.shape)
        return (None, None, *(t if of else None for t, of in zip(found, needed, strict=True)), None)


@lru_cache(maxsize=256)
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.scalar_tensor(value, dtype=torch.float32, device="cpu")


class _Cpu:
    """By the CPU's kernels: the gradients of rows of unit length and of numbers come with the value."""

    def serves(self, told: Told, x: Tensor, y: Tensor, gradients: bool) -> bool:
        return in_one_pass(x, y) and not torch.is_autocast_enabled("cpu")

    def number(self, value: float | Tensor, x: Tensor) -> Tensor | None:
        if not isinstance(value, Tensor):
            return _constant(value) if abs(value) < BOUND else None
        return value if aligned.is_number(value, x.device) else None

    def loss(self, x: Tensor, y: Tensor, a: Any, b: Any, told: Told, wanted: Four) -> tuple[Tensor, ...]:
        return derivatives.run(torch.ops.fastcl.cpu_aligned_loss, x, y, a, b, *told, [*wanted, False, False])

    def gradients(
        self, g: Tensor, x: Tensor | None, y: Tensor | None, saved: list[Tensor], told: Told, wanted: Four, shape: torch.Size
    ) -> Found:  # fmt: skip
        of_x, of_y, *of_numbers = saved
        x, y = (rows if of else None for rows, of in zip((x, y), wanted, strict=False))
        if derivatives.nothing_watches():
            backward = torch.ops.fastcl.cpu_aligned_loss_backward
            found: tuple[Tensor | None, ...] = derivatives.run(backward, g, x, y, of_x, of_y, told.normalize)
        else:
            found = self._plainly(g, x, y, of_x, of_y, told.normalize)
        da, db = (g * t if of else None for t, of in zip(of_numbers, wanted[2:], strict=True))
        return found[0], found[1], da, db

    @staticmethod
    def _plainly(
        g: Tensor, x: Tensor | None, y: Tensor | None, of_x: Tensor, of_y: Tensor, normalize: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What cpu_aligned_loss_backward does, in plain PyTorch."""
        if y is not None and of_y.dim() == 1:  # of stacked rows, y's below x's
            of_y = of_x[-y.shape[0] :]
        if x is not None:
            of_x = of_x[: x.shape[0]]

        def of(rows: Tensor | None, of_unit: Tensor) -> Tensor | None:
            if rows is None:
                return None
            return passes.gradient_of_unit(g * of_unit, rows) if normalize else g * of_unit

        return of(x, of_x), of(y, of_y)


_CPU = _Cpu()
