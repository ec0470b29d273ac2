"""No loss makes the host of a GPU wait: what a CUDA graph's capture forbids, looked for in every op, of C++ too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from bench import host_time
from bench.capture import waits
from tests.objectives.cases import CASES, Case
from tests.objectives.witnesses import gradients, library

pytestmark = pytest.mark.filterwarnings("ignore:kcl. kernel='riesz' with t > 0 is unbounded below")
FORMS = {"cuda": ("strip", "fused", "hopper"), "triton": ("strip", "fused"), "blocked": ("",)}
ROUTES = [(backend, form) for backend, forms in FORMS.items() for form in forms]
ON: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "cuda": lambda: host_time.cuda(90),
    "triton": lambda: host_time.triton(90),
    "blocked": host_time.nothing,
}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_no_loss_waits(backend: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first arguments, and groups; launches are counted, and do nothing."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv(f"FASTCL_{backend.upper()}", form)
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.01")
    found: dict[str, object] = {}
    with ON[backend]():
        for case in CASES:
            for index in (0, len(case.grid)) if case.groups else (0,):
                found |= {f"{case.id} {index}": seen for seen in [of_a_step(case, index, backend)] if seen}
    assert not found


def of_a_step(case: Case, index: int, backend: str) -> dict[str, int]:
    """The waits of its forward and backward."""
    rows = case.rows_of(24, 8, torch.bfloat16)
    arguments = case.arguments(index, 24, 8, rows[0].detach())
    return waits(lambda: gradients(library(case, rows, backend, **arguments), rows))


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0]),
        lambda x: x.repeat_interleave(torch.tensor(3)),
        lambda x: torch.bincount(x.long().abs()),
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_the_instrument_sees_a_wait(reads: Callable[[torch.Tensor], object]) -> None:
    x = torch.arange(5.0)
    assert waits(lambda: reads(x)), "unseen"
    assert not waits(lambda: torch.logsumexp(x * 2.0 + torch.full((), 3.0), 0))
