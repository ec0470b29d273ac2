"""Squared distances are formed about a point amid the rows: one far row, or one that is not finite, does not move it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import fastcl
from fastcl.backends.reference import centre

BACKENDS = ("auto", "blocked", "reference")
FAR = 6  # the row that is, one of those that are sampled
PLACES = ("x", "y", "both", "itself")


def rows(place: str, far: float, n: int = 37, m: int = 53) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    y = None if place == "itself" else torch.randn(m, 6, generator=g)
    for side, here in ((x, ("x", "both", "itself")), (y, ("y", "both"))):
        if side is not None and place in here:
            side[FAR] = far
    return x, y


def by_differences(x: Tensor, y: Tensor | None, scale: Tensor) -> Tensor:
    """sum_{j != i} log(1 + a |x_i - y_j|^2), whose slope a far pair has a part in too."""
    u = (x[:, None] - (x if y is None else y)[None]).square().sum(2)
    own = torch.eye(*u.shape, dtype=torch.bool)  # two far rows that are near each other: that distance no centre saves
    return torch.where(own, 0.0, torch.log1p(scale * u)).sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_far_row_leaves_the_others_their_distances(place: str, backend: str) -> None:
    x, y = rows(place, 1e6)

    def valued(dtype: torch.dtype) -> list[Tensor]:
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (x, y)]
        scale = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        if dtype == torch.float64:
            r = by_differences(leaves[0], leaves[1], scale)  # type: ignore[arg-type]
        else:
            r = fastcl.pair_reduce(
                *leaves, operand="sqdist", pair="log1p", reduce="sum", mask="off_diagonal", scale=scale, backend=backend
            )
        found = torch.autograd.grad(r.sum(), [t for t in (*leaves, scale) if t is not None])
        return [t.detach().double() for t in (r, *found)]

    for mine, right in zip(valued(torch.float32), valued(torch.float64), strict=True):
        # Of each row by its own size: the far one's gradients are 1e-6, those of the others some tens.
        size = right.abs() if right.ndim < 2 else right.norm(dim=1, keepdim=True)
        assert ((mine - right).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_cloud_far_from_the_origin_keeps_its_gradients(place: str, backend: str) -> None:
    """2a (diag(W 1) X - W Y) cancels about the origin: 1e8 from it half of a float64's digits would be gone."""
    x, y = (None if t is None else t.double() + 1e8 for t in rows(place, 1.0))

    def gradients(near: float) -> list[Tensor]:
        leaves = [(t - near).requires_grad_() for t in (x, y) if t is not None]
        scale = torch.tensor(0.5, dtype=torch.float64)
        if near:
            r = by_differences(leaves[0], leaves[1] if len(leaves) > 1 else None, scale)
        else:
            r = fastcl.pair_reduce(
                *leaves, operand="sqdist", pair="log1p", reduce="sum", mask="off_diagonal", scale=scale, backend=backend
            )
        return list(torch.autograd.grad(r.sum(), leaves))

    for mine, right in zip(gradients(0.0), gradients(1e8), strict=True):
        assert ((mine - right).abs() <= 1e-12 * right.norm(dim=1, keepdim=True)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp itself
def test_a_far_row_leaves_the_others_their_tangents() -> None:
    x, _ = rows("itself", 1e6)
    scale, direction = torch.tensor(0.5), torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def value(x: Tensor) -> Tensor:
        r = fastcl.pair_reduce(x, operand="sqdist", pair="log1p", reduce="sum", mask="off_diagonal", scale=scale)
        assert isinstance(r, Tensor)
        return r

    mine = jvp(value, (x,), (direction,))[1].double()
    right = jvp(lambda x: by_differences(x, None, scale.double()), (x.double(),), (direction.double(),))[1]
    assert ((mine - right).abs() <= 1e-5 * right.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_stays_with_those_it_meets(backend: str, bad: float) -> None:
    x, _ = rows("itself", bad)
    groups = torch.arange(37) % 3
    mask = fastcl.within_groups(groups)
    r = fastcl.pair_reduce(x, operand="sqdist", scale=-0.5, mask=mask, backend=backend)
    assert isinstance(r, Tensor)
    assert r[groups != groups[FAR]].isfinite().all()


@pytest.mark.parametrize("sizes", [(1, 0), (0, 3), (2, 1), (1, 1), (5, 3), (33, 1), (64, 65), (1000, 7)])
def test_the_centre_is_amid_the_cloud(sizes: tuple[int, int]) -> None:
    """The median of few rows, of two middle ones the smaller; of many, one of a sample; 0 of none."""
    x, y = (torch.randn(k, 4) + 1e4 for k in sizes)
    middle, both = centre(x, y), torch.cat([x, y])
    if max(sizes) <= 32:
        lower = both.median(0).values  # the clouds' entries are above 0: the smaller, too
        assert torch.equal(middle, lower)
    assert ((middle - 1e4).abs() < 1.0).all() or len(both) < 33
    assert centre(x[:0], y[:0]).eq(0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_other_row_far_away(backend: str) -> None:
    """As a shard may have them: the centre is not half way to those, where near rows would lose their digits."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    x[2:] = 1e6 * x[2:].abs()
    given: dict[str, Any] = {"operand": "sqdist", "scale": -2.0, "pair": "exp", "reduce": "sum", "mask": "off_diagonal"}
    mine, right = (fastcl.pair_reduce(t, backend=b, **given) for t, b in ((x, backend), (x.double(), "reference")))
    assert ((mine - right).abs() <= 1e-5 * right.abs()).all()
