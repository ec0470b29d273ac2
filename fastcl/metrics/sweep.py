"""How the metrics go over many rows: blocks for the engine, and tiles for what it has no reduction for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..equation import checks
from ..equation.problem import accumulation_dtype
from ..functional.rows import normalize_rows

# A tile of float32 similarities should stay in a core's own cache while it is read several times: on one core 512 x 1024
# takes 5 ns a pair for the histogram of cosines, whole rows of 100,000 columns take 20 ns.
TILE = (512, 1024)
BLOCKS = 64  # of rows, for the engine: enough for a bar that moves


def detached(x: Tensor, normalize: bool) -> Tensor:
    """The rows without gradient, of unit length when asked."""
    return normalize_rows(x.detach()) if normalize else x.detach()


def unit_rows(x: Tensor) -> Tensor:
    """Rows of unit length in the accumulation dtype, without gradient."""
    return normalize_rows(x.detach().to(accumulation_dtype(x.dtype)))


def at_least(rows: int, x: Tensor) -> int:
    """The number of rows, if there are so many."""
    if x.shape[0] < rows:
        raise ValueError(
            f"x: expected at least {rows} row{'s' * (rows > 1)}, got {x.shape[0]}; collect more before measuring"
        )
    return x.shape[0]


def positive(name: str, value: float | Tensor) -> float:
    """A Python number > 0; a tensor with one element is read."""
    number = checks.positive_number(name, value)
    return float(checks.positive_number(name, float(number)))


def ranges(n: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows, [start, stop)."""
    step = max(TILE[1], -(-n // BLOCKS))
    for start in range(0, n, step):
        yield start, min(n, start + step)


def tiles(n: int, m: int) -> Iterator[tuple[slice, slice]]:
    """All pairs (i, j) of n rows and m columns."""
    for i in range(0, n, TILE[0]):
        for j in range(0, m, TILE[1]):
            yield slice(i, min(n, i + TILE[0])), slice(j, min(m, j + TILE[1]))


def triangle_tiles(n: int) -> Iterator[tuple[slice, slice]]:
    """The pairs i < j: square tiles on the diagonal (equal slices), and those right of them."""
    rows, columns = TILE
    for i in range(0, n, rows):
        own = slice(i, min(n, i + rows))
        yield own, own
        for j in range(own.stop, n, columns):
            yield own, slice(j, min(n, j + columns))


def pairs_of_block(own: Tensor, later: Tensor) -> int:
    """How many unordered pairs a block of rows is in, with itself and with the rows after it."""
    return own.shape[0] * later.shape[0] + own.shape[0] * (own.shape[0] - 1) // 2


def blocks(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block of rows, and all rows after it."""
    for start, stop in ranges(x.shape[0]):
        yield x[start:stop], x[stop:]


def all_finite(x: Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    return bool(x.isfinite().all())
