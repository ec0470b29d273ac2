"""The drop-ins beside the originals in two and in three gloo processes: each process's value and gradients."""

from pathlib import Path

import pytest

from tests.distributed import launch

from . import shards
from .compare import assert_same

# Three processes tell the two ways around a ring apart, and rank 2 has neighbours on both sides that differ; the heavy
# imports of the other two libraries are made in two processes only.
LIBRARIES = {2: tuple(shards.LIBRARIES), 3: ("open_clip", "lightly")}
NAMES = {
    world: [f"{library}: {case.name}" for library in libraries for case in shards.LIBRARIES[library](0, world)]
    for world, libraries in LIBRARIES.items()
}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("across_processes")]


def found(world: int, folder: Path) -> list[dict[str, tuple]]:
    """What each of `world` processes found."""
    results = launch.results(world, folder / str(world), "tests.dropin.shards", *LIBRARIES[world])
    assert isinstance(results, list), results
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet and leave their results."""
    return tmp_path_factory.mktemp("shards")


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in NAMES.items() for name in names])
def test_shards(world: int, name: str, folder: Path) -> None:
    for results in found(world, folder):
        ours, theirs = results[name]
        assert_same(ours, theirs)


@pytest.mark.parametrize("world", LIBRARIES)
def test_every_case_was_run(world: int, folder: Path) -> None:
    for results in found(world, folder):
        assert list(results) == NAMES[world]


@pytest.mark.parametrize("world", LIBRARIES)
def test_shards_see_each_other(world: int, folder: Path) -> None:
    """The comparison would be void if no process looked beyond its own rows."""
    local, gathered = (f"lightly: NTXentLoss gather_distributed={gather}" for gather in (False, True))
    for results in found(world, folder):
        assert (results[local][0][0] - results[gathered][0][0]).abs() > 0.1
