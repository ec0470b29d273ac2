"""The one op in its two forms, as torch.library ops: schema, real, fake and autocast (derivatives.py has autograd).

    pair_reduce   r (and c), with any upstream gradient
    pair_total    outer(r), one scalar upstream gradient: value and gradients come from one call

Schemas are defined here, so that they exist without a compiler. The kernel ops at the end are what C++ implements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import derivatives, flops, transforms
from .backends import beyond, choice, closed_form, native
from .derivatives import present
from .equation import checks
from .equation.arguments import not_traced
from .equation.masks import Mask
from .equation.names import Backend, Operand, Outer, PairReduction
from .equation.pairs import PairFunction
from .equation.problem import (
    ALIGNED,
    DIFFERENTIABLE,
    LENGTH,
    PROBLEM,
    TENSORS,
    Problem,
    Wanted,
    accumulation_dtype,
    pack,
    unpack,
)

library = torch.library.Library("fastcl", "DEF")
library.define(f"pair_reduce({PROBLEM}, str backend) -> (Tensor r, Tensor c)", tags=(torch.Tag.pt2_compliant_tag,))
library.define(
    f"pair_reduce_backward({PROBLEM}, Tensor r, Tensor c, Tensor g, Tensor h, bool[] wanted, bool wide, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"pair_total({PROBLEM}, Tensor? positive, str outer, bool[] wanted, str backend)"
    " -> (Tensor value, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What csrc/cpu implements; an absent output is an empty tensor.
library.define(f"kernel_rows({PROBLEM}) -> (Tensor, Tensor)")
library.define(
    f"kernel_gradients({PROBLEM}, Tensor r, Tensor c, Tensor g, Tensor h, bool[] wanted, bool wide)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"kernel_total({PROBLEM}, Tensor? positive, str outer, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

library.define(f"cpu_aligned_loss({ALIGNED}) -> (Tensor value, Tensor, Tensor, Tensor, Tensor)")
library.define(
    "cpu_aligned_loss_backward(Tensor upstream, Tensor? x, Tensor? y, Tensor of_x, Tensor of_y, bool normalize) -> (Tensor, Tensor)"
)


def _serve(p: Problem, backend: str) -> Any:
    """The module that serves the problem: a closed form where there is one, then the backend (chosen here, at run time)."""
    flops.register_where_counted()
    name, module = choice.choose(backend, p.x.device, p.x.dtype, p.pair)
    return closed_form if name != "reference" and closed_form.applies(p) else module


def _absent(t: Tensor, wanted: bool) -> Tensor | None:
    return t if wanted else None


# ---- real -----------------------------------------------------------------------------------------------------------------


def _pair_reduce(*arguments: Any) -> tuple[Tensor, ...]:
    p = unpack(arguments)
    r, c = _serve(p, arguments[-1]).rows(p)
    return present((r, c), r)


def _pair_reduce_backward(*arguments: Any) -> tuple[Tensor, ...]:
    p = unpack(arguments)
    r, c, g, h, wanted, wide, backend = arguments[LENGTH:]
    given = (p, r, _absent(c, p.columns), g, _absent(h, p.columns), Wanted(*wanted))
    answer = beyond.gradients(*given, _serve(p, backend).gradients(*given, p.dtype if wide else None))
    return present(tuple(answer), r)


def _pair_total(*arguments: Any) -> tuple[Tensor, ...]:
    p = unpack(arguments)
    positive, outer, wanted, backend = arguments[LENGTH:]
    value, answer, dpositive = _serve(p, backend).total(p, positive, outer, Wanted(*wanted))
    answer = beyond.of_total(p, value, outer, Wanted(*wanted), answer)
    return (value, *present((*answer, dpositive), value))


# ---- fake -----------------------------------------------------------------------------------------------------------------


def _fake_gradients(arguments: tuple[Any, ...], wanted: list[bool], dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, y = arguments[0], arguments[1]
    m = x.shape[0] if y is None else y.shape[0]
    shapes = [(x.shape[0], x.shape[1]), (m, x.shape[1]), (), (), (x.shape[0],), (m,)]
    small = accumulation_dtype(x.dtype)
    dtypes = [dtype, dtype, small, small, small, small]
    return tuple(
        x.new_empty(s if w else (0,), dtype=t if w else small) for s, t, w in zip(shapes, dtypes, wanted, strict=True)
    )


def _fake_pair_reduce(*arguments: Any) -> tuple[Tensor, ...]:
    flops.register_where_counted()
    p = unpack(arguments)
    return p.x.new_empty(p.n, dtype=p.dtype), p.x.new_empty(p.m if p.columns else 0, dtype=p.dtype)


def _fake_pair_reduce_backward(*arguments: Any) -> tuple[Tensor, ...]:
    dtype, wide = arguments[0].dtype, arguments[-2]
    return _fake_gradients(arguments, arguments[-3], accumulation_dtype(dtype) if wide else dtype)


def _fake_pair_total(*arguments: Any) -> tuple[Tensor, ...]:
    flops.register_where_counted()
    x, positive, wanted = arguments[0], arguments[LENGTH], arguments[-2]
    dtype = accumulation_dtype(x.dtype)
    dpositive = x.new_empty(0 if positive is None else x.shape[0], dtype=dtype)
    return (x.new_empty((), dtype=dtype), *_fake_gradients(arguments, wanted, dtype), dpositive)


# ---- autocast -------------------------------------------------------------------------------------------------------------


def _autocast(op: Any, device: str) -> Callable[..., Any]:
    """Cast x and y as mm does, and nothing else: a scale or a bias keeps its precision, and so do products within the op."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    def call(x: Tensor, y: Tensor | None, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(cast(x, dtype), cast(y, dtype), *rest)

    return call


