"""The host's time of a call on a GPU: what it counts is what a call launches."""

from __future__ import annotations

import pytest
import torch

from bench import host_time
from bench.cases import Case
from fastcl.bench.losses import EAGER, ours
from tests.cuda.emulation import emulated
from tests.cuda.fused_launching import few

CASE = Case("clip", "clip", 8, 16, 0)


def test_operations_are_those_that_would_launch_something() -> None:
    x, y = torch.randn(4, 3), torch.randn(3)
    assert host_time.operations(lambda: x + y) == 1
    assert host_time.operations(lambda: torch.nn.functional.softplus(x @ x.T).sum()) == 3
    assert host_time.operations(lambda: (x.T, x[1:], x.to(x.dtype), x.view(-1), torch.empty_like(x))) == 0
    assert host_time.operations(lambda: x.double()) == 1


def test_launches_are_those_of_a_call_that_runs() -> None:
    x, y = CASE.inputs(torch.bfloat16)
    with emulated(80, library=few()) as session:
        value = ours("clip", "cuda")(x, y)
        forward = len(session.names)
        value.backward()  # type: ignore[no-untyped-call]
        whole = len(session.names)
    with host_time.cuda(80) as count:
        found = host_time.found(ours("clip", "cuda"), CASE, count, rounds=1)
    assert found.kernels == (forward, whole - forward)
    assert found.operations[0] == 0 and found.operations[1] > 0 and found.seconds > 0  # autograd begins, and adds to .grad


@pytest.mark.parametrize("loss", host_time.LOSSES)
def test_eager_launches_no_kernel_of_ours(loss: str) -> None:
    with host_time.nothing() as count:
        assert host_time.found(EAGER[loss], CASE, count, rounds=1).kernels == (0, 0)
