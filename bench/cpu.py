"""The CPU kernels as shares of the machine's limit, and against the strongest baselines, beside their goals.

    python -m bench.cpu                      every case, the kernels and the ratios
    python -m bench.cpu --rows 2048          other numbers of rows
    python -m bench.cpu --kernels            the kernels alone

The limit is a loop of fused multiply-adds in registers on the same threads, measured in turns with the kernels: a share
is taken within each round, so that a neighbour on the machine slows both. One GEMM is 2 n^2 d flops. AMX can pass that limit:
it multiplies bfloat16 parts of floats, six products for one, at 16 times the rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastcl import functional
from fastcl.backends import extension

from .baselines import methods
from .cases import Case
from .measure import FULL_WIDTH, SQUARE_FLOPS, SQUARE_ROWS, environment, step, time_interleaved

KERNELS = torch.ops.fastcl
PEAK_SECONDS = 0.05
BFLOAT16, BFLOAT16_GOAL = "the same of bfloat16 rows", 1.9


class Kernel(NamedTuple):
    """One call, its flops, and the share of the limit that it should reach at n = 2048 and from n = 8192 on."""

    name: str
    gemms: float
    call: Callable[[], Any]
    goal_small: float | None
    goal_large: float | None


def kernels(n: int, d: int) -> list[Kernel]:
    """The schedules that losses rest on, without the PyTorch around them."""
    x, y = (torch.nn.functional.normalize(torch.randn(n, d)) for _ in range(2))
    zero, none, g = torch.tensor(0.0), torch.empty(0), torch.full((n,), 1.0 / n)
    positive = torch.zeros(n)

    def problem(
        y: Any,
        scale: float,
        operand: str,
        pair: str,
        reduce: str,
        columns: bool,
        x: Tensor = x,
        limit: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> tuple[Any, ...]:
        return (
            x, y, torch.tensor(scale), zero, None, None, None, None, limit, limit, guide, guide, 0, 0, 0, "off_diagonal", operand,
            pair, [], reduce, columns,
        )  # fmt: skip

    both = problem(y, 14.0, "dot", "identity", "logsumexp", True)
    half = problem(y.bfloat16(), 14.0, "dot", "identity", "logsumexp", True, x.bfloat16())
    limited = problem(y, 14.0, "dot", "identity", "logsumexp", True, limit=torch.full((n,), 14.0 * 0.1))
    guided = problem(y, 14.0, "dot", "identity", "logsumexp", True, limit=torch.full((n,), 0.1), guide=x)
    one = problem(y, 14.0, "dot", "identity", "logsumexp", False)
    itself = problem(None, 2.0, "dot", "identity", "logsumexp", False)
    gaussian = problem(None, -2.0, "sqdist", "exp", "sum", False)
    x_and_y, only_x = [True, True, *[False] * 4], [True, *[False] * 5]

    def clip(both: tuple[Any, ...] = both) -> None:
        r, c = KERNELS.kernel_rows(*both)
        KERNELS.kernel_gradients(*both, r, c, g, g, x_and_y, False)

    def nt_xent() -> None:
        r, _ = KERNELS.kernel_rows(*itself)
        KERNELS.kernel_gradients(*itself, r, none, g, none, only_x, False)

    def one_direction() -> None:
        KERNELS.kernel_total(*one, positive, "contrast", x_and_y)

    def gaussian_sum() -> None:
        KERNELS.kernel_total(*gaussian, None, "sum", only_x)

    return [
        Kernel("rows and columns, forward + backward (CLIP)", 4, clip, 0.87, 0.92),
        Kernel(BFLOAT16, 4, partial(clip, half), None, None),
        Kernel("the same with limits (fastcl.at_most)", 4, partial(clip, limited), None, None),
        Kernel("the same with limits of guides as wide (guide=)", 6, partial(clip, guided), None, None),
        Kernel("one direction, value and both gradients", 3, one_direction, None, None),
        Kernel("x with itself, log-sum-exp, forward + backward (NT-Xent)", 2, nt_xent, None, 0.90),
        Kernel("x with itself, Gaussian sum with gradient", 1.5, gaussian_sum, None, 0.90),
    ]


def shares(n: int, d: int, rounds: int) -> list[tuple[Kernel, float, float]]:
    """Each kernel's median seconds, and the median of its share of the limit."""
    found = kernels(n, d)
    peaks: list[float] = []
    steps: dict[str, Callable[[], Any]] = {"limit": lambda: peaks.append(KERNELS.cpu_fma_peak(PEAK_SECONDS))}
    for k in found:
        steps[k.name] = k.call
        steps[f"limit after {k.name}"] = steps["limit"]
    seconds = time_interleaved(steps, rounds)
    turns = len(found) + 1
    rows = []
    for place, k in enumerate(found):
        flops = k.gemms * 2.0 * n * n * d
        around = [(peaks[r * turns + place] + peaks[r * turns + place + 1]) / 2 for r in range(1, rounds + 1)]
        rates = [flops / s for s in seconds[k.name]]
        share = statistics.median(rate / peak for rate, peak in zip(rates, around, strict=True))
        rows.append((k, statistics.median(seconds[k.name]), share))
    return rows


def goal(kernel: Kernel, n: int, d: int) -> str:
    """The goal as text, where there is one for this size."""
    wanted = kernel.goal_large if n >= 8192 and d >= 128 else kernel.goal_small if n == 2048 else None
    return "" if wanted is None else f"goal {100 * wanted:.0f}%"


