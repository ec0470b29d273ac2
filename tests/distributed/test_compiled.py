"""Every check of compiled.py and compiled_steps.py in two gloo processes: one start of the processes for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import compiled_steps, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compiled_over_ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet and leave their results."""
    return tmp_path_factory.mktemp("compiled") / "ranks"


@pytest.mark.parametrize("name", compiled_steps.CHECKS)
def test_check(name: str, folder: Path) -> None:
    results = launch.results(2, folder, "tests.distributed.compiled_steps")
    assert not isinstance(results, str), results
    for rank, errors in enumerate(results):
        error = errors.get(name, "not reached: an earlier check failed")
        assert not isinstance(error, str), f"rank {rank}: {error}"
        assert error <= 1.0, f"rank {rank}: {error:.3g} times the tolerance"
