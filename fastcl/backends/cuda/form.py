"""Which form serves a problem: the one place where that is decided."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ...equation.problem import Problem
from . import fused, hopper, launches

FORM_VARIABLE = "FASTCL_CUDA"
NAMES = ("strip", "fused", "hopper", "auto")
OLDEST_CAPABILITY = (8, 0)  # of the architectures that setup.py builds for unless told


class Entry(NamedTuple):
    """The widest d at which the fused form is faster: predicted until measured.

    Compared are the lower bounds that counted instructions and bytes give at n = m = 65,536 (a fused pass overlaps its terms, the
    strip form's passes add up), so that near a border either form may win.
    """

    capability: tuple[int, int]  # from this one on, until the next entry
    rows: int  # of two-byte rows, and so on
    gradients: int
    rows_tf32: int
    gradients_tf32: int
    hopper: bool = False  # rows of two bytes by the kernels of sm_90a, of any d


TABLE = (
    # A100: 5 products at the tensor cores' bound beat 4 and the epilogues up to 256; at 512 dX no longer fits.
    Entry((8, 0), 1024, 256, 512, 128),
    # 99 KB of shared memory: the gradient holds 128.
    Entry((8, 6), 1024, 128, 512, 128),
    # H100: wgmma in the sweeps too, 4 products where fused takes 5, 2 bytes a pair where strip moves 22. Counted, never measured.
    Entry((9, 0), 512, 128, 256, 0, hopper=True),
    # B200: mma.sync reaches 62% of the peak of wgmma, which the strip form's matrix products have: a tie at 256.
    Entry((10, 0), 512, 128, 256, 0),
    Entry((12, 0), 1024, 128, 512, 128),
)


def requested() -> str:
    """What FASTCL_CUDA says at this moment, or "auto".

    Raises:
        ValueError: if it names none of the forms.
    """
    name = os.environ.get(FORM_VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(f"{FORM_VARIABLE}: expected strip, fused, hopper or auto, got {name!r}")
    return name


def form(p: Problem, gradients: bool) -> str:
    """The form that serves the rows of this problem, or its gradients; of limits, which others would hold in registers, the strip.

    Raises:
        ValueError: if FASTCL_CUDA names none of them.
    """
    name = requested()
    if name == "strip" or p.mask.limited or p.n == 0 or p.m == 0:
        return "strip"
    facts = launches.facts_of(p.x.device)
    entry = next((e for e in reversed(TABLE) if facts.capability >= e.capability), None)
    if (name == "hopper" or (name == "auto" and entry is not None and entry.hopper)) and hopper.holds(p, facts):
        return "hopper"
    if not fused.holds(p, facts, gradients):
        return "strip"
    return "fused" if name == "fused" or _predicted(p, entry, gradients) else "strip"


def _predicted(p: Problem, entry: Entry | None, gradients: bool) -> bool:
    if entry is None:
        return False
    if p.x.dtype == torch.float32:
        return p.x.shape[1] <= (entry.gradients_tf32 if gradients else entry.rows_tf32)
    return p.x.shape[1] <= (entry.gradients if gradients else entry.rows)
