"""Every test runs with uninitialised memory poisoned: torch.empty gives NaN (or the largest integer), and so do csrc/cpu's own."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest
import torch

os.environ["FASTCL_COMPILE_PAIRS"] = (
    "0"  # but for the tests that compile: they say so, and keep it in a folder of their own
)
os.environ["FASTCL_POISON"] = "1"  # csrc/cpu reads it at its first use of memory


DRAWN = 64  # of each list of cases in the quick tests, which end in 8 minutes on two cores


# Of each list in `make test-slow`: of 2,500 cases, combinations of a few choices, as many show what two or three choices break.
MOST = int(os.environ.get("FASTCL_MOST_CASES", "1000000"))


def beyond_the_draw(cases: Iterable[str], drawn: int = DRAWN) -> set[str]:
    """Of each test's cases, by their names, all but `drawn`: the same ones wherever they are collected, from all over the list."""
    lists: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        lists[case.partition("[")[0]].append(case)
    return {case for of_one in lists.values() for case in sorted(of_one, key=_shuffled)[drawn:]}


def _shuffled(case: str) -> bytes:
    return hashlib.sha256(case.encode()).digest()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A long list of cases is drawn from: the others are slow tests, up to MOST."""
    lists = [item.nodeid for item in items if not item.get_closest_marker("xdist_group")]  # those check all at once
    left_out = beyond_the_draw(lists, MOST)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
    others = beyond_the_draw(item.nodeid for item in items if not item.get_closest_marker("slow"))
    for item in items:
        if item.nodeid in others:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Checks that share the processes they start are one group, of one worker; scattered, each worker starts them all."""
    grouped = [i for i in session.items if i.get_closest_marker("xdist_group")]
    if session.config.getoption("loadgroup", False) and not all("@" in i.nodeid for i in grouped):
        raise pytest.UsageError(
            "this pytest-xdist does not group tests under this pytest; see the versions in pyproject.toml"
        )


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch fills uninitialised memory in deterministic mode; FASTCL_BACKEND from outside must not leak into tests."""
    monkeypatch.delenv("FASTCL_BACKEND", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_empty_is_poisoned() -> None:
    assert torch.empty(7).isnan().all()
