"""What the tiles of a problem may take of memory: one variable for every backend."""

from __future__ import annotations

import os

from ..equation.problem import Problem

WORKSPACE_VARIABLE = "FASTCL_WORKSPACE_MB"


def default_workspace(p: Problem) -> int:
    """Bytes: 96 MB, or half as much again as the gradients of x and y in the accumulation dtype, which stand beside it.

    The larger the tile, the fuller its products and the fewer launches: CLIP's gradient at 65,536 x 512 has 1,024 tiles of
    2048 x 2048, or 64 of 8192 x 8192.
    """
    return max(96 << 20, p.dtype.itemsize * 3 * p.x.shape[1] * (p.n + p.m) // 2)


def workspace(default: int) -> int:
    """Bytes: by FASTCL_WORKSPACE_MB, which is read at each call, or the default.

    Raises:
        ValueError: if FASTCL_WORKSPACE_MB is not a positive number.
    """
    text = os.environ.get(WORKSPACE_VARIABLE)
    if not text:
        return default
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0.0 < megabytes < 1e9:
        raise ValueError(f"{WORKSPACE_VARIABLE}: expected a positive number of megabytes, got {text!r}")
    return int(megabytes * (1 << 20))
