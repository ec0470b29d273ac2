"""Measure which instructions of this processor run the CPU's kernels quickest, and have later processes take them.

    fastcl tune              forward and backward of CLIP of 2,048 x 128 with each set above baseline; the quickest is kept
    fastcl tune --forget     the widest set again

The widest set is not always the quickest: what AMX or AVX-512 gain is up to the processor, its power limits and who shares it. Each
set has a process of its own; these take turns, round by round. A tie within 5% goes to the wider set. What is kept counts for this
kind of processor and these kernels, in processes that start later: none changes its instructions on its way, which would change the
bits of the same call. The environment variable FASTCL_CPU_ISA rules over it, and `fastcl doctor` says what is chosen, and why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, NamedTuple

import torch

from .backends import extension, tuned

ISA_VARIABLE = "FASTCL_CPU_ISA"
PAUSE = 0.01  # seconds before a turn, in which the threads of the turn before fall asleep
PATIENCE = 300.0  # seconds of a turn, after which its process is taken for hung
STEPS = 3  # of a turn, whose best counts: others on the machine only make it longer


def main(argv: Sequence[str]) -> int:
    """Measures, and keeps the choice; or forgets it.

    Args:
        argv: see --help.

    Returns:
        0; 1 where nothing could be measured, kept or removed.
    """
    chosen = _arguments(argv)
    try:
        if chosen.forget:
            print(f"removed {tuned.path()}" if tuned.forget() else "nothing was kept")
            return 0
    except OSError as error:
        return _failed(f"{error}; remove it by hand")
    if extension.library is None:
        return _failed(f"there are no kernels of the CPU to measure: {extension.reason}")
    usable = extension.library.usable_isas()
    times, failed = measured(usable[1:] or usable, chosen.n, chosen.d, chosen.rounds)
    if not times:
        return _failed("; ".join(f"{isa}: {why}" for isa, why in failed.items()))
    isa = tuned.quickest(times, usable)
    today = datetime.date.today().isoformat()
    found = tuned.Measured(isa, times, tuned.processor(), usable, torch.get_num_threads(), today)
    unkept = tuned.keep(found)
    if chosen.json:
        where = {"kept": None if unkept else str(tuned.path()), "unkept": unkept, "failed": failed}
        print(json.dumps(vars(found) | {"n": chosen.n, "d": chosen.d, "rounds": chosen.rounds} | where, indent=1))
    else:
        print("\n".join(_table(found, failed, chosen)))
        if unkept is None:
            print(f"Kept in {tuned.path()}, for processes that start from now on.")
        if asked := os.environ.get(ISA_VARIABLE):
            print(f"{ISA_VARIABLE}={asked} is set here, and rules over it.")
    return 0 if unkept is None else _failed(f"it is not kept: {unkept}")


def measured(isas: Sequence[str], n: int, d: int, rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """The median milliseconds of a forward and backward with each set, and why others have none."""
    times: dict[str, list[float]] = {isa: [] for isa in isas}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        children = {isa: stack.enter_context(_child(isa, n, d)) for isa in isas}
        for turn in range(rounds + 1):  # in the first of them all start and warm up
            for isa in sorted(isas, reverse=turn % 2 == 1):
                if isa in failed:
                    continue
                time.sleep(PAUSE)
                try:
                    milliseconds = _turn(children[isa].process)
                except (OSError, ValueError):
                    children[isa].process.kill()
                    failed[isa] = f"its process ended with status {children[isa].process.wait()}{children[isa].last_words()}"
                    continue
                if turn:
                    times[isa].append(milliseconds)
    return {isa: statistics.median(of) for isa, of in times.items() if isa not in failed}, failed


class _Child(NamedTuple):
    """A process with a set of its own, and what it writes of what goes wrong."""

    process: subprocess.Popen[str]
    errors: IO[str]

    def last_words(self) -> str:
        """After ": "; nothing of a process that was stopped by a signal before it said anything."""
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""


@contextmanager
def _child(isa: str, n: int, d: int) -> Iterator[_Child]:
    """A process with this set, which waits for its turns."""
    command = [sys.executable, "-m", __name__, str(n), str(d)]
    environment = {**os.environ, ISA_VARIABLE: isa}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process,
    ):
        try:
            yield _Child(process, errors)
        finally:
            process.kill()
            with suppress(OSError):  # a line that nobody read
                process.stdin.close()  # type: ignore[union-attr]


def _turn(process: subprocess.Popen[str]) -> float:
    """Milliseconds of its next turn."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Timer(PATIENCE, process.kill)
    late.start()
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("took "):  # libraries may print, too
                return float(line.split()[1])
    finally:
        late.cancel()
    raise OSError("no answer")


def _turns(n: int, d: int) -> None:
    """In a child: the best of STEPS for each line of the parent's, after one that wakes the threads and the clock."""
    from .bench.losses import method_of
    from .bench.measuring import step, views

    method, rows = method_of("clip", "cpu"), views(n, d, torch.float32, "cpu")
    for _ in sys.stdin:
        step(method, *rows)
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step(method, *rows)
            times.append(1e3 * (time.perf_counter() - start))
        print(f"took {min(times)}", flush=True)


def _table(found: tuned.Measured, failed: dict[str, str], chosen: Any) -> Iterator[str]:
    threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
    yield f"CLIP of {chosen.n:,} x {chosen.d}, float32, forward and backward, {threads}: medians of {chosen.rounds} rounds' best"
    yield f"  {'set':<12}{'ms':>10}{'of the best':>14}"
    least = min(found.milliseconds.values())
    for isa, milliseconds in found.milliseconds.items():
        yield f"  {isa:<12}{milliseconds:>10.2f}{milliseconds / least:>14.2f}"
    yield from (f"  {isa:<12}failed: {why}" for isa, why in failed.items())
    alone = len(found.milliseconds) + len(failed) == 1
    yield f"Chosen: {found.isa}" + (", the only one above baseline here." if alone else ".")


def _failed(why: str) -> int:
    print(f"fastcl tune: error: {why}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastcl tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forget", action="store_true", help="remove what is kept, and measure nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--n", type=_positive, default=2048, help="rows of each view, 2048 unless told")
    parser.add_argument("--d", type=_positive, default=128, help="their width, 128 unless told")
    parser.add_argument("--rounds", type=_positive, default=9, help="turns of each set, 9 unless told")
    return parser.parse_args(argv)


if __name__ == "__main__":
    _turns(*map(int, sys.argv[1:]))
