"""A drop-in beside its original: both get leaves of their own with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-10


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_views(n: int, d: int, seed: int = 0) -> list[Tensor]:
    """Rows and noisy copies of them."""
    u = rows(n, d, seed=seed)
    return [u, u + 0.7 * rows(n, d, seed=seed + 1000)]


def unit(x: Tensor) -> Tensor:
    """Rows of unit length."""
    return torch.nn.functional.normalize(x, dim=1)


def evaluate(loss: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The value, then the gradient of every leaf; 0 where autograd has none to give."""
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*own)
    gradients = torch.autograd.grad(value, own, allow_unused=True)
    return [
        value.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(own, gradients, strict=True)),
    ]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Value and each gradient agree to 1e-10 of the original's largest entry."""
    assert len(ours) == len(theirs)
    for name, a, b in zip(["value", *(f"gradient {i}" for i in range(len(ours)))], ours, theirs, strict=False):
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, original {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}: {a.dtype}, original {b.dtype}"
        error, bound = _largest(a - b), TOLERANCE * _largest(b) + 1e-14
        assert error <= bound, f"{name}: differs by {error}, allowed {bound}"


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    """Both give the same value and gradients on these leaves."""
    assert_same(evaluate(ours, leaves), evaluate(theirs, leaves))
