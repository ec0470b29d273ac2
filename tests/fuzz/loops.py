"""The definition of an objective as double loops (tests/oracle): what the definition itself is held to, at small sizes.

A formula that is wrong is so in every backend, in float64 and on plain PyTorch too; the loops share nothing with it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from fastcl.functional import kernel
from tests import oracle

from .case import Case, Found, run
from .rule import SAFETY, Fault
from .truth import Truth, at_the_least_length, double, parts, plain_number

ROWS, LONGEST = 9, 100.0  # of each matrix at most
CLOSE = 1e-9  # of two evaluations in float64


def by_loops(case: Case, dtype: torch.dtype = torch.float64) -> Found | None:
    """The case by double loops in float64; None where they know no such function or argument, or would take too long.

    dtype: of which what is documented in roundings is in those. A paper has no clamp; where kcl documents one, the loops have it.
    """
    kind, _, name = case.function.rpartition(".")
    function = getattr(oracle, name, None)
    if kind != "functional" or function is None or case.derive in ("jvp", "twice"):
        return None
    known = inspect.signature(function).parameters
    tensors = [t for t in case.tensors().values() if isinstance(t, Tensor)]
    if not all(k in known for k in case.keywords) or not all(0 < len(t) <= ROWS for t in tensors if t.dim()):
        return None
    if any(float(t.detach().double().norm(dim=1).max()) > LONGEST for t in tensors if t.dim() == 2):
        return None
    if at_the_least_length(case, torch.finfo(torch.float32).eps):
        return None
    alone = replace(case, autocast="", compiled=False, sizes=(1,), threads=1, derive="grad")
    floor, plain = kernel._floor(dtype), oracle.kernels._riesz
    with patch.object(oracle.kernels, "_riesz", lambda d2, t: plain(torch.where(d2 < floor, floor, d2), t)):
        return run(alone, double, number=plain_number, function=function)


def fault(truth: Truth) -> Fault | None:
    """How the definition differs from the double loops: by more than float64, or one rounding of the rows, explains."""
    found = by_loops(truth.case, truth.dtype)
    # As papers have them they overflow.
    if found is None or not all(bool(got.isfinite().all()) for _, got, _ in parts(found)):
        return None
    for where, got, pick in parts(found):
        t = pick(truth.found)
        got = (
            got.reshape(t.shape) if got.numel() == t.numel() else got
        )  # a number in a vector makes columns of the loops' rows
        asked = t.isfinite()
        error = torch.where(asked, (got - t).abs(), 0.0)
        if not error.numel() or bool((error <= CLOSE * t.abs().nan_to_num(0, 0, 0).max()).all()):
            continue
        moved = [torch.where(asked, (pick(c) - t).abs(), 0.0).nan_to_num(float("inf")) for _, c in truth.draws(4)]
        # In the loops a loss of pairs that are told well apart is what is left of logits.
        leaf = truth.case.tensors().get(where.removeprefix("gradient of "), torch.ones(())).detach().double()
        length = leaf.reshape(-1, leaf.shape[-1] if leaf.dim() > 1 else 1).norm(dim=1).clamp(min=1e-12).min()
        logits = max(1.0, truth.largest) * max(1.0, abs(truth.case.upstream)) / min(1.0, float(length))
        allowed = SAFETY * torch.stack(moved).max() + 1e-12 * logits
        if (truth.weights_are_any() and where.startswith("gradient")) or bool(error.max() <= allowed):
            continue
        return Fault("is not that of the double loops", where, float(error.max()), float(allowed))
    return None
