"""Draw calls from new seeds until the time is up, and print each that is wrong as a script.

    make fuzz MINUTES=30                              every backend and kind of call, on the best instruction set of the machine
    FASTCL_CPU_ISA=baseline make fuzz MINUTES=30      on another

A case runs in a process of its own kind, so that one that kills it is reported like any other. Exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from . import draws
from .case import Case
from .hunt import WrongError, judge
from .places import EMULATED, place

# What a round draws of each kind: a compiled call takes seconds, an interpreted kernel too.
ROUND = {
    "objectives": 120,
    "ops": 120,
    "modules": 60,
    "metrics": 30,
    "spoiled": 60,
    "2 ranks": 30,
    "3 ranks": 20,
    "compiled": 4,
    "interpreted": 6,
    "emulated": 6,
}


def strategy(
    kind: str, number: int, paths: Sequence[str] | None = None
) -> tuple[st.SearchStrategy[Case], Callable[[Case], Any]]:
    """What is drawn, and where it runs."""
    if kind.endswith("ranks"):
        world = int(kind[0])
        return draws.over_ranks(world, paths), place(world)
    if kind == "compiled":
        return draws.compiled(), place()
    if kind == "interpreted":
        # Tiles of 32 x 32 or so: several of them at sizes that the interpreter can run.
        form = ("strip", "fused")[number % 2]
        return draws.interpreted(), place(TRITON_INTERPRET="1", FASTCL_TRITON=form, FASTCL_WORKSPACE_MB="0.005")
    if kind == "emulated":
        return draws.emulated(), place(**{EMULATED: "1"})
    return draws.cases(kind, paths), place()


class TimeUp(BaseException):
    """Ends a round at once."""


class Hunter:
    """Judges cases of a kind; raises what is wrong and not known yet, of which it keeps the shortest script."""

    def __init__(
        self, kind: str, where: Callable[[Case], Any], end: float, known: set[Any], judged: Counter[tuple[str, bool]]
    ) -> None:
        self.kind, self.where, self.end, self.known, self.judged = kind, where, end, known, judged
        self.wrong: WrongError | None = None

    def one(self, case: Case) -> None:
        if time.monotonic() > self.end:
            raise TimeUp
        try:
            self.judged[self.kind, judge(case, self.where)] += 1
        except WrongError as wrong:
            if wrong.key in self.known:
                return
            if self.wrong is None or len(str(wrong)) < len(str(self.wrong)):
                self.wrong = wrong
            raise


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--kinds", nargs="*", default=list(ROUND), choices=list(ROUND), help="what to draw; all by default"
    )
    parser.add_argument(
        "--paths", nargs="*", help="of these alone, as functional.sup_con or losses.CLIPLoss; all by default"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="where to begin")
    given_ = parser.parse_args()
    os.environ["FASTCL_POISON"] = "1"  # as in the tests: the kernels' own memory holds NaN before they write it
    torch.use_deterministic_algorithms(True)
    end = time.monotonic() + 60.0 * given_.minutes
    known: set[Any] = set()
    judged: Counter[tuple[str, bool]] = Counter()
    print(f"from seed {given_.seed}, on {os.environ.get('FASTCL_CPU_ISA', 'the best instruction set')}", flush=True)
    number = given_.seed
    while time.monotonic() < end:
        for kind in given_.kinds:
            drawn, where = strategy(kind, number, given_.paths)
            hunter = Hunter(kind, where, end, known, judged)
            run = settings(
                max_examples=ROUND[kind], database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
            )(given(drawn)(hunter.one))  # fmt: skip
            with suppress(WrongError, Flaky, TimeUp), draws.each_anew():
                seed(number)(run)()
            if hunter.wrong is not None:
                known.add(hunter.wrong.key)
                print(f"\n# ---- wrong ({kind}, seed {number}) ----\n{hunter.wrong}\n", flush=True)
        number += 1
    print(
        {kind: (judged[kind, True], judged[kind, False]) for kind in given_.kinds},
        "judged and refused;",
        len(known),
        "wrong",
    )
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
