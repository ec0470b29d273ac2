"""Inputs at the edge: no rows, one, two; one group for all; equal rows; rows of any norm; NaN; any strides."""

import pytest
import torch
from torch import Tensor

from fastcl import functional

from .cases import CASES, Case
from .witnesses import close, double_loop, gradients, library, name_of, served, sets_of

DOUBLE = torch.float64


def of_size(case: Case, n: int, d: int = 5, dtype: torch.dtype = DOUBLE):
    """Rows for n, and arguments that fit them."""
    rows = [x.detach() for x in case.rows_of(n, d, dtype)]
    return rows, case.arguments(0, n, d, rows[0])


def both(case: Case, rows: list[Tensor], arguments: dict, backend: str):
    """Value and gradients of the library, and of the double loop in float64."""
    leaves = [x.detach().requires_grad_() for x in rows]
    exact = [x.detach().double().requires_grad_() for x in rows]
    value, truth = library(case, leaves, backend, **arguments), double_loop(case, exact, **arguments)
    return value, gradients(value, leaves), truth, gradients(truth, exact)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_and_two_rows(case: Case, n: int) -> None:
    rows, arguments = of_size(case, n)
    for backend in served(DOUBLE):
        if n < case.smallest and len(rows[0]) < case.smallest:
            with pytest.raises(ValueError, match=rf"{case.name}: expected at least {case.smallest} rows.*got {n}"):
                library(case, rows, backend, **arguments)
            continue
        value, found, truth, wanted = both(case, rows, arguments, backend)
        # The double loop keeps the positive inside its log-sum-exp: what it knows of a small loss is known to eps of a logit.
        one = torch.ones(())
        close(value, truth, one)
        for got, want in zip(found, wanted, strict=True):
            close(got, want, one)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_rows(case: Case) -> None:
    """A mean over nothing is an error, a sum over nothing is 0, and no rows have no losses."""
    rows, arguments = [x[:0] for x in of_size(case, 3)[0]], {}
    arguments = case.grid[0] | case.given(3, 5, rows[0])
    if "labels" in arguments:
        arguments["labels"] = arguments["labels"][:0]
    for backend in served(DOUBLE):
        with pytest.raises(ValueError, match=r"expected at least \d rows?"):
            library(case, rows, backend, **arguments)
        if case.rows and case.smallest == 1:
            leaves = [x.clone().requires_grad_() for x in rows]
            total = library(case, leaves, backend, **arguments, reduction="sum")
            total.backward()
            assert total == 0
            assert library(case, rows, backend, **arguments, reduction="none").shape == (0,)


@pytest.mark.parametrize("case", [c for c in CASES if c.rows], ids=name_of)
def test_how_many_values_a_row_has(case: Case) -> None:
    """What an objective says of itself, for a rank that has no row to tell by."""
    rows, arguments = of_size(case, 6)
    values = library(case, rows, None, **arguments | {"reduction": "none"})
    # Else rows that match nothing are among them; rows over ranks list no positives.
    if values.shape[0] % rows[0].shape[0] == 0 and "positives" not in arguments:
        assert values.shape[0] // rows[0].shape[0] == getattr(getattr(functional, case.name), "own_values", 1)


@pytest.mark.parametrize("case", [c for c in CASES if c.groups], ids=name_of)
def test_one_group_leaves_no_negatives(case: Case) -> None:
    """Values and gradients are those without negatives, and never NaN."""
    rows, arguments = of_size(case, 5)
    arguments |= {"groups": torch.zeros(max(len(x) for x in rows), dtype=torch.int64)}
    for backend in served(DOUBLE):
        leaves = [x.detach().requires_grad_() for x in rows]
        value = library(case, leaves, backend, **arguments)
        truth = double_loop(case, rows, **arguments)
        torch.testing.assert_close(value.detach(), truth, rtol=1e-12, atol=1e-12)
        assert not any(g.isnan().any() for g in gradients(value, leaves))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=name_of)
@pytest.mark.parametrize(("case", "index"), sets_of(), ids=name_of)
def test_equal_rows(case: Case, index: int, dtype: torch.dtype) -> None:
    """All rows equal, positives too: self-pairs are masked by index, so duplicates are negatives like others."""
    rows = [x.detach() for x in case.rows_of(5, 5, dtype)]
    arguments = case.arguments(index, 5, 5, rows[0])
    rows = [rows[0][:1].expand(len(x), -1) for x in rows]
    for backend in served(dtype):
        leaves = [x.detach().clone().requires_grad_() for x in rows]
        value = library(case, leaves, backend, **arguments)
        truth = double_loop(case, [x.double() for x in rows], **arguments)
        if "riesz" not in arguments.get("kernel", ""):
            # The distance of equal rows is a difference of norms: eps, or its square root as a norm.
            close(value, truth, torch.tensor(case.terms(arguments)), rtol=16 * torch.finfo(dtype).eps ** 0.5)
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in gradients(value, leaves))


