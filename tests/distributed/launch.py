"""Start processes, wait for them, and read what they found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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
    """The exit code and the output of each; one that took longer than the timeout was killed, and has its output all the same."""
    end, said = time.monotonic() + timeout, []
    try:
        for process in processes:
            try:
                said.append(process.communicate(timeout=max(0.0, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                process.kill()
                said.append(f"{process.communicate()[0]}\nkilled after {timeout:.0f} s")
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@cache
def results(world: int, folder: Path, module: str, *arguments: str) -> list[dict[str, Any]] | str:
    """What each rank found, or what all that failed had to say; run once, whatever comes of it."""
    try:
        folder.mkdir()
        ended = finish(start(world, folder, module, *arguments))
        failed = [f"rank {rank} of {world} failed:\n{said}" for rank, (code, said) in enumerate(ended) if code != 0]
        if failed:  # the cause may be with another rank than the first, whose peer is gone
            return "\n".join(failed)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    except Exception as error:  # not raised: a second call would find the folder, and say that alone
        return f"{type(error).__name__}: {error}"
