"""What the Triton and CUDA kernels cost on a GPU, counted on a machine without one: an upper bound on speed, never a timing.

    python -m bench.gpu_estimate [--gpu a100 h100] [--d 128 512] [--dtype bfloat16]

The compiled PTX runs under tools/ptxemu at two widths; the difference, divided by its number of pairs (i, j), is the steady
cost of a pair, and times n m it bounds the time at n = m = 65,536 from below. Left out: latency, occupancy, tails, the
imperfect overlap of the terms, the L1 cache. The strip form's matrix products are counted at the card's full rate.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastcl.triton_kernels import fused, tuning
from fastcl.triton_kernels.strip import Strip

from fastcl.backends import choice
from fastcl.equation.masks import Mask
from fastcl.equation.pairs import pair_function
from fastcl.equation.problem import Problem, Wanted
from tests.cuda import fused_launching as cuda
from tests.cuda.emulation import emulated
from tools.ptxemu import triton as ptxemu
from tools.ptxemu.stats import GPUS, Stats

CAPABILITY = {"a100": 80, "h100": 90}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TENSOR = {"bfloat16": "bf16", "float16": "f16"}
SHARED = {"a100": 163 << 10, "h100": 227 << 10}  # bytes that one CTA may have
AT = 65536


class Cost(NamedTuple):
    """One pass, per pair (i, j): executed matrix flops over 2d, exponentials, bytes, conflicts; and seconds of each term."""

    name: str
    products: float
    exponentials: float
    global_bytes: float
    sector_bytes: float
    conflicts: float
    seconds: dict[str, float]

    @property
    def binds(self) -> str:
        return max(self.seconds, key=lambda term: self.seconds[term])

    @property
    def milliseconds(self) -> float:
        return max(self.seconds.values()) * AT * AT * 1e3


def rows_of(n: int, d: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype)


def clip_problem(n: int, m: int, d: int, dtype: torch.dtype) -> Problem:
    """Rows and columns of CLIP, the positives (and here every pair near them) left out far from the tiles that are counted."""
    x, y = rows_of(n, d, dtype), rows_of(m, d, dtype)
    mask = Mask("off_diagonal", 1 << 20, 0)
    scale, shift = torch.tensor(14.0), torch.tensor(0.0)
    return Problem(x, y, scale, shift, None, None, mask, "dot", pair_function("identity"), "logsumexp", True)


def launches(p: Problem, capability: int, run: Callable[[Problem], Any]) -> list[Stats]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = ptxemu.activate(capability, threads=1)
    with session:
        run(p)
    return session.stats


def steady(
    name: str, gpu: str, d: int, sizes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype,
    run: Callable[[Problem], Any], kernel: str,
) -> Cost:  # fmt: skip
    """The cost of a pair under Triton's kernels: those whose name has `kernel` in it."""

    def count(p: Problem) -> list[Stats]:
        return [s for s in launches(p, CAPABILITY[gpu], run) if kernel in s.kernel]

    return steady_of(name, gpu, d, sizes, dtype, count)


def steady_of(
    name: str, gpu: str, d: int, sizes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype,
    count: Callable[[Problem], list[Stats]],
) -> Cost:  # fmt: skip
    """The cost of a pair: what a wider problem costs more than a narrower one, over the pairs that it has more."""
    counted = []
    for n, m in sizes:
        stats = count(clip_problem(n, m, d, dtype))
        terms = [dict(s.roofline(gpu).terms) for s in stats]
        seconds = {term: sum(t[term] for t in terms) for term in terms[0] if not term.startswith("DRAM")}
        counts = (
            sum(s.mma_flops for s in stats) / (2 * d), sum(s.mufu for s in stats), sum(s.global_bytes for s in stats),
            sum(s.global_sectors for s in stats) * 32, sum(s.bank_conflicts for s in stats),
        )  # fmt: skip
        counted.append((counts, seconds))
    (few, short), (many, long) = counted
    pairs = sizes[1][0] * sizes[1][1] - sizes[0][0] * sizes[0][1]
    each = [(b - a) / pairs for a, b in zip(few, many, strict=True)]
    return Cost(name, *each, {term: (long[term] - short[term]) / pairs for term in short})


