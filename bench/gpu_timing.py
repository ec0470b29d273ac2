"""The timed parts of the day of the card: fastcl by each form, other libraries, eager and torch.compile, in turns by events.

The L2 cache is flushed before every call; medians; a matmul of the same dtype and a copy take turns with the methods, and every
rate is a share of that matmul's. What has no figure keeps a row that says why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastcl.backends import choice
from fastcl.backends.cuda import hopper, launches
from fastcl.backends.products import add_product
from fastcl.equation.masks import Mask
from fastcl.equation.pairs import pair_function
from fastcl.equation.problem import Problem, Wanted

from . import gpu_baselines
from .cases import Case
from .device_checks import FORMS, Result, Route, first_line, forms_of, routes, setting
from .formulas import EAGER, ours
from .gpu_checks import Day
from .measure import step

FLUSH_CALLS = 2  # times the size of the L2 cache
PRODUCT = 8192
ROUNDS = 12
HALF = torch.bfloat16
KINDS = {"half": HALF, "tf32": torch.float32}
# loss, rows a view, d, products of 2 n n d that are counted
CASES = {
    "clip-64k": Case("clip-64k", "clip", 65536, 512, 4),
    "siglip-64k": Case("siglip-64k", "siglip", 65536, 768, 3),
    "nt-xent-32k": Case("nt-xent-32k", "nt_xent", 16384, 128, 2),
    "f-micl-64k": Case("f-micl-64k", "f_micl_js", 65536, 128, 1.5),
    "clip-32k-wide": Case("clip-32k-wide", "clip", 32768, 1024, 4),
    "clip-4k-wide": Case("clip-4k-wide", "clip", 4096, 1024, 4),
    "clip-1k": Case("clip-1k", "clip", 1024, 512, 4),
    "clip-256": Case("clip-256", "clip", 256, 512, 4),
}
# Megabytes of the strip's workspace that give tiles of 2048, 4096 and 8192 two-byte rows a side.
TILES = {2048: "24", 4096: "96", 8192: "384"}


class Clock:
    """Seconds of a call with nothing of it in the L2 cache, and the bytes that it adds to what is allocated."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 1 << 20
        self.flushed = torch.empty(FLUSH_CALLS * l2, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        self.flushed.zero_()
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak(self, run: Callable[[], Any]) -> int | None:
        """None on a CPU, whose allocator does not count."""
        if not self.cuda:
            run()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def clear(self) -> None:
        """Gives back what the last method left."""
        if self.cuda:
            torch.cuda.empty_cache()


class Plan(NamedTuple):
    """A row of the table: what to run, with which settings; or why not."""

    name: str
    run: Callable[[], Any] | None
    settings: dict[str, str] = {}  # noqa: RUF012  never written to
    absent: str = ""


def plans(case: Case, day: Day, x: Tensor, y: Tensor) -> list[Plan]:
    """fastcl as it chooses and by every route, other libraries, eager."""
    found = [Plan("fastcl", partial(step, ours(case.loss), x, y))]
    for route in routes(day.device, HALF)[1:]:
        if route.backend != "blocked" and not route.name.endswith("cuda auto"):
            found.append(Plan(route.name, partial(step, ours(case.loss, route.backend), x, y), route.settings))
    for rival in gpu_baselines.libraries(case.loss, case.d):
        why = rival.absent(case, float("inf"), day.device.type)
        found.append(Plan(rival.name, None if why else _imported_late(rival, x, y), absent=why or ""))
    return [*found, Plan("eager", partial(step, EAGER[case.loss], x, y))]


def _imported_late(rival: gpu_baselines.Baseline, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """A library that cannot be imported is a row that says so."""
    made: list[Any] = []

    def run() -> Tensor:
        if not made:
            made.append(rival.make(rival.choices[0]))
        return step(made[0], x, y)

    return run


def timed(day: Day, name: str) -> Iterator[Result]:
    """One case. Half of the time is for first calls and peaks, a quarter for turns, and what is left for torch.compile."""
    case = CASES[name] if day.rows is None else CASES[name].resized(day.rows)
    clock, whole = Clock(day.device), day.left
    x, y = case.inputs(HALF, day.device.type)
    able: dict[str, Plan] = {}
    rows: dict[str, Result] = {}
    for plan in plans(case, day, x, y):
        rows[plan.name] = row = {"case": name, "method": plan.name}
        if plan.run is None:
            row["absent"] = plan.absent
        elif day.left < 0.5 * whole and plan.name != "fastcl":
            row["cut"] = "no time was left for its first call"
        else:
            row |= first_calls(plan, clock, x, y)
            if "failed" not in row:
                able[plan.name] = plan
    ceilings = _ceilings(case, day.device)
    # On a CPU, where nothing is a figure, a second tries them.
    seconds = in_turns([*able.values(), *ceilings], clock, day, 0.25 * whole if clock.cuda else 1.0)
    limit = ceilings[0]
    rate = 2.0 * min(PRODUCT, case.n) ** 3 / statistics.median(seconds[limit.name])
    copied = _bytes_of_copy(case) / statistics.median(seconds[ceilings[1].name])
    yield {
        "case": name,
        "ceiling": {"flops": rate, "bytes": copied},
        "loss": case.loss,
        "n": case.rows,
        "d": case.d,
        "gemms": case.gemms,
    }
    for method, row in rows.items():
        yield row | figures(seconds.get(method, []), case, rate)
    if "eager" in able and day.left > 0.2 * whole:
        # Inductor's first call takes half a minute of a CPU, and nothing there is a figure.
        by = "inductor" if clock.cuda else "aot_eager"
        compiled = Plan(
            "torch.compile", partial(step, torch.compile(EAGER[case.loss], dynamic=False, backend=by), x, y)
        )
        row = {"case": name, "method": "torch.compile"} | first_calls(compiled, clock, x, y)
        if "failed" not in row:
            row |= figures(in_turns([compiled], clock, day, 2.0)["torch.compile"], case, rate)
        yield row


def first_calls(plan: Plan, clock: Clock, x: Tensor, y: Tensor) -> Result:
    """Seconds of the first call and the peak of the second, or why there is none; out of memory is caught."""
    assert plan.run is not None
    row: Result = {}
    try:
        with setting(plan.settings):
            start = time.perf_counter()
            plan.run()
            if clock.cuda:
                torch.cuda.synchronize()
            row["first"] = time.perf_counter() - start
            x.grad = y.grad = None  # they are part of what a call adds
            row["peak"] = clock.peak(plan.run)
    except Exception as error:
        row = {"failed": first_line(error)}
    x.grad = y.grad = None
    clock.clear()
    return row


def in_turns(plans: list[Plan], clock: Clock, day: Day, allowance: float) -> dict[str, list[float]]:
    """Seconds of each in each round; at least one round, and as many as the allowance holds."""
    seconds: dict[str, list[float]] = {plan.name: [] for plan in plans}
    end = day.clock() + min(allowance, day.left)
    for _ in range(ROUNDS):
        for plan in plans:
            assert plan.run is not None
            with setting(plan.settings):
                seconds[plan.name].append(clock.seconds(plan.run))
        if day.clock() > end:
            break
    return seconds


def figures(seconds: list[float], case: Case, limit: float) -> Result:
    if not seconds:
        return {}
    median = statistics.median(seconds)
    return {
        "ms": 1e3 * median,
        "rounds": len(seconds),
        "tflops": case.flops / median / 1e12,
        "share": case.flops / median / limit,
    }


def _ceilings(case: Case, device: torch.device) -> list[Plan]:
    side = min(PRODUCT, case.n)
    a, b = (torch.randn(side, side, device=device).to(HALF) for _ in range(2))
    source = torch.empty(_bytes_of_copy(case) // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    torch.mm(a, b), target.copy_(source)
    return [Plan("ceiling: matmul", lambda: torch.mm(a, b)), Plan("ceiling: copy", lambda: target.copy_(source))]


def _bytes_of_copy(case: Case) -> int:
    """Read and written: a quarter of what 65,536 x 65,536 float32 logits take, and less for small cases."""
    return 2 * min(1 << 31, 2 * case.n * case.n)


# ---- the dispatch tables --------------------------------------------------------------------------------------------------


def dispatch(day: Day) -> Iterator[Result]:
    """Rows and gradients of a log-sum-exp by each form, and the strip's tiles: what the tables predicted, and what is quickest.

    Two-byte rows by every backend, then float32 ones as tf32: the two columns that the tables have.
    """
    clock = Clock(day.device)
    backends = dict.fromkeys(r.backend for r in routes(day.device, HALF) if r.backend in FORMS)
    for (kind, dtype), backend, d in product(KINDS.items(), backends, (64, 128, 256, 512, 768, 1024)):
        if day.left < 0:
            yield {"cut": f"{backend}, {kind}, from d = {d} on"}
            return
        found: Result = {"backend": backend, "kind": kind, "d": d, "n": day.rows or 16384}
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # says nothing to two-byte rows
        try:
            for op, ms in _of_forms(backend, found["n"], d, dtype, clock, day):
                yield found | {"op": op} | verdict(ms)
        except Exception as error:
            yield found | {"right": False, "failed": first_line(error)}
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def _of_forms(
    backend: str, n: int, d: int, dtype: torch.dtype, clock: Clock, day: Day
) -> Iterator[tuple[str, dict[str, float]]]:
    """Milliseconds of rows, then of gradients, by each form."""
    form, workspace, _ = FORMS[backend]
    names = forms_of(backend, day.device, dtype)
    p, module = _problem(n, d, dtype, day.device), choice.choose(backend, day.device, dtype)[1]
    r, c = module.rows(p)
    g = torch.full((n,), 1.0 / n, device=day.device)
    wanted = Wanted(True, True, False, False, False, False)
    rows, gradients = partial(module.rows, p), partial(module.gradients, p, r, c, g, g, wanted)
    yield "rows", _milliseconds([Plan(name, rows, {form: name}) for name in names], clock, day)
    tiles = [Plan(f"strip, tile {side}", gradients, {form: "strip", workspace: mb}) for side, mb in TILES.items()]
    plans = [*(Plan(name, gradients, {form: name}) for name in names), *tiles]
    if "hopper" in names and hopper.holds(p, launches.facts_of(day.device)):
        plans.append(Plan("hopper, torch's products", partial(by_torchs_products, gradients), {form: "hopper"}))
    yield "gradients", _milliseconds(plans, clock, day)


def by_torchs_products(gradients: Callable[[], Any]) -> Any:
    """The gradients with torch's product of a strip in place of hopper_product: which is quicker, only a card can say."""

    def product_of(out: Tensor, w: Tensor, z: Tensor, unit: Tensor | None, transposed: bool, _: int) -> None:
        add_product(out, w.T if transposed else w, z[:, : out.shape[1]], unit)

    with mock.patch.object(hopper, "add_product", product_of):
        return gradients()


def _milliseconds(plans: list[Plan], clock: Clock, day: Day) -> dict[str, float]:
    for plan in plans:  # compile
        assert plan.run is not None
        with setting(plan.settings):
            plan.run()
    return {name: 1e3 * statistics.median(times) for name, times in in_turns(plans, clock, day, 0.5).items()}


def verdict(ms: dict[str, float]) -> Result:
    """Whether `auto` is as quick as the best form that was forced, within what two runs differ by."""
    best = min((name for name in ms if name != "auto"), key=lambda name: ms[name])
    slower = ms["auto"] / ms[best]
    said = "confirmed" if slower <= 1.05 else f"refuted: {best} is {slower:.2f} times as fast as auto"
    return {"ms": ms, "best": best, "verdict": said}


def _problem(n: int, d: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x, y = (torch.nn.functional.normalize(t.detach()) for t in Case("", "clip", n, d, 1).inputs(dtype, device.type))
    scale, shift = torch.tensor(14.0, device=device), torch.tensor(0.0, device=device)
    return Problem(
        x, y, scale, shift, None, None, Mask("off_diagonal"), "dot", pair_function("identity"), "logsumexp", True
    )


__all__ = ["CASES", "Clock", "Route", "dispatch", "timed", "verdict"]
