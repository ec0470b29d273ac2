"""A library of another version, whose ops are others than those that are called: said before any call, with what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fastcl.backends import choice, cuda, extension
from fastcl.backends.cuda import launches

from .emulation import LAUNCHES, emulated

ALL = launches.ARGUMENTS | launches.ARGUMENTS_OF_HOPPER


def built() -> dict[str, object]:
    """The ops as csrc/cuda/launches.cpp registers them."""
    with emulated():
        return {name: getattr(torch.ops.fastcl_emulated, name) for name in LAUNCHES}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    launches.stale.cache_clear()
    yield
    launches.stale.cache_clear()


def test_the_counts_are_those_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = built()
    assert ops.keys() == ALL.keys()
    monkeypatch.setattr(launches, "ops", SimpleNamespace(**ops))
    assert launches.stale() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda ops: ops.pop("strip_reduce_limited"),
            "strip_reduce_limited with 24 arguments, and there is none in it",
        ),
        (lambda ops: ops.update(hopper_sweep=ops["hopper_merge"]), "hopper_sweep with 35 arguments, and it takes 10"),
    ],
    ids=["missing", "other"],
)
def test_another_version_is_refused_by_name_and_passed_over_by_auto(
    change: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = built()
    change(ops)  # type: ignore[operator]
    monkeypatch.setattr(launches, "ops", SimpleNamespace(**ops))
    monkeypatch.setattr(extension, "cuda_reason", None)
    device = torch.device("cuda")
    with pytest.raises(choice.BackendUnavailableError, match=words) as raised:
        choice.choose("cuda", device, torch.float32)
    assert "rebuild it: pip install" in str(raised.value)
    assert choice.choose("auto", device, torch.float32)[0] in ("triton", "blocked")


def test_where_nine_oh_was_not_built_nothing_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {name: op for name, op in built().items() if not name.startswith("hopper")}
    monkeypatch.setattr(launches, "ops", SimpleNamespace(**ops))
    monkeypatch.setattr(extension, "cuda_reason", None)
    assert "libfastcl_cuda.so" not in (cuda.unavailable(torch.device("cuda"), torch.float32) or "")
