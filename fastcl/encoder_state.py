"""What encoders keep between their calls: the modules that callables hold, the buffers of those, and parametrised weights."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.masked import MaskedTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_OF_MODULES = vars(nn.Module()).keys()  # the module's own books
FEW = 100  # items of a container that is looked into: towers are few, and a data set is not searched
DEPTH = 2  # containers within containers
_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, deque, dict)
_NAMES, _ORDER = (type.__dict__[name].__get__ for name in ("__dict__", "__mro__"))  # past what a metaclass may run


def modules_of(encoders: Iterable[Callable[..., Any]]) -> list[nn.Module]:
    """The modules that these are or hold, each once, without their parts.

    A bound method holds its object; functools.partial its function and arguments; a function its closure, its defaults and the
    globals that it names; a container of up to 100 items these, and those of one within; any other object its attributes, and a
    module its own and its parts', but not those of objects among them. Functions that a function names are followed within their
    file. A module too many does no harm: its buffers stay.
    """
    found: dict[nn.Module, None] = {}
    seen: set[tuple[int, bool, int]] = set()
    for encoder in encoders:
        _find(encoder, found, seen, True)
    return list(found)


def _find(
    value: Any, found: dict[nn.Module, None], seen: set[tuple[int, bool, int]], attributes: bool, within: int = 0
) -> None:
    kind = type(value)  # isinstance asks a proxy for its __class__
    if issubclass(kind, nn.Module):
        if value not in found:
            found[value] = None
            for part in value.modules():
                for name, held_apart in vars(part).items():  # in a list, so that the optimizer does not find it
                    if name not in _OF_MODULES:
                        _find(held_apart, found, seen, False)
        return
    key = (id(value), attributes, within)  # met again further out, a container is looked into further
    if key in seen:
        return
    seen.add(key)
    held: Iterable[Any] = ()
    if issubclass(kind, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif kind is MethodType:
        held = (value.__self__, value.__func__)
    elif kind is FunctionType:
        held = _held_by(value)
    elif container := next((c for c in _CONTAINERS if issubclass(kind, c)), None):
        if container.__len__(value) <= FEW and within < DEPTH:  # its own methods may run anything
            held = dict.values(value) if container is dict else container.__iter__(value)
        within += 1
    elif attributes and not issubclass(kind, (Tensor, type, ModuleType)):
        held, attributes = _attributes(value, kind), False
    for part in held:
        _find(part, found, seen, attributes, within)


def _attributes(value: Any, kind: type) -> Iterator[Any]:
    """Those of an object itself, in __slots__ too, and what calls it."""
    with suppress(Exception):  # a proxy's
        held = object.__getattribute__(value, "__dict__")
        yield from dict.values(held)
    of_kinds = [_NAMES(k) for k in _ORDER(kind)]
    for slot in (s for names in of_kinds for s in names.values() if type(s) is MemberDescriptorType):
        with suppress(AttributeError):  # not set
            yield slot.__get__(value)
    yield next((names["__call__"] for names in of_kinds if "__call__" in names), None)


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
        if type(value) is not FunctionType or value.__globals__ is function.__globals__:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:  # comprehensions and functions inside
        if isinstance(inner, CodeType):
            yield from _names(inner)


@contextmanager
def own_parametrizations() -> Iterator[None]:
    """Under torch.nn.utils.parametrize.cached(), a cache of its own: weights made before have another graph, or none."""
    cache, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = cache


def refuse_hooks(modules: Iterable[nn.Module], chunks: int) -> None:
    """Those that follow a parameter's accumulation, as optimizers in the backward do, would run for each chunk."""
    for name, p in (named for m in modules for named in m.named_parameters() if chunks > 1):
        if getattr(p, "_in_backward_optimizers", ()):  # torch.distributed.optim's, on a node that does not tell its hooks
            raise ValueError(
                "encoders: expected parameters without an optimizer in the backward, which would step for each of "
                f"{chunks} chunks, got one on {name}; leave it out, and step after cached_step or the backward"
            )
        for hook in (p._post_accumulate_grad_hooks or {}).values() if p.requires_grad else ():
            if not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(
                ("torch.distributed.", "torch.nn.parallel.")
            ):
                raise ValueError(
                    "encoders: expected parameters without register_post_accumulate_grad_hook, which would run for each of "
                    f"{chunks} chunks, got one on {name}; remove it, and step after cached_step or the backward"
                )


def versions_of(modules: Iterable[nn.Module]) -> dict[Tensor, int]:
    """How often each parameter changed in place."""
    parameters = (
        p for m in modules for p in m.parameters() if p.requires_grad and not (is_lazy(p) or p.is_inference())
    )
    return {p: p._version for p in parameters}


@contextmanager
def unchanged(versions: dict[Tensor, int]) -> Iterator[None]:
    """Parameters that get gradients here have these versions, as what a graph saved."""

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError(
            f"encoders: expected the parameters of the first pass, and one parameter of shape {tuple(gradient.shape)} was "
            "changed in place since; let the optimizer step after the backward"
        )

    with ExitStack() as stack:
        for p, version in versions.items():
            if p._version != version and p.requires_grad:
                stack.callback(p.register_hook(refuse).remove)
        yield


