"""An objective over ranks as one op of torch.compile's graph: the call as it is made without, in one node that nothing looks into.

    over_ranks(tensors, reals, integers, call, group, wanted) -> [value, the gradient of each tensor that wants one]

Value and gradients come from one call, whose messages are sent in the forward (at_once.py); the backward sends one number.

The call is spelt in a string that says all of it but the numbers and tensors: a graph that is kept, in this process or on a disk,
means the same wherever it is run. What it was spelt of, dynamo guards. Numbers are arguments of the op, reals in a tensor: one that
changes makes no graph for each value.

Both ops that send are effects in one order (torch.library): no compiler leaves one out, makes it twice or exchanges two.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.fx import traceback
from torch.utils import checkpoint

from .. import transforms
from ..equation.divergence import Divergence
from ..equation.problem import accumulation_dtype
from .derivatives import refuse
from .ranks import Ranks, process_group
from .wire import Wire

LARGEST = 2**62  # of an integer that an op takes
OBJECTIVES: dict[str, Callable[..., Any]] = {}  # those that a spelt call may name
PARAMETERS: dict[str, tuple[str, ...]] = {}  # of each, in their order
_ordered = hasattr(torch.library, "_register_effectful_op") and hasattr(torch._library, "effects")  # from torch 2.10 on


class Place(NamedTuple):
    """How and where a call is made: what is around it, and what its group says."""

    grad_mode: bool
    device: str
    autocast: str  # a dtype, or off
    gradient: Any
    strategy: Any


# ---- while a graph is traced ----------------------------------------------------------------------------------------------


def named(function: Callable[..., Any]) -> str | None:
    """The name under which a spelt call finds an objective; None for one that has no reduction, or stands within a function."""
    name, reduction = f"{function.__module__}:{function.__qualname__}", signature(function).parameters.get("reduction")
    if (
        "<locals>" in name
        or reduction is None
        or (reduction.kind, reduction.default) != (reduction.KEYWORD_ONLY, "mean")
    ):
        return None
    while name in OBJECTIVES:  # one that is defined anew: a graph of the other may be kept
        name += "'"
    OBJECTIVES[name], PARAMETERS[name] = function, tuple(signature(function).parameters)
    return name


def traced() -> bool:
    """Whether a graph is made, in which an op over ranks keeps its place."""
    return _ordered and torch.compiler.is_compiling() and not transforms.active()


def one_number(kwargs: dict[str, Any]) -> bool:
    """Whether a call of a named objective with these settings has one number as its answer."""
    several = kwargs.get("return_terms", False) or kwargs.get("return_log_u", False)
    return not several and kwargs.get("reduction", "mean") != "none"


class Spelling:
    """A call in a string, and beside it its tensors and numbers."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.reals: list[float] = []
        self.integers: list[int] = []
        self.unknown = False

    def of(self, value: Any) -> str:
        """An argument as Python would write it, with its kind before it."""
        if isinstance(value, Tensor):
            self.unknown |= value.is_meta or value.is_nested or value.layout != torch.strided  # what no call takes
            self.tensors.append(value)
            return f"('tensor', {len(self.tensors) - 1})"
        if value is None or type(value) is bool or type(value) is str:
            return f"('constant', {value!r})"
        if type(value) is float:
            self.reals.append(value)
            return f"('real', {len(self.reals) - 1})"
        if type(value) is int:
            if not -LARGEST < value < LARGEST:
                return f"('constant', {value!r})"
            self.integers.append(value)
            return f"('integer', {len(self.integers) - 1})"
        if type(value) is list or type(value) is tuple:
            return f"('{type(value).__name__}', [{', '.join([self.of(v) for v in value])}])"
        if type(value) is Divergence:
            return f"('divergence', {value.key!r})"
        self.unknown = True
        return ""


def called(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Ranks, autocast: str) -> Tensor | None:
    """The value of a call, by one op in the graph; None where it has something that is not spelt."""
    spelling = Spelling()
    positional = [spelling.of(value) for value in args]
    # As they are declared, rows first: the first matrix says of what dtype the value is.
    names = [key for key in PARAMETERS[name] if key in kwargs] + [key for key in kwargs if key not in PARAMETERS[name]]
    by_name = [f"{key!r}: {spelling.of(kwargs[key])}" for key in names if key != "group"]
    if spelling.unknown:
        return None
    rows = next((t for t in spelling.tensors if t.dim() == 2), None)
    device = torch.device("cpu") if rows is None else rows.device
    place = (torch.is_grad_enabled(), device.type, autocast, ranks.gradient, ranks.strategy)
    call = f"({name!r}, [{', '.join(positional)}], {{{', '.join(by_name)}}}, {place!r})"
    # torch.full makes a graph for each number; a product of one that changes, one for them all. On the rows' device: the value is
    # waited for where the agreement waits anyway, and no graph for a GPU has an operation on the CPU.
    one = torch.ones((), dtype=torch.float64, device=device)
    reals = torch.stack([one * value for value in spelling.reals]) if spelling.reals else one.new_empty(0)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in spelling.tensors]
    group = group_name(ranks)
    answer: Tensor = torch.ops.fastcl.over_ranks(spelling.tensors, reals, spelling.integers, call, group, wanted)[0]
    return answer


def group_name(group: Any) -> str:
    """By which an op finds the group of whatever `group=` takes."""
    name: str = process_group(group).group_name
    return name


# ---- while it is run ------------------------------------------------------------------------------------------------------


