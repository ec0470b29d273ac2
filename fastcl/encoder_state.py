"""What encoders keep between their calls: the modules that callables hold, and the buffers of those."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

FEW = 100  # items of a container that is looked into: towers are few, and a data set is not searched


def modules_of(encoders: Iterable[Callable[..., Any]]) -> list[nn.Module]:
    """The modules that these are or hold, each once, without their parts.

    A bound method holds its object; functools.partial its function and arguments; a function its closure, its defaults and the
    globals that it names; a container of up to 100 items these; any other object its attributes, but not those of objects among
    them. Functions that a function names are followed within their file. A module too many does no harm: its buffers stay.
    """
    found: dict[nn.Module, None] = {}
    seen: set[tuple[int, bool]] = set()
    for encoder in encoders:
        _find(encoder, found, seen, True)
    return list(found)


def _find(value: Any, found: dict[nn.Module, None], seen: set[tuple[int, bool]], attributes: bool) -> None:
    if isinstance(value, nn.Module):
        found[value] = None
        return
    if (id(value), attributes) in seen:
        return
    seen.add((id(value), attributes))
    held: Iterable[Any] = ()
    if isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        held = (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        held = _held_by(value)
    elif isinstance(value, (list, tuple, Mapping)):
        held = () if len(value) > FEW else value.values() if isinstance(value, Mapping) else value
    elif attributes and hasattr(value, "__dict__") and not isinstance(value, (Tensor, type, type(torch))):
        held, attributes = (*vars(value).values(), getattr(type(value), "__call__", None)), False  # noqa: B004
    for part in held:
        _find(part, found, seen, attributes)


def _held_by(function: FunctionType) -> Iterator[Any]:
    """The closure, the defaults, and the globals that are named; of functions among those, the ones of this file."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # assigned later
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if not isinstance(value, FunctionType) or value.__globals__ is function.__globals__:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:  # comprehensions and functions inside
        if isinstance(inner, CodeType):
            yield from _names(inner)


class Buffers:
    """The buffers that a first pass moves, as they were before it: a second pass starts there, and moves nothing."""

    def __init__(self) -> None:
        self.before: _State = {}

    def note(self, module: nn.Module) -> None:
        """Those of a module and its parts as they are, in place of what was noted of them."""
        parts = module.modules()
        self.before |= _noted((part, name) for part in parts for name, _ in part.named_buffers(recurse=False))

    def keep_moved(self) -> None:
        """Let go of those that the first pass left alone. (Their versions do not tell: BatchNorm moves its own unseen.)"""
        for (part, name), (buffer, value) in list(self.before.items()):
            if getattr(part, name, None) is buffer and (buffer.shape != value.shape or torch.equal(buffer, value)):
                del self.before[part, name]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """As before the first pass; afterwards as found, be it the end of the first pass or of calls after it."""
        now = _noted(self.before)
        _restore(self.before)
        try:
            yield
        finally:
            _restore(now)


_State = dict[tuple[nn.Module, str], tuple[Tensor, Tensor]]  # each buffer, and what it held


def _noted(names: Iterable[tuple[nn.Module, str]]) -> _State:
    buffers = ((part, name, getattr(part, name, None)) for part, name in names)
    return {
        (part, name): (buffer, buffer.detach().clone())
        for part, name, buffer in buffers
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    }


def _restore(state: _State) -> None:
    """Past the versions, since graphs that saved a buffer find the same in it afterwards."""
    for (part, name), (buffer, value) in state.items():
        if getattr(part, name, None) is not buffer:
            setattr(part, name, buffer)
        buffer.data.copy_(value)
