"""Pair functions of a user's own: who serves one, and their kernels, which are made while the torch form serves.

The one question is `reason`: None where a backend has a kernel for the pair function, and otherwise why not. The CPU's kernel is
compiled in the background (pair_libraries.py), held against the torch form, and serves from the next call on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..equation.language import SOURCE, RefusedError
from ..equation.masks import Mask
from ..equation.pairs import PairFunction
from ..equation.problem import PAIR, Problem, pack
from . import extension, pair_libraries

MOST_CONSTANTS = 8  # csrc/cpu/task.h
SYMBOL = "fastcl_own_pair"
ON_CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the default is where this is imported
Z = torch.cat((torch.linspace(-7.31, 7.67, 61, **ON_CPU), torch.logspace(-6, 0, 31, **ON_CPU)))


@dataclass
class Kernel:
    """The CPU's kernel of one pair function."""

    done: threading.Event = field(default_factory=threading.Event)
    name: str = ""  # by which the kernels know it
    reason: str | None = None  # why there is none
    warning: str | None = None  # to be said once, in a thread of the caller's


_lock = threading.Lock()
_compiling = threading.Lock()  # one compiler at a time: the other cores are the caller's
_kernels: dict[tuple[Any, ...], Kernel] = {}
_checked: dict[tuple[Any, ...], str | None] = {}


def reason(backend: str, pair: PairFunction) -> str | None:
    """None where the backend has a kernel for this pair function; otherwise why not, and what mends it."""
    if backend == "triton":
        return _of_triton(pair)
    if backend != "cpu":
        return (
            f"it has no kernel for the pair function {pair.name!r}, which is not one of fastcl.pairs; use backend='blocked', "
            "which takes any"
        )
    kernel = _kernel(pair)
    if not kernel.done.is_set():
        return f"its kernel for the pair function {pair.name!r} is being compiled; backend='auto' serves meanwhile"
    if kernel.warning is not None:
        with _lock:
            warning, kernel.warning = kernel.warning, None
        if warning is not None:
            warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return kernel.reason


def _of_triton(pair: PairFunction) -> str | None:
    from ..triton_kernels import own_pairs

    try:
        own_pairs.functions(pair)
    except (RefusedError, RecursionError) as error:
        return f"it has no kernel for the pair function {pair.name!r}: {error}; use backend='blocked', which takes any"
    return None


def wait(pair: PairFunction) -> None:
    """Until the CPU's kernel of this pair function is there, or it is known that there will be none."""
    _kernel(pair).done.wait()


def kernel_name(cls: type[PairFunction], constants: Sequence[float]) -> str:
    """The name by which the CPU's kernels know a pair function that `reason` has none against."""
    kernel = _kernels.get(cls.text()) or _kernel(cls.of(constants))
    kernel.done.wait()
    return kernel.name


def check(pair: PairFunction) -> None:
    """Holds the slope against autograd, at the first use of a pair function that is not ours.

    Raises:
        ValueError: it is not the derivative of the value.
    """
    key = pair.text()
    if key not in _checked:
        # In a thread of its own: within an op autograd records nothing, nor under inference mode.
        answer: list[str | None] = [None]
        thread = threading.Thread(target=lambda: answer.append(_complaint(pair)))
        thread.start()
        thread.join()
        _checked[key] = answer[-1]
    if (complaint := _checked[key]) is not None:
        raise ValueError(complaint)


def _complaint(pair: PairFunction) -> str | None:
    try:
        (expected, found), (rough_expected, rough_found) = (
            _slopes(pair, Z.to(d)) for d in (torch.float64, torch.float32)
        )
    except Exception:  # what it raises here, it raises where it is used
        return None
    # Only where float32 already has digits: elsewhere the terms of value cancel, and autograd's do.
    allowed = 1e-3 * expected.abs()
    known = ((rough_expected - expected).abs() <= allowed) & ((rough_found - found).abs() <= 1e-3 * found.abs())
    least = 1e-6 * expected[known].abs().max() if known.any() else 0.0
    wrong = known & ((found - expected).abs() > allowed + least)
    wrong |= found.isnan() & expected.isfinite() & rough_expected.isfinite() & pair.f(Z).isfinite()
    if not wrong.any():
        return None
    k, mend = int(wrong.nonzero()[0]), "leave slope out, and it is derived"
    if getattr(pair.slope, SOURCE, None) is not None:  # then a number of its module is not what it was
        mend = "it was derived when the class was defined; define the class anew, or make its number a constant of the class"
    return (
        f"{type(pair).__name__}.slope: expected the derivative of value, {float(expected[k]):.6g} at z = {float(Z[k]):.6g}, got "
        f"{float(found[k]):.6g}; {mend}"
    )


