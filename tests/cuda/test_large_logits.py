"""Log-sum-exps of logits so large that their roundings are all of z - r: a weight is what it was reduced of, and none passes 1."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from fastcl.backends import choice, reference
from fastcl.equation.problem import Gradients, Problem
from tests.triton.problems import all_wanted, error, problem, roundings, upstream

from . import fused_launching, hopper_launching
from .emulation import EVERYTHING, emulated

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Case(NamedTuple):
    """A form of the kernels, compiled for an architecture, and the dtype of its rows."""

    form: str
    arch: int
    dtype: torch.dtype

    def found(self, p: Problem, both: bool) -> Gradients:
        library = {"fused": fused_launching.few, "hopper": hopper_launching.few}.get(self.form)
        up = upstream(p)
        with emulated(self.arch, library=None if EVERYTHING or library is None else library()):
            _, backend = choice.choose("cuda", p.x.device, p.x.dtype)
            r, c = backend.rows(p)
            return backend.gradients(p, r, c, up.g, up.h if both else None, all_wanted(p))

    def __str__(self) -> str:
        return f"{self.form}-{str(self.dtype).removeprefix('torch.')}"


CASES = [Case("strip", 80, F32), Case("fused", 80, BF16), Case("hopper", 90, BF16)]
if EVERYTHING:
    CASES += [Case("strip", 80, t) for t in (F64, BF16, F16)] + [Case("fused", 80, F16), Case("hopper", 90, F16)]
SIDES = ("rows and columns", "rows", "itself")


def large(size: float, sides: str, dtype: torch.dtype, shift: float = 0.0, bias: float = 0.0) -> Problem:
    """Unit rows, whose largest logit takes all of a row; biases of both sides where there are any."""
    p = problem(70, None if sides == "itself" else 90, 64, columns=sides == "rows and columns", scale=size, dtype=dtype,
                bias=bias > 0.0)  # fmt: skip
    p.shift.fill_(shift * size)
    for values in (p.bias_x, p.bias_y):
        if values is not None:
            values.mul_(10.0 * bias * size)
    return p


def truth(p: Problem, both: bool) -> Gradients:
    exact = {name: t.double() for name, t in vars(p).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    p, up = replace(p, **exact), upstream(p)
    r, c = reference.rows(p)
    h = up.h.double() if both and up.h is not None else None
    return reference.gradients(p, r, c, up.g.double(), h, all_wanted(p))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shift_and_bias", [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("size", [1e6, 1e8])
def test_the_largest_logit_has_all_of_the_weight(
    size: float, sides: str, shift_and_bias: tuple[float, float], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_CUDA", case.form)
    p = large(size, sides, case.dtype, *shift_and_bias)
    both = sides != "rows"
    for name, got, right in zip(Gradients._fields, case.found(p, both), truth(p, both), strict=True):
        if got is not None and right is not None:
            assert error(got, right) < roundings(p), f"{name} of {case} at {size}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sides", SIDES[:2])
def test_weights_of_equal_logits_pass_no_upstream_gradient(
    sides: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half each; as far as r, in float32, tells them from all: to a unit in its last place at 1e6, to none at 1e9."""
    monkeypatch.setenv("FASTCL_CUDA", case.form)
    for size, most in ((1e6, 1.35), (1e9, 2.01)):
        p = large(size, sides, case.dtype)
        assert p.y is not None
        p.y[45:] = p.y[:45]
        p = replace(p, mask=p.mask._replace(kind="all"))
        up = upstream(p)
        found = case.found(p, False)
        assert found.shift is not None
        assert 0.95 < found.shift / up.g.sum() < most
