"""Every test runs with uninitialised memory poisoned: torch.empty gives NaN (or the largest integer), and so do csrc/cpu's own."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["FASTCL_COMPILE_PAIRS"] = (
    "0"  # but for the tests that compile: they say so, and keep it in a folder of their own
)
os.environ["FASTCL_POISON"] = "1"  # csrc/cpu reads it at its first use of memory


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
