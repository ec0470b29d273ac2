"""What a CUDA graph's capture forbids, both forms do without: no value is read on the host, no size depends on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton")

from fastcl.triton_kernels import fused, strip, tuning

from fastcl import triton_kernels

from .problems import all_wanted, problem, upstream


class Launched:
    """Stands in for a kernel: fake tensors have no memory to launch it on."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **named: None


@pytest.fixture(autouse=True)
def _launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (strip, ("strip_reduce", "strip_weights", "merge_partials")),
        (fused, ("fused_rows", "fused_gradient", "merge_columns")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launched())
    monkeypatch.setattr(fused, "aligned", lambda rows: rows)  # which asks for an address
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_80")
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.005")


@pytest.mark.parametrize("form", ["strip", "fused"])
@pytest.mark.parametrize("mask", ["off_diagonal", "across_groups"])
@pytest.mark.parametrize("pair", ["identity", "exp"])
def test_nothing_is_read_on_the_host(form: str, mask: str, pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    monkeypatch.setenv("FASTCL_TRITON", form)
    for m, operand in ((70, "sqdist"), (None, "dot")):
        p = problem(50, m, 8, pair=pair, operand=operand, mask=mask, columns=m is not None, dtype=torch.float16)
        up = upstream(p)
        with FakeTensorMode(allow_non_fake_inputs=True):
            r, c = triton_kernels.rows(p)
            triton_kernels.gradients(p, r, c, up.g, up.h, all_wanted(p))
            triton_kernels.total(p, None, "sum" if p.reduce == "sum" else "pooled", all_wanted(p))


def test_the_instrument_sees_a_read() -> None:
    p = problem(5, 6, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        float((p.x + 1).sum())
