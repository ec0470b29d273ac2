"""The op's rules for autograd and for the transforms of torch.func, one function for each dispatch key.

    reverse mode    <g, r> + <h, c> by pair_reduce_backward; a total's gradients come with its value
    forward mode    one more sweep (backends/tangents.py)
    vmap            one call for each entry of the batch
    twice           on `reference`, which is plain PyTorch; elsewhere an error

They stand at the dispatcher, below Python: dual numbers want no gradient and would pass torch.library.register_autograd
unnoticed, and a function of torch.func enters there once for each of its levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import transforms
from .backends import beyond, choice, native, reference, tangents
from .backends.sides import is_known
from .equation.problem import DIFFERENTIABLE, LENGTH, REDUCE, TENSORS, Problem, unpack
from .precision import full_precision

TWICE_ON = (
    "pass backend='reference', which is differentiable twice, or set FASTCL_BACKEND=reference for a loss that takes no backend"
)
CREATE_GRAPH = (
    "fastcl: create_graph=True asks for second derivatives, which the {name!r} backend does not have (its gradients are formed "
    f"outside autograd, so they would silently be zero); {TWICE_ON}"
)
TWICE = (
    "fastcl: a derivative of a gradient (a Hessian, jacfwd of grad, a double backward) is asked for, which the {name!r} backend "
    f"does not have (its gradients are formed outside autograd); {TWICE_ON}"
)


# From torch 2.7 on; the loop is what it does.
any_requires_grad = getattr(torch._C, "_any_requires_grad", None) or (
    lambda *arguments: any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
)
_ops: dict[str, Any] = {}  # the overloads, as they were registered


def present(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs as the fake form promises them: contiguous, and an empty tensor for what is absent."""
    return tuple(like.new_empty(0) if t is None else t.contiguous() for t in tensors)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _level_open() -> bool:
    """Whether there may be dual numbers; a compiled graph of torch.func opens its level without forward_ad's knowledge."""
    return forward_ad._current_level >= 0 or _transformed()


def _forward_mode() -> bool:
    return _level_open() and torch._C._is_fwd_grad_enabled()


def _differentiated(arguments: tuple[Any, ...]) -> bool:
    """Whether a derivative of this call may be asked for."""
    return (torch.is_grad_enabled() and any_requires_grad(*arguments)) or _forward_mode()


