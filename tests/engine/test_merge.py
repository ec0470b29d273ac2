"""Partial results merge: shards with offsets or groups give what the whole gives, and no NaN where nothing is left."""

import pytest
import torch

import fastcl
from fastcl.equation import masks

INFINITY = float("inf")


@pytest.mark.parametrize("kind", ["off_diagonal", "across_groups", "within_groups"])
def test_shards_equal_the_whole(kind: str) -> None:
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    gx, gy = torch.arange(10) % 4, torch.arange(12) % 5

    def mask(rows: slice, cols: slice) -> masks.Mask:
        if kind == "off_diagonal":
            return fastcl.off_diagonal(rows.start, cols.start)
        return getattr(fastcl, kind)(gx[rows], gy[cols])

    whole = fastcl.pair_reduce(x, y, mask=mask(slice(0, 10), slice(0, 12)), columns=True)
    r, c = torch.full((10,), -INFINITY, dtype=torch.float64), torch.full((12,), -INFINITY, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 10)):
        for cols in (slice(0, 5), slice(5, 6), slice(6, 12)):
            part_r, part_c = fastcl.pair_reduce(x[rows], y[cols], mask=mask(rows, cols), columns=True)
            r[rows], c[cols] = fastcl.merge(r[rows], part_r), fastcl.merge(c[cols], part_c)
    torch.testing.assert_close((r, c), whole, rtol=1e-13, atol=1e-13)


def test_gradients_flow_through_a_merge_of_shards() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    merged = fastcl.merge(fastcl.pair_reduce(x, y[:3]), fastcl.pair_reduce(x, y[3:]))
    expected = torch.autograd.grad(fastcl.pair_reduce(x, y).sin().sum(), (x, y))
    for got, want in zip(torch.autograd.grad(merged.sin().sum(), (x, y)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_two_empty_parts_merge_to_nothing_with_gradient_zero() -> None:
    a = torch.tensor([-INFINITY, -INFINITY, 1.0], requires_grad=True)
    b = torch.tensor([-INFINITY, 2.0, -INFINITY], requires_grad=True)
    merged = fastcl.merge(a, b)
    assert merged.tolist() == [-INFINITY, 2.0, 1.0]
    merged.backward(torch.ones(3))
    assert a.grad is not None and a.grad.tolist() == [0.0, 0.0, 1.0]
    assert b.grad is not None and b.grad.tolist() == [0.0, 1.0, 0.0]


def test_gradcheck() -> None:
    parts = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(fastcl.merge, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_of_parts_far_apart_and_of_equal_ones(dtype: torch.dtype) -> None:
    """p (1 - p) of a part, where torch.logaddexp forms e^(b - a) / (1 + e^(b - a))^2, and torch.maximum halves both."""
    a = torch.tensor([0.0, 1000.0, -1000.0, 3.0, 0.0], dtype=dtype, requires_grad=True)
    b = torch.tensor([1000.0, 0.0, 3.0, 3.0, 1.0], dtype=dtype)
    (first,) = torch.autograd.grad(fastcl.merge(a, b).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    share = torch.sigmoid(a.detach().double() - b.double())
    torch.testing.assert_close(first.detach().double(), share, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        second.double(), share * torch.sigmoid(b.double() - a.detach().double()), rtol=1e-6, atol=0
    )


def test_infinite_parts() -> None:
    a, b = torch.tensor([INFINITY, INFINITY, 1.0]), torch.tensor([INFINITY, -INFINITY, INFINITY])
    assert fastcl.merge(a, b).tolist() == [INFINITY] * 3


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^merge: expected r2 to be a floating-point tensor, got torch.int64$"):
        fastcl.merge(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
