"""What a CUDA graph's capture asks of a loss: that the host waits for nothing, and that a replay reads what is there by then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import profile

from fastcl import transforms
from fastcl.functional import positives

# Operations whose result the host has to know, or that copy from its pageable memory: a GPU's stream is waited for in each.
WAITS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "equal",
        "repeat_interleave", "lift_fresh",
    )
}  # fmt: skip
Loss = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Of CPU tensors no value is looked at, as none of a GPU's is: what fastcl looks at there costs no wait."""
    with (
        mock.patch.object(transforms, "values_are_stored", return_value=False),
        mock.patch.object(positives, "_refuse_where", return_value=None),
    ):
        yield


def waits(run: Callable[[], object]) -> dict[str, int]:
    """How often each operation for which the host of a GPU would wait is called, within ops of C++ too; of CPU tensors."""
    with as_on_a_device():
        run()  # what is made once
        with profile() as seen:
            run()
    return dict(Counter(event.name for event in seen.events() if event.name in WAITS))


def replays(loss: Loss, rows: Sequence[Tensor], others: Sequence[Tensor]) -> str | None:
    """Captures `loss` of `rows`, replays it with the values of `others` in their place; why that is not what it gives, or None."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss(rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss(rows)
    with torch.no_grad():
        for mine, other in zip(rows, others, strict=True):
            mine.copy_(other)
    graph.replay()
    expected = loss(rows)
    torch.cuda.synchronize()
    off = max(_relative(a, b) for a, b in zip(captured, expected, strict=True))
    # Sums by atomics come in another order, so that an element may be rounded to its other neighbour in the rows' dtype.
    return None if off <= torch.finfo(rows[0].dtype).eps else f"a replay is off by {off:.1e}"


def _relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference by that of b; NaN where either holds one, which is above any bound."""
    difference, size = (float(t.detach().double().norm()) for t in (a.double() - b.double(), b))
    return difference / size if size else difference
