"""One of several gloo processes: it makes every check in turn. Run by launch.py.

    python -m tests.distributed.ranks RANK WORLD MEETING_FILE RESULT_FILE

The result is {check: error}: how far this rank is from one process with the whole batch, over the tolerance; or what was raised.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from . import backends, behaviour, costs, dtensors, limits, losses, matches, mistakes, primitive

# Two processes meet each pair once, three go round, four have a half-way: the first two share the checks of the primitive. Where
# lists are cut, four share them too, and all worlds share those of the losses: three minutes of two cores less.
CUT = "FASTCL_MOST_CASES" in os.environ
SHARES = {1: (0, 8), 2: (0, 4), 3: (2, 4), 4: (1, 2)} if CUT else {1: (0, 8), 2: (0, 2), 3: (1, 2), 4: (0, 1)}
OF_LOSSES = {1: (0, 1), 2: (0, 2), 3: (1, 2), 4: (0, 2)} if CUT else dict.fromkeys(SHARES, (0, 1))


def checks(world: int) -> dict[str, Callable[[int, int], float]]:
    """The checks of a world."""

    def share(of: dict[str, Callable[[int, int], float]], shares: dict[int, tuple[int, int]]) -> Any:
        first, step = shares[world]
        return list(of.items())[first::step]

    return dict(
        [
            *share(primitive.CHECKS, SHARES),
            *share(losses.checks(world), OF_LOSSES),
            *matches.CHECKS.items(),
            *limits.CHECKS.items(),
            *behaviour.CHECKS.items(),
            *backends.CHECKS.items(),
            *dtensors.CHECKS.items(),
            *mistakes.CHECKS.items(),
            *costs.CHECKS.items(),
        ]
    )


def main(
    rank: int, world: int, meeting: str, result: str, made: dict[str, Callable[[int, int], float]] | None = None
) -> None:
    """Make every check that this world has, or those given, and write what came of it."""
    faulthandler.dump_traceback_later(560, exit=True)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    for name, check in (made or checks(world)).items():
        try:
            found[name] = check(rank, world)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the ranks are no longer in step: what comes after would hang or mislead
    torch.save(found, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