# Against whom, and by how much, at 8192 rows: (loss, baseline) -> goal at d = 128 and at d = 512. KCL is two Gaussian sums.
# Another goal where torch's BLAS uses the processor's full vectors: torch.compile saves a product by holding n x n numbers.
RATIO_GOALS = {
    ("clip", "eager"): (7.5, 3.1),
    ("clip", "torch.compile"): (3.5, 2.1),
    ("nt_xent", "lightly"): (15.0, 6.5),
    ("kcl", "torch.compile"): (7.5, 5.0),
}
RATIO_GOALS_OF_FULL_WIDTH = {("clip", "torch.compile"): (3.5, 1.25)}


def blas_share(rounds: int) -> float:
    """What torch's product of square matrices reaches of the limit."""
    square = torch.randn(SQUARE_ROWS, SQUARE_ROWS)
    peaks: list[float] = []
    steps: dict[str, Callable[[], Any]] = {
        "product": lambda: square @ square, "limit": lambda: peaks.append(KERNELS.cpu_fma_peak(PEAK_SECONDS))
    }  # fmt: skip
    seconds = time_interleaved(steps, rounds)["product"]
    return SQUARE_FLOPS / statistics.median(seconds) / statistics.median(peaks)


def ratios(n: int, d: int, rounds: int, full_width: bool) -> list[tuple[str, str, float, str]]:
    """How many times as long as fastcl each baseline takes, forward and backward, normalisation included."""
    result = []
    wanted_ratios = RATIO_GOALS | (RATIO_GOALS_OF_FULL_WIDTH if full_width else {})
    for loss in ("clip", "nt_xent", "info_nce", "kcl"):
        # Goals count NT-Xent's 2n rows as n.
        case = Case(loss, loss, n // 2 if loss == "nt_xent" else n, d, 0)
        x, y = case.inputs()
        steps: dict[str, Callable[[], Any]] = {
            name: partial(step, make(), x, y) for name, make in methods(loss, case.n).items()
        }
        seconds = time_interleaved(steps, rounds)
        for name, taken in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(taken, seconds["fastcl"], strict=True))
            goals = wanted_ratios.get((loss, name)) if n == 8192 and d in (128, 512) else None
            wanted = f"goal {goals[d == 512]}x" if goals else ""
            result.append((loss, name, ratio, wanted))
    return result


OPTION_GOAL = 1.15  # of a plain step, from 8,192 rows on


def options(n: int, d: int, rounds: int) -> list[tuple[str, float]]:
    """How many times as long as CLIP's plain step it takes with each option, normalisation included."""
    x, y = Case("clip", "clip", n, d, 0).inputs()
    index = torch.arange(n)
    given: dict[str, dict[str, Any]] = {
        "plain": {},
        "groups": {"groups": index // 2},
        "false_negative_margin": {"false_negative_margin": 0.1},
        "positives, one a row": {"positives": (index, index)},
        "positives, two a row": {"positives": (torch.cat([index, index]), torch.cat([index, index ^ 1]))},
        "label_smoothing": {"label_smoothing": 0.1},
    }
    calls = {name: partial(functional.clip, logit_scale=14.0, **arguments) for name, arguments in given.items()}
    seconds = time_interleaved({name: partial(step, call, x, y) for name, call in calls.items()}, rounds)
    plain = seconds.pop("plain")
    return [
        (name, statistics.median(a / b for a, b in zip(taken, plain, strict=True))) for name, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192], help="numbers of rows (default 2048 8192)")
    parser.add_argument(
        "--columns", type=int, nargs="+", default=[128, 512], help="widths of the rows (default 128 512)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--kernels", action="store_true", help="leave out the baselines")
    chosen = parser.parse_args()
    if extension.library is None:
        raise SystemExit(f"bench.cpu needs the compiled kernels: {extension.reason}")
    where = environment()
    limit = KERNELS.cpu_fma_peak(4 * PEAK_SECONDS) / 1e9
    print(
        f"{where['processor']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, commit {where['commit']}"
    )
    of_blas = blas_share(chosen.rounds)
    print(
        f"float32; the limit (fused multiply-adds in registers) is {limit:.0f} GF/s; of it torch's matmul reaches {of_blas:.0%}"
    )
    for n, d in tqdm([(n, d) for n in chosen.rows for d in chosen.columns], unit="size"):
        lines = [f"\nn = {n}, d = {d}"]
        found = shares(n, d, chosen.rounds)
        for kernel, seconds, share in found:
            wanted = goal(kernel, n, d)
            if kernel.name == BFLOAT16:
                wanted = f"{found[0][1] / seconds:.1f}x float32's speed, goal {BFLOAT16_GOAL}x"
            lines.append(f"  {kernel.name:58} {1e3 * seconds:9.1f} ms {100 * share:5.0f}% of the limit  {wanted}")
        if not chosen.kernels:
            for loss, name, ratio, wanted in ratios(n, d, chosen.rounds, of_blas > FULL_WIDTH):
                lines.append(f"  {loss:10} {name:36} takes {ratio:5.1f}x fastcl's time  {wanted}")
        for name, ratio in options(n, d, chosen.rounds):
            wanted = f"goal {OPTION_GOAL}x" if n >= 8192 else ""
            lines.append(f"  clip       {name:36} takes {ratio:5.2f}x the plain step's  {wanted}")
        tqdm.write("\n".join(lines))


if __name__ == "__main__":
    main()
