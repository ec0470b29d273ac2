"""What torch's FlopCounterMode counts for the ops: the products of the dense formula, so that shares of a machine's peak compare.

    z = X Y^T     2 n m d forward
    dX = W Y      2 n m d, dY = W^T X likewise, each where it is wanted (in pair_total already in the forward)

A row with itself (y None) counts both roles, as the dense formula does. Where Gram matrices serve, their own products count;
sums of z itself make none. What kernels form again in a backward is theirs to hide, and is not counted.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from .backends import choice, closed_form
from .equation.problem import Problem, unpack


def _products(p: Problem, backend: str) -> tuple[int, int]:
    """Flops of z, with those of the guides beside it, and of the gradient of one side."""
    n, m, d = p.n, p.m, p.x.shape[1]
    if not _is_closed(p, backend):
        guided = 0 if p.mask.guide_x is None else 2 * n * m * p.mask.guide_x.shape[1]
        return 2 * n * m * d + guided, 2 * n * m * d
    return (0, 0) if p.pair.name == "identity" else (2 * d * d * (n + m), 2 * d * d * (n + m))


def _is_closed(p: Problem, backend: str) -> bool:
    return not choice.is_reference(backend) and closed_form.applies(p)


def _sides(p: Problem, wanted: list[bool]) -> int:
    return 2 * wanted[0] if p.y is None else sum(wanted[:2])


def _pair_reduce(*arguments: Any, out_val: Any = None) -> int:
    return _products(unpack(arguments), arguments[-1])[0]


def _pair_reduce_backward(*arguments: Any, out_val: Any = None) -> int:
    p = unpack(arguments)
    return _sides(p, arguments[-3]) * _products(p, arguments[-1])[1]


def _pair_total(*arguments: Any, out_val: Any = None) -> int:
    p = unpack(arguments)
    forward, side = _products(p, arguments[-1])
    wanted = arguments[-2]
    if p.pair.name == "square" and _is_closed(p, arguments[-1]):
        # Gram matrices are there with the value: each gradient is one product of its rows with one of them.
        half, of_y = 2 * p.x.shape[1] ** 2, wanted[0] if p.y is None else wanted[1]
        return forward + half * (p.n * wanted[0] + p.m * of_y)
    return forward + _sides(p, wanted) * side


FORMULAS = {"pair_reduce": _pair_reduce, "pair_reduce_backward": _pair_reduce_backward, "pair_total": _pair_total}
_MODULE = "torch.utils.flop_counter"
_registered = False


def register_where_counted() -> None:
    """Register the formulas once torch's flop counter is there: to import it is to import Triton, which takes half a second.

    A counter takes a copy of the formulas when it is made, and counts an op after having run it: one that was made before its
    first op of ours is found and told.
    """
    global _registered
    if _registered or _MODULE not in sys.modules:
        return
    _registered = True
    counter = sys.modules[_MODULE]
    ours = {getattr(torch.ops.fastcl, name): formula for name, formula in FORMULAS.items()}
    for op, formula in ours.items():
        counter.register_flop_formula(op, get_raw=True)(formula)
    for mode in gc.get_objects():
        if issubclass(type(mode), counter.FlopCounterMode):
            mode.flop_registry = ours | mode.flop_registry
