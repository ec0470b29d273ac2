"""Draws that are the same whatever else the process holds."""

import pytest
from hypothesis.internal.cache import LRUCache
from hypothesis.internal.conjecture import providers


@pytest.fixture(autouse=True)
def _nothing_from_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also draws numbers that it reads in the sources of modules imported so far: a run beside other tests drew others."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
    monkeypatch.setattr(providers, "CONSTANTS_CACHE", LRUCache(1024))