class Buffers:
    """The buffers of modules as a first pass finds them: a second pass starts there, and moves nothing.

    Those that the second pass alone moves stay so. With those that are others when it starts go the plain values of their part that
    are: flags and counts, by which it knows that they moved. A copy of every buffer is held, since versions do not tell: BatchNorm
    moves its own unseen.
    """

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []
        self.before: _State = {}

    def note(self, module: nn.Module) -> None:
        """Those of a module and its parts as they are, in place of what was noted of them."""
        self.roots.append(module)
        self.before |= _noted(module.modules())

    def note_moved(self) -> None:
        """At the end of the first pass; what runs between both may move them back."""
        for part, held in self.before.items():
            held.note_moved(part)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """As before the first pass; afterwards as found, be it the end of the first pass or of calls after it.

        Parts that the first pass made start as found.
        """
        self.note_moved()
        now = {part: held.as_found(part) for part, held in self.before.items() if held.moved}
        made = _noted(part for root in self.roots for part in root.modules() if part not in self.before)
        for part, found in now.items():
            self.before[part].put_back(part, found.plain)
        for found in made.values():
            found.moved.update(dict.fromkeys(found.buffers))
        try:
            yield
        finally:
            for part, found in (now | made).items():
                found.put_back(part, found.plain)


class _Held(NamedTuple):
    """A buffer, or None, and what it held; of a lazy one, and one on meta, nothing."""

    buffer: Tensor | None
    value: Tensor | None = None

    @classmethod
    def of(cls, buffer: Tensor | None) -> _Held:
        if buffer is None or is_lazy(buffer) or buffer.is_meta:
            return cls(buffer)
        return cls(buffer, buffer.detach().clone())

    def is_right(self) -> bool:
        """Whether the buffer holds that."""
        if self.buffer is None:
            return True
        if self.value is None:
            return is_lazy(self.buffer) or self.buffer.is_meta
        return all(a.shape == b.shape and _equal(a, b) for a, b in self._parts(self.value))

    def put_back(self) -> None:
        """Past the version, since graphs that saved a buffer find the same in it afterwards."""
        if self.buffer is None or self.value is None or self.is_right():
            return
        if any(a.shape != b.shape or _repeats(a) for a, b in self._parts(self.value)):
            self.buffer.data = self.value.clone()
        for a, b in self._parts(self.value):
            a.copy_(b)

    def _parts(self, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert self.buffer is not None
        return list(zip(_strided(self.buffer), _strided(value), strict=True))


class _Part(NamedTuple):
    """Of a module without its parts: buffers by name, plain values, and the names of buffers that moved."""

    buffers: dict[str, _Held]
    plain: dict[str, Any]
    moved: dict[str, None]

    def note_moved(self, part: nn.Module) -> None:
        found = _buffers(part)
        for name in (n for n in {**self.buffers, **found} if n not in self.moved):
            held = self.buffers.get(name)
            if held is None or held.buffer is not found.get(name, _NOTHING) or not held.is_right():
                self.moved[name] = None

    def as_found(self, part: nn.Module) -> _Part:
        """The moved buffers as they are now, and the plain values that are others now; what came to hold an object is let be."""
        buffers = {name: _Held.of(b) for name, b in _buffers(part).items() if name in self.moved}
        now, objects = _plain(part), {*vars(part), *part._modules.keys(), *part._parameters.keys()}
        names = [n for n in self.plain.keys() | now.keys() if self.plain.get(n, _NOTHING) != now.get(n, _NOTHING)]
        return _Part(buffers, {n: now.get(n, _NOTHING) for n in names if n in now or n not in objects}, self.moved)

    def put_back(self, part: nn.Module, plain: Iterable[str]) -> None:
        """The buffers that moved, and the plain values of these names."""
        for name in self.moved:
            held = self.buffers.get(name)
            if held is None:
                part._buffers.pop(name, None)
                continue
            if name not in part._buffers or part._buffers[name] is not held.buffer:
                part._buffers[name] = held.buffer
            held.put_back()
        for name in plain:
            value = self.plain.get(name, _NOTHING)
            if value is _NOTHING:
                vars(part).pop(name, None)
            else:
                vars(part)[name] = value


_NOTHING = object()
_State = dict[nn.Module, _Part]
_PLAIN = (bool, int, float, str, type(None))


def _noted(parts: Iterable[nn.Module]) -> _State:
    return {p: _Part({name: _Held.of(b) for name, b in _buffers(p).items()}, _plain(p), {}) for p in parts}


def _buffers(part: nn.Module) -> dict[str, Tensor | None]:
    return dict(part._buffers.items())  # a scripted module's are no dictionary


def _plain(part: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(part).items() if issubclass(type(value), _PLAIN) and name not in _OF_MODULES
    }


def _strided(buffer: Tensor) -> list[Tensor]:
    """What a buffer is made of, as torch compares it, past its version."""
    if isinstance(buffer, MaskedTensor):  # of which data is a copy
        return [buffer._masked_data.data, buffer._masked_mask.data]
    buffer = buffer.data
    if buffer.is_nested:
        return list(buffer.unbind())
    if buffer.layout == torch.sparse_coo:
        return [buffer._indices(), buffer._values()]
    if buffer.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [buffer.crow_indices(), buffer.col_indices(), buffer.values()]
    if buffer.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [buffer.ccol_indices(), buffer.row_indices(), buffer.values()]
    return [buffer] if buffer.layout == torch.strided else []  # oneDNN's, which train nothing


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether they hold the same; not, where torch has no way to tell."""
    with suppress(RuntimeError, TypeError):
        return torch.equal(a, b)
    with suppress(RuntimeError, TypeError):  # float4
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return False


def _repeats(buffer: Tensor) -> bool:
    """Whether entries share their memory, as an expanded tensor's do."""
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
