"""A learned scale that has become infinite: plain PyTorch's infinities, and NaN in no value that PyTorch's float64 has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nn

import fastcl.functional as F

from .witnesses import served

D = 3


def eager(x: Tensor, y: Tensor, a: Tensor, b: Tensor, normalize: bool) -> Tensor:
    if normalize:
        x, y = nn.normalize(x, dim=1), nn.normalize(y, dim=1)
    sign = 2.0 * torch.eye(len(x), dtype=x.dtype) - 1.0
    return -nn.logsigmoid(sign * (a * (x @ y.T) + b)).sum() / len(x)


def kinds(t: Tensor) -> list[float]:
    """Each entry's sign where it is infinite, NaN where it is that, 0 where it is a number."""
    return torch.where(t.isfinite(), 0.0, t.sign()).flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [0.0, -10.0])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_siglip(n: int, bias: float, normalize: bool, dtype: torch.dtype) -> None:
    """The value and the gradients of both numbers; of rows PyTorch has infinity times a sum, whose sign rounding may decide."""
    g = torch.Generator().manual_seed(n)
    rows = [torch.randn(n, D, generator=g).to(dtype) for _ in range(2)]
    numbers = [torch.tensor(math.inf, dtype=dtype), torch.tensor(bias, dtype=dtype)]

    def found(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        x, y, a, b = (t.to(dtype, copy=True).requires_grad_() for t in (*rows, *numbers))
        if backend is None:
            value = eager(x, y, a, b, normalize)
        else:
            value = F.siglip(x, y, logit_scale=a, logit_bias=b, normalize=normalize, backend=backend)
        return [value.detach(), *torch.autograd.grad(value, (a, b, x, y))]

    right = found(torch.float64, None)
    for backend in ("auto", *served(dtype)):
        mine = found(dtype, backend)
        for got, want in zip(mine[:3], right[:3], strict=True):
            assert kinds(got) == kinds(want)
            if want.isfinite():
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        for got, want in zip(mine[3:], right[3:], strict=True):
            assert not got.isfinite()[~want.isfinite()].any()
