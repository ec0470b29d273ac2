"""An objective over ranks as one op of torch.compile's graph: the call as it is made without, in one node that nothing looks into.

    over_ranks(tensors, reals, integers, call, group, wanted) -> [value, the gradient of each tensor that wants one]
    parts_over_ranks(the same) -> what a call returns that is not one number: rows, terms, a loss and its state

Value and gradients of one number come from one call, whose messages are sent in the forward (at_once.py); the backward sends one
number. Of anything else the gradients are no multiples of what could be kept: the backward is an op that makes the call again.

All ops that send are effects in one order (torch.library): no compiler leaves one out, makes it twice or exchanges two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.fx import traceback
from torch.utils import checkpoint

from .. import batch, transforms
from ..equation.problem import accumulation_dtype
from ..loss_scaling import STATE
from .derivatives import refuse
from .ranks import Ranks, process_group
from .spelling import Spelling, Spelt, found, given, objective, read, restored
from .wire import Wire

STAND_IN = 0.5  # for a real number whose value a trace does not know: every objective takes it
_ordered = hasattr(torch.library, "_register_effectful_op") and hasattr(torch._library, "effects")  # from torch 2.10 on


# ---- while a graph is traced ----------------------------------------------------------------------------------------------


def traced() -> bool:
    """Whether a graph is made, in which an op over ranks keeps its place."""
    return _ordered and torch.compiler.is_compiling() and not transforms.active()


def called(spelt: Spelt, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Ranks, rounding: tuple[str, str]) -> Any:
    """The answer of a call, by one op in the graph; None where it has something that is not spelt."""
    several, one_number = spelt.several(kwargs), spelt.one_number(kwargs)
    if not spelt.known or (several and spelt.form is None):
        return None
    spelling = Spelling()
    positional = [spelling.of(value) for value in args]
    # As they are declared, rows first: the first matrix says of what dtype the value is.
    names = [key for key in spelt.parameters if key in kwargs] + [key for key in kwargs if key not in spelt.parameters]
    by_name = spelling.of_all({key: kwargs[key] for key in names if key != "group"})
    if spelling.unknown:
        return None
    rows = next((t for t in spelling.tensors if t.dim() == 2), None)
    device = torch.device("cpu") if rows is None else rows.device
    place = (torch.is_grad_enabled(), *rounding, ranks.gradient, ranks.strategy)
    call = f"({spelt.name!r}, [{', '.join(positional)}], {by_name}, {place!r})"
    # On the rows' device: they are waited for where the agreement waits anyway, and no graph for a GPU has an operation on the CPU.
    reals, tensors = spelling.numbers(device), spelling.tensors
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    rest = (reals, spelling.integers, call, group_name(ranks), wanted)
    if one_number:
        return torch.ops.fastcl.over_ranks(tensors, *rest)[0]
    parts = torch.ops.fastcl.parts_over_ranks(tensors, *rest)[: len(spelt.form._fields) if several else 1]
    return spelt.form(*parts) if several else parts[0]


def agreed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], settings: dict[str, Any], group: Any) -> bool:
    """Let all ranks agree on the call of a method, by one op in the graph; False where it has something that is not spelt."""
    spelling = Spelling()
    positional = spelling.of(list(args))
    by_name, across = spelling.of_all(kwargs), spelling.of_all(settings)
    if spelling.unknown:
        return False
    wanted = [t.requires_grad for t in spelling.tensors]
    place = (torch.is_grad_enabled(), wanted, group_name(group))
    call = f"({name!r}, {positional}, {by_name}, {across}, {place!r})"
    rows = next((t for t in spelling.tensors if t.dim() == 2), None)
    reals = spelling.numbers(torch.device("cpu") if rows is None else rows.device)
    torch.ops.fastcl.agree_over_ranks(spelling.tensors, reals, spelling.integers, call)
    return True


def group_name(group: Any) -> str:
    """By which an op finds the group of whatever `group=` takes."""
    name: str = process_group(group).group_name
    return name


# ---- while it is run ------------------------------------------------------------------------------------------------------


def group_of(name: Any) -> Any:
    """The group of that name."""
    return dist.distributed_c10d._resolve_process_group(name)


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


class Told(NamedTuple):
    """What an op is told of a call, in the order of its schema."""

    tensors: list[Tensor]
    reals: Tensor
    integers: list[int]
    call: str
    group: str
    wanted: list[bool]

    def wanting(self) -> list[Tensor]:
        return [t for t, w in zip(self.tensors, self.wanted, strict=True) if w]

    def held_over(self) -> list[Tensor]:
        """What the backward takes again, though it wants no gradient (a queue, say): it may be written over before.

        A clone in the graph would not do: the compiler makes it again in the backward, of what has been written over.
        """
        return [t for t, w in zip(self.tensors, self.wanted, strict=True) if not w] if any(self.wanted) else []

    def as_leaves(self) -> Told:
        return self._replace(tensors=_leaves(self.tensors, self.wanted))


@contextmanager
def _united(told: Told) -> Iterator[Any]:
    """The call of these leaves, agreed on, with what was around it."""
    from .call import Union, rounded  # which traces these ops

    spelt, args, kwargs, place = given(told.call, told.tensors, told.reals.tolist(), told.integers)
    ranks = Ranks(group_of(told.group), place.gradient, place.strategy)
    with _recording(), torch.set_grad_enabled(place.grad_mode), rounded(place.device, place.autocast):
        yield Union(spelt, args, kwargs, ranks, asking=True)


class _Apart:
    """Tensors that share no memory with each other, nor with those given: a compiler writes over what an op returned."""

    def __init__(self, given: list[Tensor]) -> None:
        self.held = {t.untyped_storage()._cdata for t in given}

    def __call__(self, t: Tensor) -> Tensor:
        t = t.detach().contiguous()
        t = t.clone() if t.untyped_storage()._cdata in self.held else t
        self.held.add(t.untyped_storage()._cdata)
        return t


def _leaves(tensors: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]


def _over_ranks(*arguments: Any) -> list[Tensor]:
    told = Told(*arguments)
    inside, apart = told.as_leaves(), _Apart(told.tensors)
    with _united(inside) as union:
        value, gradients = union.with_gradients()
    assert value.dim() == 0, f"{told.call}: expected one number, got shape {tuple(value.shape)}"
    return [
        value.detach().to(_promised(told.tensors), copy=True),
        *(apart(gradients[id(t)][1].to(_kept(t))) for t in inside.wanting()),
    ]


def _parts_over_ranks(*arguments: Any) -> list[Tensor]:
    told = Told(*arguments)
    apart = _Apart(told.tensors)
    with _united(told.as_leaves()) as union:
        parts = [apart(part) for part in union.parts()]
    return [*parts, *(t.clone(memory_format=torch.contiguous_format) for t in told.held_over())]


def _gradients_of_parts(*arguments: Any) -> list[Tensor]:
    *of_call, upstream = arguments
    inside, apart = Told(*of_call).as_leaves(), _Apart([*of_call[0], *upstream])
    with _united(inside) as union:
        gradients = union.gradients(inside.wanting(), upstream)
    return [apart(g) for g in gradients]


def _once(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Within a checkpoint, whose compiler knows no effect that is made again, what is traced is kept."""

    @wraps(fake)
    def traced_once(*given: Any) -> Any:
        if "recompute" in traceback.current_meta:
            traceback.current_meta["recompute"] = checkpoint.CheckpointPolicy.MUST_SAVE
        return fake(*given)

    return traced_once