@pytest.mark.parametrize("norm", [1e-30, 1e-8, 1e30, 1e37])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_normalised_rows_of_any_norm(case: Case, norm: float) -> None:
    """float32 rows whose squares overflow, or which are below the 1e-12 of the normalisation."""
    rows, arguments = of_size(case, 6, dtype=torch.float32)
    rows = [x * norm for x in rows]
    arguments |= {"normalize": True}
    for backend in served(torch.float32):
        value, found, truth, wanted = both(case, rows, arguments, backend)
        close(value, truth, torch.as_tensor(case.terms(arguments)), rtol=1e-4)
        for got, want in zip(
            found, wanted, strict=True
        ):  # squares of s = 1e-36 have gradients that float32 does not hold
            close(got, want, want.abs().max().clamp(min=1e4 * torch.finfo(torch.float32).tiny), rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rows_of_zeros_have_finite_gradients(case: Case) -> None:
    rows, arguments = of_size(case, 6)
    arguments |= {"normalize": True}
    for x in rows:
        x[1] = 0.0
    for backend in served(DOUBLE):
        value, found, truth, _ = both(case, rows, arguments, backend)
        close(value, truth)
        assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=name_of)
@pytest.mark.parametrize("case", [c for c in CASES if c.rows], ids=name_of)
def test_every_row_that_sees_a_nan_gives_nan(case: Case, dtype: torch.dtype) -> None:
    """And no other does: those of the double loop, with one group for all too, where a row sees its positive alone."""
    n, d = 7, 4
    for index, alone in [(index, False) for index in case.sets()] + [(len(case.grid), True)] * case.groups:
        for which in range(len(case.inputs(n, d))):
            rows = [x.detach() for x in case.rows_of(n, d, dtype)]
            rows[which][2, 1] = float("nan")
            arguments = case.arguments(index, n, d, rows[0]) | {"reduction": "none"}
            if alone:
                arguments["groups"] = torch.zeros_like(arguments["groups"])
            seen = double_loop(case, [x.double() for x in rows], **arguments).isnan()
            assert alone or seen.any()
            for backend in served(dtype) if case.backend else [None]:
                for wanted in (False, True):
                    at = [x.clone().requires_grad_(wanted) for x in rows]
                    found = library(case, at, backend, **arguments).isnan()
                    assert torch.equal(found, seen), (which, backend, arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_not_a_number_stays_visible(case: Case, bad: float) -> None:
    """A NaN or an infinity in the rows gives no finite value that would hide it."""
    rows, arguments = of_size(case, 6)
    rows[0][2, 1] = bad
    for backend in served(DOUBLE):
        assert not torch.isfinite(library(case, rows, backend, **arguments))


def strided(x: Tensor) -> list[Tensor]:
    """The same matrix with other strides: transposed, every second of more, a slice of a wider one."""
    n, d = x.shape
    spaced = x.new_full((2 * n, 3 * d), float("nan"))
    spaced[::2, 1::3] = x
    wide = torch.cat([x.new_full((n, 1), float("nan")), x], dim=1)
    return [x.T.contiguous().T, spaced[::2, 1::3], wide[:, 1:]]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_any_strides(case: Case, dtype: torch.dtype) -> None:
    rows, arguments = of_size(case, 17, 9, dtype=dtype)
    for backend in served(dtype):
        plain = [x.detach().requires_grad_() for x in rows]
        value = library(case, plain, backend, **arguments)
        wanted = gradients(value, plain)
        for views in zip(*(strided(x) for x in rows), strict=True):
            leaves = [x.detach().requires_grad_() for x in views]
            assert not all(x.is_contiguous() for x in leaves)
            again = library(case, leaves, backend, **arguments)
            close(again, value, torch.as_tensor(case.terms(arguments)), rtol=4 * torch.finfo(torch.float32).eps)
            for got, want in zip(gradients(again, leaves), wanted, strict=True):
                close(got, want, rtol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_inputs_are_left_alone(case: Case) -> None:
    rows, arguments = of_size(case, 6)
    kept = [x.clone() for x in rows]
    for backend in served(DOUBLE):
        leaves = [x.requires_grad_() for x in rows]
        library(case, leaves, backend, **arguments).backward()
        assert all(torch.equal(x, k) for x, k in zip(rows, kept, strict=True))


def test_temperature_free_of_long_rows_is_a_number() -> None:
    """Rows of 1e17 that are not normalised: 2e39 times odds of 0."""
    x, y = (torch.tensor(rows).mul(1e16).requires_grad_() for rows in ([[-9.0, -8.0], [3.0, 5.0]], [[10.0, 9.0], [9.0, 9.0]]))
    loss = functional.temperature_free_info_nce(x, y, normalize=False, reduction="none")
    exact = functional.temperature_free_info_nce(x.double(), y.double(), normalize=False, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (x, y)))


def test_temperature_free_of_near_rows_keeps_digits() -> None:
    """Cosines of 1 - 1e-6: 1 - <x, y> had five of their digits wrong in float32."""
    offset = torch.full((15, 127), 100.0)
    x = offset + 0.25 * torch.randn(15, 127, generator=torch.Generator().manual_seed(0))
    x[0] = 0.0
    exact = x.double().requires_grad_()
    rows = x.clone().requires_grad_()
    truth, loss = (functional.temperature_free_info_nce(t, t.detach().roll(1, 1), reduction="none") for t in (exact, rows))
    torch.testing.assert_close(loss.double(), truth, rtol=2e-4, atol=0.0)
    (want,), (got,) = (torch.autograd.grad(value[1:].sum(), leaf) for value, leaf in ((truth, exact), (loss, rows)))
    assert (got - want).norm() <= 2e-3 * want.norm()
