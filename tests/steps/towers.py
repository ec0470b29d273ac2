"""Small encoders, and a step that keeps every graph: what a cached step must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 6


def tower(seed: int, dropout: float = 0.3) -> nn.Module:
    """5 inputs to WIDTH outputs, float64, in training mode."""
    torch.manual_seed(seed)
    layers = (nn.Linear(5, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, WIDTH))
    return nn.Sequential(*layers).double()


def normed_tower() -> nn.Module:
    """As tower, with a first layer whose spectral norm is a power iteration kept in buffers."""
    layers = (nn.utils.parametrizations.spectral_norm(nn.Linear(5, 16)), nn.ReLU(), nn.Linear(16, WIDTH))
    return nn.Sequential(*layers).double()


def rows(n: int, seed: int) -> Tensor:
    """Inputs, float64."""
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_with_every_graph(
    encoders: Sequence[Callable[..., Any]], batches: Sequence[Tensor], loss: Callable[..., Tensor], chunk: int
) -> Tensor:
    """The same chunks in the same order, none of them let go."""
    value = loss(*(torch.cat([e(part) for part in b.split(chunk)]) for e, b in zip(encoders, batches, strict=True)))
    value.backward()
    return value.detach()


def gradients(*modules: nn.Module) -> list[Tensor]:
    """Those of all parameters, in order, taken away."""
    parameters = [p for module in modules for p in module.parameters()]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def same(found: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    """Of float64, to rounding."""
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))
