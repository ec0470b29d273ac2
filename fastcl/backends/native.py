"""The backend "cpu": the kernels of csrc/cpu behind the protocol of a backend.

torch's dispatcher releases the interpreter's lock while they run. They refuse what they must not read by ValueError: the library
knows no Python, and torch makes that of std::invalid_argument. A TypeError for a dtype that no check has seen yet, from a caller of
torch.ops.fastcl, is raised here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..equation.pairs import PairFunction
from ..equation.problem import PAIR, Gradients, Problem, Wanted, pack
from . import extension, own_pairs

kernels = torch.ops.fastcl
INTERRUPTED = "fastcl: interrupted by SIGINT"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this device and dtype, with what mends it; None when they can."""
    return (
        extension.reason if device.type == "cpu" else f"there are no kernels for {device.type}; use backend='blocked'"
    )


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked."""
    r, c = finished(kernels.kernel_rows, *_packed(p))
    return r, c if p.columns else None


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>; dx and dy in `dtype`, that of x or the accumulation dtype."""
    absent = r.new_empty(0)
    given = [absent if t is None else t for t in (r, c, g, h)]
    return _present(finished(kernels.kernel_gradients, *_packed(p), *given, list(wanted), dtype == p.dtype), wanted)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The value of the total form and its gradients for an upstream gradient of 1."""
    value, *answer, dpositive = finished(kernels.kernel_total, *_packed(p), positive, outer, list(wanted))
    return value, _present(answer, wanted), None if positive is None else dpositive


def finished(call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a kernel, which Ctrl-C stops between two tiles (csrc/cpu/interruption.h).

    Python then runs its handler here, in the loop: KeyboardInterrupt goes on to the caller, and after a handler that does not raise
    (one that takes a note, to stop after the step) the call is made again.
    """
    while True:
        try:
            return call(*arguments)
        except RuntimeError as error:
            if INTERRUPTED not in str(error):
                raise


def _packed(p: Problem) -> tuple[Any, ...]:
    """The problem as the op's arguments, its dtypes checked."""
    if p.x.dtype not in DTYPES:
        raise TypeError(f"x: expected float64, float32, bfloat16 or float16, got {p.x.dtype}")
    vectors = (("bias_x", p.bias_x, p.dtype), ("bias_y", p.bias_y, p.dtype))
    limits = (("limit_x", p.mask.limit_x, p.dtype), ("limit_y", p.mask.limit_y, p.dtype))
    groups = (("group_x", p.mask.group_x, torch.int64), ("group_y", p.mask.group_y, torch.int64))
    guides = (("guide_x", p.mask.guide_x, p.dtype), ("guide_y", p.mask.guide_y, p.dtype))
    for name, t, dtype in (("y", p.y, p.x.dtype), *vectors, *groups, *limits, *guides):
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")
    return by_kernel_name(pack(p))


def by_kernel_name(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments with the name by which the kernels know a pair function of a user's own."""
    known = PairFunction.by_key[arguments[PAIR]]
    if known.built_in:
        return arguments
    return (*arguments[:PAIR], own_pairs.kernel_name(known, arguments[PAIR + 1]), *arguments[PAIR + 1 :])


def _present(answer: Sequence[Tensor], wanted: Wanted) -> Gradients:
    return Gradients(*(t if w else None for t, w in zip(answer, wanted, strict=True)))
