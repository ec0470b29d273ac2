"""Checks, made once, before memory is touched: every error says what was expected, what came, and what to do.

Python numbers are checked; tensor values never are (that would read them on the host).
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .masks import KINDS, Mask
from .pairs import PairFunction, pair_function
from .problem import OPERANDS, OUTERS, REDUCTIONS, accumulation_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def one_of(argument: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it is one of the allowed names; otherwise a ValueError with the nearest name."""
    if value in allowed:
        return str(value)
    near = get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}: expected one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def matrix(name: str, x: Any) -> Tensor:
    """A (rows, d) tensor of a supported floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a {_layout(x)} one; convert it, e.g. {name}.to_dense()")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float64, float32, bfloat16 or float16, got {_dtype(x)}; convert it, e.g. {name}.float()"
        )
    if x.dim() != 2:
        raise ValueError(f"{name}: expected a matrix (rows, d), got shape {tuple(x.shape)}; flatten or unsqueeze it")
    return x


def like(name: str, y: Tensor, other: str, x: Tensor) -> None:
    """y has the dtype of x, or autocast will give both the same; and the device of x."""
    if y.dtype != x.dtype and not _autocast_unifies(x, y):
        raise TypeError(f"{name}: expected the dtype of {other}, {_dtype(x)}, got {_dtype(y)}; convert one of them")
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


def vector(name: str, v: Any, length: int, of: str, x: Tensor) -> Tensor:
    """A floating vector of the given length on the device of x."""
    if not isinstance(v, Tensor) or not v.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {_dtype(v)}")
    if v.dim() != 1 or v.shape[0] != length:
        raise ValueError(f"{name}: expected shape ({length},), one value for each row of {of}, got {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{name}: expected the device of {of}, {x.device}, got {v.device}; move it")
    return v


def groups(name: str, g: Any, length: int, of: str, x: Tensor) -> Tensor:
    """An int64 vector, one group for each row."""
    if not isinstance(g, Tensor) or g.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {_dtype(g)}; convert it with .long()")
    if g.dim() != 1 or g.shape[0] != length:
        raise ValueError(f"{name}: expected shape ({length},), one group for each row of {of}, got {tuple(g.shape)}")
    if g.device != x.device:
        raise ValueError(f"{name}: expected the device of {of}, {x.device}, got {g.device}; move it")
    return g


def number(name: str, value: Any) -> float | Tensor:
    """A finite Python number, or a floating tensor with one element (whose value is not read)."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(
                f"{name}: expected a number or a floating-point tensor, got {_dtype(value)}; convert it with .float()"
            )
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor with one element, got shape {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number or a tensor with one element, got {type(value).__name__}")
    if not float("-inf") < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value  # type: ignore[return-value]


def positive_number(name: str, value: Any) -> float | Tensor:
    """A finite number > 0, or a tensor with one element (whose value is not read)."""
    value = number(name, value)
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return value


def scalar(name: str, value: Any, x: Tensor) -> Tensor:
    """`value` as a 0-dim tensor of the accumulation dtype on the device of x; gradients pass through."""
    value, dtype = number(name, value), accumulation_dtype(x.dtype)
    if isinstance(value, Tensor):
        return value.to(device=x.device, dtype=dtype).reshape(())
    if torch.compiler.is_compiling():
        # torch.full makes a graph for each number; a product of one that changes, one for them all.
        return torch.ones((), dtype=dtype, device=x.device) * value
    return torch.full((), value, dtype=dtype, device=x.device)


def offset(name: str, value: Any) -> None:
    """The index of a row within the whole batch: an int64 for the kernels."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}; pass int({name})")
    if not -(2**62) <= value <= 2**62:
        raise ValueError(f"{name}: expected an index within the whole batch, between -2**62 and 2**62, got {value}")


def mask(m: Any, x: Tensor, y: Tensor | None) -> Mask:
    """The mask, checked against the rows; a name stands for a mask without data."""
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
        for name in ("row_offset", "col_offset"):
            offset(name, getattr(m, name))
        if y is None and m.row_offset != m.col_offset:
            raise ValueError(
                f"mask: x with itself needs equal offsets, got row_offset={m.row_offset} and col_offset={m.col_offset}; pass y=x"
            )
        return m
    group_x = groups("group_x", m.group_x, x.shape[0], "x", x)
    if y is None:
        if m.group_y is not None and m.group_y is not m.group_x:
            raise ValueError(
                "mask: x with itself needs one vector of groups, got group_x and group_y; leave group_y out or pass y=x"
            )
        return Mask(m.kind, 0, 0, group_x, None)
    group_y = m.group_x if m.group_y is None else m.group_y
    return Mask(m.kind, 0, 0, group_x, groups("group_y", group_y, y.shape[0], "y", x))


def reduction_of_pairs(operand: Any, pair: Any, reduce: Any) -> PairFunction:
    """The pair function; operand and reduce are known and agree with it."""
    one_of("operand", operand, OPERANDS)
    one_of("reduce", reduce, REDUCTIONS)
    f = pair_function(pair)
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


def _layout(x: Tensor) -> str:
    return "nested" if x.is_nested else str(x.layout).removeprefix("torch.").replace("_", " ")


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
