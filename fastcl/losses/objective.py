"""An objective as an nn.Module: its constructor takes the function's settings, its call takes the rows.

A subclass names its function and its settings, with the function's defaults, and becomes a dataclass by itself:

    class InfoNCELoss(Objective, function=functional.info_nce):
        temperature: float | Tensor = 0.07

A setting that is an nn.Parameter is learned, one that is a plain tensor becomes a buffer: both move and save with the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import Parameter, Signature, cleandoc, get_annotations, signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, dataclass_transform

from ..distributed import Group, SavedGroup
from ..equation.arguments import Check, checks_of_fields, checks_of_function, no_tensor, said, unexpected
from ..equation.names import Backend, Reduction
from .scale import number, reshape_numbers, stated

HALVES = (torch.float16, torch.bfloat16)

_as_dataclass = dataclass(kw_only=True, eq=False, repr=False)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class _Declared(nn.Module):
    """For type checkers: what derives from this is a dataclass. Of the class that carries the mark itself they take no fields."""


@_as_dataclass
class Objective(_Declared):
    """An objective as a module; the module's own docstring says how to write one.

    Args:
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        backend: see fastcl.pair_reduce.
        group: the ranks over which the rows are spread; see fastcl.Ranks.
    """

    normalize: bool = True
    reduction: Reduction = "mean"
    backend: Backend | None = None
    group: Group | None = None

    function: ClassVar[Callable[..., Tensor]]
    settings: ClassVar[tuple[str, ...]] = ()  # the fields that are arguments of the function
    wide: ClassVar[tuple[str, ...]] = ()  # buffers that stay out of half precision, whatever becomes of the model
    # Of settings and other fields, as the function and the class declare them.
    checks: ClassVar[dict[str, Check]] = {"group": no_tensor}

    def __new__(cls, *_: Any, **given: Any) -> Self:
        taken = signature(cls.__init__).parameters
        if Parameter.VAR_KEYWORD not in (p.kind for p in taken.values()):
            for name in given.keys() - taken.keys():
                raise unexpected(cls.__name__, name, taken)
        for name in given.keys() & cls.checks.keys():
            if isinstance(given[name], Tensor):  # torch has an error of its own where a parameter may not be
                cls.checks[name](name, given[name], None)
        module = super().__new__(cls)
        nn.Module.__init__(module)  # before the fields are assigned: some are parameters
        return module

    def __init_subclass__(cls, function: Callable[..., Any] | None = None) -> None:
        kept = _redefined(cls)
        _as_dataclass(cls)
        known = {setting.name for setting in fields(cls) if setting.init} | kept.keys()
        for name in known & cls.__dict__.keys():  # a default left on the class would hide a parameter of that name
            delattr(cls, name)
        for name, value in kept.items():
            setattr(cls, name, value)
        types = {setting.name: setting.type for setting in fields(cls) if setting.init}
        cls.checks = checks_of_fields(cls, types) | cls.checks
        if function is not None:
            cls.function = staticmethod(function)
            cls.settings = tuple(name for name in signature(function).parameters if name in known)
            cls.checks |= checks_of_function(function)
            cls.forward = _forward_of(cls, function)
            cls.__doc__ = "\n\n".join(
                (
                    cleandoc(cls.__doc__ or ""),
                    f"fastcl.functional.{function.__name__}:",
                    cleandoc(function.__doc__ or ""),
                )
            )

    def __post_init__(self) -> None:
        for name, check in self.checks.items():
            if hasattr(self, name) and not isinstance(given := getattr(self, name), nn.Module):
                taken = check(name, given, None)
                if taken is not given and not stated(self, name):  # the function takes it at each call
                    setattr(self, name, taken)
        self._check_together()
        for name in self.settings:
            value = self.__dict__.get(name)  # parameters are not there, nor what a subclass computes
            if isinstance(value, Tensor):
                delattr(self, name)
                self.register_buffer(name, value)

    def _check_together(self) -> None:
        """Raise what our own functions raise of settings that do not go together: they check these before they ask for rows."""
        if not self.settings or not self.function.__module__.startswith("fastcl.functional."):
            return
        if not all(hasattr(self, name) for name in self.settings):
            return  # a subclass computes one of what is not there yet
        given = {name: getattr(self, name) for name in self.settings if name != "group"}
        given = {name: 1.0 if isinstance(value, nn.Module) else value for name, value in given.items()}
        kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)
        rows = [p for p in signature(self.function).parameters.values() if p.kind in kinds]
        first = f"{rows[0].name}[0]" if rows[0].kind is Parameter.VAR_POSITIONAL else rows[0].name
        try:
            self.function(*(None for _ in rows), **given)
        except TypeError as error:
            if not str(error).startswith(f"{first}: expected a tensor, got NoneType"):
                raise

    def arguments(self) -> dict[str, Any]:
        """The settings as the function takes them."""
        return {name: getattr(self, name) for name in self.settings}

    def _apart(self, data: dict[str, Any], settings: dict[str, Any], kept: tuple[str, ...] = ()) -> dict[str, Any]:
        """What is given at a call beside the rows. In the place of what the module itself gives stands what is wrong with that.

        Args:
            data: what is given.
            settings: of the module.
            kept: other names that it gives.
        """
        twice = next((name for name in data if name in settings or name in kept), None)
        if twice is None:
            return data
        kind, function = type(self).__name__, self.function
        if twice in settings:
            place = "fastcl.functional." if function.__module__.startswith("fastcl.functional.") else ""
            advice = f"make {kind}({twice}=...), or call {place}{function.__name__}"
            message = f"{twice}: expected as a setting of the module, got it at its call; {advice}"
        else:
            message = f"{twice}: expected what {kind} keeps, got it at its call; leave it out"
        if not self._speaks_to_all():
            raise TypeError(message)
        return {name: value for name, value in data.items() if name != twice} | said(message)

    def _speaks_to_all(self) -> bool:
        """Whether a call that is wrong must be made all the same, for the other ranks to hear of it."""
        return self.group is not None

    def extra_repr(self) -> str:
        shown = (s for s in self.settings if s != "group" or self.group is not None)
        kept = ((name, getattr(self, name)) for name in shown)
        return ", ".join(f"{name}={_shown(value)}" for name, value in kept if not isinstance(value, nn.Module))

    def __getstate__(self) -> dict[str, Any]:
        """Of a process group, which cannot be saved, its ranks: the group of all is found again, another is asked for."""
        return self._own() | {"group": SavedGroup.of(self.group)}

    def _own(self) -> dict[str, Any]:
        """What a copy has too: not what `compile()` left here, which is bound to this module."""
        state: dict[str, Any] = super().__getstate__()
        return state

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self._own())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in the same process keeps the group."""
        memo[id(self.group)] = self.group
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self._own(), memo))
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in self.wide}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype in HALVES:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        reshape_numbers(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.wide:  # with assign=True they are the saved tensors
            if getattr(self, name).dtype in HALVES:
                setattr(self, name, getattr(self, name).float())


def _forward_of(cls: type[Objective], function: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an objective: by its signature it takes what the function takes and the module does not know.

    By its code it takes anything: with group= a call that is wrong on one rank must reach the other ranks.
    """

    def forward(self: Objective, *rows: Tensor, **data: Tensor | None) -> Any:
        """The objective of these rows; keywords are what differs from batch to batch, such as groups."""
        settings = self.arguments()
        return self.function(*rows, **self._apart(data, settings), **settings)

    found = cls.__dict__.get("forward", forward)
    if found is forward or Parameter.VAR_POSITIONAL in (p.kind for p in signature(found).parameters.values()):
        known = {setting.name for setting in fields(cls)} | {"training"}  # which every module knows
        called = getattr(cls, "step", function)  # a forward of its own may call what takes more than the function
        rows = [p for name, p in signature(called).parameters.items() if name not in known]
        found.__signature__ = Signature([Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *rows])
    return found


def _redefined(cls: type[Objective]) -> dict[str, Any]:
    """What a subclass defines under the name of an inherited setting, without declaring it anew.

    A value becomes the setting's default. A property (or any descriptor) stays what it is, and is returned; unless it can be
    assigned, the constructor does not take that setting.
    """
    annotations, kept = get_annotations(cls), {}
    for inherited in fields(cls):
        name = inherited.name
        if name not in cls.__dict__ or name in annotations:
            continue
        annotations[name], value = inherited.type, cls.__dict__[name]
        if hasattr(type(value), "__get__"):
            kept[name] = value
            assigned = getattr(value, "fset", None) is not None
            setattr(cls, name, field(default=inherited.default) if assigned else field(init=False))
    cls.__annotations__ = annotations
    return kept


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
    return f"{kind}({number(value)})" if value.numel() == 1 else f"{kind}{tuple(value.shape)}"
