"""Calls that nobody thought of: a fixed number of them, always the same. `make fuzz` goes on from there; see __main__.py."""

import inspect
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import draws, public
from .case import Case, Found, resolve
from .hunt import judge
from .places import here, instruction_sets, place

# How many of each kind: a minute in all. What a call is compared with, and by which rule: rule.py.
BUDGET = {"objectives": 240, "ops": 320, "modules": 100, "metrics": 180, "spoiled": 80}
FIXED = settings(
    derandomize=True, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
)  # fmt: skip


def hold(drawn: st.SearchStrategy[Case], calls: int, where: Callable[[Case], Found]) -> None:
    """That many calls are right; the first that is not is shrunk, and its script is the error's text."""

    @settings(FIXED, max_examples=calls)
    @given(drawn)
    def each(case: Case) -> None:
        judge(case, where)

    with draws.each_anew():
        each()


@pytest.mark.parametrize("kind", BUDGET)
def test_calls(kind: str) -> None:
    # Where there are few functions each has its share: drawn together, some come time and again and others hardly.
    paths = [(path,) for path in public.public()[kind]] if kind in ("ops", "metrics") else [None]
    for of in paths:
        hold(draws.cases(kind, of), BUDGET[kind] // len(paths), here)


@pytest.mark.parametrize("isa", instruction_sets())
def test_calls_of_other_instruction_sets(isa: str) -> None:
    there = place(FASTCL_CPU_ISA=isa)
    hold(draws.cases("kernels"), 120, there)
    there.stop()


@pytest.mark.parametrize("world", [2, 3])
def test_calls_over_ranks(world: int) -> None:
    hold(draws.over_ranks(world), 50, here)
    place(world).stop()


def test_everything_public_is_drawn() -> None:
    """Every public function and module can be drawn from its signature, and every name that an argument takes is known."""
    for kind, paths in public.public().items():
        assert paths, kind
        for path in paths:
            for parameter in inspect.signature(resolve(path)).parameters.values():
                if kind == "objectives":
                    assert parameter.annotation != "str", (path, parameter.name)
