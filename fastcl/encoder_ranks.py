"""Encoders whose ranks meet: of DistributedDataParallel and fully_shard, a step in chunks asks what a plain one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def waits(module: Any) -> bool:
    """Whether it waits for its peers at the end of a backward."""
    return hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync")


@contextmanager
def not_waiting(module: Any) -> Iterator[None]:
    """Gradients stay with this process: DistributedDataParallel's no_sync, or fully_shard's setting."""
    if hasattr(module, "no_sync"):
        with module.no_sync():
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def refuse_static_graph(module: nn.Module) -> None:
    """Of what is called for a second chunk, and has a backward for each."""
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise ValueError(
            "encoders: expected DistributedDataParallel without static_graph=True where it is called for several chunks, each of "
            "which has a backward of its own, got it for 2; leave it out"
        )


def handing_out(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Those that give all ranks the first one's buffers whenever they are called."""
    return [m for m in modules if isinstance(m, DistributedDataParallel) and m.require_backward_grad_sync]


@contextmanager
def hand_out(modules: list[DistributedDataParallel], starts: Callable[[], bool], again: bool) -> Iterator[None]:
    """They do so as a tower starts, and not in its other chunks, of which ranks may have different numbers.

    The very first call does as in a plain step; a second pass starts with what came of that.
    """
    called: set[nn.Module] = set()

    def before(module: Any, _: Any) -> None:
        if again or module in called:
            module.require_forward_param_sync = starts() and module in called
        called.add(module)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before).remove)
        yield
