"""A whole loss of two aligned views in two ops: csrc/cuda/aligned.cpp, the fused kernels with three small ones around them.

aligned_rows   fused_rows   aligned_finish        forward: value, the rows as they are swept, and O(n) that the backward reads
fused_gradient (of either side)  aligned_gradients    backward

For batches whose time on a GPU is the host's: some sixty operations of torch's stand between the same launches otherwise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ... import derivatives, transforms
from ..aligned import Found, Four, Told, is_number
from . import form, fused, launches

MOST = 2048  # rows of either side: one block finishes the loss of all


def serves(told: Told, x: Tensor, y: Tensor, gradients: bool) -> bool:
    """Whether the kernels serve the loss of these rows; squared distances of rows of unit length alone, which need no centre."""
    few = y.shape[0] <= MOST and (told.operand == "dot" or told.normalize)
    if not few or form.requested() not in ("auto", "fused"):
        return False
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype:  # which would cast the unit rows
        return False
    return fused.holds_rows(x, told.reduce, launches.facts_of(x.device), gradients)


def number(value: float | Tensor, x: Tensor) -> float | Tensor | None:
    """The number as the kernels take it; None where they do not."""
    return value if not isinstance(value, Tensor) or is_number(value, x.device) else None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """torch's current device is that of the launches, and after them what it was."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _loss(told: Told, wanted: Four, device: torch.device) -> tuple[Any, ...]:
    _, multiprocessors, shared_bytes = launches.facts_of(device)
    return (*told, [*wanted, False, False], multiprocessors, shared_bytes)


def loss(x: Tensor, y: Tensor, a: Any, b: Any, told: Told, wanted: Four) -> tuple[Tensor, ...]:
    """The loss, and what `gradients` takes: rows as they are swept, and state."""
    numbers = [(v, 0.0) if isinstance(v, Tensor) else (None, float(v)) for v in (a, b)]
    given = (*(t for t, _ in numbers), *(v for _, v in numbers))
    with _on(x.device):
        return derivatives.run(launches.ops.cuda_aligned_loss, x, y, *given, *_loss(told, wanted, x.device))


def gradients(
    g: Tensor, x: Tensor | None, y: Tensor | None, saved: list[Tensor], told: Told, wanted: Four, shape: torch.Size
) -> Found:
    """The gradients that are wanted, for the upstream gradient g; shape: that of x. Rows that want none may be None."""
    rows, state = saved
    # Batched gradients are those of 1, each times its own.
    alone = transforms.values_are_here()
    upstream = g if alone else torch.ones((), dtype=torch.float32, device=rows.device)
    given = [t if told.normalize and of else None for t, of in zip((x, y), wanted, strict=False)]
    found = derivatives.run(
        launches.ops.cuda_aligned_loss_backward,
        upstream,
        *given,
        rows,
        state,
        *shape,
        *_loss(told, wanted, rows.device),
    )
    dx, dy, da, db = (t if alone or not of else g * t for t, of in zip(found, wanted, strict=True))
    return dx, dy, da, db
