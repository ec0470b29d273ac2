"""Float16 weights of sums, whatever the pair function: drawn ones, user-made ones, clamps at 1e-6. Run by test_interpreter.py.

A slope may be of any size, at the pairs or far from them: the gradients are as right as those of float32 weights, but for the
11 bits of each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcl
from fastcl import triton_kernels
from fastcl.backends import reference
from fastcl.equation.pairs import PairFunction
from fastcl.equation.problem import Problem

from . import user_pairs
from .problems import REACHED, Upstream, all_wanted, error, problem, torch_answer

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMS = ("strip", "fused")
STORED = 1.5e-3  # a few of float16's roundings


def gradients_are_right(p: Problem, patch: pytest.MonkeyPatch) -> None:
    """Every gradient of the sum in both forms, within what torch errs in float32 on the same rows and the stored weights' rounding.

    Those of the total form come in float32: what is measured is the weights, not where float16 ends.
    """
    wanted = all_wanted(p)
    _, truth, _ = reference.total(p, None, "sum", wanted)
    wide = Problem(**{**p.__dict__, "x": p.x.float(), "y": None if p.y is None else p.y.float()})
    plain = torch_answer(wide, Upstream(torch.ones(p.n), None, torch.zeros(p.n)))[2]
    for form in FORMS:
        patch.setenv("FASTCL_TRITON", form)
        _, got, _ = triton_kernels.total(p, None, "sum", wanted)
        for name, mine, theirs, by_torch in zip(truth._fields, got, truth, plain, strict=True):
            if theirs is not None and theirs.ndim:  # the scalars are sums of both signs, which cancel
                assert mine is not None and by_torch is not None
                allowed = STORED + error(by_torch, theirs)
                assert error(mine, theirs) <= allowed, f"d{name} in the {form} form, {p.pair}"


def centred(pair: PairFunction, operand: str, scale: float, at: float, seed: int, m: int | None) -> Problem:
    """A problem whose z spread around `at`."""
    p = problem(24, m, 8, operand=operand, pair="exp", columns=m is not None, dtype=torch.float16, seed=seed)
    middle = sum(REACHED[operand]) / 2
    return Problem(
        **{
            **p.__dict__,
            "pair": pair,
            "scale": p.scale.new_tensor(scale),
            "shift": p.scale.new_tensor(at - scale * middle),
        }
    )


@st.composite
def registered(draw: st.DrawFn) -> Problem:
    """A registered pair function; a clamp's eps from 1e-6 on, and z that reach it."""
    cls = draw(st.sampled_from([c for c in PairFunction.registry.values() if c.built_in]))
    constants = {"p": draw(st.sampled_from((-2.0, -1.0, -0.5, 0.5))), "eps": draw(st.sampled_from((1e-6, 1e-3, 0.3)))}
    pair = cls(*(constants.get(name, 0.5) for name in cls.constant_names))
    operand = draw(st.sampled_from(("dot", "sqdist")))
    # Between 0.1 and 2.1 on dot, 0.1 and 4.1 on sqdist: within the domain of every one.
    at = 0.1 + (REACHED[operand][1] - REACHED[operand][0]) / 2
    return centred(pair, operand, 1.0, at, draw(st.integers(0, 99)), draw(st.sampled_from((None, 33))))


@st.composite
def made_by_users(draw: st.DrawFn) -> Problem:
    """A pair function of user_pairs.py, with constants that put its largest slope anywhere, at any height."""
    cls = draw(st.sampled_from([user_pairs.Step, user_pairs.Bump]))
    pair = cls(draw(st.floats(-12.0, 12.0)), 10.0 ** draw(st.integers(-8, 8)))
    operand = draw(st.sampled_from(("dot", "sqdist")))
    return centred(
        pair,
        operand,
        draw(st.sampled_from((-1.0, 1.0, 3.0))),
        0.0,
        draw(st.integers(0, 99)),
        draw(st.sampled_from((None, 33))),
    )


@settings(max_examples=8, derandomize=True, deadline=None)
@given(p=registered())
def test_registered_pair_functions(p: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gradients_are_right(p, patch)


@settings(max_examples=8, derandomize=True, deadline=None)
@given(p=made_by_users())
def test_a_new_pair_function_cannot_break_it(p: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gradients_are_right(p, patch)


@pytest.mark.parametrize("form", FORMS)
def test_the_steepest_divergence(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slope bound at the clamp is 1e12, a million times every pair's."""
    monkeypatch.setenv("FASTCL_TRITON", form)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(24, 16, generator=generator).half() for _ in range(2))
    grads = []
    for rows, backend in (((x, y), "triton"), ((x.double(), y.double()), "reference")):
        leaves = [t.detach().clone().requires_grad_() for t in rows]
        loss = fastcl.functional.f_micl(*leaves, similarity="cosine", divergence="sh", backend=backend)
        grads.append(torch.autograd.grad(24 * loss, leaves))
    for mine, truth in zip(*grads, strict=True):
        assert error(mine, truth) < 3e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("above", [0.0, 27.0, 50.0])
def test_totals_of_rows_far_below_their_positives(form: str, above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are sigmoids of 1e-12 and 1e-22, in one sweep and in two."""
    monkeypatch.setenv("FASTCL_TRITON", form)
    p = problem(24, 33, 8, bias=True, dtype=torch.float16)
    positive = reference.rows(p)[0] + above
    _, truth, _ = reference.total(p, positive, "contrast", all_wanted(p))
    _, got, _ = triton_kernels.total(p, positive, "contrast", all_wanted(p))
    for name, mine, theirs in zip(truth._fields, got, truth, strict=True):
        if theirs is not None and theirs.ndim:
            assert mine is not None
            assert error(mine, theirs) <= STORED, f"d{name}"
