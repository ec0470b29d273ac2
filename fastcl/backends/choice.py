"""Which backend serves a device and dtype, and why: chosen inside the op, from shapes, devices and dtypes only."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from ..equation import checks
from ..equation.names import Backend
from ..equation.pairs import Identity, PairFunction
from . import blocked, extension, own_pairs

ENVIRONMENT_VARIABLE = "FASTCL_BACKEND"

# name -> module with rows, gradients, total and unavailable; loaded when first asked for.
MODULES = {
    "reference": "fastcl.backends.reference",
    "blocked": "fastcl.backends.blocked",
    "cpu": "fastcl.backends.native",
    "triton": "fastcl.triton_kernels",
    "cuda": "fastcl.backends.cuda",
}
NAMES = get_args(Backend)
KERNELS = ("cpu", "triton", "cuda")  # those whose pair functions are generated from pairs.py

# The order in which `auto` asks, by device type.
PREFERENCE = {"cpu": ("cpu", "blocked"), "cuda": ("cuda", "triton", "blocked")}
PREFERENCE_ELSEWHERE = ("blocked",)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot serve this device and dtype; the message says why and what mends it."""


def requested(backend: str | None) -> str:
    """The backend argument, or what FASTCL_BACKEND says at this moment, or "auto"."""
    name = backend if backend not in (None, "auto") else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in NAMES:
        source = "backend" if backend == name else ENVIRONMENT_VARIABLE
        return checks.one_of(source, name, NAMES)
    return name


def _module(name: str) -> ModuleType:
    return sys.modules.get(MODULES[name]) or importlib.import_module(MODULES[name])


def reason(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    pair: PairFunction = Identity(),  # noqa: B008 - it has no state
) -> str | None:
    """None when the backend serves the device, dtype and pair function; otherwise why not, and what mends it."""
    if name in ("cpu", "cuda") and device.type != name:
        return f"it serves {name} tensors, and these are on {device.type}"
    try:
        module = _module(name)
    except ImportError as error:
        return f"it is not installed ({error}); reinstall fastcl"
    answer: str | None = module.unavailable(device, dtype)
    if answer is None and not pair.built_in and name in KERNELS:
        answer = own_pairs.reason(name, pair)
    return answer


def choose(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    pair: PairFunction = Identity(),  # noqa: B008
) -> tuple[str, ModuleType]:
    """The name and module of the backend that serves this call.

    Raises:
        BackendUnavailableError: when the backend that was asked for cannot serve it.
    """
    name = requested(backend)
    if not pair.built_in:
        own_pairs.check(pair)
        if name == "cpu":  # who asks for it by name waits for its kernel
            own_pairs.wait(pair)
    if name != "auto":
        why = reason(name, device, dtype, pair)
        if why is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot serve {device.type} tensors of {dtype}: {why}")
        return name, _module(name)
    if device.type == "cpu" and extension.library is None:
        extension.warn_once()
    for name in PREFERENCE.get(device.type, PREFERENCE_ELSEWHERE):
        if reason(name, device, dtype, pair) is None:
            return name, _module(name)
    return "blocked", blocked


def explain(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """Each backend with None or the reason why it does not serve the device and dtype, in the order in which `auto` asks."""
    order = PREFERENCE.get(device.type, PREFERENCE_ELSEWHERE)
    names = [*order, *(name for name in MODULES if name not in order)]
    return [(name, reason(name, device, dtype)) for name in names]


def is_reference(backend: str | None) -> bool:
    """Whether this call is served by the definition itself, which alone is differentiable twice."""
    return requested(backend) == "reference"


def of_closed_form(backend: str | None) -> str:
    """Where a sum with a closed form is taken: by no kernel, whose lack of a dtype would refuse it; the definition stays."""
    return "reference" if is_reference(backend) else "blocked"


def of_float64(backend: str | None, rows: Tensor) -> str:
    """Where the same is taken of these rows in float64: by the kernels that have it, else by none; the definition stays.

    Raises:
        BackendUnavailableError: when the backend that was asked for cannot serve the rows as they are.
    """
    name = choose(backend, rows.device, rows.dtype)[0]
    return name if name in ("cpu", "reference") else "blocked"


__all__ = [
    "BackendUnavailableError",
    "choose",
    "explain",
    "is_reference",
    "of_closed_form",
    "of_float64",
    "reason",
    "requested",
]
