# mypy: disallow-untyped-defs=False
"""What stands in a class of one's own, and which class an op means: defined anew, derived from another, of numbers of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import fastcl
from fastcl.backends import own_pairs
from fastcl.equation.intrinsics import exp, select_less
from fastcl.pairs import PairFunction

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FACTOR = 2.0
BACKENDS = ["blocked", "reference"]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registry without what a test puts there: names may be used again."""
    before = dict(PairFunction.registry)
    yield
    PairFunction.registry.clear()
    PairFunction.registry.update(before)


def linear() -> type[Any]:
    @dataclass(frozen=True)
    class Mine(PairFunction, name="mine"):
        w: float

        @staticmethod
        def value(z, w):
            return w * z

    return Mine


def cubic() -> type[Any]:
    @dataclass(frozen=True)
    class Mine(PairFunction, name="mine"):
        w: float

        @staticmethod
        def value(z, w):
            return w * z * z * z

    return Mine


def sums(pair: Any, backend: str = "blocked", x: torch.Tensor = X) -> torch.Tensor:
    return fastcl.pair_reduce(x, pair=pair, reduce="sum", backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_of_the_same_name_leaves_the_earlier_one_alone(backend: str) -> None:
    """As when a cell of a notebook runs again: values and gradients of what is there stay those of its class."""
    earlier, x = linear()(2.0), X.clone().requires_grad_()
    r = sums(earlier, backend, x)
    later = cubic()(2.0)
    torch.testing.assert_close(sums(earlier, backend), (2.0 * X @ X.T).sum(1))
    torch.testing.assert_close(sums(later, backend), (2.0 * (X @ X.T) ** 3).sum(1))
    torch.testing.assert_close(torch.autograd.grad(r.sum(), x)[0], 4.0 * X.sum(0).expand_as(X), rtol=1e-12, atol=1e-12)
    assert PairFunction.registry["mine"] is type(later) and earlier.name == later.name == "mine"


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields_of_a_class_and_of_the_one_it_comes_from(backend: str) -> None:
    class Same(linear(), name="same"):  # type: ignore[misc]
        pass

    @dataclass(frozen=True)
    class More(linear(), name="more"):  # type: ignore[misc]
        LEAST: ClassVar[float] = 1.0
        v: float = 3.0

        @staticmethod
        def value(z, w, v):
            return w * z * v

    @dataclass(frozen=True, kw_only=True)
    class Whole(PairFunction, name="whole"):
        k: int

        @staticmethod
        def value(z, k):
            return k * z

    assert More.constant_names == ("w", "v")
    for pair, factor in ((Same(2.0), 2.0), (More(2.0), 6.0), (Whole(k=2), 2.0)):
        torch.testing.assert_close(sums(pair, backend), (factor * X @ X.T).sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_numbers_have_the_dtype_of_z(backend: str) -> None:
    class Constant(PairFunction, name="constant"):
        @staticmethod
        def value(z):
            return 0.1

    class Step(PairFunction, name="step"):
        @staticmethod
        def value(z):
            return select_less(z, 0.0, 0.1, 0.3)

    z = X @ X.T
    assert torch.equal(sums(Constant(), backend), torch.full_like(z, 0.1).sum(1))
    steps = torch.full_like(z, 0.3).masked_fill(z < 0, 0.1).sum(1)
    torch.testing.assert_close(sums(Step(), backend), steps, rtol=1e-14, atol=0.0)


class Scaled(PairFunction, name="scaled_of_a_test"):
    @staticmethod
    def value(z):
        return FACTOR * exp(0.1 * z)


del PairFunction.registry[Scaled.name]


def test_a_number_of_the_module_that_changes_after_the_slope_was_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_pairs, "_checked", {})
    r = sums(Scaled())
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(ValueError, match=r"Scaled\.slope: expected the derivative of value, .*; define the class anew"):
        sums(Scaled())
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert torch.equal(sums(Scaled()), r)
