"""Limits of the products of guides (fastcl.at_most(guide=)): pairs above are out, by one decision forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.equation.masks import Mask
from tests.objectives.witnesses import gradients, served
from tests.oracle import pairwise

from .test_limits import DTYPES, FORMS, INF, SHAPES, every_backend_agrees, rows

NAN = float("nan")


def whole(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Guides of small integers, whose products every dtype holds: no limit between two integers is a matter of rounding."""
    return torch.randint(-3, 4, (n, k), generator=torch.Generator().manual_seed(seed)).to(dtype)


def limits(n: int, seed: int) -> Tensor:
    """Between two integers; a few are infinite."""
    limit = torch.randint(-6, 7, (n,), generator=torch.Generator().manual_seed(seed)) + 0.5
    limit[3::17], limit[5::23] = INF, -INF
    return limit


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_double_loop(reduce: str, itself: bool) -> None:
    x, y = rows(7, 3, 0, torch.float64), rows(9, 3, 1, torch.float64)
    s, t, of_rows, of_cols = whole(7, 4, 2), whole(9, 4, 3), limits(7, 4), limits(9, 5)
    if itself:
        y, t, of_cols = x, s, of_rows
    leaves = [x.requires_grad_()] if itself else [x.requires_grad_(), y.requires_grad_()]

    def stays(i: int, j: int) -> bool:
        product = sum(float(a) * float(b) for a, b in zip(s[i], t[j], strict=True))
        return i != j and product <= float(of_rows[i]) and product <= float(of_cols[j])

    z = 2.0 * x @ y.T
    found = [[z[i, j] for j in range(len(y)) if stays(i, j)] for i in range(7)]
    assert 0 < sum(map(len, found)) < 7 * len(y) - 7
    wanted = torch.stack([pairwise.lse(row, z) if reduce == "logsumexp" else pairwise.add(row, z) for row in found])
    slopes = gradients(torch.where(wanted.isneginf(), 0.0, wanted).square().sum(), leaves)
    mask = fastcl.at_most(of_rows, None if itself else of_cols, guide=s if itself else (s, t), mask="off_diagonal")
    for backend in served(torch.float64):
        got = fastcl.pair_reduce(x, None if itself else y, reduce=reduce, scale=2.0, mask=mask, backend=backend)
        assert isinstance(got, Tensor)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
        mine = gradients(torch.where(got.isneginf(), 0.0, got).square().sum(), leaves)
        for found_slope, slope in zip(mine, slopes, strict=True):
            torch.testing.assert_close(found_slope, slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())) or "rows")
def test_every_backend_is_the_definition(form: dict[str, Any], n: int, m: int | None, dtype: torch.dtype) -> None:
    x, y = rows(n, 12, 0, dtype), None if m is None else rows(m, 12, 1, dtype)
    own, other = whole(n, 19, 2, torch.bfloat16), whole(m or n, 19, 3).T.contiguous().T
    guide = own if m is None else (own, other)
    given = [(limits(n, 4), None)]
    if m is not None:
        given += [(None, limits(m, 5)), (limits(n, 4), limits(m, 5))]
    for limit, base in zip(given, ("off_diagonal", "all", fastcl.off_diagonal()), strict=False):
        mask = fastcl.at_most(*limit, guide=guide, mask=base)
        every_backend_agrees(x, y, mask, form)


