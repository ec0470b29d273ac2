"""What goes from rank to rank: small values to everybody, rows to everybody or to the next, partial results home.

Rows travel as bytes, so that a shard with its groups and normalisers is one message. Results are added by the receiver in rank
order: no result depends on which message came first, nor on a library's order of adding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..precision import stacked

ALIGNMENT = 16  # bytes; each rank's part of a gathered message starts at a multiple, whatever it holds

# torch 2.13 gave it a new name, and warns of the old one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
Columns = tuple[Tensor, ...]  # tensors with one entry for each row of a shard: rows, groups, normalisers, gradients


class Wire:
    """The ranks of a group, as the sender and the receiver see them."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    @property
    def device(self) -> torch.device:
        """Where messages that are no rows lie: the same on every rank, wherever its rows are."""
        served = self.group._device_types
        return torch.device("cpu") if not served or torch.device("cpu") in served else served[0]

    def everywhere(self, values: Tensor) -> Tensor:
        """(world, ...) the small tensor of every rank."""
        flat = values.contiguous().view(-1)
        found = flat.new_empty(self.world * flat.numel())
        if flat.numel():
            _all_gather(found, flat, group=self.group)
        return found.view(self.world, *values.shape)

    def summed(self, matrix: Tensor) -> Tensor:
        """The sum over ranks, the same on each."""
        result = matrix.contiguous().clone()
        dist.all_reduce(result, group=self.group)
        return result

    def mean(self, number: Tensor) -> Tensor:
        """The mean of the ranks' numbers, the same on each."""
        return number.clone() if self.world == 1 else self.summed(number) / self.world

    def gathered(self, columns: Columns, sizes: Sequence[int]) -> Columns:
        """The columns of every rank, one after the other: one all-gather for the widest, one for the rest."""
        widest = max(range(len(columns)), key=lambda i: _row_bytes(columns[i]))
        rest = tuple(t for i, t in enumerate(columns) if i != widest)
        wide = self._gathered((columns[widest],), sizes)[0]
        narrow = iter(self._gathered(rest, sizes) if rest else ())
        return tuple(wide if i == widest else next(narrow) for i in range(len(columns)))

    def _gathered(self, columns: Columns, sizes: Sequence[int]) -> Columns:
        width = sum(_row_bytes(t) for t in columns)
        length = max(1, -(-max(sizes) * width // ALIGNMENT)) * ALIGNMENT
        packed = pack(columns)
        mine = packed
        if packed.numel() != length:
            mine = packed.new_empty(length)
            mine[: packed.numel()] = packed
        found = self.everywhere(mine)
        if len(columns) == 1 and len(set(sizes)) == 1 and length == sizes[0] * width:  # nothing to move
            return (found.view(-1).view(columns[0].dtype).view(sum(sizes), *columns[0].shape[1:]),)
        shards = [unpack(found[k], columns, n) for k, n in enumerate(sizes)]
        return tuple(stacked(*parts) for parts in zip(*shards, strict=True))

    def home(self, parts: Sequence[Columns], back: Sequence[int], like: Columns) -> list[Columns]:
        """Send parts[k] to rank k, and receive of each rank as many rows as `back` says: one all-to-all."""
        outgoing = [pack(part) for part in parts]
        width = sum(_row_bytes(t) for t in like)
        incoming = [n * width for n in back]
        received = like[0].new_empty(sum(incoming), dtype=torch.uint8)
        dist.all_to_all_single(
            received, torch.cat(outgoing), incoming, [message.numel() for message in outgoing], group=self.group
        )
        return [unpack(message, like, n) for message, n in zip(received.split(incoming), back, strict=True)]

    def shift(self, columns: Columns, step: int, rows: int) -> Callable[[], Columns]:
        """Start to send columns to the rank `step` further and to receive `rows` rows from that far behind.

        Returns:
            A function that waits for both and gives the columns received.
        """
        if step % self.world == 0:
            return lambda: columns
        message = pack(columns)
        received = message.new_empty(rows * sum(_row_bytes(t) for t in columns))
        to, source = (self._global(self.rank + sign * step) for sign in (1, -1))
        # An empty message is not sent: both sides know its size.
        operations = [dist.P2POp(dist.isend, message, to, self.group)] if message.numel() else []
        if received.numel():
            operations.append(dist.P2POp(dist.irecv, received, source, self.group))
        pending = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> Columns:
            for work in pending:
                work.wait()
            assert message is not None  # kept alive until it is sent
            return unpack(received, columns, rows)

        return wait

    def _global(self, rank: int) -> int:
        return int(dist.get_global_rank(self.group, rank % self.world)) if self.group is not None else rank % self.world


def _row_bytes(t: Tensor) -> int:
    return math.prod(t.shape[1:]) * t.element_size()


def _by_size(columns: Columns) -> list[int]:
    """Widest elements first, so that each is aligned to itself."""
    return sorted(range(len(columns)), key=lambda i: -columns[i].element_size())


def pack(columns: Columns) -> Tensor:
    """The bytes of the columns, one after the other."""
    parts = [_flat(columns[i]).view(torch.uint8) for i in _by_size(columns)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flat(t: Tensor) -> Tensor:
    """All entries in one row of stride 1, which even a contiguous tensor of one entry may not have."""
    return t.detach().contiguous().as_strided((t.numel(),), (1,))


def unpack(message: Tensor, like: Columns, rows: int) -> Columns:
    """The columns that were packed, `rows` rows of each, as views of the message."""
    found: list[Tensor | None] = [None] * len(like)
    start = 0
    for i in _by_size(like):
        stop = start + rows * _row_bytes(like[i])
        found[i] = message[start:stop].view(like[i].dtype).view(rows, *like[i].shape[1:])
        start = stop
    return tuple(t for t in found if t is not None)
