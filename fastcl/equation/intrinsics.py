"""The named intrinsics that pair functions are written in: their meaning, in PyTorch.

Their twins are csrc/intrinsics.h and triton_kernels/intrinsics.py; a test holds the three together. Constants are Python floats.
All propagate NaN, and none makes NaN from a finite argument inside its domain.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exp(z: Tensor) -> Tensor:
    return torch.exp(z)


def expm1(z: Tensor) -> Tensor:
    """e^z - 1, of which near 0 the difference keeps no digit; far below 0 it does, and torch.expm1's slope, (e^z - 1) + 1, none."""
    return torch.where(z < -1.0, torch.exp(torch.clamp(z, max=-1.0)) - 1.0, torch.expm1(torch.clamp(z, min=-1.0)))


def log(z: Tensor) -> Tensor:
    return torch.log(z)


def log1p(z: Tensor) -> Tensor:
    return torch.log1p(z)


def rsqrt(z: Tensor) -> Tensor:
    return torch.rsqrt(z)


def sigmoid(z: Tensor) -> Tensor:
    return torch.sigmoid(z)


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), with every derivative's digits on both sides of 0: the gradient of F.softplus is formed by way of g e^z, which
    is infinite where g / (1 + e^-z) is not, and the second derivative of F.logsigmoid is 0 from 17 on in float32."""
    positive = z > 0
    return torch.where(positive, z, 0.0) + torch.log1p(torch.exp(torch.where(positive, -z, z)))


def pow(z: Tensor, exponent: float) -> Tensor:
    return torch.pow(z, exponent)


def maximum(z: Tensor, bound: float) -> Tensor:
    return torch.clamp(z, min=bound)


def minimum(z: Tensor, bound: float) -> Tensor:
    return torch.clamp(z, max=bound)


def select_less(a: Tensor, b: float, when_less: Tensor | float, otherwise: Tensor | float) -> Tensor:
    """when_less where a < b, otherwise elsewhere."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return when_less if a < b else otherwise  # numbers are what their callers make of them
    if not isinstance(when_less, Tensor) and not isinstance(otherwise, Tensor):
        # of two numbers torch.where makes the default dtype, whatever that of z
        when_less = torch.full_like(a if isinstance(a, Tensor) else b, when_less)  # one of them is z
    return torch.where(a < b, when_less, otherwise)
