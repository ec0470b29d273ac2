"""The closed forms wait for no device: a CUDA graph captures them, groups included."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastcl.backends import closed_form
from fastcl.backends.closed_form import classes
from fastcl.equation.masks import KINDS
from tests.triton.problems import all_wanted, problem, upstream


@pytest.mark.parametrize("pair", ["identity", "square"])
@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("m", [12, None])
def test_no_size_depends_on_a_value(m: int | None, mask: str, pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    monkeypatch.setattr("fastcl.backends.row_dot.in_one_pass", lambda *rows: False)  # as on a GPU
    p = problem(9, m, 3, pair=pair, mask=mask, columns=m is not None)
    p = p.__class__(**{**p.__dict__, "reduce": "sum"})
    up = upstream(p)
    with FakeTensorMode(allow_non_fake_inputs=True):
        r, c = closed_form.rows(p)
        closed_form.gradients(p, r, c, up.g, up.h, all_wanted(p))
        closed_form.total(p, None, "sum", all_wanted(p))


def test_classes_name_equal_groups_equally() -> None:
    groups = torch.tensor([7, -3, 7, 2**40, -3, 0])
    index = classes(groups)
    assert torch.equal(index[:, None] == index, groups[:, None] == groups)
    assert int(index.min()) >= 0 and int(index.max()) < len(groups)
    assert classes(groups[:0]).shape == (0,)
