"""A call of an objective in a string that says all of it but its numbers and tensors.

A graph that is kept, in this process or on a disk, then means the same wherever it is run. What a call was spelt of, dynamo guards.
Numbers stand beside it, reals in a tensor: one that changes makes no graph for each value.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, signature, unwrap
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..equation.divergence import Divergence

LARGEST = 2**62  # of an integer that an op takes
_numbers = count(1)


class Place(NamedTuple):
    """How and where a call is made: what is around it, and what its group says."""

    grad_mode: bool
    device: str
    autocast: str  # a dtype, or off
    gradient: Any
    strategy: Any


@dataclass(frozen=True, eq=False)
class Spelt:
    """An objective that a spelt call may name, and what its answer is.

    Args:
        name: by which it is found.
        function: the objective.
        parameters: in their order.
        known: whether it says what it returns.
        reduces: whether it has a reduction, by which it is one number or one for each row.
        form: the NamedTuple that it returns with one of `flags` set, or always where there are none; None for tensors alone.
        flags: settings that ask for more than the loss.
    """

    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    known: bool
    reduces: bool
    form: Any
    flags: tuple[str, ...]

    def one_number(self, settings: dict[str, Any]) -> bool:
        """Whether a call with these settings has one number as its answer."""
        return self.reduces and settings.get("reduction", "mean") != "none" and not self.several(settings)

    def several(self, settings: dict[str, Any]) -> bool:
        """Whether a call with these settings has a tuple as its answer."""
        if not self.flags:
            return self.form is not None
        return any(settings.get(flag, False) for flag in self.flags)


OBJECTIVES: WeakValueDictionary[str, Spelt] = WeakValueDictionary()


def named(function: Callable[..., Any]) -> Spelt:
    """An objective under the name by which a spelt call finds it, as long as the objective is there."""
    name, parameters = f"{function.__module__}:{function.__qualname__}", signature(function).parameters
    if name in OBJECTIVES or "<locals>" in name:  # a graph of another of that name may be kept
        name += f"'{next(_numbers)}"
    reduction = parameters.get("reduction")
    reduces = reduction is not None and (reduction.kind, reduction.default) == (Parameter.KEYWORD_ONLY, "mean")
    flags = tuple(each for each in parameters if each.startswith("return_"))
    form = _form_of(function)
    known = reduces or form is not None or signature(function).return_annotation in ("Tensor", Tensor)
    found = Spelt(name, function, tuple(parameters), known, reduces, form, flags)
    OBJECTIVES[name] = found
    return found


def _form_of(function: Callable[..., Any]) -> Any:
    """The NamedTuple that an objective's annotation says it returns, if any."""
    said = signature(function).return_annotation
    known = getattr(unwrap(function), "__globals__", {})
    kinds = [known.get(kind.strip()) for kind in said.split("|")] if isinstance(said, str) else [said]
    return next((kind for kind in kinds if isinstance(kind, type) and hasattr(kind, "_fields")), None)


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

    def of_all(self, values: dict[str, Any]) -> str:
        """Arguments by name."""
        return f"{{{', '.join([f'{name!r}: {self.of(value)}' for name, value in values.items()])}}}"

    def numbers(self, device: torch.device) -> Tensor:
        """The reals in a tensor. torch.full makes a graph for each number; a product of one that changes, one for them all."""
        one = torch.ones((), dtype=torch.float64, device=device)
        return torch.stack([one * value for value in self.reals]) if self.reals else one.new_empty(0)


@cache
def read(call: str) -> tuple[Any, ...]:
    """What a string spells."""
    found: tuple[Any, ...] = ast.literal_eval(call)
    return found


def found(name: str, known: Any) -> Any:
    """What is known by this name, in a process that was given the graph too."""
    if name not in known:
        import_module(name.partition(":")[0])
    return known[name]


def restored(spelt: tuple[str, Any], parts: dict[str, Any]) -> Any:
    """An argument as it was before it was spelt."""
    kind, said = spelt
    if kind in parts:
        return parts[kind][said]
    if kind in ("list", "tuple"):
        values = [restored(each, parts) for each in said]
        return values if kind == "list" else tuple(values)
    return Divergence.known[said] if kind == "divergence" else said


class Restored(NamedTuple):
    """An objective, its arguments, and how and where it is called."""

    spelt: Spelt
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place


def objective(call: str) -> Spelt:
    """The objective of a call."""
    spelt: Spelt = found(read(call)[0], OBJECTIVES)
    return spelt


def given(call: str, tensors: list[Tensor], reals: Sequence[float], integers: list[int]) -> Restored:
    """A call as it was before it was spelt, of these tensors and numbers."""
    _, args, kwargs, place = read(call)
    parts = {"tensor": tensors, "real": reals, "integer": integers}
    by_name = {key: restored(each, parts) for key, each in kwargs.items()}
    return Restored(objective(call), tuple(restored(each, parts) for each in args), by_name, Place(*place))
