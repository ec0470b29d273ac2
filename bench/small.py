"""Small batches: how many times fastcl's time plain PyTorch and torch.compile take, forward and backward, on one thread of a CPU.

    python -m bench.small [--rows 8 32 ...] [--width 128] [--losses clip nt_xent ...] [--rounds 15] [--eager]

The time is that of the process, in turns within each round, and the ratio is taken within a round: on a machine that others use
too neither says how long a call takes, and the ratio is what it is on an idle one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .baselines import baselines
from .cases import Case
from .measure import environment, quiet, step

LOSSES = ("clip", "nt_xent", "f_micl_js", "siglip")
OTHERS = ("eager", "torch.compile")
GOALS = {
    8: 1.0,
    32: 1.0,
    128: 1.2,
    256: 1.5,
    512: 1.5,
    1024: 2.5,
}  # of eager, by rows; of torch.compile 1 from 256 rows on
TURN_SECONDS = 0.02


def of_process(run: Callable[[], Any]) -> float:
    """Seconds that the process works on a call, of as many as fit in TURN_SECONDS the mean."""
    start, calls = time.process_time(), 0
    while time.process_time() - start < TURN_SECONDS:
        run()
        calls += 1
    return (time.process_time() - start) / calls


def ratios(loss: str, n: int, d: int, rounds: int, others: tuple[str, ...] = OTHERS) -> tuple[float, dict[str, float]]:
    """fastcl's median seconds, and the median ratio of each other's."""
    case = Case(loss, loss, n, d, 0)
    x, y = case.inputs()
    made = {b.name: b.make(b.choices[0]) for b in baselines(loss) if b.name in ("fastcl", *others)}
    calls: dict[str, Callable[[], Any]] = {name: partial(step, method, x, y) for name, method in made.items()}
    for call in calls.values():
        of_process(call)
    found = [{name: of_process(call) for name, call in calls.items()} for _ in range(rounds)]
    own = statistics.median(r["fastcl"] for r in found)
    return own, {name: statistics.median(r[name] / r["fastcl"] for r in found) for name in calls if name != "fastcl"}


def line(loss: str, n: int, d: int, rounds: int, others: tuple[str, ...]) -> str:
    """One loss at one size, in words."""
    own, found = ratios(loss, n, d, rounds, others)
    said = [f"{loss:10} n = {n:5}  {1e6 * own:8.0f} us"]
    for name, ratio in found.items():
        goal = GOALS.get(n) if name == "eager" else 1.0 if n >= 256 else None
        said.append(f"{name} {ratio:5.2f}x" + (f" (goal {goal})" if goal else ""))
    return "  ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.small", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=list(GOALS), help="numbers of rows (default all of the goals)"
    )
    parser.add_argument("--width", type=int, default=128, help="columns (default 128)")
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    where = environment()
    print(
        f"{where['processor']}, 1 thread, {where['isa']}, torch {where['torch']}, commit {where['commit']}, d = {chosen.width}"
    )
    others = OTHERS[:1] if chosen.eager else OTHERS
    for loss, n in tqdm([(loss, n) for loss in chosen.losses for n in chosen.rows], unit="size"):
        tqdm.write(line(loss, n, chosen.width, chosen.rounds, others))


if __name__ == "__main__":
    main()
