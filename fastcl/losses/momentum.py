"""Momentum contrast, and the queue of its negatives. For the slowly moving encoder: torch.optim.swa_utils.AveragedModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from typing_extensions import Self

from .. import functional
from ..distributed import agreed, write_gathered, writer
from ..equation import checks
from ..equation.arguments import declared, integer
from ..functional.rows import normalize_rows
from .objective import Objective


class MoCoLoss(Objective, function=functional.moco):
    """MoCo. Call: loss(q, k, queue.rows), then queue.enqueue(k), with a MoCoQueue.

    Examples:
        >>> loss, queue = fastcl.losses.MoCoLoss(temperature=0.5), fastcl.losses.MoCoQueue(4, length=16)
        >>> q = k = torch.eye(4)
        >>> value = loss(q, k, queue.rows)
        >>> queue.enqueue(k)
    """

    temperature: float | Tensor = 0.2
    sharded_queue: bool = False


class MoCoV3Loss(Objective, function=functional.moco_v3):
    """MoCo v3. Call: loss(q1, q2, k1, k2, groups=None).

    Examples:
        >>> loss = fastcl.losses.MoCoV3Loss(temperature=0.5)
        >>> q = torch.eye(4)
        >>> round(loss(q, q, q, q).item(), 4)
        0.6815
    """

    temperature: float | Tensor = 0.2


@writer
def in_a_circle(rows: Tensor, position: Tensor, k: Tensor) -> None:
    """Write keys from a position on, which goes round; of more than there are places, the last."""
    length, n = rows.shape[0], k.shape[0]
    kept = min(n, length)
    places = (position + n - kept + torch.arange(kept, device=k.device)) % length
    rows.index_copy_(0, places, k[n - kept :].to(rows.dtype))
    position.add_(n).remainder_(length)


class MoCoQueue(nn.Module):
    """The keys of the latest batches, in a circular buffer: the negatives of MoCo.

    Enqueue the keys of a batch after its loss, so that no positive is among the negatives. The batch need not divide the length.
    Rows and position are in the state_dict. The rows start as random directions, as in the authors' code (He et al. 2020).

    Args:
        d: the width of a key.
        length: how many keys are kept, > 0.
        normalize: whether to scale keys to unit length as they come.
        sharded: whether each rank keeps its own keys only: a part of a queue `world` times as long, for
            moco(..., sharded_queue=True, group=...), with the same loss. Otherwise every rank keeps the keys of all. Its rows are
            no buffers then, which DistributedDataParallel overwrites with those of rank 0; a rank's state_dict has its own.
        device, dtype: of the rows; the dtype is that of the queries.

    Raises:
        ValueError: for sizes that are not > 0.

    Examples:
        >>> queue = fastcl.losses.MoCoQueue(4, length=16)
        >>> queue.enqueue(torch.eye(4))
        >>> queue.rows.shape
        torch.Size([16, 4])
    """

    rows: Tensor
    position: Tensor

    @declared
    def __init__(
        self,
        d: int,
        length: int = 65536,
        *,
        normalize: bool = True,
        sharded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d", d), ("length", length)):
            integer(name, value, least=1, expected="a number > 0")
        if dtype is not None and dtype not in checks.DTYPES:
            raise TypeError(
                f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}; pass that of the queries"
            )
        self.normalize, self.sharded = normalize, sharded
        self.register_buffer("rows", F.normalize(torch.randn(length, d, device=device, dtype=dtype)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))
        with self._as_buffers():  # and from here on in their place
            pass

    @property
    def d(self) -> int:
        """The width of a key."""
        return self.rows.shape[1]

    def _check(self, k: Tensor) -> None:
        if checks.matrix("k", k).shape[1] != self.d:
            raise ValueError(f"k: expected rows of the queue's width, d = {self.d}, got d = {k.shape[1]}")

    def _across(self) -> dict[str, Any] | None:
        """What all ranks must share, where keys of all are kept."""
        length, queue = self.rows.shape[0], f"on {self.rows.device.type}"
        return None if self.sharded else {"length": length, "d": self.d, "normalize": self.normalize, "queue": queue}

    @torch.no_grad()
    @agreed(_check, _across)
    def enqueue(self, k: Tensor) -> None:
        """Let these keys, and those of all other ranks where torch.distributed runs, replace the oldest.

        Args:
            k: (n, d) floating, any dtype, n may differ from rank to rank; of more than `length` keys the last are kept.

        Raises:
            ValueError: for rows of another width or on another device.
            TypeError: for a dtype that is not floating.
            MismatchError: for what differs from rank to rank (a ValueError).
        """
        self._check(k)
        if k.device != self.rows.device:
            raise ValueError(
                f"k: expected the device of the queue, {self.rows.device}, got {k.device}; move one of them"
            )
        k = normalize_rows(k) if self.normalize else k
        everybody = not self.sharded and dist.is_available() and dist.is_initialized()
        write_gathered(in_a_circle, [self.rows, self.position], (k,), dist.group.WORLD if everybody else None)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Within, what a sharded queue keeps are buffers, as where a module is moved, saved or loaded; outside plain attributes."""
        kept = ("rows", "position") if self.sharded else ()
        self._buffers.update({name: self.__dict__.pop(name) for name in kept if name in self.__dict__})
        try:
            yield
        finally:
            self.__dict__.update({name: self._buffers.pop(name) for name in kept})

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        with self._as_buffers():
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_buffers():
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"length={self.rows.shape[0]}, d={self.rows.shape[1]}, normalize={self.normalize}"