def _as_given(device: str) -> Callable[..., Any]:
    """A backward may run under autocast; its rows have been cast, or not, in the forward."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def call(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return torch.ops.fastcl.pair_reduce_backward(*arguments)

    return call


def _register() -> None:
    forms: list[tuple[str, Any, Any]] = [
        ("pair_reduce", _pair_reduce, _fake_pair_reduce),
        ("pair_reduce_backward", _pair_reduce_backward, _fake_pair_reduce_backward),
        ("pair_total", _pair_total, _fake_pair_total),
    ]
    for name, real, fake in forms:
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcl::{name}", fake, lib=library)
    derivatives.register(library)
    for device in ("cpu", "cuda"):
        for name in ("pair_reduce", "pair_total"):
            library.impl(name, _autocast(getattr(torch.ops.fastcl, name), device), f"Autocast{device.upper()}")
        library.impl("pair_reduce_backward", _as_given(device), f"Autocast{device.upper()}")


_register()


# ---- public ---------------------------------------------------------------------------------------------------------------


def problem(
    x: Tensor,
    y: Tensor | None,
    *,
    operand: str = "dot",
    pair: str | PairFunction = "identity",
    reduce: str = "logsumexp",
    mask: str | Mask = "all",
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
    columns: bool = False,
) -> Problem:
    """The checked problem; every error is raised here."""
    if torch._C._get_tracing_state() is not None:
        raise not_traced()
    checks.boolean("columns", columns)
    if y is None:
        checks.matrix("x", x)
        for name, given in (("bias_x", bias_x is not None), ("bias_y", bias_y is not None), ("columns", columns)):
            if given:
                raise ValueError(f"{name}: x with itself (y=None) takes no {name}; pass y=x")
    else:
        checks.pair_of_matrices("x", x, "y", y)
    dtype = accumulation_dtype(x.dtype)
    f = checks.reduction_of_pairs(operand, pair, reduce, x)
    if bias_x is not None:
        bias_x = checks.vector("bias_x", bias_x, x.shape[0], "x", x).to(dtype)
    if bias_y is not None and y is not None:
        bias_y = checks.vector("bias_y", bias_y, y.shape[0], "y", x).to(dtype)
    a, b = checks.scalar("scale", scale, x), checks.scalar("shift", shift, x)
    return Problem(x, y, a, b, bias_x, bias_y, checks.mask(mask, x, y), operand, f, reduce, columns)


class _Options(TypedDict, total=False):
    """For type checkers: what pair_reduce takes beside rows and columns."""

    operand: Operand
    pair: str | PairFunction
    reduce: PairReduction
    mask: str | Mask
    scale: float | Tensor
    shift: float | Tensor
    bias_x: Tensor | None
    bias_y: Tensor | None
    backend: Backend | None


@overload
def pair_reduce(
    x: Tensor, y: Tensor | None = None, *, columns: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...
@overload
def pair_reduce(
    x: Tensor, y: Tensor | None = None, *, columns: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def pair_reduce(
    x: Tensor, y: Tensor | None = None, *, columns: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
@transforms.of_keepable
def pair_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    operand: Operand = "dot",
    pair: str | PairFunction = "identity",
    reduce: PairReduction = "logsumexp",
    mask: str | Mask = "all",
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
    columns: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reduce a function of every visited pair of rows, without ever holding the n x m matrix.

        r_i = REDUCE_{j in M(i)} f(z_ij),   z_ij = a u(x_i, y_j) + b + bx_i + by_j,   c_j = REDUCE_{i: j in M(i)} f(z_ij)

    Gradients flow to x, y, scale, shift and the biases; memory is O(n d). sqdist is computed from norms and dot products about
    a common centre: its absolute error is eps (|x|^2 + |y|^2), right for unit rows, not for tiny distances between far rows.
    Sums of z^2 on dot where Gram matrices are cheaper (n = m > 4d/3) are taken over all pairs, minus the diagonal that the
    mask leaves out: their absolute error is eps |x_i|^2 sum_j |y_j|^2. A row that is far longer than the others would take their
    digits so; on a CPU such rows are found, and pairs visited. Log-sum-exps on a GPU may share one reference: they are off by eps
    times the largest |z| that the longest rows allow, as long as that is below 240. z itself must stay within the range of the
    result's dtype.

    Args:
        x: (n, d), float64, float32, bfloat16 or float16; any strides.
        y: (m, d), dtype and device of x. None means x itself: half the work, no biases, no columns.
        operand: u, "dot" <x_i, y_j> or "sqdist" |x_i - y_j|^2.
        pair: f, a name or a fastcl.pairs.PairFunction; "identity" for logsumexp.
        reduce: "logsumexp" or "sum".
        mask: M, "all", "off_diagonal" or a mask made by off_diagonal, across_groups, within_groups, at_most.
        scale: a, a number or a tensor with one element.
        shift: b, a number or a tensor with one element.
        bias_x: (n,) bx, floating; None for 0.
        bias_y: (m,) by, floating; None for 0.
        columns: whether to return c too, from the same sweep.
        backend: "auto" (None), "reference", "blocked", "cpu", "triton" or "cuda".

    Returns:
        r (n,), or (r, c) with c (m,); float32 (float64 for float64 input). A row with nothing left has sum 0 and logsumexp
        -inf, and gradient 0. A row of NaN makes NaN of the r_i of pairs that visit it and of no other; on a CPU of gradients
        likewise, while elsewhere it may reach all of them through pairs that the mask leaves out, as an infinite row may
        everywhere. Where Gram matrices are taken everything is NaN.

    Raises:
        ValueError: for shapes, names or values that do not fit.
        TypeError: for unsupported or mixed dtypes.
        BackendUnavailableError: when the backend asked for cannot serve the device and dtype.
        RuntimeError: from backward with create_graph=True, and for a derivative of a gradient under torch.func, except on backend
            "reference". Forward mode (one more sweep), grad, vjp, jacrev and vmap (entry by entry) are served by every backend.

    Examples:
        >>> x, y = torch.randn(1000, 64), torch.randn(5000, 64)
        >>> fastcl.pair_reduce(x, y, scale=0.1).shape  # log-sum-exp of each row of 0.1 x y^T
        torch.Size([1000])
        >>> r, c = fastcl.pair_reduce(x, y, operand="sqdist", pair="exp", reduce="sum", scale=-0.01, columns=True)
        >>> r.shape, c.shape
        (torch.Size([1000]), torch.Size([5000]))
    """
    if any(map(checks.is_dtensor, (x, y, scale, shift, bias_x, bias_y))):
        return _of_dtensors("pair_reduce", pair_reduce, locals())
    p = problem(
        x, y, operand=operand, pair=pair, reduce=reduce, mask=mask, scale=scale, shift=shift, bias_x=bias_x, bias_y=bias_y,
        columns=columns,
    )  # fmt: skip
    r, c = _call(torch.ops.fastcl.pair_reduce, p, (*pack(p), _backend(backend)))
    return (r, c) if columns else r


