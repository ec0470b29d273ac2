"""CLIP on two gloo processes: fastcl with group= against open_clip's ClipLoss(local_loss, gather_with_grad).

    python -m bench.distributed [--rows 1024 4096] [--dim 512] [--repeats 7]

Forward and backward of the loss on given rows, one thread for each process, the calls of both taking turns; the time of a step is
that of the slower process. Printed: medians, and the median of the ratios of neighbouring calls with its quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from fastcl import Ranks, functional
from tests.dropin import originals

SCALE = 1 / 0.07


def steps(rank: int, world: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The ways to compute the loss of unit rows."""
    theirs = originals.open_clip().ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    group = dist.group.WORLD
    return {
        "open_clip": lambda x, y, scale: theirs(x, y, scale),
        **{
            f"fastcl {strategy}": lambda x, y, scale, strategy=strategy: functional.clip(
                x, y, logit_scale=scale, normalize=False, group=Ranks(group, strategy=strategy)
            )
            for strategy in ("gather", "ring")
        },
    }


def process(rank: int, world: int, meeting: str, args: argparse.Namespace) -> None:
    """Time every way, in turns; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    ways = steps(rank, world)
    for n in args.rows:
        g = torch.Generator().manual_seed(rank)
        x, y = (F.normalize(torch.randn(n, args.dim, generator=g)).requires_grad_() for _ in range(2))
        scale = torch.tensor(SCALE, requires_grad=True)
        times: dict[str, list[float]] = {name: [] for name in ways}
        values = {}
        for repeat in range(args.repeats + 1):
            for name, way in ways.items():
                x.grad = y.grad = scale.grad = None
                dist.barrier()
                start = time.perf_counter()
                loss = way(x, y, scale)
                loss.backward()
                took = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(took, dist.ReduceOp.MAX)
                value = loss.detach() / world  # open_clip's is that of own rows
                dist.all_reduce(value)
                values[name] = float(value)
                if repeat:  # the first warms up
                    times[name].append(float(took))
        if rank == 0:
            show(n, args.dim, times, values)
    dist.destroy_process_group()


def show(n: int, d: int, times: dict[str, list[float]], values: dict[str, float]) -> None:
    """One line for each way."""
    reference = times["open_clip"]
    print(f"CLIP, 2 gloo processes of 1 thread, {n} rows each, d = {d}, float32, torch {torch.__version__}")
    for name, took in times.items():
        ratios = sorted(a / b for a, b in zip(reference, took, strict=True))
        low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[3 * len(ratios) // 4]
        print(
            f"  {name:14s} {1e3 * statistics.median(took):9.1f} ms   {middle:5.2f} x open_clip [{low:.2f}, {high:.2f}]"
            f"   loss {values[name]:.6f}"
        )


def main() -> None:
    """Start two processes and wait for them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048], help="on each process")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        process(args.rank, 2, args.meeting, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, "-m", "bench.distributed", *sys.argv[1:], "--meeting", str(Path(folder) / "meeting")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*own, "--rank", str(rank)], env=environment) for rank in range(2)]
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit(f"a process failed: exit codes {codes}")


if __name__ == "__main__":
    main()
