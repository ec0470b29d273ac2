"""What the tests of objectives share: which backends serve this machine, and one evaluation by library or by oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastcl
from fastcl.backends import choice
from tests import oracle

from .cases import CASES, Case

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)


def served(dtype: torch.dtype, *, definition: bool = True) -> list[str]:
    """The backends that serve CPU tensors of the dtype; without the definition where speed is the point."""
    names = [name for name in choice.MODULES if choice.reason(name, CPU, dtype) is None]
    return names if definition else [name for name in names if name != "reference"]


def sets_of(cases: Sequence[Case] = CASES) -> list[Any]:
    """(case, index of its arguments), for parametrising."""
    return [(case, index) for case in cases for index in case.sets()]


def name_of(value: Any) -> str:
    """A readable id for a parameter."""
    if isinstance(value, Case):
        return value.id
    return str(value).removeprefix("torch.")


def library(case: Case, rows: Sequence[Tensor], backend: str | None, **arguments: Any) -> Tensor:
    """The objective by fastcl."""
    chosen = {"backend": backend} if case.backend else {}
    return getattr(fastcl.functional, case.name)(*rows, **arguments, **chosen)


def double_loop(case: Case, rows: Sequence[Tensor], **arguments: Any) -> Tensor:
    """The objective by its double loop."""
    return getattr(oracle, case.name)(*rows, **arguments)


def gradients(value: Tensor, leaves: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """Gradients to every leaf; zeros where there is none."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def upstream_for(value: Tensor) -> Tensor:
    """An upstream gradient without structure, the same for the same shape."""
    g = torch.Generator("cpu").manual_seed(7)
    return torch.randn(value.shape, generator=g, dtype=torch.float64).to(value.dtype)


def close(got: Tensor, want: Tensor, scale: Tensor | None = None, rtol: float = 1e-10) -> None:
    """Equal to rtol of the largest entry: a small entry of a gradient is as exact as the sum that it comes from."""
    size = float((want if scale is None else scale).detach().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.detach(), want.detach().to(got.dtype), rtol=rtol, atol=rtol * size)
