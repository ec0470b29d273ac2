"""CUDA and Triton agree with each other and with the reference, loss by loss: the kernels as compiled, on the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.objectives.cases import CASES, Case
from tests.objectives.witnesses import library, name_of, upstream_for
from tests.triton import emulation as triton_emulation
from tests.triton.problems import error

from .emulation import EVERYTHING, emulated

SERVED = [case for case in CASES if case.backend]
# Log-sum-exp over rows and columns, a pair function in total form, groups of labels: what a plain test run can afford.
FEW = ("clip", "siglip", "sup_con")
N, D = 70, 20  # two row blocks, ragged
# From the definition: what normalising in that dtype costs (see test_losses.py).
FROM_REFERENCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
# From each other. Both are handed the same rows, normalised by torch alike, and sum exact products in float32: what is left
# are the order of the sums and the last bit of an exponential, for each unit that exponents are large. Measured: 5e-7 at
# most in values, 3e-6 in gradients.
SUMS = 16 * torch.finfo(torch.float32).eps
# A weight or an element of the gradient on the border between two numbers of bfloat16 falls to either side: 2^-8 of it.
BORDER = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


class Answer(NamedTuple):
    """A loss and the gradients of its rows and scalars."""

    value: Tensor
    gradients: tuple[Tensor | None, ...]


def arguments_of(case: Case, u: Tensor) -> dict[str, Any]:
    """The first set of its arguments; where that has a closed form and launches no kernel, the first with groups."""
    return case.arguments(len(case.grid) if case.id == "spectral" else 0, N, D, u)


def answer(case: Case, dtype: torch.dtype, backend: str) -> Answer:
    """By that backend, of rows that `dtype` holds exactly; the reference has them in float64."""
    exact = backend == "reference"
    rows = [x.detach().to(dtype).to(torch.float64 if exact else dtype).requires_grad_() for x in case.rows_of(N, D)]
    arguments = arguments_of(case, rows[0])
    scalars = {
        name: torch.tensor(float(arguments.get(name, value)), dtype=torch.float32)
        .to(torch.float64 if exact else torch.float32)
        .requires_grad_()
        for name, value in case.scalars.items()
    }
    reduction = {"reduction": "none"} if case.rows else {}
    value = library(case, rows, backend, **arguments | scalars, **reduction)
    leaves = [x for k, x in enumerate(rows) if k not in case.detached] + list(scalars.values())
    return Answer(value.detach(), torch.autograd.grad(value, leaves, upstream_for(value), allow_unused=True))


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def agree(a: Answer, b: Answer, values: float, gradients: float) -> None:
    assert error(a.value, b.value, 1e-3) <= values
    for mine, theirs in zip(a.gradients, b.gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert error(mine, theirs, 1e-3) <= gradients


@pytest.mark.parametrize("dtype", FROM_REFERENCE, ids=name_of)
@pytest.mark.parametrize("case", SERVED if EVERYTHING else [c for c in SERVED if c.id in FEW], ids=name_of)
def test_loss_by_loss(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", "strip")
    monkeypatch.setenv("FASTCL_TRITON", "strip")
    with emulated(80) as session:
        cuda = answer(case, dtype, "cuda")
        assert session.names, "no kernel ran"
    with triton_emulation.emulated(80) as triton_session:
        triton = answer(case, dtype, "triton")
        assert triton_session.stats, "no kernel ran"
    truth = answer(case, dtype, "reference")
    allowed = SUMS * case.logits(arguments_of(case, case.rows_of(N, D)[0]))
    for mine in (cuda, triton):
        agree(mine, truth, FROM_REFERENCE[dtype], FROM_REFERENCE[dtype])
    agree(cuda, triton, allowed, allowed + BORDER[dtype])
