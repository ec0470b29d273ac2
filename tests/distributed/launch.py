"""Start processes, wait for them, and read what they found."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 580


def start(world: int, folder: Path, module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """`world` processes of a module, each with its rank, the world, a file to meet at and a file for its result."""
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", module, str(rank), str(world)),
                *(str(folder / "meeting"), str(folder / f"{rank}.pt"), *arguments),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = TIMEOUT) -> list[tuple[int, str]]:
    """The exit code and the output of each."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@cache
def results(world: int, folder: Path, module: str) -> list[dict[str, Any]] | str:
    """What each rank found, or what the first that failed had to say; run once, either way."""
    folder.mkdir()
    for rank, (code, said) in enumerate(finish(start(world, folder, module))):
        if code != 0:
            return f"rank {rank} of {world} failed:\n{said}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
