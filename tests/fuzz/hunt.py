"""One case judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import loops
from .case import Case, Found, run
from .places import REFUSALS
from .public import range_of
from .truth import Truth


class WrongError(AssertionError):
    """A fault, with the script that shows it."""

    def __init__(self, case: Case, what: str) -> None:
        super().__init__(f"{what}\n{case.script()}\n# {what}")
        self.case, self.what = case, what
        self.key = (case.function, what.partition(":")[0], case.backend)  # one report of each


INVALID = (ValueError, TypeError)


def judge(case: Case, evaluate: Callable[[Case], Any] = run) -> bool:
    """False where the arguments are refused; raises WrongError where the answer is.

    What the definition refuses, everyone must refuse.
    """
    if case.spoiled:
        refused(case, evaluate)
        return False
    tensors = [t for t in case.tensors().values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not all(bool(t.isfinite().all()) for t in tensors):
        return False
    try:
        truth = Truth(case)
    except INVALID:
        return False
    except Exception as error:
        raise WrongError(case, f"reference: {type(error).__name__}: {error}".splitlines()[0]) from error
    fault = loops.fault(truth)
    if fault is not None:
        raise WrongError(case, f"reference: {fault}")
    try:
        found = evaluate(case)
    except Exception as error:
        if case.derive == "twice" and "create_graph=True asks" in str(error):
            return False
        raise WrongError(case, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    fault = truth.fault(found) or beyond(case, found)
    if fault is not None:
        raise WrongError(case, str(fault))
    return True


def beyond(case: Case, found: Found) -> str | None:
    """A value that no rounding takes beyond what the docstring says of it."""
    low, high = range_of(case.owner)
    outside = [v for v in found.values if bool(((v < low) | (v > high)).any())]
    return f"value: expected {low} to {high} as documented, got {outside[0]}" if outside else None


def refused(case: Case, evaluate: Callable[[Case], Any]) -> None:
    """A wrong argument is told by a ValueError or a TypeError."""
    try:
        evaluate(case)
    except INVALID:
        return
    except Exception as error:
        if str(error).startswith(REFUSALS):  # of another process
            return
        raise WrongError(case, f"{case.spoiled}: {type(error).__name__}: {error}".splitlines()[0]) from error
    raise WrongError(case, f"{case.spoiled}: taken for right")
