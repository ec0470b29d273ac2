"""What the compiled kernels execute, counted: no matrix product more than the catalogue counts, and one exponential a pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fastcl.triton_kernels import fused, tuning

from bench.gpu_estimate import (
    AT,
    CAPABILITY,
    Cost,
    clip_problem,
    fused_costs,
    launches,
    product_milliseconds,
    strip_costs,
)
from bench.hopper_estimate import HEADLINES, share
from fastcl import triton_kernels
from fastcl.backends import reference
from fastcl.equation.masks import Mask, by_groups
from fastcl.equation.problem import Problem, Wanted

from .emulation import EVERYTHING
from .problems import error, problem
from .user_pairs import Softplus

CASES = [("a100", 128), ("h100", 128), ("a100", 512), ("h100", 512)] if EVERYTHING else [("a100", 128)]
# Prologues are in neither; the column state of the tiles and the edges of the sweep are.
A_LITTLE = 1.05


@pytest.mark.parametrize(("gpu", "d"), CASES)
def test_the_fused_form_executes_what_is_counted(gpu: str, d: int) -> None:
    rows, sweep = fused_costs(gpu, d, torch.bfloat16)
    assert 1.0 <= rows.products <= A_LITTLE
    assert 2.0 <= sweep.products <= 2.0 * A_LITTLE
    for cost in (rows, sweep):
        assert 1.0 <= cost.exponentials <= A_LITTLE
        assert cost.conflicts <= 0.01
        assert max(cost.global_bytes, cost.sector_bytes) < 24 * d / 128


@pytest.mark.parametrize(("gpu", "d"), CASES[:2] if EVERYTHING else CASES)
def test_the_epilogues_execute_one_exponential(gpu: str, d: int) -> None:
    for cost in strip_costs(gpu, d, torch.bfloat16):
        assert 1.0 <= cost.exponentials <= A_LITTLE
        assert cost.products == 0.0


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_tensor_cores_bind_at_512_in_the_form_that_the_table_predicts(gpu: str) -> None:
    """The strip form: its four products at the card's full rate take longer than any other term of its epilogues."""
    assert tuning.FUSED_UP_TO[f"sm_{CAPABILITY[gpu]}"]["half"] < 512
    costs = strip_costs(gpu, 512, torch.bfloat16)
    for term in costs[0].seconds:
        epilogues = sum(cost.seconds.get(term, 0.0) for cost in costs) * AT * AT * 1e3
        assert epilogues < 4 * product_milliseconds(gpu, 512, "bfloat16"), term


def test_a_share_is_what_is_counted_over_what_takes_time() -> None:
    """Passes that take a product's time each: CLIP executes the four it counts, InfoNCE four for three, SimCLR half of each."""
    found = {}
    for h in HEADLINES:
        one = Cost(
            "one product",
            1.0,
            1.0,
            0.0,
            0.0,
            0.0,
            {"tensor": product_milliseconds("h100", h.d, "bfloat16") / AT / AT / 1e3},
        )
        found[h.name] = share(h, [one] * (len(h.passes) + 2))
    assert found == pytest.approx(
        {"clip-64k-bf16": 1.0, "siglip-64k-bf16": 1.0, "info-nce-64k-bf16": 0.75, "simclr-16k-bf16": 1.0}
    )


def test_a_reference_that_serves_no_pair_costs_no_second_sweep() -> None:
    """Logits that no bound on norms places: the sweep with the shared reference visits nothing, the other one all."""
    p = clip_problem(128, 256, 64, torch.bfloat16)
    p.scale.fill_(1e4)
    shared, apart = (s for s in launches(p, 80, fused.rows) if "fused_rows" in s.kernel)
    assert shared.mma_flops == 0
    assert apart.mma_flops == 2 * 128 * 256 * 64


def test_a_row_that_underflows_is_noticed() -> None:
    """One row far under the others: the second sweep runs, and not where all rows serve."""
    near = clip_problem(128, 128, 64, torch.bfloat16)
    far = clip_problem(128, 128, 64, torch.bfloat16)
    far.scale.fill_(200.0)
    far.y.copy_(far.x[:1].expand(128, -1))  # type: ignore[union-attr]
    far.x[5] = -far.x[0]
    for p, again in ((near, False), (far, True)):
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        stats = launches(p, 80, lambda p: found.append(fused.rows(p)))  # noqa: B023  runs at once
        shared, apart = (s for s in stats if "fused_rows" in s.kernel)
        assert shared.mma_flops > 0
        assert (apart.mma_flops > 0) == again
        for mine, truth in zip(found[0], reference.rows(p), strict=True):
            assert mine is not None and truth is not None
            assert error(mine, truth) < 4e-6


@pytest.mark.parametrize("form", ["fused", "strip"])
def test_a_second_diagonal_costs_where_it_crosses_a_tile(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch stacked with its second view: beside one diagonal at most 6% more, where groups are compared for every pair.

    Of 36 blocks of 128 x 128 on and right of the diagonal a second one crosses four. Groups that say the same take 14% more at the
    least.
    """
    monkeypatch.setenv("FASTCL_TRITON", form)
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.4")
    one = clip_problem(1024, 1, 64, torch.bfloat16)
    one = replace(one, y=None, columns=False, mask=Mask("off_diagonal"))
    two = replace(one, mask=Mask("off_diagonal", period=512))
    groups = replace(one, mask=by_groups(two.mask, 1024, None, one.x.device))
    found = []
    for p in (one, two, groups):
        stats = launches(p, 80, _summed)
        found.append(sum(s.instructions for s in stats))
    assert found[0] < found[1] <= 1.06 * found[0] < 1.12 * found[0] < found[2]


def _summed(p: Problem) -> None:
    r, _ = triton_kernels.rows(p)
    triton_kernels.gradients(p, r, None, torch.ones(p.n), None, Wanted(True, p.y is not None, True, False, False, False))


@pytest.mark.parametrize("form", ["fused", "strip"])
def test_a_function_of_ones_own_executes_what_the_built_in_one_does(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """softplus, and its copy with a constant: at most 5% more instructions, and no more exponentials."""
    monkeypatch.setenv("FASTCL_TRITON", form)
    found = []
    for pair in ("softplus", Softplus(1.0)):
        p = problem(128, 256, 64, pair=pair, mask="all", dtype=torch.bfloat16)
        stats = launches(p, 80, _summed)
        assert all(s.kernel.startswith(form) or s.kernel == "merge_partials" for s in stats)
        found.append((sum(s.instructions for s in stats), sum(s.mufu for s in stats)))
    (built_in, exponentials), (own, own_exponentials) = found
    assert own_exponentials == exponentials > 0
    assert own <= 1.05 * built_in
