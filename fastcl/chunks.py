"""Batches cut along their rows: tensors and lists, in tuples and dictionaries of any depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .equation.arguments import integer


def sizes(count: int, chunk: Any) -> list[int]:
    """Those of the chunks of so many rows."""
    if isinstance(chunk, Sequence):
        return list(chunk)
    chunk = integer("chunk", chunk, least=1, expected="a number of rows >= 1")
    return [min(chunk, count - start) for start in range(0, max(count, 1), chunk)]


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [part for value in batch.values() for part in _parts(value)]
    if isinstance(batch, tuple):
        return [part for value in batch for part in _parts(value)]
    return [batch] if isinstance(batch, list) or (isinstance(batch, Tensor) and batch.dim()) else []


def tensors(batch: Any) -> list[Tensor]:
    """The tensors that are cut."""
    return [part for part in _parts(batch) if isinstance(part, Tensor)]


def rows(batch: Any, index: int) -> int:
    """How many a batch has."""
    counts = {len(part) for part in _parts(batch)}
    if len(counts) != 1:
        got = f"{sorted(counts)} rows" if counts else f"{type(batch).__name__} without any"
        raise ValueError(f"batches[{index}]: expected tensors or lists of one number of rows, got {got}")
    return counts.pop()


def cut(batch: Any, start: int, stop: int) -> Any:
    """The same batch of a range of rows; what has none stays as it is."""
    if isinstance(batch, Mapping):
        return {name: cut(value, start, stop) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(cut(value, start, stop) for value in batch)
    return batch[start:stop] if isinstance(batch, list) or (isinstance(batch, Tensor) and batch.dim()) else batch
