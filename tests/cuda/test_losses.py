"""Every loss by the public API with backend="cuda", forward and backward, through the kernels that a card would run."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import fastcl
from tests.objectives.cases import CASES, Case
from tests.objectives.test_transforms import sharpness
from tests.objectives.witnesses import library, name_of, sets_of, upstream_for
from tests.triton.problems import error

from .emulation import EVERYTHING, emulated

# kcl warns once; tests/objectives/test_errors.py asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:kcl. kernel='riesz' with t > 0 is unbounded below")
SERVED = [case for case in CASES if case.backend]
SETS = [(case, index) for case, index in sets_of() if case.backend] if EVERYTHING else [(case, 0) for case in SERVED]
# Against the definition on the same rows: what normalising, taking logarithms and summing in that dtype may cost. Where torch
# itself errs more (the blocked form on the same rows), twice that: the kernels round their weights to the dtype too. The
# gradient of a temperature is a sum over pairs of weights times logits, which cancel: its terms are as much larger than it as
# the logits are.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def _strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", "strip")


def value_and_gradients(case: Case, index: int, dtype: torch.dtype, backend: str, rows_dtype: torch.dtype):
    """The loss of rows that `dtype` holds exactly, computed in `rows_dtype`, and the gradients of its rows and scalars."""
    rows = [x.detach().to(dtype).to(rows_dtype).requires_grad_() for x in case.rows_of(9, 5)]
    arguments = case.arguments(index, 9, 5, rows[0])
    scalars = {
        name: torch.tensor(float(arguments.get(name, value)), dtype=torch.float64).to(
            torch.float32 if dtype != torch.float64 else dtype
        )
        for name, value in case.scalars.items()
    }
    scalars = {
        name: t.to(rows_dtype if rows_dtype == torch.float64 else t.dtype).requires_grad_()
        for name, t in scalars.items()
    }
    reduction = {"reduction": "none"} if case.rows else {}
    value = library(case, rows, backend, **arguments | scalars, **reduction)
    leaves = [x for k, x in enumerate(rows) if k not in case.detached] + list(scalars.values())
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream_for(value), allow_unused=True)]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16] if EVERYTHING else [torch.float32]
)
@pytest.mark.parametrize(("case", "index"), SETS, ids=name_of)
def test_every_loss(case: Case, index: int, dtype: torch.dtype) -> None:
    with emulated():
        check_loss(case, index, dtype)


def check_loss(case: Case, index: int, dtype: torch.dtype) -> None:
    """A loss by backend="cuda", as it runs here, against the definition."""
    mine = value_and_gradients(case, index, dtype, "cuda", dtype)
    truth = value_and_gradients(case, index, dtype, "reference", torch.float64)
    plain = value_and_gradients(case, index, dtype, "blocked", dtype)
    for k, (got, want, torch_got) in enumerate(zip(mine, truth, plain, strict=True)):
        assert (got is None) == (want is None)
        if want is not None:
            arguments = case.arguments(index, 9, 5, case.rows_of(9, 5)[0].detach())
            terms = sharpness(case, arguments) if k > 0 and want.ndim == 0 else 1.0
            assert error(got, want, 1e-3) <= max(ALLOWED[dtype] * terms, 2.0 * error(torch_got, want, 1e-3))


@pytest.mark.parametrize("case", SERVED if EVERYTHING else SERVED[:1], ids=lambda case: case.id)
def test_gradcheck_in_float64(case: Case) -> None:
    if case.is_surrogate(0):
        pytest.skip("by definition the gradient is not that of the value")
    rows = case.rows_of(4, 3)
    arguments = case.arguments(0, 4, 3, rows[0].detach())
    free = [x for k, x in enumerate(rows) if k not in case.detached]

    def call(*given: torch.Tensor) -> torch.Tensor:
        values = iter(given)
        return library(
            case, [x if k in case.detached else next(values) for k, x in enumerate(rows)], "cuda", **arguments
        )

    with emulated():
        assert gradcheck(call, free)


def test_both_reductions_backward_twice_and_second_derivatives_refused() -> None:
    x, y = (torch.randn(70, 6, dtype=torch.float32).requires_grad_() for _ in range(2))
    with emulated() as session:
        for reduction in ("mean", "sum", "none"):
            loss = fastcl.functional.clip(x, y, logit_scale=3.0, backend="cuda", reduction=reduction).sum()
            first = torch.autograd.grad(loss, (x, y), retain_graph=True)
            again = torch.autograd.grad(loss, (x, y), retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            torch.autograd.grad(loss, x, create_graph=True)
        assert session.names
