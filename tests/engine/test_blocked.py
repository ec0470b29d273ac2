"""The fallback against the definition: every combination, block boundaries, dtypes, layouts and extremes."""

import pytest
import torch
from torch import Tensor

import fastcl

from .combinations import Combination, assert_same, combinations, eager, inputs, total_id, totals, value_and_gradients

COMBINATIONS = combinations()
SIZES = [(11, 7, 5), (1, 1, 1), (2, 9, 3), (0, 3, 2), (3, 0, 2), (4, 5, 0)]


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows of eleven float64 columns, so that even small problems take several, the last one ragged."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", str(3 * 11 * 8 / 2**20))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("c", COMBINATIONS, ids=lambda c: c.id)
def test_blocked_equals_reference(c: Combination, size: tuple[int, int, int]) -> None:
    i = inputs(c, *size)
    columns = not c.itself
    expected = value_and_gradients(i.call("reference", columns=columns), i.leaves)
    assert_same(value_and_gradients(i.call("blocked", columns=columns), i.leaves), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("c", "outer"), totals(), ids=total_id)
def test_blocked_totals_equal_reference(c: Combination, outer: str) -> None:
    for size in SIZES:
        i = inputs(c, *size)
        more: dict = {"outer": outer}
        if outer == "contrast":
            more["positive"] = i.leaves["positive"] = torch.linspace(
                -1, 1, size[0], dtype=torch.float64
            ).requires_grad_()
        expected = value_and_gradients(i.call("reference", **more), i.leaves)
        assert_same(value_and_gradients(i.call("blocked", **more), i.leaves), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [c for c in COMBINATIONS if c.mask == "off_diagonal"], ids=lambda c: c.id)
