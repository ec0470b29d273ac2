"""Every case under pytest-benchmark, grouped by case; for comparing two commits on one machine, by hand:

    python -m pytest bench/test_speed.py --benchmark-enable [-k clip-8k] [--rows 2048] [--benchmark-save=before]
    python -m pytest bench/test_speed.py --benchmark-enable --benchmark-compare=0001

Not part of `make test`, which collects tests/ only; a test there runs this file once, untimed. pytest-benchmark runs one method
after another: figures for the README come from `make bench`, where they take turns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from bench import measure
from bench.baselines import Baseline, baselines
from bench.cases import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are measured


def _all() -> list[Any]:
    pairs = [(case, baseline) for case in CASES.values() for baseline in baselines(case.loss)]
    return [pytest.param(case, baseline, id=f"{case.name}-{baseline.name}") for case, baseline in pairs]


@pytest.mark.parametrize(("case", "baseline"), _all())
def test_speed(case: Case, baseline: Baseline, benchmark: Any, request: pytest.FixtureRequest) -> None:
    rows = request.config.getoption("--rows")
    case = case.resized(rows) if rows else case
    why = baseline.absent(case)
    if why is not None:
        pytest.skip(f"{baseline.name}: {why}")
    chunk, _ = measure.sweep(case, baseline) if benchmark.enabled else (baseline.choices[0], {})
    method = baseline.make(chunk)
    errors = measure.errors(case, method)
    assert max(errors) < measure.TOLERANCE, f"{baseline.name} is wrong: {errors}"
    benchmark.group = case.name
    benchmark.extra_info.update(flops=case.flops, gemms=case.gemms, chunk=chunk, errors=errors)
    x, y = case.inputs()
    benchmark.pedantic(partial(measure.step, method, x, y), rounds=5, warmup_rounds=1)
