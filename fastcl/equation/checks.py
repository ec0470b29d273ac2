"""Checks, made once, before memory is touched: every error says what was expected, what came, and what to do.

Python numbers are checked; tensor values never are (that would read them on the host).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import DTYPES, as_tensor, boolean, cast, dense, integer, kind_of, number, one_of, positive_number, real
from .masks import KINDS, Mask, three_diagonals
from .pairs import PairFunction, pair_function
from .problem import OPERANDS, OUTERS, REDUCTIONS, accumulation_dtype

PLAIN = (Tensor, torch.nn.Parameter)

INDEX = "an index within the whole batch, between -2**62 and 2**62"


def is_dtensor(value: Any) -> bool:
    """Whether this is a torch.distributed.tensor.DTensor, which takes long to import and may not be there."""
    return isinstance(value, Tensor) and type(value) not in PLAIN and hasattr(value, "device_mesh")


def matrix(name: str, x: Any) -> Tensor:
    """A (rows, d) tensor of a supported floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(x)}{as_tensor(name, x)}")
    if is_dtensor(x):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass {name}.full_tensor(), or own rows by {name}.to_local()"
        )
    dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {kind_of(x)}; convert it, e.g. {name}{cast(x)}"
        )
    if x.dim() != 2:
        raise ValueError(f"{name}: expected a matrix (rows, d), got shape {tuple(x.shape)}; flatten or unsqueeze it")
    return x


def like(name: str, y: Tensor, other: str, x: Tensor) -> None:
    """y has the dtype of x, or autocast will give both the same; and the device of x."""
    if y.dtype != x.dtype and not _autocast_unifies(x, y):
        raise TypeError(f"{name}: expected the dtype of {other}, {kind_of(x)}, got {kind_of(y)}; convert one of them")
    if y.device != x.device:
        raise ValueError(f"{name}: expected the device of {other}, {x.device}, got {y.device}; move one of them")


def _autocast_unifies(x: Tensor, y: Tensor) -> bool:
    device = x.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, y.dtype)


def pair_of_matrices(name_x: str, x: Any, name_y: str, y: Any, same_rows: bool = False) -> None:
    """x (n, d) and y (m, d) agree in d, dtype and device; with same_rows also n = m."""
    x, y = matrix(name_x, x), matrix(name_y, y)
    like(name_y, y, name_x, x)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{name_y}: expected rows of the width of {name_x}, d = {x.shape[1]}, got d = {y.shape[1]}; project both to one width"
        )
    if same_rows and x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{name_y}: expected one row for each row of {name_x}, {x.shape[0]}, got {y.shape[0]}; pass rows in matching order"
        )


def some_rows(name: str, x: Tensor) -> None:
    """A mean over rows has some."""
    if not x.shape[0]:
        raise ValueError(f"{name}: expected at least 1 row, got 0: a mean over no rows; skip empty batches")


def vector(name: str, v: Any, length: int, of: str, x: Tensor) -> Tensor:
    """A floating vector of the given length on the device of x."""
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(v)}{as_tensor(name, v)}")
    dense(name, v)
    if v.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(v)}; convert it with {cast(v)}")
    if v.dim() != 1 or v.shape[0] != length:
        raise ValueError(f"{name}: expected shape ({length},), one value for each row of {of}, got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: expected the device of {of}, {x.device}, got {v.device}; move it")
    return v


def groups(name: str, g: Any, length: int, of: str, x: Tensor) -> Tensor:
    """An int64 vector, one group for each row."""
    if not isinstance(g, Tensor):
        raise TypeError(
            f"{name}: expected an int64 tensor, got {kind_of(g)}{as_tensor(name, g, ', dtype=torch.int64')}"
        )
    dense(name, g)
    if g.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {kind_of(g)}; convert it with {cast(g, 'long')}")
    if g.dim() != 1 or g.shape[0] != length:
        raise ValueError(f"{name}: expected shape ({length},), one group for each row of {of}, got {tuple(g.shape)}")
    if g.device != x.device:
        raise ValueError(f"{name}: expected the device of {of}, {x.device}, got {g.device}; move it")
    return g


def scalar(name: str, value: Any, x: Tensor) -> Tensor:
    """`value` as a 0-dim tensor of the accumulation dtype on the device of x; gradients pass through."""
    value, dtype = number(name, value, x), accumulation_dtype(x.dtype)
    if isinstance(value, Tensor):
        return value.to(device=x.device, dtype=dtype).reshape(())
    if torch.compiler.is_compiling():
        # torch.full makes a graph for each number; a product of one that changes, one for them all.
        return torch.ones((), dtype=dtype, device=x.device) * value
    return torch.scalar_tensor(value, dtype=dtype, device=x.device)  # half of torch.full's time


def mask(m: Any, x: Tensor, y: Tensor | None) -> Mask:
    """The mask, checked against the rows; a name stands for a mask without data."""
    if not (isinstance(m, Mask) and m.limited):
        return _indices(m, x, y)
    limit_x, limit_y = m.limit_x, m.limit_y
    if y is None and (limit_x is None or (limit_y is not None and limit_y is not limit_x)):
        raise ValueError("mask: x with itself has limits of its rows alone, got limit_y; leave limit_y out or pass y=x")
    guide_x, guide_y = _guides(m.guide_x, m.guide_y, x, y)
    return _indices(m.unlimited(), x, y)._replace(
        limit_x=_limits("limit_x", limit_x, x, "x", x),
        limit_y=None if y is None else _limits("limit_y", limit_y, y, "y", x),
        guide_x=guide_x,
        guide_y=guide_y,
    )


