"""Large upstream gradients of losses of float16 rows, as torch.amp.GradScaler makes them: divided by a power of 2 on their way
through the loss, and multiplied by it where its gradients leave it.

Within a loss a gradient of unit rows is float16, and overflows at 65504 where that of the rows themselves, over their norms, may
be far from it; two such parts with opposite signs would be NaN. What is divided away is what the loss's mean over n rows does not
take: an upstream of n or less is left as it is, bit for bit. So is what a steep loss multiplies by: a scale of 1e20 takes the
gradient of a positive and that of the other pairs beyond float16 with opposite signs, their sum NaN.

A transform (torch.func.grad, vjp) takes no such Function: for it the loss is worked out on float32 rows, whose gradients are
rounded where they leave it. So is a loss whose slope has no bound: log(1 - tau e^-r) near its clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import transforms
from .precision import full_precision

if TYPE_CHECKING:
    from .distributed.spelling import Spelt

# Numbers by which (1), or by whose inverse (-1), the gradients of unit rows grow; up to STEEP float16 holds each part of them.
SLOPES = {"logit_scale": 1, "temperature": -1, "beta": 1, "t": 1, "sigma": -1}
STEEP = 2.0**12
UNBOUNDED = ("debiased", "hard_negative")
QUARTIC = ("spread_out",)  # of rows as they are, in parts of either sign
STATE = ("log_u", "statistic")  # matrices that are no rows of the batch: in a dtype of their own


def scaled(
    spelt: Spelt,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int | None = None,
    agreed: Callable[[Tensor], Tensor] | None = None,
    wide: dict[int, Tensor] | None = None,
) -> Any:
    """The objective of these arguments, scaled where some tensor wants a gradient and rows are float16; for a transform in float32.

    Args:
        spelt: an objective.
        args: of it.
        kwargs: of it.
        rows: how many the batch has; None where they are all here.
        agreed: the largest of a number on every rank, so that all ranks divide by the same; None for this process alone.
        wide: for the id of a float16 tensor the same in float32, whose gradient is not rounded to float16 where it leaves the loss.
    """
    values = [*args, *kwargs.values()]
    if not any(map(overflows, values)):
        return spelt.function(*args, **kwargs)
    rows_here = rows_of(spelt, args, kwargs)
    name = spelt.function.__name__
    if transforms.active() or name in UNBOUNDED or (name in QUARTIC and kwargs.get("normalize") is False):
        return _in_float32(spelt.function, rows_here, args, kwargs, wide or {})
    if not (torch.is_grad_enabled() and any(_wants(v) for v in values)):
        return spelt.function(*args, **kwargs)
    wires: list[Tensor] = []

    def entered(value: Any) -> Any:
        if not _wants(value):
            return value
        # A number's gradient is rounded to float16 once it has its size again, of which there may be little for a small upstream.
        dtype = torch.promote_types(value.dtype, torch.float32) if value.numel() == 1 and value.dim() < 2 else value.dtype
        inside, wire = _Enter.apply((wide or {}).get(id(value), value), dtype)
        wires.append(wire)
        return inside

    answer = spelt.function(*map(entered, args), **{name: entered(value) for name, value in kwargs.items()})
    losses = tuple(answer) if isinstance(answer, tuple) else (answer,)
    most = largest_upstream(rows_here, kwargs, rows)
    differentiable = [loss for loss in losses if loss.requires_grad]  # what a Function returns wants gradients, all of it
    if not differentiable:
        return answer
    left = iter(
        _Leave.apply((most, agreed), len(differentiable), _steepness(rows_here, kwargs), *differentiable, *wires)
    )
    found = [next(left) if loss.requires_grad else loss for loss in losses]
    return type(answer)(*found) if isinstance(answer, tuple) else found[0]


def rows_of(spelt: Spelt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating matrices of a call that are rows: all but state, by its name."""
    named = (*zip(chain(spelt.parameters, repeat("")), args, strict=False), *kwargs.items())
    return [
        v for name, v in named if name not in STATE and isinstance(v, Tensor) and v.dim() == 2 and v.is_floating_point()
    ]


