"""Pair functions of a user's own for Triton: a module of their checked text, made at first use."""

from __future__ import annotations

import hashlib
import linecache
import sys
from types import ModuleType
from typing import Any

from ..equation.codegen import own_triton
from ..equation.pairs import PairFunction

_made: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def functions(pair: PairFunction) -> tuple[Any, Any]:
    """The value and slope of a pair function that is not ours, each a @triton.jit function.

    Raises:
        RefusedError: it uses something outside the language, or more constants than the kernels hold.
    """
    key = pair.text()
    found = _made.get(key)
    if found is None:
        module = _module(own_triton(type(pair)))
        found = _made[key] = module.value, module.slope
    return found


def _module(text: str) -> ModuleType:
    """Two of one text are one. Triton reads a function's source by its file's name, where linecache has it."""
    name = f"{__package__}.own_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if (known := sys.modules.get(name)) is not None:
        return known
    module, file = ModuleType(name), f"<{name}>"
    vars(module)["__package__"] = __package__
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), vars(module))  # of a checked tree: nothing but the language is in it
    return sys.modules.setdefault(name, module)
