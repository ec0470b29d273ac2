"""Whole losses of two aligned views: what is told of them, and what an engine of them has.

serves      whether its kernels serve the loss of these rows
number      a number as they take it, or None where they do not
loss        the value, and what a backward takes
gradients   the gradients that are wanted, for an upstream gradient
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Four = tuple[bool, bool, bool, bool]  # of x, y, scale and shift
Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Told(NamedTuple):
    """A loss as the ops take it: the arguments of ALIGNED (equation/problem.py) from `normalize` on, but for `wanted`."""

    normalize: bool
    sides: str
    operand: str
    reduce: str
    outer: str
    columns: bool
    pair: str
    pair_numbers: list[float]
    positive: str
    positive_numbers: list[float]
    linear: float
    constant: float


class Engine(Protocol):
    """The CPU's is functional/at_once.py's, that of CUDA cuda/aligned.py."""

    def serves(self, told: Told, x: Tensor, y: Tensor, gradients: bool) -> bool:
        """Whether the kernels serve the loss of these rows."""

    def number(self, value: float | Tensor, x: Tensor) -> float | Tensor | None:
        """The number as they take it; None where they do not."""

    def loss(self, x: Tensor, y: Tensor, a: Any, b: Any, told: Told, wanted: Four) -> tuple[Tensor, ...]:
        """The value, and what `gradients` takes as saved."""

    def gradients(
        self, g: Tensor, x: Tensor | None, y: Tensor | None, saved: list[Tensor], told: Told, wanted: Four, shape: torch.Size
    ) -> Found:  # fmt: skip
        """The gradients that are wanted, for the upstream gradient g; shape: that of x. Rows that want none may be None."""


def plain(*rows: Tensor) -> bool:
    """Whether these are matrices in memory of no subclass of torch's."""
    return all(
        (type(x) is Tensor or isinstance(x, torch.nn.Parameter))
        and x.layout == torch.strided
        and not x.is_nested
        and x.dim() == 2
        for x in rows
    )


def is_number(value: Tensor, device: torch.device) -> bool:
    """Whether kernels of this device read the tensor as a number."""
    plain = type(value) is Tensor or isinstance(value, torch.nn.Parameter)
    return plain and value.dtype == torch.float32 and value.dim() == 0 and value.device == device