@pytest.mark.parametrize("backend", served(torch.float32))
@pytest.mark.parametrize("itself", [True, False])
def test_forward_and_backward_decide_alike_at_equality(itself: bool, backend: str) -> None:
    """Hundreds of products are their limits but for rounding, as in test_limits."""
    x, s = rows(320, 24, 0), rows(40, 33, 2).repeat(8, 1)
    y, t = (None, s) if itself else (rows(240, 24, 1), rows(40, 33, 3).repeat(6, 1))
    products = s @ t.T
    limit = products[:, 7], None if itself else products[9]
    mask = fastcl.at_most(*limit, guide=s if itself else (s, t), mask="off_diagonal")
    sides = (x,) if y is None else (x, y)
    for form, scale in itertools.product(("rows", "total"), (3.0, 3000.0)):  # shared exponentials, and running maxima
        shift = torch.tensor(0.1, requires_grad=True)
        call: dict[str, Any] = {"scale": scale, "shift": shift, "mask": mask, "backend": backend}
        if scale == 3.0:
            exp = call | {"pair": "exp", "reduce": "sum"}
            r = (
                fastcl.pair_reduce(*sides, **exp).sum()
                if form == "rows"
                else fastcl.pair_total(*sides, outer="sum", **exp)
            )
            (slope,) = torch.autograd.grad(r, shift)
            torch.testing.assert_close(slope, r.detach(), rtol=2e-6, atol=0.0)
        # And the weights of a log-sum-exp are 1 in each row that has any.
        r = fastcl.pair_reduce(*sides, **call) if form == "rows" else fastcl.pair_total(*sides, outer="pooled", **call)
        some = torch.isfinite(r)
        assert some.any()
        (slope,) = torch.autograd.grad(torch.where(some, r, 0.0).sum(), shift)
        torch.testing.assert_close(slope, some.sum().to(slope.dtype), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_what_is_no_number(reduce: str, dtype: torch.dtype) -> None:
    """NaN comes of NaN, of a limit and of a guide alike, whatever the other side's limits; an infinite guide is one by its sign."""
    x, y = rows(6, 3, 0, dtype), rows(9, 3, 1, dtype)
    s, t = whole(6, 4, 2, dtype), whole(9, 4, 3, dtype)
    bad = torch.arange(6) == 2
    for backend, of_cols in itertools.product(served(dtype), (INF, -INF)):
        call: dict[str, Any] = {"reduce": reduce, "backend": backend}
        cols = torch.full((9,), of_cols)
        one_limit = torch.full((6,), INF).masked_fill(bad, NAN)
        one_guide = s.clone()
        one_guide[2, 1] = NAN
        for limit, guide in ((one_limit, s), (torch.full((6,), INF), one_guide), (None, one_guide)):
            mask = fastcl.at_most(limit, cols, guide=(guide, t))
            r, c = fastcl.pair_reduce(x, y, mask=mask, columns=True, **call)
            assert torch.equal(r.isnan(), bad), (backend, of_cols)
            assert c.isnan().all()
            leaf = x.clone().requires_grad_()
            r = fastcl.pair_reduce(leaf, y, mask=mask, **call)
            (dx,) = gradients(torch.where(r.isfinite(), r, 0.0).sum(), [leaf])
            assert dx[~bad].isfinite().all()
        twice = fastcl.pair_reduce(x, reduce=reduce, backend=backend, mask=fastcl.at_most(one_limit, guide=s))
        assert twice.isnan().all()  # pairs of x with itself have both limits
    for backend in served(dtype):
        far = s.abs() + 1.0
        far[2], far[3] = INF, -INF
        r = fastcl.pair_reduce(
            x, y, reduce=reduce, mask=fastcl.at_most(torch.full((6,), 1e6), guide=(far, t.abs() + 1.0)), backend=backend
        )
        plain = fastcl.pair_reduce(x, y, reduce=reduce, backend=backend)
        nothing = torch.full((6,), -INF if reduce == "logsumexp" else 0.0, dtype=dtype)
        torch.testing.assert_close(r, torch.where(bad, nothing, plain), rtol=1e-6, atol=1e-6)
        # A row of NaN is met by the pairs that its guide lets in, and by no other.
        lost = x.clone()
        lost[2] = NAN
        mask = fastcl.at_most(torch.where(bad, -INF, INF), guide=(s, t))
        leaves = [lost.requires_grad_(), y.clone().requires_grad_()]
        for pair in ("exp", "identity") if reduce == "sum" else ("identity",):  # the slope of z itself is 1, of NaN too
            shift = torch.zeros((), dtype=dtype, requires_grad=True)
            r = fastcl.pair_reduce(*leaves, reduce=reduce, pair=pair, shift=shift, mask=mask, backend=backend)
            assert torch.equal(r[bad], nothing[bad])
            assert torch.isfinite(r[~bad]).all()
            dx, dy, dshift = gradients(torch.where(r.isneginf(), 0.0, r).sum(), [*leaves, shift])
            assert torch.isfinite(dy).all()
            assert torch.isfinite(dx[~bad]).all()
            assert torch.isfinite(dshift)
            # Where it counts its NaN is in the gradients of its partners, of none but those where the upstream is not 0.
            let_in = fastcl.at_most(torch.full((6,), 0.5), guide=(s, t))
            r = fastcl.pair_reduce(*leaves, reduce=reduce, pair=pair, mask=let_in, backend=backend)
            met = (s.double() @ t.double().T)[2] <= 0.5
            assert met.any() and not met.all()
            assert r[2].isnan()
            up = torch.where(r.isneginf(), 0.0, 1.0).to(r)
            (dy,) = torch.autograd.grad(r, leaves[1], up)
            assert torch.equal(dy.isnan().any(1), met), (backend, pair)
            (dy,) = torch.autograd.grad(
                fastcl.pair_reduce(*leaves, reduce="sum", pair="identity", mask=let_in, backend=backend),
                leaves[1],
                torch.where(bad, 0.0, 1.0).to(r),
            )
            assert torch.isfinite(dy).all()


# Of the torch.jit that forward mode and torch.compile load, torch itself warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", served(torch.float64))
def test_transforms_and_graphs(backend: str) -> None:
    x, y = rows(7, 4, 0, torch.float64), rows(9, 4, 1, torch.float64)
    s, t = whole(7, 5, 2, torch.float64).requires_grad_(), whole(9, 5, 3, torch.float64).requires_grad_()

    def value(x: Tensor, y: Tensor, s: Tensor = s) -> Tensor:
        mask = fastcl.at_most(torch.full((7,), 1.5), guide=(s, t), mask="off_diagonal")
        r = fastcl.pair_reduce(x, y, scale=3.0, mask=mask, backend=backend)
        assert isinstance(r, Tensor)
        return torch.where(r.isneginf(), 0.0, r).sum()

    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    wanted = gradients(value(*leaves), leaves)
    for got, want in zip(torch.func.grad(value, (0, 1))(x, y), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    direction = torch.ones_like(x)
    _, slope = torch.func.jvp(lambda x: value(x, y), (x,), (direction,))
    torch.testing.assert_close(slope, (wanted[0] * direction).sum(), rtol=1e-10, atol=1e-12)
    several = torch.func.vmap(value)(*(torch.stack(pair) for pair in ((x, 2 * x), (y, y), (s.detach(), -s.detach()))))
    both = torch.stack([value(x, y), value(2 * x, y, -s.detach())]).detach()
    torch.testing.assert_close(several, both, rtol=1e-10, atol=1e-12)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(value(*leaves), (s, t), allow_unused=True) == (None, None)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(value, leaves)


X, T = rows(4, 3, 0), torch.ones(4, 2)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"guide": (T,)}, {"y": X}, TypeError, "guide: expected two tensors (s, t), of rows and of columns, or one of x with itself, "),
    ({"guide": (None, T)}, {"y": X}, TypeError, "guide: expected two tensors (s, t), "),
    ({"guide": T}, {"y": X}, ValueError, "guide: expected (s, t), of the rows of x and of y, got one tensor"),
    ({"guide": (T, T.clone())}, {}, ValueError, "guide: x with itself has one guide, of its rows, got two"),
    ({"guide": torch.ones(4)}, {}, ValueError, "guide[0]: expected a matrix (rows, d), got shape (4,)"),
    ({"guide": T.int()}, {}, TypeError, "guide[0]: expected float64, float32, bfloat16 or float16, got int32"),
    ({"guide": "t"}, {}, TypeError, "guide[0]: expected a tensor, got str"),
    ({"guide": torch.ones(3, 2)}, {}, ValueError, "guide[0]: expected one row for each row of x, 4, got 3"),
    ({"guide": (T, torch.ones(3, 2))}, {"y": X}, ValueError, "guide[1]: expected one row for each row of y, 4, got 3"),
    ({"guide": (T, torch.ones(4, 3))}, {"y": X}, ValueError, "guide[1]: expected rows of one width of 1 or more, k = 2 for"),
    ({"guide": torch.ones(4, 0)}, {}, ValueError, "guide[0]: expected rows of one width of 1 or more, k = 0 for guide[0]"),
    ({"guide": T.to("meta")}, {}, ValueError, "guide[0]: expected the device of x, cpu, got meta"),
    ({"limit_x": None, "guide": T}, {}, ValueError, "at_most: expected limits of the rows, the columns or both, got none"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "call", "kind", "message"), REFUSED, ids=[r[3][:60] for r in REFUSED])
def test_refused(given: dict[str, Any], call: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        fastcl.pair_reduce(X, mask=fastcl.at_most(**({"limit_x": torch.ones(4)} | given)), **call)
    assert str(caught.value).startswith(message)


def test_masks_without_limits_have_no_guides() -> None:
    told = fastcl.at_most(torch.ones(4), guide=T, mask=fastcl.off_diagonal(period=2))
    assert told.guided and not told.unlimited().guided
    assert Mask("off_diagonal", period=2) == told.unlimited()
