"""The intrinsics and the generated pair functions of Triton against their PyTorch twins. Run by test_interpreter.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastcl.triton_kernels import intrinsics, own_pairs
from fastcl.triton_kernels.generated_pairs import PAIRS as GENERATED
from hypothesis import example, given, settings

from fastcl.equation import intrinsics as twins
from fastcl.equation.derivative import derived_slope
from fastcl.equation.pairs import PairFunction

from ..engine.test_derivative import K, bodies, folder, written
from .problems import PAIRS

__all__ = ["folder"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAN, INF = float("nan"), float("inf")
EVERYWHERE = torch.cat(
    (torch.linspace(-90.0, 90.0, 401), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1e-5, -1e-5, NAN, INF, -INF]))
)
POSITIVE = torch.cat((torch.logspace(-6, 6, 200), torch.tensor([1.0, 1.0 + 1e-6, NAN, INF])))
ONE_ARGUMENT = {
    "exp": EVERYWHERE, "expm1": EVERYWHERE, "sigmoid": EVERYWHERE, "softplus": EVERYWHERE, "log": POSITIVE, "rsqrt": POSITIVE,
    "log1p": torch.cat((POSITIVE, torch.tensor([0.0, 1e-30, -1e-7, 1e-3, -0.5, -0.999]))),
}  # fmt: skip


@triton.jit
def apply_one(Z, OUT, n, F: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, F(tl.load(Z + at, mask=at < n, other=1.0)), mask=at < n)


@triton.jit
def apply_two(Z, OUT, n, k, F: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, F(tl.load(Z + at, mask=at < n, other=1.0), k), mask=at < n)


@triton.jit
def apply_pair(Z, OUT, n, k0, k1, F: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    z = tl.load(Z + at, mask=at < n, other=1.0)
    tl.store(OUT + at, F(z, k0, k1) + 0.0 * z, mask=at < n)


def close(got: torch.Tensor, want: torch.Tensor, z: torch.Tensor) -> None:
    """Equal to a few roundings, and to those of z log2 e, which an exponential turns into its own."""
    far = bool(z.abs().nan_to_num(0.0, 0.0, 0.0).max() > 10.0)
    torch.testing.assert_close(got.double(), want, rtol=1.5e-5 if far else 1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_one_argument(name: str) -> None:
    z = ONE_ARGUMENT[name]
    out = torch.empty_like(z)
    apply_one[(1,)](z, out, len(z), F=getattr(intrinsics, name), BLOCK=512)
    want = getattr(twins, name)(z.double())
    # Float32 ends at 3.4e38 and, flushed to 0, at 1.2e-38.
    want = torch.where(want.abs() > 3.4028235e38, torch.sign(want) * INF, want)
    tiny = (want.abs() < 1.2e-38) & (out.abs() < 1.2e-38)
    close(out[~tiny], want[~tiny], z)


@pytest.mark.parametrize(("name", "k"), [("pow", 2.5), ("pow", -0.5), ("maximum", 0.3), ("minimum", 0.3)])
def test_two_arguments(name: str, k: float) -> None:
    z = POSITIVE[POSITIVE < 1e5] if name == "pow" else EVERYWHERE
    out = torch.empty_like(z)
    apply_two[(1,)](z, out, len(z), k, F=getattr(intrinsics, name), BLOCK=512)
    torch.testing.assert_close(out.double(), getattr(twins, name)(z.double(), k), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("pair", PAIRS)
def test_generated_pair_functions(pair: str) -> None:
    function = PAIRS[pair]
    z = torch.linspace(0.05, 3.0, 300)
    k0, k1 = (*function.constants, 0.0, 0.0)[:2]
    for generated, twin in zip(GENERATED[pair], (function.f, function.df), strict=True):
        out = torch.empty_like(z)
        apply_pair[(1,)](z, out, len(z), k0, k1, F=generated, BLOCK=512)
        torch.testing.assert_close(out.double(), twin(z.double()), rtol=2e-6, atol=1e-6)


@example(body=["return pow(z, 2.0) - pow(z, 3.0) + pow(z - 2.0, -3) * pow(z, 0)"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(body=bodies)
def test_drawn_pair_functions(body: list[str], folder: Path) -> None:
    """A user's own, as they are made at run time: value and derived slope against autograd in float64."""
    cls: Any = written(body, folder)
    cls.slope, cls.constant_names = staticmethod(derived_slope(cls)), ("p", "q")
    cls.text = classmethod(vars(PairFunction)["text"].__func__)
    z = torch.linspace(-1.9, 1.9, 300)
    wide = z.double().requires_grad_()
    value = cls.value(wide, *K) + 0.0 * wide
    (slope,) = torch.autograd.grad(value.sum(), wide)
    narrow = [cls.value(z, *K) + 0.0 * z, cls.slope(z, *K) + 0.0 * z]
    for made, want, rough in zip(own_pairs.functions(cls()), (value.detach(), slope), narrow, strict=True):
        out = torch.empty_like(z)
        apply_pair[(1,)](z, out, len(z), *K, F=made, BLOCK=512)
        allowed = 8 * (rough.double() - want).abs().max() + 1e-5 * want.abs().max().clamp(min=1.0)
        assert ((out.double() - want).abs() <= allowed).all(), body