def fused_costs(gpu: str, d: int, dtype: torch.dtype) -> list[Cost]:
    """fused_rows, and one sweep of fused_gradient, which a deterministic backward runs twice."""
    arch = f"sm_{CAPABILITY[gpu]}"
    rows_tile = tuning.rows_tiles(arch, "half", d)[0]
    gradient_tile = tuning.gradient_tiles(arch, "half", "logsumexp", d)[0]

    def sweep(p: Problem) -> None:
        r, c = torch.full((p.n,), 10.0), torch.full((p.m,), 10.0)
        fused.gradients(p, r, c, torch.rand(p.n), torch.rand(p.m), Wanted(True, False, False, False, False, False))

    # One row block for each program of the emulated launch, so that prologues cancel in the difference.
    n = rows_tile.BM * 2
    wide = [(n, rows_tile.BN * tiles) for tiles in (4, 12)]
    costs = [steady("fused rows and columns", gpu, d, (wide[0], wide[1]), dtype, fused.rows, "fused_rows")]
    n = gradient_tile.BM
    wide = [(n, gradient_tile.BN * tiles) for tiles in (4, 12)]
    costs.append(steady("fused gradient, one sweep", gpu, d, (wide[0], wide[1]), dtype, sweep, "fused_gradient"))
    return costs


def strip_costs(gpu: str, d: int, dtype: torch.dtype) -> list[Cost]:
    """The strip form's epilogues; its products are torch's."""

    def weights(p: Problem) -> None:
        r, c = torch.full((p.n,), 10.0), torch.full((p.m,), 10.0)
        wanted = Wanted(True, True, False, False, False, False)
        Strip(p).gradients(r, c, torch.rand(p.n), torch.rand(p.m), wanted)

    sizes = ((128, 512), (128, 1536))
    return [
        steady("strip reduce", gpu, d, sizes, dtype, lambda p: Strip(p).rows(), "strip_reduce"),
        steady("strip weights", gpu, d, sizes, dtype, weights, "strip_weights"),
    ]


def cuda_costs(gpu: str, d: int) -> list[Cost]:
    """The hand-written kernels of csrc/cuda in bfloat16: the forward sweep, and the gradient's where its kernel holds d."""
    launch = cuda.Launcher(cuda.few(arch=CAPABILITY[gpu]))
    # x's rows stay in shared memory where they leave room for stages of y's: 128 rows of d beside 3 x 16 KB.
    shape = cuda.Shape(ctas=2, resident=256 * d <= SHARED[gpu] - (60 << 10))

    def sweep(p: Problem) -> list[Stats]:
        r, c = torch.full((p.n,), 10.0), torch.full((p.m,), 10.0)
        weights = cuda.Weights(torch.rand(p.n), torch.rand(p.m), r, c, torch.tensor([10.0, 1.0]))
        return [cuda.gradient(launch, p, weights)[2]]

    sizes, dtype = ((256, 512), (256, 1536)), torch.bfloat16
    costs = [steady_of("CUDA rows and columns", gpu, d, sizes, dtype, lambda p: [cuda.rows(launch, p, shape)[2]])]
    if d <= 128:
        costs.append(steady_of("CUDA gradient, one sweep", gpu, d, sizes, dtype, sweep))
    return costs


