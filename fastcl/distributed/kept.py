"""What a module keeps of the rows of all ranks (a queue of keys, normalisers of samples): sent, and written where it is kept.

In a graph of torch.compile these are two ops, since how many rows come is known by the first alone, and since what sends may write
over nothing. The rows that have come wait in this process, under a number that the second op takes.

    gather_columns(columns, group) -> number      an effect, as all that sends
    write_columns(state!, number, how)            the function of that name writes them into the state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from . import in_graph
from .ranks import process_group
from .spelling import found
from .wire import Columns, Wire

WRITERS: dict[str, Callable[..., None]] = {}
_came: dict[int, Columns] = {}
_numbers = count(1)


def writer(function: Callable[..., None]) -> Callable[..., None]:
    """A function of a state's tensors and then of columns, which it writes into them; a graph finds it by its name."""
    WRITERS[_name(function)] = function
    return function


def write_gathered(write: Callable[..., None], state: Sequence[Tensor], columns: Columns, group: Any) -> None:
    """Write the columns of all ranks of `group`, in rank order, into the state; of None, those of this process."""
    if group is None:
        write(*state, *columns)
    elif in_graph.traced():
        number = torch.ops.fastcl.gather_columns(list(columns), in_graph.group_name(group))
        torch.ops.fastcl.write_columns(list(state), number, _name(write))
    else:
        _write_gathered(write, state, columns, group)


@torch._disable_dynamo
def _write_gathered(write: Callable[..., None], state: Sequence[Tensor], columns: Columns, group: Any) -> None:
    write(*state, *gathered(columns, process_group(group)))


def gathered(columns: Columns, group: Any) -> Columns:
    """The columns of all ranks of a process group, in rank order and without gradient; how many rows differs from rank to rank."""
    wire = Wire(group)
    mine = torch.tensor([columns[0].shape[0]], device=columns[0].device)
    sizes = wire.everywhere(mine).view(-1).tolist()
    return wire.gathered(tuple(t.detach().contiguous() for t in columns), sizes)


def gathered_rows(x: Tensor, group: Any = None) -> Tensor:
    """The rows of all ranks, in rank order and without gradient; their numbers may differ, their widths and dtypes must not."""
    return gathered((x,), group or torch.distributed.group.WORLD)[0]


def _name(function: Callable[..., None]) -> str:
    return f"{function.__module__}:{function.__name__}"


def _gather(columns: list[Tensor], group: str) -> Tensor:
    number = next(_numbers)
    _came[number] = gathered(tuple(columns), in_graph.group_of(group))
    return torch.tensor(number, device="cpu")


def _write(state: list[Tensor], number: Tensor, how: str) -> None:
    found(how, WRITERS)(*state, *_came.pop(int(number)))


library = in_graph.register(
    [
        (
            "gather_columns",
            "(Tensor[] columns, str group) -> Tensor",
            _gather,
            lambda columns, group: torch.empty((), dtype=torch.int64, device="cpu"),
        ),
        (
            "write_columns",
            "(Tensor(a!)[] state, Tensor number, str how) -> ()",
            _write,
            lambda state, number, how: None,
        ),
    ],
    ("gather_columns",),
)
