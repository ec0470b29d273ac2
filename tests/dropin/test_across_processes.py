"""The drop-ins beside the originals in two and in three gloo processes: each process's value and gradients."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from . import shards
from .compare import assert_same

ROOT = Path(__file__).resolve().parents[2]
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
    results = run(world, folder)
    assert isinstance(results, list), results
    return results


@cache
def run(world: int, folder: Path) -> list[dict[str, tuple]] | str:
    """The results of all processes, or what the first one that failed had to say; once, either way."""
    results = [folder / f"{rank} of {world}.pt" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.dropin.shards",
                str(rank),
                str(world),
                str(folder / f"meeting of {world}"),
                str(result),
                *LIBRARIES[world],
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, result in enumerate(results)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    except subprocess.TimeoutExpired:
        return f"{world} processes did not end within 300 s"
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        if process.returncode != 0:
            return f"rank {rank} of {world} failed:\n{said[rank]}"
    return [torch.load(result) for result in results]


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