def test_lower_precision(c: Combination, dtype: torch.dtype) -> None:
    """Sums are float32, whatever the rows: no further from the float64 definition than eager float32, plus a few roundings.

    Gradients to x and y then carry one rounding to their dtype.
    """
    i = inputs(c, 33, 29, 17, dtype)
    columns = not c.itself
    truth = value_and_gradients(i.call("reference", columns=columns), i.leaves)
    yardstick = value_and_gradients(eager(i, torch.float32, columns), i.leaves)
    actual = value_and_gradients(i.call("blocked", columns=columns), i.leaves)
    for name, want in truth.items():
        got = actual[name]
        assert got.dtype == (dtype if name in ("x", "y") else torch.float32)
        # A scalar's gradient is a sum over all rows, of either sign: its terms are what is rounded.
        size = want.double().abs().max() if want.dim() else truth["output0"].double().abs().sum()
        error, torch_error = ((t[name].double() - want.double()).abs().max() for t in (actual, yardstick))
        assert error <= 2.0 * torch_error + 4.0 * torch.finfo(got.dtype).eps * size, (name, error, torch_error, size)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows of a wider matrix": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "reversed": lambda x: x.flip(0).flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_layouts(layout: str, backend: str) -> None:
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    results = []
    for view in (lambda t: t, LAYOUTS[layout]):
        a, b = view(x).detach().requires_grad_(), view(y).detach().requires_grad_()
        r, c = fastcl.pair_reduce(a, b, operand="sqdist", scale=-1.0, columns=True, backend=backend)
        results.append((r, c, *torch.autograd.grad(r.sum() + c.square().sum(), (a, b))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


def test_broadcast_rows() -> None:
    x = torch.randn(1, 4, dtype=torch.float64).expand(6, 4)
    torch.testing.assert_close(
        fastcl.pair_reduce(x, mask="off_diagonal"), (x[0] @ x[0] + torch.tensor(5.0).double().log()).expand(6)
    )


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_all_masked_rows_give_minus_infinity_and_gradient_zero(backend: str) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    same = torch.zeros(6, dtype=torch.int64)
    r = fastcl.pair_reduce(x, mask=fastcl.across_groups(same), backend=backend)
    assert torch.isneginf(r).all()
    torch.where(torch.isneginf(r), 0.0, r).sum().backward()
    assert x.grad is not None and (x.grad == 0).all()
    for outer, value in (("contrast", 0.0), ("pooled", float("-inf"))):
        positive = torch.zeros(6, requires_grad=True) if outer == "contrast" else None
        total = fastcl.pair_total(
            x, x.detach(), outer=outer, positive=positive, mask=fastcl.across_groups(same), backend=backend
        )
        assert total.item() == value
        assert (torch.autograd.grad(total, x)[0] == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e-3, -1e3])
@pytest.mark.parametrize("norm", [1e-20, 1e-5, 1.0, 1e5, 1e10])
def test_any_norm_and_tiny_temperatures_are_finite_and_right(norm: float, scale: float) -> None:
    """float32 against the float64 definition: z itself is rounded, so values and weights are right to eps |z|."""
    x = torch.randn(40, 8)
    x[::3] *= norm
    y = torch.randn(30, 8)
    results = []
    for backend in ("reference", "blocked"):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        r, c = fastcl.pair_reduce(a, b, scale=scale, columns=True, backend=backend)
        results.append((r, c, *torch.autograd.grad(r.sum() + c.sum(), (a, b))))
    reach = abs(scale) * (x @ y.T).abs().max().item()
    for want, got in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error < 1e-5 + 4e-7 * min(reach, 1e6), error


def test_nan_in_gives_nan_out() -> None:
    x = torch.randn(5, 3)
    x[2, 1] = float("nan")
    assert fastcl.pair_reduce(x, torch.randn(4, 3)).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("text", ["-1", "0", "much", "1e9", "nan"])
def test_bad_workspace_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", text)
    with pytest.raises(ValueError, match=f"FASTCL_WORKSPACE_MB: expected a positive number of megabytes, got '{text}'"):
        fastcl.pair_reduce(torch.randn(3, 4), backend="blocked")


def test_deterministic() -> None:
    x, y = torch.randn(300, 16), torch.randn(200, 16)

    def run() -> list[Tensor]:
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        r, c = fastcl.pair_reduce(a, b, columns=True, backend="blocked")
        return [r, c, *torch.autograd.grad(r.sum() + c.sum(), (a, b))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_a_logit_beyond_the_dtype_gives_infinity_not_nan() -> None:
    x, y = torch.full((3, 2), 1e20), torch.tensor([[1e20, 1e20], [1e-20, 0.0]])
    r, c = fastcl.pair_reduce(x, y, columns=True, backend="blocked")
    assert torch.isposinf(r).all()
    assert torch.isposinf(c[0])
    torch.testing.assert_close(c[1], 1.0 + torch.tensor(3.0).log())


@pytest.mark.parametrize("scale", [1e30, 3e38, float("inf")])
@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_a_large_scale_comes_after_the_product(reduce: str, scale: float) -> None:
    """x times a leaves the range where z does not; an infinite z is infinite, with its sign, and no NaN."""
    torch.manual_seed(0)
    x, y = 100.0 * torch.rand(5, 4), 1e-38 * (1.0 + torch.rand(6, 4))
    pair = "identity" if reduce == "logsumexp" else "softplus"
    r, right = (
        fastcl.pair_reduce(x, y, pair=pair, reduce=reduce, scale=torch.tensor(scale), backend=backend)  # type: ignore[call-overload]
        for backend in ("blocked", "reference")
    )
    torch.testing.assert_close(r, right, rtol=1e-5, atol=0.0)
    mixed = torch.randn(5, 4)
    r, right = (
        fastcl.pair_reduce(mixed, y, pair=pair, reduce=reduce, scale=torch.tensor(scale), backend=backend)  # type: ignore[call-overload]
        for backend in ("blocked", "reference")
    )
    torch.testing.assert_close(r, right, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not r.isnan().any()


@pytest.mark.parametrize(
    ("logit", "shift"), [(20334310.0, -1.0), (2.0**24 - 1.0, 8.0), (2.0**14 - 2.0**-10, 8.0), (3e6, 0.3)]
)
def test_a_shift_beside_large_logits(logit: float, shift: float) -> None:
    """Weights add up to 1, as in plain PyTorch: r - b, of an r that holds b rounded away, would make e^2 of them."""
    x, y = torch.tensor([[logit], [3.0]]), torch.tensor([[1.0], [0.5]], requires_grad=True)
    for form in (
        lambda: fastcl.pair_total(x, y, outer="pooled", shift=shift, backend="blocked"),
        lambda: fastcl.pair_reduce(x, y, shift=shift, backend="blocked")[0],
        lambda: fastcl.pair_reduce(x, y, shift=shift, columns=True, backend="blocked")[1][0],
    ):
        (gradient,) = torch.autograd.grad(form(), y)
        torch.testing.assert_close(gradient, torch.tensor([[logit], [0.0]]), rtol=1e-6, atol=0.0)
