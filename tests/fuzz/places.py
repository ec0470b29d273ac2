"""Where a case runs: here, in a process of another instruction set, or over ranks. Processes are kept; to die is an answer."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist

from fastcl.backends import extension

from .case import Case, Found, run

REFUSALS = ("ValueError: ", "TypeError: ", "MismatchError: ")
EMULATED = "FASTCL_FUZZ_EMULATED"  # of a place whose cases run on an emulated GPU
PATIENCE = 300.0  # seconds; a compiled call takes some, and processes that start on a busy machine


class ProcessError(Exception):
    """What a process raised, or how it ended."""


class Place:
    """`world` processes that wait for cases, each with the environment given."""

    def __init__(self, world: int = 1, **environment: str) -> None:
        self.world, self.environment = world, environment
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        """Start what is not running."""
        if self.processes:
            return
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        context = multiprocessing.get_context("spawn")
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **self.environment}):
            for rank in range(self.world):
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(there, rank, self.world, str(meeting)), daemon=True)
                process.start()
                there.close()
                self.processes.append(process)
                self.pipes.append(here)

    def stop(self) -> None:
        """End the processes; the next case starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def __call__(self, case: Case) -> Found:
        """What the processes find, put together as one process with all rows would have found it."""
        self.start()
        answers, alive = [], True
        for pipe in self.pipes:
            pipe.send(case)
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(PATIENCE):
                    raise TimeoutError
                answer = pipe.recv()
            except (EOFError, TimeoutError) as error:
                alive = False
                answer = ProcessError(f"no answer for {PATIENCE:.0f} seconds")
                if isinstance(error, EOFError):
                    self.processes[rank].join(10)
                    answer = ProcessError(f"the process died with exit code {self.processes[rank].exitcode}")
            answers.append(answer)
        raised = [answer for answer in answers if isinstance(answer, ProcessError)]
        if raised:
            if not (alive and in_step(answers)):
                self.stop()
            said = [str(answer) if isinstance(answer, ProcessError) else "nothing" for answer in answers]
            if case.odd and len(set(said)) > 1:
                raise ProcessError(f"one rank's mistake is not everybody's error: {' / '.join(said)}")
            raise raised[0]
        return joined(case, answers)


def in_step(answers: list[Any]) -> bool:
    """Whether processes that raised can go on together: one alone, or ranks that all refused in the same words of ours."""
    said = {str(answer) if isinstance(answer, ProcessError) else "" for answer in answers}
    return len(answers) == 1 or (len(said) == 1 and said.pop().startswith(("RuntimeError: fastcl: ", *REFUSALS)))


def joined(case: Case, found: list[Found]) -> Found:
    """Rows of ranks one after the other, gradients of what they share added up, and numbers that all have."""
    if len(found) == 1:
        return found[0]
    values = []
    for parts in zip(*(f.values for f in found), strict=True):
        if parts[0].dim() == 0:
            if not all(torch.equal(part.nan_to_num(), parts[0].nan_to_num()) for part in parts):
                raise ProcessError(f"ranks have different values: {[float(part) for part in parts]}")
            values.append(parts[0])
        elif parts[0].dim() == 2:
            values.append(torch.cat(parts))
        else:
            views = max((part.numel() // size for part, size in zip(parts, case.sizes, strict=True) if size), default=1)
            values.append(
                torch.cat([p.view(views, size) for p, size in zip(parts, case.sizes, strict=True)], 1).flatten()
            )
    times = len(found) if case.gradient == "ddp" and found[0].values[0].dim() == 0 else 1
    gradients = {}
    for name in found[0].gradients:
        parts = [f.gradients[name] for f in found]
        gradients[name] = (
            torch.cat(parts)
            if name in case.sharded
            else parts[0]
            if case.placed  # a number has its whole gradient on every rank
            else torch.stack(parts).double().sum(0).to(parts[0].dtype)
        ) / times
    return Found(values, gradients)


def serve(pipe: Connection, rank: int, world: int, meeting: str) -> None:
    """One process: a case comes, what it gave goes back."""
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
    group = dist.group.WORLD if world > 1 else None
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            with _device():
                answer: Any = run(case, group=group)
        except Exception as error:
            answer = ProcessError(f"{type(error).__name__}: {error}")
        pipe.send(answer)


def _device() -> AbstractContextManager[Any]:
    if not os.environ.get(EMULATED):
        return nullcontext()
    from tests.cuda.emulation import emulated

    return emulated()


@cache
def place(world: int = 1, **environment: str) -> Place:
    """The processes of that world and environment, one set for the whole run."""
    return Place(world, **environment)


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine has and this process does not use."""
    library = extension.library
    return () if library is None else tuple(isa for isa in library.usable_isas() if isa != library.chosen_isa())


def here(case: Case) -> Found:
    """In this process, or over ranks where the case has any."""
    return place(len(case.sizes))(case) if len(case.sizes) > 1 else run(case)