def _guides(s: Any, t: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Guides of rows and of columns, in the accumulation dtype and without a gradient."""
    if s is None and t is None:
        return None, None
    if y is None and t is not None and t is not s:
        raise ValueError("guide: x with itself has one guide, of its rows, got two; pass guide=s or y=x")
    if y is not None and t is None:
        raise ValueError("guide: expected (s, t), of the rows of x and of y, got one tensor; pass guide=(s, t)")
    found: list[Tensor] = []
    for name, guide, rows, of in (("guide[0]", s, x, "x"), ("guide[1]", t, y, "y")):
        if rows is None:
            return found[0], None
        matrix(name, guide)
        if guide.shape[0] != rows.shape[0]:
            raise ValueError(f"{name}: expected one row for each row of {of}, {rows.shape[0]}, got {guide.shape[0]}")
        if guide.shape[1] != s.shape[1] or not guide.shape[1]:
            raise ValueError(
                f"{name}: expected rows of one width of 1 or more, k = {s.shape[1]} for guide[0], got k = {guide.shape[1]}"
            )
        if guide.device != x.device:
            raise ValueError(f"{name}: expected the device of {of}, {x.device}, got {guide.device}; move it")
        found.append(guide.detach().to(accumulation_dtype(x.dtype)))
    return found[0], found[1]


def _limits(name: str, limits: Any, rows: Tensor, of: str, x: Tensor) -> Tensor | None:
    """A limit for each of the rows, in the accumulation dtype and without a gradient."""
    if limits is None:
        return None
    return vector(name, limits, rows.shape[0], of, x).detach().to(accumulation_dtype(x.dtype))


def _indices(m: Any, x: Tensor, y: Tensor | None) -> Mask:
    """The mask without limits."""
    if isinstance(m, str):
        if m in ("across_groups", "within_groups"):
            raise ValueError(f"mask: {m!r} needs groups; pass fastcl.{m}(group_x, group_y)")
        m = Mask(one_of("mask", m, KINDS))
    if not isinstance(m, Mask):
        raise TypeError(
            f"mask: expected a name or a fastcl.Mask, got {type(m).__name__}; build one with fastcl.off_diagonal()"
        )
    one_of("mask", m.kind, KINDS)
    if m.kind in ("all", "off_diagonal"):
        row, col, period = (integer(k, getattr(m, k), expected=INDEX) for k in ("row_offset", "col_offset", "period"))
        m = m._replace(row_offset=row, col_offset=col, period=period)
        if m.period < 0:
            raise ValueError(f"period: expected how many rows lie between two views, 0 or more, got {m.period}")
        if y is None and m.row_offset != m.col_offset:
            raise ValueError(
                f"mask: x with itself needs equal offsets, got row_offset={m.row_offset} and col_offset={m.col_offset}; pass y=x"
            )
        periodic = m.kind == "off_diagonal" and m.period
        return three_diagonals(m, x.shape[0], None if y is None else y.shape[0], x.device) if periodic else m
    group_x = groups("group_x", m.group_x, x.shape[0], "x", x)
    if y is None:
        if m.group_y is not None and m.group_y is not m.group_x:
            raise ValueError(
                "mask: x with itself needs one vector of groups, got group_x and group_y; leave group_y out or pass y=x"
            )
        return Mask(m.kind, 0, 0, group_x, None)
    group_y = m.group_x if m.group_y is None else m.group_y
    return Mask(m.kind, 0, 0, group_x, groups("group_y", group_y, y.shape[0], "y", x))


def reduction_of_pairs(operand: Any, pair: Any, reduce: Any, x: Tensor) -> PairFunction:
    """The pair function; operand and reduce are known and agree with it, its constants with the dtype of x."""
    one_of("operand", operand, OPERANDS)
    one_of("reduce", reduce, REDUCTIONS)
    f = pair_function(pair)
    f.checked(x)
    if reduce == "logsumexp" and f.name != "identity":
        raise ValueError(f"pair: reduce='logsumexp' goes with pair='identity' only, got {f.name!r}; use reduce='sum'")
    return f


def outer(name: Any, reduce: str, positive: Any, x: Tensor) -> None:
    """The outer form goes with the reduction, and a positive is given exactly for contrast."""
    one_of("outer", name, OUTERS)
    if name in ("contrast", "pooled") and reduce != "logsumexp":
        raise ValueError(f"outer: {name!r} goes with reduce='logsumexp' only, got {reduce!r}; use outer='sum'")
    if (positive is not None) != (name == "contrast"):
        got = "none" if positive is None else "one"
        raise ValueError(f"positive: expected a vector exactly when outer='contrast', got {got} with outer={name!r}")
    if positive is not None:
        vector("positive", positive, x.shape[0], "x", x)


__all__ = [
    "DTYPES", "boolean", "groups", "integer", "like", "mask", "matrix", "number", "one_of", "outer", "pair_of_matrices",
    "positive_number", "real", "reduction_of_pairs", "scalar", "some_rows", "vector",
]  # fmt: skip
