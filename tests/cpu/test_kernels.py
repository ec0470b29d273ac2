"""The CPU kernels against the definition: every combination, sizes around the register tile and the cache tile, threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastcl
from fastcl.backends import choice
from tests.engine.combinations import (
    Combination,
    assert_same,
    combinations,
    eager,
    inputs,
    total_id,
    totals,
    value_and_gradients,
)

COMBINATIONS = combinations()
# Around the register tiles of every instruction set (9 x 48, 4 x 24, 4 x 8; half as wide in float64), and nothing at all.
SIZES = [(11, 7, 5), (1, 1, 1), (49, 25, 17), (2, 9, 3), (0, 3, 2), (3, 0, 2), (4, 5, 0), (24, 24, 48)]
# Several cache tiles (of 384, 192 and 96), ragged, for every thread.
LARGE = [(430, 411, 20), (200, 700, 33)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_threads(cases: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Each case with one, two or three threads in turns, which no period of the list meets."""
    return [(*case, 1 + (k + k // 3) % 3) for k, case in enumerate(cases)]


def test_the_kernels_serve() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert choice.choose(None, torch.device("cpu"), dtype)[0] == "cpu"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("c", COMBINATIONS, ids=lambda c: c.id)
def test_equals_reference(c: Combination, size: tuple[int, int, int]) -> None:
    i = inputs(c, *size)
    columns = not c.itself
    expected = value_and_gradients(i.call("reference", columns=columns), i.leaves)
    assert_same(value_and_gradients(i.call("cpu", columns=columns), i.leaves), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("c", "outer"), totals(), ids=total_id)
def test_totals_equal_reference(c: Combination, outer: str) -> None:
    for size in SIZES:
        i = inputs(c, *size)
        more: dict = {"outer": outer}
        if outer == "contrast":
            more["positive"] = i.leaves["positive"] = torch.linspace(
                -1, 1, size[0], dtype=torch.float64
            ).requires_grad_()
        expected = value_and_gradients(i.call("reference", **more), i.leaves)
        assert_same(value_and_gradients(i.call("cpu", **more), i.leaves), expected, rtol=1e-10, atol=1e-11)


def name(value: Any) -> str:
    return value.id if isinstance(value, Combination) else str(value)


def thorough() -> list[Combination]:
    """One pair function for each epilogue's shape, with every mask and operand."""
    return [c for c in COMBINATIONS if c.pair.name in ("identity", "softplus")]


@pytest.mark.parametrize(("c", "size", "count"), with_threads([(c, s) for c in thorough() for s in LARGE]), ids=name)
def test_many_tiles_and_threads(c: Combination, size: tuple[int, int, int], count: int) -> None:
    i = inputs(c, *size, biases=count > 1)
    columns = not c.itself and count != 3
    expected = value_and_gradients(i.call("reference", columns=columns), i.leaves)
    with threads(count):
        found = value_and_gradients(i.call("cpu", columns=columns), i.leaves)
    assert_same(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("c", "outer", "count"), with_threads([t for t in totals() if t[0] in thorough()]), ids=name)
def test_totals_of_many_tiles_and_threads(c: Combination, outer: str, count: int) -> None:
    i = inputs(c, *LARGE[count % 2])
    more: dict = {"outer": outer}
    if outer == "contrast":
        more["positive"] = i.leaves["positive"] = (
            torch.linspace(-1, 1, i.leaves["x"].shape[0]).double().requires_grad_()
        )
    expected = value_and_gradients(i.call("reference", **more), i.leaves)
    with threads(count):
        found = value_and_gradients(i.call("cpu", **more), i.leaves)
    assert_same(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", COMBINATIONS, ids=lambda c: c.id)
def test_precision(c: Combination, dtype: torch.dtype) -> None:
    """No further from the float64 definition than eager float32, plus a few roundings; gradients carry one to their dtype."""
    i = inputs(c, 53, 49, 17, dtype)
    columns = not c.itself
    truth = value_and_gradients(i.call("reference", columns=columns), i.leaves)
    yardstick = value_and_gradients(eager(i, torch.float32, columns), i.leaves)
    actual = value_and_gradients(i.call("cpu", columns=columns), i.leaves)
    for name, want in truth.items():
        got = actual[name]
        assert got.dtype == (dtype if name in ("x", "y") else torch.float32)
        finite = torch.isfinite(want)
        assert torch.equal(got[~finite], want[~finite].to(got.dtype))
        # A scalar's gradient is a sum over all rows, of either sign: its terms are what is rounded.
        size = (
            want[finite].double().abs().amax()
            if want.dim()
            else truth["output0"].double().nan_to_num(neginf=0).abs().sum()
        )
        if name in ("x", "y"):  # with sqdist a row's terms may cancel to nothing
            size = torch.maximum(size, torch.tensor(torch.finfo(torch.float32).eps / torch.finfo(dtype).eps).double())
        error, torch_error = ((t[name].double() - want.double())[finite].abs().amax() for t in (actual, yardstick))
        assert error <= 1.5 * torch_error + 4.0 * torch.finfo(got.dtype).eps * size, (name, error, torch_error, size)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "rows of a wider matrix": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_layouts(layout: str, operand: str) -> None:
    x, y = torch.randn(70, 19, dtype=torch.float64), torch.randn(53, 19, dtype=torch.float64)
    results = []
    for view in (lambda t: t, LAYOUTS[layout]):
        a, b = view(x).detach().requires_grad_(), view(y).detach().requires_grad_()
        assert view is not LAYOUTS[layout] or layout == "not aligned" or not a.is_contiguous()
        r, c = fastcl.pair_reduce(a, b, operand=operand, scale=-1.0, columns=True, backend="cpu")
        results.append((r, c, *torch.autograd.grad(r.sum() + c.square().sum(), (a, b))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


def test_broadcast_rows() -> None:
    x = torch.randn(1, 4, dtype=torch.float64).expand(60, 4)
    r = fastcl.pair_reduce(x, mask="off_diagonal", backend="cpu")
    torch.testing.assert_close(r, (x[0] @ x[0] + torch.tensor(59.0).double().log()).expand(60))


@pytest.mark.parametrize("only", range(6))
def test_only_what_is_wanted(only: int) -> None:
    """Each gradient alone equals the same gradient among all six; the total forms too."""
    g = torch.Generator().manual_seed(3)
    for operand in ("dot", "sqdist"):
        leaves = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((40, 7), (55, 7), (), (), (40,), (55,))]

        def gradients(wanted: list[int], total: bool, leaves: list = leaves, operand: str = operand) -> tuple:
            x, y, scale, shift, bias_x, bias_y = leaves = [
                t.clone().requires_grad_(k in wanted) for k, t in enumerate(leaves)
            ]
            more = {
                "operand": operand,
                "scale": scale,
                "shift": shift,
                "bias_x": bias_x,
                "bias_y": bias_y,
                "backend": "cpu",
            }
            if total:
                out = fastcl.pair_total(
                    x, y, reduce="logsumexp", outer="contrast", positive=torch.zeros(40).double(), **more
                )
            else:
                r, c = fastcl.pair_reduce(x, y, columns=True, **more)
                out = r.sum() + c.square().sum()
            return torch.autograd.grad(out, [leaves[k] for k in wanted])

        for total in (False, True):
            (alone,) = gradients([only], total)
            torch.testing.assert_close(alone, gradients(list(range(6)), total)[only], rtol=1e-12, atol=1e-12)
