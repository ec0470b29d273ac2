"""What is public, and what its signatures and docstrings say of its arguments: nothing is listed by hand."""

from __future__ import annotations

import inspect
import math
import re
from functools import cache
from typing import Any, Literal, get_args, get_origin

from fastcl import functional, losses, metrics
from fastcl.equation import names
from fastcl.losses import Objective

from .case import resolve

BY_CALL = ("backend", "group", "progress", "reduction")  # chosen for the call as a whole


def public() -> dict[str, tuple[str, ...]]:
    """Paths of everything that can be called, by kind."""
    objectives = [f"functional.{n}" for n in functional.__all__ if inspect.isfunction(getattr(functional, n))]
    modules = [
        f"losses.{n}"
        for n in losses.__all__
        if issubclass(getattr(losses, n), Objective) and getattr(losses, n) is not Objective
    ]
    numbers = [f"metrics.{n}" for n in metrics.__all__ if inspect.isfunction(getattr(metrics, n))]
    return {
        "objectives": tuple(objectives), "modules": tuple(modules), "metrics": tuple(numbers),
        "ops": ("pair_reduce", "pair_total"),
    }  # fmt: skip


def arguments_of(function: Any) -> list[inspect.Parameter]:
    """Its parameters; three in place of any number of views."""
    found: list[inspect.Parameter] = []
    for p in inspect.signature(function).parameters.values():
        several = p.kind is p.VAR_POSITIONAL
        found += [p.replace(name=f"{p.name}_{k}", kind=p.POSITIONAL_OR_KEYWORD) for k in range(3)] if several else [p]
    return found


@cache
def documented(function: Any) -> dict[str, str]:
    """What the docstring says of each argument."""
    doc = inspect.getdoc(function) or ""
    said: dict[str, str] = {}
    listed: list[str] = []
    for line in re.split(r"\nArgs:\n", doc, maxsplit=1)[-1].splitlines():
        if re.match(r"\S", line):
            break
        start = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        listed = start[1].split(", ") if start else listed
        for name in listed:
            said[name] = f"{said.get(name, '')} {start[2] if start else line.strip()}"
    return said


@cache
def range_of(function: Any) -> tuple[float, float]:
    """Between what its numbers lie, by the docstring."""
    said = re.search(r"\nReturns:\n(.*)", inspect.getdoc(function) or "")
    line = said[1] if said and ";" not in said[1] else ""
    low, high = re.search(r"(?:>= |between )(\d+)\b", line), re.search(r"(?:<= |between \d+ and )(\d+)\b", line)
    return float(low[1]) if low else -math.inf, float(high[1]) if high else math.inf


@cache
def names_of(path: str, argument: str) -> tuple[str, ...]:
    """The names that an argument takes, by its annotation."""
    parameter = inspect.signature(resolve(path)).parameters.get(argument)
    kinds = [] if parameter is None else [getattr(names, kind, None) for kind in str(parameter.annotation).split(" | ")]
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