@cache
def _read(call: str) -> tuple[str, list[Any], dict[str, Any], Place]:
    name, args, kwargs, place = ast.literal_eval(call)
    return name, args, kwargs, Place(*place)


def _objective(name: str) -> Callable[..., Any]:
    if name not in OBJECTIVES:  # in a process that was given the graph
        import_module(name.partition(":")[0])
    return OBJECTIVES[name]


def _group(name: Any) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


def _restored(spelt: tuple[str, Any], parts: dict[str, Any]) -> Any:
    kind, said = spelt
    if kind in parts:
        return parts[kind][said]
    if kind in ("list", "tuple"):
        values = [_restored(each, parts) for each in said]
        return values if kind == "list" else tuple(values)
    return Divergence.known[said] if kind == "divergence" else said


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd within an op, which stands below it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


def _promised(tensors: list[Tensor]) -> torch.dtype:
    """The dtype of the value: that of the results of the first rows."""
    rows = next((t for t in tensors if t.dim() == 2 and t.is_floating_point()), None)
    return torch.float32 if rows is None else accumulation_dtype(rows.dtype)


def _kept(t: Tensor) -> torch.dtype:
    """The dtype of a tensor's gradient until the upstream gradient is known: that of float16 may be beyond its range."""
    return torch.float32 if t.dtype == torch.float16 else t.dtype


def _over_ranks(
    tensors: list[Tensor], reals: Tensor, integers: list[int], call: str, group: str, wanted: list[bool]
) -> list[Tensor]:
    from .call import of_union  # which traces these ops

    name, args, kwargs, place = _read(call)
    ranks = Ranks(_group(group), place.gradient, place.strategy)
    inside = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    parts = {"tensor": inside, "real": reals.tolist(), "integer": integers}
    given = [_restored(each, parts) for each in args]
    named = {key: _restored(each, parts) for key, each in kwargs.items()}
    off = place.autocast == "off"
    rounding: Any = nullcontext() if off else torch.autocast(place.device, getattr(torch, place.autocast))
    with _recording(), torch.set_grad_enabled(place.grad_mode), rounding:
        value, gradients = of_union(_objective(name), tuple(given), named, ranks, in_one_call=True)
    assert value.dim() == 0, f"{name}: expected one number, got shape {tuple(value.shape)}"
    found = [value.detach().to(_promised(tensors), copy=True)]
    held = {t.untyped_storage()._cdata for t in tensors}
    for t, w in zip(inside, wanted, strict=True):
        if w:
            gradient = gradients[id(t)][1].to(_kept(t)).contiguous()
            # A compiler writes over what an op returned: two names of one gradient would be one too many.
            found.append(gradient.clone() if gradient.untyped_storage()._cdata in held else gradient)
            held.add(gradient.untyped_storage()._cdata)
    return found


def _fake_over_ranks(
    tensors: list[Tensor], reals: Tensor, integers: list[int], call: str, group: str, wanted: list[bool]
) -> list[Tensor]:
    meta = traceback.current_meta
    if "recompute" in meta:  # within a checkpoint, whose compiler knows no effect that is made again
        meta["recompute"] = checkpoint.CheckpointPolicy.MUST_SAVE
    value = reals.new_empty((), dtype=_promised(tensors))
    return [value, *(t.new_empty(t.shape, dtype=_kept(t)) for t, w in zip(tensors, wanted, strict=True) if w)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, _, integers, _, ctx.group, ctx.wanted = inputs
    ctx.rest = (None, None if integers else [], None, None, None)  # what torch.library takes for a list of tensors
    ctx.dtypes = [t.dtype for t in tensors]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    refuse(upstream)
    if upstream[0] is None:
        return [None for _ in ctx.dtypes], *ctx.rest
    factor = torch.ops.fastcl.mean_over_ranks(upstream[0].double(), ctx.group)
    saved = iter(ctx.saved_tensors)
    found = [(next(saved) * factor).to(dtype) if w else None for dtype, w in zip(ctx.dtypes, ctx.wanted, strict=True)]
    return found, *ctx.rest


def _mean_over_ranks(number: Tensor, group: str) -> Tensor:
    return Wire(_group(group)).mean(number)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _evened(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    refuse([upstream])
    return torch.ops.fastcl.mean_over_ranks(upstream, ctx.group), None


def _register() -> torch.library.Library:
    library = torch.library.Library("fastcl", "FRAGMENT")
    tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
    forms: list[tuple[str, str, Any, Any]] = [
        (
            "over_ranks",
            "(Tensor[] tensors, Tensor reals, SymInt[] integers, str call, str group, bool[] wanted) -> Tensor[]",
            _over_ranks,
            _fake_over_ranks,
        ),
        ("mean_over_ranks", "(Tensor number, str group) -> Tensor", _mean_over_ranks, lambda t, _: torch.empty_like(t)),
        ("evened", "(Tensor number, str group) -> Tensor", lambda t, _: t.clone(), lambda t, _: torch.empty_like(t)),
    ]
    for name, schema, real, fake in forms:
        library.define(name + schema, tags=tags)
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcl::{name}", fake, lib=library)
    for name, backward, setup in (("over_ranks", _gradients, _save), ("evened", _evened, _keep_group)):
        torch.library.register_autograd(f"fastcl::{name}", backward, setup_context=setup, lib=library)
    if _ordered:
        for name in ("over_ranks", "mean_over_ranks"):
            op = getattr(torch.ops.fastcl, name).default
            torch.library._register_effectful_op(op, torch._library.effects.EffectType.ORDERED, lib=library)
            checkpoint.SAC_IGNORED_OPS.add(op)
    return library


library = _register()