def largest_upstream(rows_here: list[Tensor], kwargs: dict[str, Any], rows: int | None) -> float:
    """The largest upstream gradient that a loss of float16 rows takes as it is."""
    if kwargs.get("reduction", "mean") != "mean":
        return 1.0
    return float(rows or max(1, *(v.shape[0] for v in rows_here)))


def _steepness(rows: list[Tensor], kwargs: dict[str, Any]) -> Tensor | None:
    """By what a gradient of 1 may grow within the loss, in units of STEEP; None where the numbers are known and are not steep."""
    numbers = [(kwargs[name], power) for name, power in SLOPES.items() if kwargs.get(name) is not None]
    long = kwargs.get("normalize") is False and any(x.numel() for x in rows)
    known = 1.0
    for number, power in numbers:
        if not isinstance(number, Tensor):
            known = known * max(number if power > 0 else 1.0 / number, 1.0)
    tensors = [number for number, _ in numbers if isinstance(number, Tensor)]
    if not (tensors or long or known > STEEP):
        return None
    # In a tensor: a number that changes would make a graph of torch.compile for each value.
    steep = torch.ones((), dtype=torch.float32, device=rows[0].device).mul(known / STEEP)
    for number, power in numbers:
        if isinstance(number, Tensor):
            number = number.detach().reshape(()).to(steep)
            steep = steep * (number if power > 0 else 1.0 / number).clamp(min=1.0, max=2.0**100)
    if long:
        entries = torch.stack([torch.linalg.vector_norm(x.detach(), float("inf")).float() for x in rows if x.numel()])
        steep = steep * entries.amax().nan_to_num(1.0, posinf=1.0).clamp(min=1.0, max=2.0**100)
    return torch.where(steep > 1.0, steep.clamp(max=2.0**100), 0.0)


def _in_float32(
    function: Callable[..., Any], rows: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], wide: dict[int, Tensor]
) -> Any:
    """function(*args, **kwargs) of wider rows, without autocast to float16; rows of several dtypes stay, for its error."""
    if len({v.dtype for v in rows}) > 1:
        return function(*args, **kwargs)

    def widened(value: Any) -> Any:
        return wide.get(id(value), value).float() if any(value is v for v in rows) else value

    with full_precision(rows[0].device):
        return function(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})


def _wants(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def overflows(value: Any) -> bool:
    """Whether these are rows that are float16, or will be under autocast."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return False
    if value.dtype == torch.float16:
        return True
    device = value.device.type
    cast = value.dtype in (torch.float32, torch.bfloat16) and device in ("cpu", "cuda")
    return cast and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class _Enter(torch.autograd.Function):
    """A tensor as it is, and a wire on which _Leave says in the backward what its gradient is to be multiplied by."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype = value.dtype
        return value.to(dtype).view_as(value), value.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None]:
        gradient, factor = upstream
        if gradient is None or factor is None:
            return gradient, None
        return (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor).to(ctx.dtype), None


class _Leave(torch.autograd.Function):
    """Losses as they are, whose upstream gradients are divided by a power of 2 that brings them to `most` or below.

    A steep loss's also times its steepness to 1 or below.
    """

    @staticmethod
    def forward(
        ctx: Any, limits: tuple[float, Any], count: int, steepness: Tensor | None, *values: Tensor
    ) -> tuple[Tensor, ...]:
        (ctx.most, ctx.agreed), ctx.wires = limits, len(values) - count
        ctx.save_for_backward(*(() if steepness is None else (steepness,)))
        return tuple(v.view_as(v) for v in values[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            largest = torch.stack([g.abs().amax() if g.numel() else g.sum() for g in upstream]).amax().float()
            excess = largest / ctx.most
            for steepness in ctx.saved_tensors:  # asked for once: checkpoint's hooks unpack no tensor a second time
                excess = torch.maximum(excess, largest * steepness)
        if ctx.agreed is not None:
            excess = ctx.agreed(excess)
        factor = torch.exp2(excess.log2().ceil()).clamp(min=1.0, max=2.0**100)
        factor = torch.where(excess.isfinite(), factor, 1.0)
        return (None, None, None, *(g / factor for g in upstream), *(factor for _ in range(ctx.wires)))