def _fake_over_ranks(*arguments: Any) -> list[Tensor]:
    told = Told(*arguments)
    value = told.reals.new_empty((), dtype=_promised(told.tensors))
    return [value, *(t.new_empty(t.shape, dtype=_kept(t)) for t in told.wanting())]


def _fake_parts(*arguments: Any) -> list[Tensor]:
    """As the rehearsal of the call has them; of a call that is wrong, which raises when it is made, what most is made of."""
    from .agreement import Rehearsal

    told = Told(*arguments)
    spelt, args, kwargs, _ = given(told.call, told.tensors, [STAND_IN] * told.reals.shape[0], told.integers)
    rows = next((t for t in told.tensors if t.dim() == 2), told.reals)
    copies = [t.new_empty(t.shape) for t in told.held_over()]
    try:
        with torch.no_grad(), batch.over(Rehearsal(rows.device)):
            answer = spelt.function(*args, **kwargs)
    except Exception:
        shapes = [() for _ in spelt.form._fields] if spelt.several(kwargs) else [rows.shape[:1]]
        return [*(rows.new_empty(shape, dtype=_promised(told.tensors)) for shape in shapes), *copies]
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [*(rows.new_empty(part.shape, dtype=part.dtype) for part in parts), *copies]


def _fake_gradients(*arguments: Any) -> list[Tensor]:
    wanting = Told(*arguments[:-1]).wanting()
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanting]


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