@transforms.of_keepable
def pair_total(
    x: Tensor,
    y: Tensor | None = None,
    *,
    outer: Outer,
    positive: Tensor | None = None,
    operand: Operand = "dot",
    pair: str | PairFunction = "identity",
    reduce: PairReduction = "logsumexp",
    mask: str | Mask = "all",
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Reduce all rows to one number, with value and gradients from one call.

        "sum": sum_i r_i      "contrast": sum_i softplus(r_i - p_i)      "pooled": log-sum-exp over all visited pairs

    Args:
        x, y, operand, pair, reduce, mask, scale, shift, bias_x, bias_y, backend: as in pair_reduce.
        outer: "sum", "contrast" or "pooled"; the last two go with reduce="logsumexp".
        positive: (n,) floating, p_i, the logit of each row's positive, which the mask leaves out; exactly for "contrast".

    Returns:
        A scalar, float32 (float64 for float64 input). Its gradients are formed for an upstream gradient of 1, and times yours in
        backward: what is beyond the dtype there stays infinite.

    Raises:
        ValueError, TypeError, BackendUnavailableError, RuntimeError: as in pair_reduce.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.pair_total(x, outer="sum", mask="off_diagonal")), 4)  # 4 log 3
        4.3944
    """
    if any(map(checks.is_dtensor, (x, y, scale, shift, bias_x, bias_y, positive))):
        return _of_dtensors("pair_total", pair_total, locals())
    p = problem(
        x, y, operand=operand, pair=pair, reduce=reduce, mask=mask, scale=scale, shift=shift, bias_x=bias_x, bias_y=bias_y,
        columns=False,
    )  # fmt: skip
    checks.outer(outer, reduce, positive, x)
    arguments = pack(p)
    if positive is not None:
        positive = positive.to(p.dtype)
    recording = torch.is_grad_enabled()
    wanted = [recording and t is not None and t.requires_grad for t in arguments[:DIFFERENTIABLE]]
    value: Tensor = _call(torch.ops.fastcl.pair_total, p, (*arguments, positive, outer, wanted, _backend(backend)))[0]
    return value


def _call(op: Any, p: Problem, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The op; by the straight way where the CPU's kernels serve a plain call of plain tensors."""
    plain = all(t is None or type(t) is Tensor or isinstance(t, torch.nn.Parameter) for t in arguments[:TENSORS])
    if plain and p.x.device.type == "cpu" and derivatives.nothing_watches() and _serve(p, arguments[-1]) is native:
        return derivatives.straight(op, arguments)
    answer: tuple[Tensor, ...] = op(*arguments)
    return answer


def _of_dtensors(form: str, op: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    from .distributed import dtensors  # which itself needs the ops

    return dtensors.pairs(form, op, arguments)


def _backend(backend: str | None) -> str:
    return "auto" if backend is None else checks.one_of("backend", backend, choice.NAMES)


__all__ = ["pair_reduce", "pair_total", "problem"]
