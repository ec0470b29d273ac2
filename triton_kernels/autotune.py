"""Choosing the fused form's tiles by time instead of by tuning.py's prediction, and only when asked for.

FASTCL_TRITON_AUTOTUNE=1 (read at each call) times every tile of the table that takes the operands, once for each
architecture, dtype, d and power of two of n and m, and keeps the fastest for the life of the process. Each choice costs a
few launches and waits for the device, which a CUDA graph's capture forbids: run once before capturing. Untested on a card.
triton.autotune is not used: it cannot share one choice among kernels, and needs a driver where these tests have none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

VARIABLE = "FASTCL_TRITON_AUTOTUNE"
Tile = TypeVar("Tile")

_chosen: dict[Hashable, object] = {}
_lock = threading.Lock()


def asked() -> bool:
    """Whether FASTCL_TRITON_AUTOTUNE asks for the search.

    Raises:
        ValueError: if it is neither 0 nor 1.
    """
    text = os.environ.get(VARIABLE) or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {text!r}")
    return text == "1"


def choose(key: Hashable, tiles: Sequence[Tile], run: Callable[[Tile], object]) -> Tile:
    """The first tile, or where the search is asked for the one whose `run` takes the least time.

    run may be called any number of times: it must leave the same result each time. A tile that the device has no room for
    is passed over.
    """
    if len(tiles) == 1 or not asked():
        return tiles[0]
    with _lock:
        if key not in _chosen:
            times = [_time_or_never(run, tile) for tile in tiles]
            _chosen[key] = tiles[times.index(min(times))]
        return _chosen[key]  # type: ignore[return-value]


def size_class(size: int) -> int:
    """Sizes that share a choice: those of one power of two."""
    return size.bit_length()


def _time_or_never(run: Callable[[Tile], object], tile: Tile) -> float:
    try:
        run(tile)  # compiles
        return milliseconds(lambda: run(tile))
    except OutOfResources:
        return float("inf")


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The least time of a few runs, by events on the current stream."""
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)
