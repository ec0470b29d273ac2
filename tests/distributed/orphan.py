"""One of two processes, whose peer dies between forward and backward. Run by test_across_ranks.py; writes what it met.

python -m tests.distributed.orphan RANK WORLD MEETING_FILE RESULT_FILE STRATEGY HOW
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from fastcl import Ranks, functional

from .shards import random

TIMEOUT = 5.0


def main(rank: int, world: int, meeting: str, result: str, strategy: str, how: str) -> None:
    """Rank 1 dies, or never comes back; rank 0 writes the error that it got, how long it took, and that it could clean up."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    x = random(8, 3, seed=rank).requires_grad_()
    loss = functional.clip(x, x + 1.0, logit_scale=2.0, group=Ranks(dist.group.WORLD, strategy=strategy))
    returned = Path(result).with_name("rank 0 has its loss")
    if rank == 1:
        # A barrier would not do: who leaves it first may die while the other still reads from it (seen on a busy machine).
        while not returned.exists():
            time.sleep(0.01)
        if how == "silent":
            time.sleep(4 * TIMEOUT)
        os._exit(0)
    returned.touch()
    start = time.monotonic()
    try:
        loss.backward()
        error = "nothing"
    except RuntimeError as met:
        error = str(met)
    took = time.monotonic() - start
    dist.destroy_process_group()
    torch.save({"error": error, "took": took}, result)
    # What follows is torch's: gloo's threads still wait for the peer, and one that asks for the interpreter while it ends takes
    # the process with it ("terminate called without an active exception", once in some hundred runs).
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:7])
