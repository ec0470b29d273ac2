"""Every check in one, two, three and four gloo processes: one start of the processes for all checks of a world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.backends import extension

from . import launch, orphan, ranks

WORLDS = (1, 2, 3, 4)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("across_ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet and leave their results."""
    return tmp_path_factory.mktemp("ranks")


def found(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    results = launch.results(world, folder / str(world), "tests.distributed.ranks")
    assert not isinstance(results, str), results
    return results


@pytest.mark.parametrize(
    ("world", "name"), [(w, name) for w in WORLDS for name in ranks.checks(w) if not name.startswith("memory")]
)
def test_check(world: int, name: str, folder: Path) -> None:
    for rank, errors in enumerate(found(world, folder)):
        error = errors.get(name, "not reached: an earlier check failed")
        assert not isinstance(error, str), f"rank {rank}: {error}"
        assert error <= 1.0, f"rank {rank}: {error:.3g} times the tolerance"


def test_ring_memory_is_flat_in_the_world(folder: Path) -> None:
    worst = {w: max(e["memory, ring"] for e in found(w, folder)) for w in WORLDS}
    # In shards: own rows and gradients, two shards in flight with theirs, packed and unpacked. Two ranks have none to pass on.
    assert worst[4] <= 1.01 * worst[3], worst
    # AMX packs rows of both sides, and 6 bytes for each float.
    on_amx = extension.library is not None and extension.library.chosen_isa() == "amx"
    assert worst[4] <= (18.0 if on_amx else 14.0), worst
    gathered = {w: max(e["memory, gather"] for e in found(w, folder)) for w in WORLDS}
    assert gathered[4] > 1.3 * gathered[2], gathered  # the measurement sees what grows


@pytest.mark.parametrize("how", ["dead", "silent"])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_missing_peer_is_an_error(strategy: str, how: str, tmp_path: Path) -> None:
    processes = launch.start(2, tmp_path, "tests.distributed.orphan", strategy, how)
    code, said = launch.finish(processes, timeout=120)[0]
    assert code == 0, said
    met = torch.load(tmp_path / "0.pt")
    assert met["error"] != "nothing"
    assert met["took"] < orphan.TIMEOUT + 10.0