def _save_call(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, reals, ctx.integers, ctx.call, ctx.group, ctx.wanted = inputs
    ctx.rest = (None, None if ctx.integers else [], None, None, None)
    count = len(output) - len(Told(*inputs).held_over())
    fields = objective(ctx.call).form._fields if count > 1 else ()
    fixed = [part for part, name in zip(output, fields, strict=False) if name in STATE]
    ctx.mark_non_differentiable(*fixed, *output[count:])
    copies = iter(output[count:])
    again = (next(copies, t) if not w else t for t, w in zip(tensors, ctx.wanted, strict=True))
    ctx.save_for_backward(reals, *again)
    ctx.count = count


def _gradients_again(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    refuse(upstream)
    reals, *tensors = ctx.saved_tensors
    made = torch.ops.fastcl.gradients_over_ranks(
        tensors, reals, ctx.integers, ctx.call, ctx.group, ctx.wanted, [g.contiguous() for g in upstream[: ctx.count]]
    )
    left = iter(made)
    return [next(left) if w else None for w in ctx.wanted], *ctx.rest


def _agree_over_ranks(tensors: list[Tensor], reals: Tensor, integers: list[int], call: str) -> Tensor:
    from .agreement import Checked

    name, args, *named, (grad_mode, wanted, group) = read(call)
    parts = {"tensor": _leaves(tensors, wanted), "real": reals.tolist(), "integer": integers}
    kwargs, settings = ({key: restored(each, parts) for key, each in values.items()} for values in named)
    with torch.set_grad_enabled(grad_mode):
        found(name, Checked.known).agree(tuple(restored(args, parts)), kwargs, settings, group_of(group))
    return reals.new_empty(0)


def _mean_over_ranks(number: Tensor, group: str) -> Tensor:
    return Wire(group_of(group)).mean(number)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _evened(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    refuse([upstream])
    return torch.ops.fastcl.mean_over_ranks(upstream, ctx.group), None


Op = tuple[str, str, Callable[..., Any], Callable[..., Any]]  # name, schema, what it does, and with fake tensors


def register(ops: list[Op], sending: tuple[str, ...]) -> torch.library.Library:
    """Define ops, of which some send messages."""
    library = torch.library.Library("fastcl", "FRAGMENT")
    tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
    for name, schema, real, fake in ops:
        library.define(name + schema, tags=tags)
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcl::{name}", _once(fake) if name in sending else fake, lib=library)
    for name in sending if _ordered else ():
        op = getattr(torch.ops.fastcl, name).default
        torch.library._register_effectful_op(op, torch._library.effects.EffectType.ORDERED, lib=library)
        checkpoint.SAC_IGNORED_OPS.add(op)
    return library


_CALL = "Tensor[] tensors, Tensor reals, SymInt[] integers, str call, str group, bool[] wanted"
library = register(
    [
        ("over_ranks", f"({_CALL}) -> Tensor[]", _over_ranks, _fake_over_ranks),
        ("parts_over_ranks", f"({_CALL}) -> Tensor[]", _parts_over_ranks, _fake_parts),
        ("gradients_over_ranks", f"({_CALL}, Tensor[] upstream) -> Tensor[]", _gradients_of_parts, _fake_gradients),
        (
            "agree_over_ranks",
            "(Tensor[] tensors, Tensor reals, SymInt[] integers, str call) -> Tensor",
            _agree_over_ranks,
            lambda tensors, reals, integers, call: reals.new_empty(0),
        ),
        ("mean_over_ranks", "(Tensor number, str group) -> Tensor", _mean_over_ranks, lambda t, _: torch.empty_like(t)),
        ("evened", "(Tensor number, str group) -> Tensor", lambda t, _: t.clone(), lambda t, _: torch.empty_like(t)),
    ],
    ("over_ranks", "parts_over_ranks", "gradients_over_ranks", "agree_over_ranks", "mean_over_ranks"),
)
for _name, _backward, _setup in (
    ("over_ranks", _gradients, _save),
    ("parts_over_ranks", _gradients_again, _save_call),
    ("evened", _evened, _keep_group),
):
    torch.library.register_autograd(f"fastcl::{_name}", _backward, setup_context=_setup, lib=library)
