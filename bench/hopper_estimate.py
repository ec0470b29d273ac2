"""What the counts of the Hopper kernels allow for the headline problems, beside the strip form: shares of the datasheet peak, never
timings. A pass takes at least what its busiest unit takes; torch's products are counted at the card's full rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.gpu_estimate import AT, Cost, cuda_strip_costs, product_milliseconds, steady_of
from fastcl.equation.pairs import pair_function
from fastcl.equation.problem import Problem
from tests.cuda import hopper_launching as hopper
from tests.cuda.fused_launching import Launcher, Weights
from tools.ptxemu.stats import Stats

GPU, DTYPE = "h100", torch.bfloat16


class Headline(NamedTuple):
    """A problem of bench.gpu_report: the products that its work is counted in, the passes that run, and how much of the matrix of
    pairs they visit (x with itself half of it)."""

    name: str
    counted: float
    d: int
    passes: tuple[str, ...]
    visited: float = 1.0


HEADLINES = (
    Headline("clip-64k-bf16", 4, 512, ("rows", "weights")),
    Headline("siglip-64k-bf16", 3, 768, ("slopes",)),
    Headline("info-nce-64k-bf16", 3, 512, ("rows", "weights of one side")),
    Headline("simclr-16k-bf16", 2, 256, ("rows", "weights of one side"), visited=0.5),
)


def softplus(p: Problem) -> Problem:
    return Problem(**{**p.__dict__, "pair": pair_function("softplus"), "reduce": "sum"})


def weights(p: Problem, both: bool) -> Weights:
    r, c = torch.full((p.n,), 10.0), torch.full((p.m,), 10.0)
    g, h = torch.rand(p.n), torch.rand(p.m)
    return Weights(g, h, r, c, torch.tensor([10.0, 1.0])) if both else Weights(g, None, r, None)


def product(launch: Launcher, p: Problem) -> Stats:
    """W Y of a strip, by a cluster of two."""
    assert p.y is not None
    return hopper.multiply(launch, torch.rand(p.m, p.n).to(DTYPE), p.y, True)[1]


def cost(name: str, d: int) -> Cost:
    """One pass of these kernels over whole tiles: what more tiles of y cost, over their pairs."""
    launch = Launcher(hopper.few())
    if name == "product":
        return steady_of(name, GPU, d, ((256, 256), (256, 768)), DTYPE, lambda p: [product(launch, p)])
    if name == "slopes":
        block = 128
    elif name == "rows":
        block = 256 if d <= 384 or d > 768 else 192 if d <= 512 else 128
    else:
        block = 256 if d <= 256 or d > 768 else 128
    # Two CTAs that share y, or from d = 776 on x, as the schedule cuts a large problem.
    shape = hopper.Shape(1, 2) if d > 768 else hopper.Shape(2 if block == 128 and d > 256 else 1)
    counts: dict[str, Callable[[Problem], Stats]] = {
        "rows": lambda p: hopper.rows(launch, p, shape)[3],
        "weights": lambda p: hopper.weigh(launch, p, weights(p, True), shape).stats,
        "weights of one side": lambda p: hopper.weigh(launch, p, weights(p, False), shape).stats,
        "slopes": lambda p: (
            hopper.weigh(launch, softplus(p), Weights(torch.ones(p.n), None, None, None), shape, sums=True).stats
        ),
    }
    n = block * shape.ctas
    return steady_of(name, GPU, d, ((n, 256), (n, 768)), DTYPE, lambda p: [counts[name](p)])


def share(h: Headline, passes: list[Cost], products: float = 0.0) -> float:
    """Counted flops over what the passes, and `products` at the full rate, take at least, as a share of the peak."""
    one = product_milliseconds(GPU, h.d, "bfloat16")
    return h.counted * one / (h.visited * sum(c.milliseconds for c in passes) + products * one)


def headlines() -> None:
    print(
        f"\nHeadline problems on {GPU}: ESTIMATE from counts, upper bounds of the share of 989 TFLOP/s; nothing was timed"
    )
    for h in HEADLINES:
        passes = [cost(name, h.d) for name in h.passes]
        passes += [cost("product", h.d)] * 2  # W Y and W^T X
        hopper_share = share(h, passes)
        reduce, weigh = cuda_strip_costs(GPU, h.d, DTYPE)
        epilogues = [weigh] if h.passes == ("slopes",) else [reduce, weigh]
        strip_share = share(h, epilogues, h.counted)
        print(
            f"  {h.name:18} counted {h.counted:g}, d = {h.d}: hopper at most {hopper_share:.2f}, strip at most {strip_share:.2f}"
        )
        for c in passes:
            print(
                f"      {c.name}: products {c.products:.3f}, exponentials {c.exponentials:.3f}, bytes {c.global_bytes:.2f} a pair, "
                f"conflicts {c.conflicts:.3f}; {c.binds.split(' (')[0]} binds, {c.milliseconds / AT / AT * 1e9:.3f} ps a pair"
            )
    print(
        "  strip: its epilogues counted with CLIP's, its products at the full rate, no launch, no tail. A tuned product reaches "
        "about 0.80 of the peak, by the bytes of ours: the L2 cache gives more than the 5.5 TB/s that are counted."
    )
