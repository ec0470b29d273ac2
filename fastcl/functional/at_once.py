"""A whole loss of two aligned views in one call of the CPU's kernels and one node of autograd.

    contrast    L = s sum_i softplus(r_i - z_ii), and with columns half of this and half of the same of c
    sum         L = s sum_i [ e sum_{j != i} psi(z_ij) + phi(z_ii) ],   z_ij = a u(x_i, y_j) + b

s is 1 over the number of rows, or 1. Below a few hundred rows a loss's time goes into the calls and nodes between its parts. What
the kernels do not serve, or PyTorch looks on at, is left to the formula that each objective is written as: `at_once` answers None.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .. import batch, derivatives
from ..backends import choice, native
from ..backends.row_dot import in_one_pass
from ..equation.names import Operand, Outer, PairReduction
from . import rows as passes
from .energy import Potential

Sides = Literal["xy", "xx", "xx+yy", "stacked"]
NOTHING = Potential()
BOUND = 2.0**100  # of numbers, so that no product of theirs leaves float32


@dataclass(frozen=True)
class Whole:
    """What csrc/cpu/aligned.cpp is told of a loss: whose pairs (stacked: of [x; y] with itself), and what becomes of them."""

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
    if not derivatives.nothing_watches() or reduction == "none" or any(a is not None for a in unless):
        return None
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and in_one_pass(x, y) and whole.serves(x, y)):
        return None
    if batch.beyond_this_process() or choice.choose(backend, x.device, x.dtype)[1] is not native:
        return None
    a, b = _number(scale), _number(shift)
    if a is None or b is None:
        return None
    share = 1.0 if reduction == "sum" else 1.0 / (x.shape[0] * whole.rows)
    given = (x, y, a, b, normalize, *_told(whole, share, energy, x.shape[0], y.shape[0]))
    if torch.is_grad_enabled() and derivatives.any_requires_grad(x, y, a, b):
        loss: Tensor = _AtOnce.apply(backend, *given)
        return loss
    return derivatives.run(torch.ops.fastcl.cpu_aligned_loss, *given, [False] * 6)[0]


def _told(whole: Whole, share: float, energy: float, n: int, m: int) -> tuple[Any, ...]:
    """The loss as the op's arguments from `sides` on."""

    def term(psi: Potential, weight: float) -> tuple[str, list[float]]:
        name, constants = ("identity", ()) if psi.pair is None else (psi.pair.name, psi.pair.constants)
        return name, [weight * psi.coefficient, psi.slope, psi.offset, *constants]

    own, matching = whole.negatives, whole.positives
    pairs = n * (m - 1) * (2 if whole.sides == "xx+yy" else 1)
    constant = share * (energy * pairs * own.constant + n * matching.constant)
    of_others, of_matching = term(own, share * energy), term(matching, 0.0 if matching.pair is None else share)
    reduction = whole.sides, whole.operand, whole.reduce, whole.outer, whole.columns
    return (*reduction, *of_others, *of_matching, share * matching.linear, constant)


@lru_cache(maxsize=256)
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.scalar_tensor(value, dtype=torch.float32, device="cpu")


def _number(value: float | Tensor) -> Tensor | None:
    """The number as the kernels take it; None where they do not."""
    if not isinstance(value, Tensor):
        return _constant(value) if abs(value) < BOUND else None
    plain = type(value) is Tensor or isinstance(value, torch.nn.Parameter)
    return value if plain and value.dtype == torch.float32 and value.dim() == 0 and value.device.type == "cpu" else None


class _AtOnce(torch.autograd.Function):
    """Loss and gradients of the rows of unit length from one call; those of the rows as they were given wait for the upstream."""

    @staticmethod
    def forward(ctx: Any, backend: str | None, *given: Any) -> Tensor:
        x, y, _, _, ctx.normalize = given[:5]
        ctx.backend, ctx.length = backend, len(given)
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[1:5]
        value, *found = derivatives.run(torch.ops.fastcl.cpu_aligned_loss, *given, [*needed, False, False])
        # As in torch a change in place of what the gradient is made of is an error; a queue that wants none may change.
        kept = [t if of or not ctx.normalize else None for t, of in zip((x, y), needed, strict=False)]
        ctx.save_for_backward(*kept, *found)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        g, needed = upstream[0], ctx.needs_input_grad[1:5]
        if g is None:
            return (None,) * (1 + ctx.length)
        if torch.is_grad_enabled():
            raise RuntimeError(derivatives.CREATE_GRAPH.format(name=choice.requested(ctx.backend)))
        x, y, of_x, of_y, *of_numbers = ctx.saved_tensors
        passes.check_saved(torch.float32, x, y, of_x, of_y)
        x, y = (rows if of else None for rows, of in zip((x, y), needed, strict=False))
        if derivatives.nothing_watches():
            found: tuple[Tensor | None, ...] = derivatives.run(
                torch.ops.fastcl.cpu_aligned_loss_backward, g, x, y, of_x, of_y, ctx.normalize
            )
        else:
            found = _gradients(g, x, y, of_x, of_y, ctx.normalize)
        dx, dy = (t if of else None for t, of in zip(found, needed, strict=False))
        da, db = (g * t if of else None for t, of in zip(of_numbers, needed[2:], strict=True))
        return (None, dx, dy, da, db, *(None,) * (ctx.length - 4))


def _gradients(
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
