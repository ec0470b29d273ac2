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


def _products(p: Problem, backend: str, total: bool = False) -> tuple[int, int, int]:
    """Flops of z, with those of the guides beside it, and of the gradients of either side."""
    n, m, d = p.n, p.m, p.x.shape[1]
    if choice.is_reference(backend) or not closed_form.applies(p):
        guided = 0 if p.mask.guide_x is None else 2 * n * m * p.mask.guide_x.shape[1]
        return 2 * n * m * d + guided, 2 * n * m * d, 2 * n * m * d
    if p.pair.name == "identity":
        return 0, 0, 0
    both = 2 * d * d * (n + m)
    # With a total's value its Gram matrices are there: each gradient is one product of its rows with one of them.
    return (both, 2 * d * d * n, 2 * d * d * m) if total else (both, both, both)


def _of_wanted(p: Problem, wanted: list[bool], of_x: int, of_y: int) -> int:
    return of_x * wanted[0] + of_y * wanted[0 if p.y is None else 1]


def _pair_reduce(*arguments: Any, out_val: Any = None) -> int:
    return _products(unpack(arguments), arguments[-1])[0]


def _pair_reduce_backward(*arguments: Any, out_val: Any = None) -> int:
    p = unpack(arguments)
    return _of_wanted(p, arguments[-3], *_products(p, arguments[-1])[1:])


def _pair_total(*arguments: Any, out_val: Any = None) -> int:
    p = unpack(arguments)
    forward, *sides = _products(p, arguments[-1], total=True)
    return forward + _of_wanted(p, arguments[-2], *sides)


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
