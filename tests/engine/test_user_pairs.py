# mypy: disallow-untyped-defs=False
"""A pair function of the caller's own: pure PyTorch serves it, kernels that do not know it say so with what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fastcl
from fastcl.backends import extension, own_pairs
from fastcl.equation.intrinsics import exp, maximum, pow, select_less
from fastcl.pairs import PairFunction, Power


@dataclass(frozen=True)
class Bump(PairFunction, name="bump_of_a_test"):
    """f(z) = e^{-w z^2}."""

    w: float

    @staticmethod
    def value(z, w):
        return exp(-w * z * z)

    @staticmethod
    def slope(z, w):
        return -2.0 * w * z * exp(-w * z * z)


del PairFunction.registry[Bump.name]  # this module's tests alone have it


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PairFunction.registry, Bump.name, Bump)


X, Y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("backend", [None, "auto", "blocked", "reference"])
def test_it_is_served_by_pure_pytorch(backend: str | None) -> None:
    x = X.clone().requires_grad_()
    fastcl.pair_total(x, Y, outer="sum", pair=Bump(0.5), reduce="sum", backend=backend).backward()
    z = (right := X.double().requires_grad_()) @ Y.double().T
    torch.exp(-0.5 * z.square()).sum().backward()
    torch.testing.assert_close(x.grad.double(), right.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(extension.library is None, reason="no compiled extension here")
def test_kernels_that_are_not_compiled_say_why() -> None:
    """tests/cpu/test_own_pairs.py has those that are."""
    with pytest.raises(
        fastcl.BackendUnavailableError,
        match=r"it has no kernel for the pair function 'bump_of_a_test': FASTCL_COMPILE_PAIRS=0 is set; .* use backend='blocked'",
    ):
        fastcl.pair_reduce(X, Y, pair=Bump(0.5), reduce="sum", backend="cpu")


def test_a_slope_that_is_not_the_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first use, on every backend, and under inference mode."""

    @dataclass(frozen=True)
    class Wrong(PairFunction, name="wrong_of_a_test"):
        @staticmethod
        def value(z):
            return exp(-0.5 * z * z)

        @staticmethod
        def slope(z):
            return z * exp(-0.5 * z * z)

    try:
        for backend in ("reference", "blocked", None):
            with pytest.raises(ValueError, match=r"Wrong.slope: expected the derivative of value, .* leave slope out"):
                fastcl.pair_reduce(X, Y, pair=Wrong(), reduce="sum", backend=backend)
        monkeypatch.setattr(own_pairs, "_checked", {})
        with torch.inference_mode(), pytest.raises(ValueError, match=r"Wrong.slope: expected"):
            fastcl.pair_reduce(X, Y, pair=Wrong(), reduce="sum")
    finally:
        del PairFunction.registry["wrong_of_a_test"]


def test_a_slope_that_is_no_number_where_the_value_has_one_is_refused() -> None:
    """Of NaN no difference is large."""

    @dataclass(frozen=True)
    class Root(PairFunction, name="root_of_a_test"):
        @staticmethod
        def value(z):
            return pow(maximum(z, 0.0), 0.5)

        @staticmethod
        def slope(z):
            return 0.5 * pow(maximum(z, 0.0), -0.5) * select_less(z, 0.0, 0.0, 1.0)

    try:
        with pytest.raises(ValueError, match=r"Root.slope: expected the derivative of value, 0 at z = -7.31, got nan;"):
            fastcl.pair_reduce(X, Y, pair=Root(), reduce="sum")
    finally:
        del PairFunction.registry["root_of_a_test"]


def test_it_takes_no_name_of_ours() -> None:
    with pytest.raises(ValueError, match="name: expected one that no pair function of fastcl has, got 'exp'"):
        type("Mine", (PairFunction,), {}, name="exp")
    assert PairFunction.registry["exp"] is fastcl.pairs.Exp


@pytest.mark.parametrize("p", [float("nan"), float("inf"), "0.5", True, None, 10**400, torch.tensor(1.0)])
def test_constants_are_numbers(p: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^power: p: expected "):
        Power(p=p, eps=1e-3)
    with pytest.raises((ValueError, TypeError), match=r"^power: eps: expected "):
        Power(p=1.0, eps=p if not isinstance(p, torch.Tensor) else 0.0)


def test_constants_stay_what_they_are_in_the_rows_dtype() -> None:
    """eps = 1e-60 is 0 in float32, and 0 to the power of -1 infinite."""
    with pytest.raises(ValueError, match=r"^power: eps: expected a number within the range of float32"):
        fastcl.pair_reduce(X, Y, pair=Power(-1.0, 1e-60), reduce="sum")
    assert fastcl.pair_reduce(X.double(), Y.double(), pair=Power(-1.0, 1e-60), reduce="sum").isfinite().all()


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda self, z, w: exp(-w * z), r"value\(self, z, w\)"),
        (lambda z: exp(-z), r"value\(z\)"),
        (lambda z, v, w: exp(-z), r"value\(z, v, w\)"),
    ],
)
def test_a_value_of_other_arguments_is_refused(value: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"Odd.value: expected value\(z, w\), z and the fields .* got {got}"):
        type("Odd", (PairFunction,), {"__annotations__": {"w": float}, "value": value}, name="odd_of_a_test")
    assert "odd_of_a_test" not in PairFunction.registry


def test_a_value_needs_no_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairFunction, "registry", dict(PairFunction.registry))

    class Plain(PairFunction, name="plain_of_a_test"):
        def value(z):  # type: ignore[override]  # noqa: N805
            return exp(-0.5 * z * z)

    r = fastcl.pair_reduce(X, Y, pair=Plain(), reduce="sum", backend="blocked")
    torch.testing.assert_close(r, fastcl.pair_reduce(X, Y, pair=Bump(0.5), reduce="sum", backend="blocked"))
