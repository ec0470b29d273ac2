"""What is left out leaves nothing behind: sums over few pairs are right to eps of these pairs, not of all that was summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
import fastcl.functional as F
from fastcl.backends import reference
from fastcl.functional import positives

BACKENDS = ("auto", "blocked")


def definition(function: Any, *rows: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    return valued(function, rows[0].double(), *(r.double() if r.is_floating_point() else r for r in rows[1:]),
                  **settings | {"backend": "reference"})  # fmt: skip


def valued(function: Any, x: Tensor, *rows: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """The value and the gradient of the first rows."""
    x = x.clone().requires_grad_()
    value = function(x, *rows, **settings)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach().double(), gradient.double()


def close(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], tolerance: float) -> None:
    for one, other in zip(found, right, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["off_diagonal", "across_groups", "within_groups"])
@pytest.mark.parametrize("longer", [1e6, 1e15])
def test_sums_do_not_feel_what_they_leave_out(longer: float, kind: str, backend: str) -> None:
    """Sums of z where one row is far longer than the others: all are right to eps of what they visit."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 37, 5).unbind()
    y[3] *= longer
    groups = torch.arange(37) // 4
    mask = fastcl.off_diagonal() if kind == "off_diagonal" else getattr(fastcl, kind)(groups, groups)
    found = fastcl.pair_reduce(x, y, reduce="sum", mask=mask, columns=True, backend=backend)
    right = fastcl.pair_reduce(x.double(), y.double(), reduce="sum", mask=mask, columns=True, backend="reference")
    visited = reference.visited(mask, torch.arange(37), torch.arange(37))
    lengths = torch.where(visited, x.norm(dim=1)[:, None] * y.norm(dim=1), 0.0).double()
    for dim, one, other in zip((1, 0), found, right, strict=True):
        assert ((one - other).abs() <= 4.0 * torch.finfo(torch.float32).eps * lengths.sum(dim)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "similarity"), [("rkl", "gaussian"), ("jeffrey", "gaussian"), ("vlc", "cosine"), ("js", "gaussian")]
)
@pytest.mark.parametrize("left", ["no pair", "few pairs"])
def test_energies_of_few_pairs(divergence: str, similarity: str, left: str, backend: str) -> None:
    """A batch of one label has no negatives, and the energy of none is 0; with one other row it is that of its pairs."""
    torch.manual_seed(1)
    x, y = torch.randn(600, 6), torch.randn(600, 6)
    groups = torch.zeros(600, dtype=torch.int64)
    groups[300] = left == "few pairs"
    way = {"divergence": divergence, "similarity": similarity, "groups": groups, "return_terms": True}
    found = F.f_micl(x, y, backend=backend, **way)
    right = F.f_micl(x.double(), y.double(), backend="reference", **way)
    assert abs(found.negative - right.negative) <= 1e-6 * (abs(right.negative) + (left == "few pairs"))
    assert left == "few pairs" or found.negative == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "longer"), [(torch.float32, 1e6), (torch.float32, 1e8), (torch.bfloat16, 1e6), (torch.float64, 1e6)]
)
@pytest.mark.parametrize("few", [0, 4])
def test_positives_of_a_long_row(
    dtype: torch.dtype, longer: float, backend: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is no positive of its own, however long it is."""
    monkeypatch.setattr(positives, "FEW", few)
    torch.manual_seed(2)
    z = torch.randn(24, 8, dtype=torch.float64).to(dtype)
    z[5] *= longer
    labels = torch.arange(24) % 5
    way = {"normalize": False, "temperature": 0.5}
    found = valued(F.sup_con, z, labels, backend=backend, **way)
    close(found, definition(F.sup_con, z, labels, **way), {torch.float64: 1e-9, torch.bfloat16: 1e-2}.get(dtype, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longer", [10.0, 1e3])
def test_own_term_of_a_short_row(longer: float, backend: str) -> None:
    """It is far larger than those of its long positives, e^-10, and is none of the loss."""
    labels = torch.arange(24) % 4
    z = 0.02 * torch.eye(8)[labels] + 0.5
    z[4:] *= longer
    way = {"normalize": False, "temperature": 4e-5 * longer, "reduction": "none"}
    found = F.sincere(z, labels, backend=backend, **way)[:4]
    right = F.sincere(z.double(), labels, backend="reference", **way)[:4]
    logits = 2.0 / 4e-5
    assert ((found - right).abs() <= 4.0 * torch.finfo(torch.float32).eps * logits * right).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_of_any_size(backend: str) -> None:
    """Those of the first row are -1e32 and its positive is -2e32: no number stands for "no negatives" above them."""
    z = 1e16 * torch.tensor([[1.0], [-2.0], [-1.0], [-1.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    found = F.sincere(z, labels, normalize=False, temperature=1.0, reduction="none", backend=backend)
    assert abs(found[0].item() / 1e32 - 1.0) < 1e-12