def _slopes(pair: PairFunction, z: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd, and as the pair function says; in float64."""
    z = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pair.f(z).sum(), z)
    return expected.double(), pair.df(z.detach()).double()


def _kernel(pair: PairFunction) -> Kernel:
    """The kernel of that pair function, its making begun by whoever asks first."""
    key = pair.text()
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _lock:
        if (kernel := _kernels.get(key)) is not None:
            return kernel
        kernel = Kernel()
        if why := _unavailable(pair):
            kernel.reason = why
            kernel.done.set()
        else:
            thread = threading.Thread(target=_make, args=(kernel, pair), name=f"fastcl {pair.name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process ends
                kernel.reason = str(error)
                kernel.done.set()
        _kernels[key] = kernel
        return kernel


def _unavailable(pair: PairFunction) -> str | None:
    """Why a kernel is not even tried: silent, as whoever built without a compiler knows; `fastcl doctor` says it."""
    if (why := pair_libraries.unavailable()) is not None:
        return f"it has no kernel for the pair function {pair.name!r}: {why}; or use backend='blocked', which takes any"
    if len(pair.constants) > MOST_CONSTANTS:
        return (
            f"its kernels take pair functions of at most {MOST_CONSTANTS} constants, and {pair.name!r} has {len(pair.constants)}; "
            "use backend='blocked', which takes any"
        )
    return None


def _make(kernel: Kernel, pair: PairFunction) -> None:
    """In a thread: compiles, opens, holds it against the torch form, and hands it to the kernels."""
    try:
        with _compiling:
            kernel.name = _add(pair)
        _hold(kernel.name, pair)
    except Exception as error:
        kernel.reason = (
            f"its kernel for the pair function {pair.name!r} could not be made: {error}; use backend='blocked'"
        )
        kernel.warning = (
            f"fastcl serves the pair function {pair.name!r} in pure PyTorch, without a kernel of its own: {error}"
        )
    finally:
        kernel.done.set()


def _add(pair: PairFunction) -> str:
    from ..equation.codegen import own_cpp  # here, since it is a command too: python -m fastcl.equation.codegen

    try:
        source = own_cpp(type(pair))
    except RecursionError:
        raise RefusedError(
            f"{type(pair).__name__}: expected an expression of fewer operations; give parts of it local names"
        ) from None
    name = hashlib.sha256(source.encode()).hexdigest()
    library = pair_libraries.opened(source)
    assert extension.library is not None
    add: Callable[..., bool] = ctypes.CDLL(str(extension.library.path)).fastcl_add_own_pair
    add.argtypes, add.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_bool  # type: ignore[attr-defined]
    if not add(name.encode(), ctypes.addressof(ctypes.c_char.in_dll(library, SYMBOL))):
        raise RuntimeError("it was compiled for another instruction set")
    return name


def _hold(name: str, pair: PairFunction) -> None:
    """Value and slope of the kernel against the torch form: at z = x 1, so that r = f(z) and dx = f'(z).

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        z = Z.to(dtype)
        one = z.new_ones(())
        absent = one.new_empty(0)
        x, zero = z[:, None].contiguous(), torch.zeros_like(one)
        packed = pack(Problem(x, one[None, None], one, zero, None, None, Mask(), "dot", pair, "sum", False))
        problem = (*packed[:PAIR], name, *packed[PAIR + 1 :])
        r, _ = torch.ops.fastcl.kernel_rows(*problem)
        wanted = [True, *[False] * 5]
        dx, *_ = torch.ops.fastcl.kernel_gradients(*problem, r, absent, torch.ones_like(z), absent, wanted, False)
        for what, got, form in (("value", r, pair.f), ("slope", dx[:, 0], pair.df)):
            _compare(what, got, form(z), form(z.double()), tolerance)


def _compare(what: str, got: Tensor, torch_form: Tensor, true: Tensor, tolerance: float) -> None:
    known = true.isfinite() & torch_form.isfinite()
    if not known.any():
        return
    rounding = (torch_form.double() - true)[known].abs().max()
    off = (got.double() - true).abs() > tolerance * (1.0 + true.abs()) + 16.0 * rounding
    off |= ~got.isfinite()
    if (off & known).any():
        k = int((off & known).nonzero()[0])
        raise RuntimeError(
            f"its {what} at z = {float(Z[k]):.6g} is {float(got[k]):.6g} by the compiled kernel and {float(true[k]):.6g} by torch"
        )


def _begin_anew() -> None:
    """In a forked child, which has none of the threads: what was being made is begun anew when it is asked for."""
    global _lock, _compiling
    _lock, _compiling = threading.Lock(), threading.Lock()
    for key in [key for key, kernel in _kernels.items() if not kernel.done.is_set()]:
        del _kernels[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)

__all__ = ["check", "kernel_name", "reason", "wait"]