def cuda_strip_costs(gpu: str, d: int, dtype: torch.dtype) -> list[Cost]:
    """The strip form's hand-written kernels; its products are torch's."""

    def counting(kernel: str, gradients: bool) -> Callable[[Problem], list[Stats]]:
        def count(p: Problem) -> list[Stats]:
            r, c = torch.full((p.n,), 10.0), torch.full((p.m,), 10.0)
            with mock.patch.dict(os.environ, FASTCL_CUDA="strip"), emulated(CAPABILITY[gpu]) as session:
                backend = choice.choose("cuda", p.x.device, p.x.dtype)[1]
                if gradients:
                    wanted = Wanted(True, True, False, False, False, False)
                    backend.gradients(p, r, c, torch.rand(p.n), torch.rand(p.m), wanted)
                else:
                    backend.rows(p)
            return [s for s, name in zip(session.stats, session.names, strict=True) if name == kernel]

        return count

    # Whole blocks of 64 x 128, in one tile of the schedule.
    sizes = ((128, 512), (128, 1536))
    return [
        steady_of("CUDA strip reduce", gpu, d, sizes, dtype, counting("strip_reduce", False)),
        steady_of("CUDA strip weights", gpu, d, sizes, dtype, counting("strip_weights", True)),
    ]


def product_milliseconds(gpu: str, d: int, dtype: str) -> float:
    """2 n m d flops at the full rate of the tensor cores."""
    return 2.0 * AT * AT * d / GPUS[gpu]["tensor"][TENSOR[dtype]] * 1e3


def estimate(gpu: str, d: int, dtype: str) -> None:
    print(f"\n{gpu}, {dtype}, d = {d}: ESTIMATE from counts, an upper bound on speed; ms at n = m = {AT:,}")
    own = (cuda_costs(gpu, d) if dtype == "bfloat16" else []) + cuda_strip_costs(gpu, d, DTYPES[dtype])
    costs = {c.name: c for c in fused_costs(gpu, d, DTYPES[dtype]) + strip_costs(gpu, d, DTYPES[dtype]) + own}
    for c in costs.values():
        terms = ", ".join(f"{term.split(' (')[0]} {s * AT * AT * 1e3:.1f}" for term, s in c.seconds.items() if s)
        print(
            f"  {c.name:27} products {c.products:.3f}  exponentials {c.exponentials:.2f}  global bytes {c.global_bytes:.1f} "
            f"(sectors {c.sector_bytes:.1f})  bank conflicts {c.conflicts:.3f}\n"
            f"      {terms} -> {c.binds} binds, {c.milliseconds:.1f} ms"
        )
    product = product_milliseconds(gpu, d, dtype)
    four = ("tensor cores", 4 * product)

    def passes(*names: str) -> list[tuple[str, float]]:
        return [(costs[name].binds.split(" (")[0], costs[name].milliseconds) for name in names]

    whole = {
        "fused": passes("fused rows and columns", *["fused gradient, one sweep"] * 2),
        "strip": [four, *passes("strip reduce", "strip weights")],
        "CUDA strip": [four, *passes("CUDA strip reduce", "CUDA strip weights")],
    }
    if "CUDA gradient, one sweep" in costs:
        whole["CUDA fused"] = passes("CUDA rows and columns", *["CUDA gradient, one sweep"] * 2)
    for form, parts in whole.items():
        by_term = Counter[str]()
        for term, ms in parts:
            by_term[term] += ms  # type: ignore[assignment]  milliseconds, not a count
        binds, most = by_term.most_common(1)[0]
        print(
            f"  CLIP forward + backward, {form}: at least {sum(by_term.values()):.1f} ms, {most:.1f} of them in passes that "
            f"{binds} bind; 4 products at full rate are {4 * product:.1f} ms"
        )
        assert math.isfinite(sum(by_term.values()))
    chosen = "fused" if d <= tuning.FUSED_UP_TO[f"sm_{CAPABILITY[gpu]}"]["half"] else "strip"
    print(f"  predicted by the Triton backend's table: {chosen}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", choices=sorted(CAPABILITY), default=sorted(CAPABILITY))
    parser.add_argument("--d", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    arguments = parser.parse_args()
    for gpu in arguments.gpu:
        for d in arguments.d:
            estimate(gpu, d, arguments.dtype)
    if "h100" in arguments.gpu:
        from bench.hopper_estimate import headlines  # which takes its counting from here

        headlines()


if __name__ == "__main__":
    main()