def _below(op: Any, keyset: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        answer: tuple[Tensor, ...] = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    return answer


def _within(op: Any, keyset: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """_below in a Function's forward, where PyTorch records nothing: the levels of torch.func around this one must go on."""
    if not _transformed():
        return _below(op, keyset, arguments)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below(op, keyset, arguments)


class _Rule(torch.autograd.Function):
    """A rule for one level of differentiation, which is all that a kernel at the dispatcher is called for."""

    @classmethod
    def at_this_level(cls, *arguments: Any) -> tuple[Tensor, ...]:
        # Function.apply itself would send it through all levels of torch.func, as for a call from above the dispatcher.
        single: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        if not _transformed():
            return single(*arguments)
        with enable_single_level_autograd_function():
            return single(*arguments)


# ---- the straight way -----------------------------------------------------------------------------------------------------


def nothing_watches() -> bool:
    """Whether a call is PyTorch's plainest: no transform, trace, mode or autocast has a say in it.

    Then a compiled kernel is called without the ops above it, whose passes through the dispatcher and Python take three times as
    long as the kernel itself for a few dozen rows.
    """
    return nothing_but_autocast() and not torch.is_autocast_enabled("cpu")


def nothing_but_autocast() -> bool:
    """Whether no transform, trace or mode has one."""
    return (
        transforms.values_are_here()  # first: what is traced stops here
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )


def straight(op: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The op pair_reduce or pair_total of these arguments, served by the compiled kernels, where nothing watches."""
    rule, kernel, taken = (
        (_Rows, torch.ops.fastcl.kernel_rows, arguments[:LENGTH])
        if op is torch.ops.fastcl.pair_reduce
        else (_Total, torch.ops.fastcl.kernel_total, arguments[:-1])
    )
    if torch.is_grad_enabled() and any_requires_grad(*arguments):
        return rule.at_this_level(None, *arguments)
    return _kernel(kernel, *taken)


def _kernel(kernel: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """A kernel of a problem."""
    return run(kernel, *native.by_kernel_name(arguments))


def run(kernel: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """A compiled kernel, called where nothing watches."""
    answer: tuple[Tensor, ...] = native.finished(_below_autograd, kernel, *arguments)
    return answer


def _below_autograd(kernel: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return kernel(*arguments)


# ---- rows -----------------------------------------------------------------------------------------------------------------


def pair_reduce(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """r and c, at the key Autograd."""
    if not _differentiated(arguments):
        return _below(_ops["pair_reduce"], keyset, arguments)
    if choice.is_reference(arguments[-1]) and (_transformed() or _forward_mode()):
        p = unpack(arguments)
        return present(reference.rows(p), p.scale)
    return _Rows.at_this_level(keyset, *arguments)


class _Rows(_Rule):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.straight = keyset is None
        if ctx.straight:
            output = _kernel(torch.ops.fastcl.kernel_rows, *arguments[:LENGTH])
        else:
            output = _within(_ops["pair_reduce"], keyset, arguments)
        _save(ctx, arguments, output)
        ctx.transformed = _transformed()
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Any, ...]:
        arguments, (r, c) = _restore(ctx)
        backend, needed = arguments[-1], ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() and not ctx.transformed:
            _require_reference(backend)
            return _differentiable(needed, arguments, lambda p: present(reference.rows(p), p.scale), (g, h))
        wanted = list(needed[:DIFFERENTIABLE])
        given = (*arguments[:LENGTH], r, c, g.contiguous(), h.contiguous(), wanted, False)
        answer: Any = None
        if ctx.straight and nothing_watches():
            answer = _kernel(torch.ops.fastcl.kernel_gradients, *given)
        if answer is None or beyond.may_be_beyond(arguments[REDUCE], answer[2], r, c):
            with full_precision(g.device):  # batched gradients are stacked, which autocast refuses of the other half precision
                answer = torch.ops.fastcl.pair_reduce_backward(*given, backend)
        return _fill(answer, wanted, len(needed))

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> tuple[Tensor, ...]:
        # PyTorch runs this with forward mode switched off, at the levels around this one too, whose tangents must go on.
        with forward_ad._set_fwd_grad_enabled(True):
            arguments, (r, c) = _restore(ctx)
            p = unpack(
                tuple(forward_ad.unpack_dual(a, level=0).primal if isinstance(a, Tensor) else a for a in arguments)
            )
            found = tangents.rows(p, c if p.columns else None, directions[1 : 1 + DIFFERENTIABLE])
            return present(found, r)


def pair_reduce_backward(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients, at the key Autograd: to be differentiated they refuse."""
    if not _differentiated(arguments):
        return _below(_ops["pair_reduce_backward"], keyset, arguments)
    return _Gradients.at_this_level(keyset, *arguments)


class _Gradients(_Rule):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.backend = arguments[-1]
        return _within(_ops["pair_reduce_backward"], keyset, arguments)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(TWICE.format(name=choice.requested(ctx.backend)))

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> tuple[Tensor, ...]:
        raise RuntimeError(TWICE.format(name=choice.requested(ctx.backend)))


# ---- total ----------------------------------------------------------------------------------------------------------------


def pair_total(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """outer(r) with its gradients, at the key Autograd; for a transform the outer function of the rows, in plain PyTorch."""
    if not _differentiated(arguments):
        return _below(_ops["pair_total"], keyset, arguments)
    if not (_transformed() or _forward_mode()):
        return _Total.at_this_level(keyset, *arguments)
    positive, outer, _, backend = arguments[LENGTH:]
    r, nothing = torch.ops.fastcl.pair_reduce(*arguments[:LENGTH], backend)
    value = reference.outer_value(outer, r, positive)
    return (value, *(nothing.new_empty(0) for _ in range(DIFFERENTIABLE + 1)))


class _Total(_Rule):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        positive, outer, wanted, backend = arguments[LENGTH:]
        if keyset is None:
            output = _kernel(torch.ops.fastcl.kernel_total, *arguments[:-1])
            if beyond.may_be_beyond(arguments[REDUCE], output[3], output[0]):
                output = _below_autograd(torch.ops.fastcl.pair_total, *arguments)
        else:
            output = _within(_ops["pair_total"], keyset, arguments)
        ctx.wanted, ctx.positive, ctx.dtype, ctx.backend = wanted, positive is not None, arguments[0].dtype, backend
        ctx.twice = choice.is_reference(backend)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if ctx.twice:
            _save(ctx, (*arguments[:LENGTH], outer), (*output[1:], *([positive] if ctx.positive else [])))
        else:
            ctx.save_for_backward(*output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        if upstream is None:
            return (None,) * (1 + len(needed))
        if torch.is_grad_enabled():
            _require_reference(ctx.backend)
            arguments, saved = _restore(ctx)
            positive = saved[-1] if ctx.positive else None

            def value(p: Problem, positive: Tensor | None = None) -> tuple[Tensor, ...]:
                return (reference.total_value(p, positive, arguments[-1]),)

            return _differentiable(needed, arguments, value, (upstream,), positive)
        saved = _restore(ctx)[1] if ctx.twice else ctx.saved_tensors
        answer = scaled(upstream, saved[: DIFFERENTIABLE + 1])
        for i in (0, 1):
            answer[i] = answer[i].to(ctx.dtype)
        filled = list(_fill(answer, ctx.wanted, len(needed)))
        filled[1 + LENGTH] = answer[DIFFERENTIABLE] if ctx.positive and needed[LENGTH] else None
        return tuple(filled)


def scaled(upstream: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """A total's gradients, formed for an upstream gradient of 1, for this one; 0 times one beyond the dtype is 0."""
    if is_known(upstream) and not upstream:
        gradients = [g.clamp(-(most := torch.finfo(g.dtype).max), most) for g in gradients]
    return [upstream * g for g in gradients]


# ---- what both forms share ------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep tensors by save_for_backward (so that in-place changes are noticed) and the rest as they are."""
    tensors = inputs[:TENSORS]
    ctx.present = [t is not None for t in tensors]
    ctx.rest = inputs[TENSORS:]
    ctx.save_for_backward(*(t for t in tensors if t is not None), *output)
    if _level_open():  # a forward runs with forward mode switched off
        ctx.save_for_forward(*(t for t in tensors if t is not None), *output)


def _restore(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    return (*tensors, *ctx.rest), tuple(saved)


def _fill(answer: Any, wanted: list[bool], length: int) -> tuple[Any, ...]:
    """Gradients for the keyset and `length` arguments."""
    gradients = [a if w else None for a, w in zip(answer, wanted, strict=False)]
    return (None, *gradients, *(None for _ in range(length - len(gradients))))


def _require_reference(backend: str) -> None:
    name = choice.requested(backend)
    if name != "reference":
        raise RuntimeError(CREATE_GRAPH.format(name=name))


def _differentiable(
    needed: tuple[bool, ...],
    arguments: tuple[Any, ...],
    outputs: Callable[..., tuple[Tensor, ...]],
    upstream: tuple[Tensor, ...],
    positive: Tensor | None = None,
) -> tuple[Any, ...]:
    """The gradients by autograd through the definition, with a graph of their own.

    Each tensor is taken under a name of its own: one that was made of another (a positive, a scale, y of x) would be walked
    through here, and by the engine once more.
    """
    arguments = tuple(t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in arguments)
    positive = positive if positive is None else positive.view_as(positive)
    p = unpack(arguments)
    values = outputs(p) if positive is None else outputs(p, positive)
    traced = [(v, g) for v, g in zip(values, upstream, strict=True) if v.requires_grad]
    candidates = [*arguments[:DIFFERENTIABLE], *(None for _ in range(LENGTH - DIFFERENTIABLE)), positive]
    places = [i for i, t in enumerate(candidates) if t is not None and needed[i]]
    answer = torch.autograd.grad(
        [v for v, _ in traced],
        [candidates[i] for i in places],
        [g for _, g in traced],
        create_graph=True,
        allow_unused=True,
    )
    filled: list[Any] = [None] * (1 + len(needed))
    for place, gradient in zip(places, answer, strict=True):
        filled[1 + place] = gradient
    return tuple(filled)


# ---- vmap -----------------------------------------------------------------------------------------------------------------


def one_by_one(op: Any) -> Callable[..., Any]:
    """The op at the key FuncTorchBatched: a call for each entry, whose kernels each fill the machine."""

    def batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def entry(i: int) -> tuple[Tensor, ...]:
            return op(
                *(a.select(at, i) if isinstance(at, int) else a for a, at in zip(arguments, in_dims, strict=True))
            )

        if info.batch_size == 0:
            shapes = (a.movedim(at, 0).new_zeros(a.movedim(at, 0).shape[1:]) if isinstance(at, int) else a
                      for a, at in zip(arguments, in_dims, strict=True))  # fmt: skip
            answers = tuple(t.new_empty((0, *t.shape)) for t in op(*shapes))
        else:
            entries = zip(*(entry(i) for i in range(info.batch_size)), strict=True)
            with full_precision(arguments[0].device):  # autocast's own stack refuses the half precision that it does not cast to
                answers = tuple(map(torch.stack, entries))
        return answers, (0,) * len(answers)

    return batched


def register(library: torch.library.Library) -> None:
    """These rules, for the ops that the library defines."""
    for kernel in (pair_reduce, pair_reduce_backward, pair_total):
        name = kernel.__name__
        _ops[name] = getattr(torch.ops.fastcl, name).default
        library.impl(name, kernel, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"fastcl::{name}", one_by_one(getattr(torch.ops.fastcl, name)), lib=library)
