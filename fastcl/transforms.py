"""What PyTorch may be doing around a call: tracing it, or transforming it (torch.func, dual numbers).

The op has rules of its own for every transform (derivatives.py). Passes over rows are written twice: as an autograd.Function,
which is quick and saves little, and in plain PyTorch, which every transform knows; a transform takes the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V")
_VMAP = "VmapMode"  # of batched gradients; the name itself, parsed at each call, takes longer than all else here
_BATCHED_GRADIENTS = torch._C._parse_dispatch_key(_VMAP) or _VMAP
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # which stands for all of its kind: one of a backend is not told
_BATCHED = torch._C._parse_dispatch_key("Batched") or "Batched"  # of a tensor that holds the entries of such a batch
_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def active() -> bool:
    """Whether a transform of torch.func is at work, or forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def of_gradients() -> bool:
    """Whether one is at work in a backward: batched gradients (is_grads_batched) are no transform of torch.func's."""
    if torch.compiler.is_compiling():
        return False
    return active() or _batches_gradients()


def values_are_here() -> bool:
    """Whether a tensor's value may be looked at: no transform, and nothing that records operations for later."""
    return forward_ad._current_level < 0 and not recorded() and not _batches_gradients()


def recorded() -> bool:
    """Whether operations are: for later, or by a transform of torch.func."""
    # Flat, since it is asked some six times for each loss: calls within would take most of its time.
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or torch._C._get_tracing_state() is not None
    )


def watched() -> bool:
    """Whether a mode sees each operation: selective checkpoints hold what they give, and refuse what is written over."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def values_are_stored(t: Tensor) -> bool:
    """Whether this tensor has numbers: it is no fake one, and none is made of it."""
    # The op's own kernels see tensors without a tangent, and one entry of batched gradients after the other: what they choose by
    # what is there is as right as ever.
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and not recorded()
        and torch._C._get_dispatch_mode(_FAKE) is None
        and (forward_ad._current_level < 0 or _below_autograd() or forward_ad.unpack_dual(t).tangent is None)
        and not (_batches_gradients() and torch._C._dispatch_keys(t).has(_BATCHED))
    )


def _below_autograd() -> bool:
    """Whether this is a kernel of an op, for which tensors are numbers: there, to unpack a dual one fails."""
    excluded: bool = torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    return excluded


def _batches_gradients() -> bool:
    included: bool = torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS)
    return included


def set_aside() -> AbstractContextManager[Any]:
    """No transform of torch.func within, for tensors that none of them has seen: it would wrap each that is made."""
    return temporarily_clear_interpreter_stack() if torch._C._are_functorch_transforms_active() else nullcontext()


def keepable(values: V) -> V:
    """The same arguments for a graph to keep: of tensors that were made under torch.inference_mode() copies, which autograd saves.

    They stand for themselves where nothing is recorded. An object that comes twice stays one: masks ask whose groups are whose.

    Args:
        values: a tuple, a list, a dict or a NamedTuple (a mask) of tensors, of such, or of anything.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _any_of_inference(values):
        return values
    copied: V = _copied(values, {})
    return copied


def of_keepable(function: Callable[P, R]) -> Callable[P, R]:
    """The function, of arguments that a graph may keep."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        args, kwargs = keepable((args, kwargs))
        return function(*args, **kwargs)

    return call


def _any_of_inference(values: Any) -> bool:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            if value.is_inference():
                return True
        elif isinstance(value, (tuple, list, dict)) and _any_of_inference(value):
            return True
    return False


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if not value.is_inference():
            return value
        return copies[id(value)] if id(value) in copies else copies.setdefault(id(value), value.clone())
    if isinstance(value, dict):
        return {name: _copied(v, copies) for name, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(v, copies) for v in value))
    return type(value)(_copied(v, copies) for v in value) if type(value) in (tuple, list) else value


def refusal(what: str, tensors: Iterable[Any]) -> RuntimeError | None:
    """The error of something that no transform passes, where one is at work or a tensor is a dual number."""
    dual = forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if not (dual or of_gradients()):
        return None
    return RuntimeError(
        f"fastcl: {what} works with .backward() and torch.autograd.grad, not in forward mode (dual numbers, jvp, jacfwd) or under "
        "torch.func (grad, vjp, vmap); leave group= out, or take the gradient by .backward()"
    )
