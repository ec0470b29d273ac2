"""Cached steps of two processes against one: DistributedDataParallel and fully_shard wait once for each tower."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import launch

from . import ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cached_across_ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet and leave their results."""
    return tmp_path_factory.mktemp("cached")


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_step(name: str, folder: Path) -> None:
    results = launch.results(2, folder / "two", "tests.steps.ranks")
    assert not isinstance(results, str), results
    for found in results:
        error, met = found[name]
        assert error < 1e-7  # the scale is a float32 parameter
        assert met == (0 if "fully_shard" in name else 1 if "shared" in name else 2)
