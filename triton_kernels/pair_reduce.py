"""The backend's three functions: which form serves this problem, and the guards that both forms need.

FASTCL_TRITON (read at each call) picks the form: strip, fused, or auto (the default: the predictions of tuning.py).
FASTCL_WORKSPACE_MB bounds the workspace of the strip form; backends/workspace.py says what it is unless told.

torch.compile sees one opaque op for each direction, whole and without a new graph for another batch size (tested). The
kernels are not wrapped by torch.library.wrap_triton, since that would give nothing and take something: there is nothing to
fuse into a launch whose inputs are the rows and whose outputs are the gradients; the loop over the strip's tiles would be
unrolled into the graph, one launch each, and a new graph for each n and m; and a graph would hold one backend, where the op
chooses at run time.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from ..backends.tiles import plain
from ..equation.problem import Gradients, Problem, Wanted
from . import fused, tuning
from .strip import Strip

FORM_VARIABLE = "FASTCL_TRITON"
FORMS = ("strip", "fused", "auto")


def _plain(p: Problem) -> AbstractContextManager[Problem]:
    return plain(p, tuning.least_period(p.x.device) if p.mask.period else 0)


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r (n,), and c (m,) when p.columns."""
    with _plain(p) as p:
        return fused.rows(p) if form(p, gradients=False) == "fused" else Strip(p).rows()


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>; dx and dy in `dtype`, that of x unless told."""
    with _plain(p) as p:
        if form(p, gradients=True) == "fused":
            return fused.gradients(p, r, c, g, h, wanted, dtype)
        return Strip(p).gradients(r, c, g, h, wanted, dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The value of the total form and its gradients, all in the accumulation dtype."""
    with _plain(p) as p:
        if form(p, gradients=any(wanted)) == "fused":
            return fused.total(p, positive, outer, wanted)
        return Strip(p).total(positive, outer, wanted)


def form(p: Problem, gradients: bool) -> str:
    """The form that serves the rows of this problem, or its gradients: strip or fused.

    Raises:
        ValueError: if FASTCL_TRITON names none of them, or the fused one where this Triton makes a race of it.
    """
    name = os.environ.get(FORM_VARIABLE) or "auto"
    if name not in FORMS:
        raise ValueError(f"{FORM_VARIABLE}: expected one of {', '.join(FORMS)}, got {name!r}")
    if p.mask.limited or (gradients and not fused.holds_gradients(p)):
        return "strip"
    precision = fused.dot_precision(p.x)
    if name == "auto":
        return tuning.predicted_form(p, precision)
    arch = tuning.architecture(p.x.device)
    if name == "fused" and tuning.unfenced(arch, tuning.kind_of(p.x.dtype, precision)):
        raise ValueError(
            f"{FORM_VARIABLE}=fused: expected Triton {tuning.FENCED} or later on {arch}, got {triton.__version__}, which leaves "
            f"out a fence between the copies of a tile and its product; upgrade Triton, or unset {FORM_VARIABLE}"
        )
    return name
