"""Matryoshka representation learning: one loss of several prefixes of the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..distributed import Ranks, agreed
from ..distributed.ranks import process_group
from ..equation import arguments, checks
from ..functional.matryoshka import in_one_visit
from ..functional.reduction import check_reduction
from ..functional.rows import inverse
from ..transforms import of_keepable
from .objective import Objective
from .softmax import CLIPLoss, InfoNCELoss

Loss = Callable[..., Tensor]


class MatryoshkaLoss(nn.Module):
    """A loss of prefixes of its rows, added up: rows that are cut to any of the widths are trained as embeddings of their own.

        L = sum_k w_k L_k(x_{1..d_k}, y_{1..d_k}, ...)

    Each prefix is normalised by its loss. A prefix is no copy of its rows, and one call of the kernels: a step costs what losses of
    d_k columns cost. InfoNCELoss and CLIPLoss as they are, of a whole batch on a CPU without AMX, take all prefixes in one visit of
    each pair (functional/matryoshka.py), where that is quicker: products cost then what those of the widest prefix cost.

    Source: Kusupati et al. 2022 (arXiv 2205.13147), eq. 1.

    Args:
        loss: L, a module of fastcl.losses or any function of rows; or one for each width, as a loss with a state of its own
            (SogCLRLoss, FastCLIPLoss, MINCLoss) must be.
        dims: d_k, increasing integers > 0; the last is at most the rows' width.
        weights: w_k, numbers, as many as widths; None for 1 each.

    Returns:
        Of a call, loss(*rows, **data): the sum. Floating matrices among `rows` are cut; labels and what is passed by name are not.

    Raises:
        ValueError: for widths that are not increasing or beyond the rows', or another number of losses or weights than of widths.
        TypeError: for widths that are no integers, or a loss that cannot be called.
        MismatchError: over the ranks of a loss's `group=`, for what differs from rank to rank (a ValueError). Of a function that
            passes a group itself it is not seen: each rank checks its own rows.

    Examples:
        >>> loss = fastcl.losses.MatryoshkaLoss(fastcl.losses.InfoNCELoss(temperature=0.5), dims=(2, 4), weights=(0.5, 1.0))
        >>> x = torch.eye(4)
        >>> value = loss(x, x)
        >>> parts = [fastcl.functional.info_nce(x[:, :d], x[:, :d], temperature=0.5) for d in (2, 4)]
        >>> torch.allclose(value, 0.5 * parts[0] + parts[1])
        True
    """

    def __init__(
        self, loss: Loss | Sequence[Loss], dims: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.dims = _increasing(dims)
        losses = list(loss) if isinstance(loss, (Sequence, nn.ModuleList)) else [loss] * len(self.dims)
        given = [1.0] * len(self.dims) if weights is None else _in_order("weights", weights, "numbers")
        for name, each in (("loss", losses), ("weights", given)):
            if len(each) != len(self.dims):
                raise ValueError(f"{name}: expected one for each of the {len(self.dims)} dims, got {len(each)}")
        self.weights = tuple(checks.real(f"weights[{i}]", w) for i, w in enumerate(given))
        distinct = {id(each): each for each in losses}
        self.losses = nn.ModuleList(_as_module(each) for each in distinct.values())
        self.order = [list(distinct).index(id(each)) for each in losses]
        for shared in self.losses if len(distinct) < len(losses) else ():
            # Rows of one width would be weighed by what was kept of another.
            if any(getattr(part, "wide", ()) for part in shared.modules()):
                kind = type(shared).__name__
                raise ValueError(
                    f"loss: expected a {kind} for each of dims, since it has a state, got one; pass a list"
                )

    @of_keepable  # once, not for each prefix
    def forward(self, *rows: Any, **data: Any) -> Tensor:
        if self._group() is None or any(map(checks.is_dtensor, rows)):
            self._check(rows)
        elif self._agree(rows) is not None:
            return torch.zeros(())  # the op in the graph raises, on all ranks, before this is anything
        cut = [_prefixes(x, self.dims) for x in rows]
        loss = self._in_one_visit([x[-1] for x in cut], data)
        if loss is not None:
            return loss
        calls = zip(self.weights, self.order, zip(*cut, strict=True), strict=True)
        return torch.stack([w * self.losses[k](*prefixes, **data) for w, k, prefixes in calls]).sum(0)

    def _check(self, rows: Sequence[Any]) -> None:
        if not rows:
            raise TypeError(
                "rows: expected them in their places, as loss(x, y), got none; what is passed by name is not cut"
            )
        for i, x in enumerate(rows):
            if not _are_cut(x):
                continue
            arguments.dense(f"rows[{i}]", x)
            if x.shape[1] < self.dims[-1]:
                raise ValueError(
                    f"rows[{i}]: expected at least {self.dims[-1]} columns, the largest of dims, got {x.shape[1]}; "
                    "pass smaller dims"
                )

    def _across(self) -> dict[str, Any]:
        """What all ranks must share."""
        return {"dims": self.dims, "weights": self.weights}

    def _group(self) -> Any:
        """The ranks that a loss talks to, as its `group=` or its state says; None where none does."""
        for loss in self.losses:
            if not isinstance(loss, (Objective, _Function)):
                continue  # what a module of another kind calls its group is its own
            group, state = loss.group, isinstance(loss, Objective) and loss.wide
            if group is not None and Ranks.of(group) is not None:
                return group
            if state and self.training and dist.is_available() and dist.is_initialized():
                return dist.group.WORLD  # a state takes in the rows of all
        return None

    @torch.no_grad()  # which rank trains its rows is for the losses to compare
    @agreed(_check, _across, over=lambda self: process_group(self._group()))
    def _agree(self, rows: Sequence[Any]) -> None:
        """Raise what is wrong with the rows of one rank on all."""
        self._check(rows)

    def _in_one_visit(self, rows: list[Any], data: dict[str, Any]) -> Tensor | None:
        """The same of a softmax contrast in its plainest form, or None."""
        loss: Any = self.losses[0]
        if type(loss) not in (InfoNCELoss, CLIPLoss) or len(self.losses) > 1 or len(rows) != 2 or data:
            return None
        if loss._forward_pre_hooks or loss._forward_hooks or loss._backward_pre_hooks or loss._backward_hooks:
            return None
        given = loss.arguments()
        others = (given[name] for name in ("false_negative_margin", "backend", "group"))  # a margin of 0 is one
        if given["normalize"] is not True or given["label_smoothing"] != 0.0 or any(o is not None for o in others):
            return None
        check_reduction(given["reduction"])
        a = given["logit_scale"] if type(loss) is CLIPLoss else inverse("temperature", given["temperature"])
        x, y = rows
        columns = type(loss) is CLIPLoss
        return in_one_visit(x, y, a, self.dims, self.weights, columns=columns, reduction=given["reduction"])

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}"


class _Function(nn.Module):
    """A function of rows as a module."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function

    @property
    def group(self) -> Any:
        """That of a partial; another function does not say."""
        return self.function.keywords.get("group") if isinstance(self.function, partial) else None

    def forward(self, *rows: Any, **data: Any) -> Tensor:
        return self.function(*rows, **data)


def _as_module(loss: Any) -> nn.Module:
    if isinstance(loss, type):
        name = loss.__name__
        raise TypeError(f"loss: expected a module or a function of rows, got the class {name}; pass {name}(...)")
    if not callable(loss):
        raise TypeError(
            f"loss: expected a module or a function of rows, got {type(loss).__name__}; pass a module of fastcl.losses"
        )
    return loss if isinstance(loss, nn.Module) else _Function(loss)


def _in_order(name: str, given: Any, what: str) -> list[Any]:
    """Of a set there is no order, and of a dict the keys would be taken."""
    if isinstance(given, (Set, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected {what} in order, got {type(given).__name__}; pass a list")
    return list(given)


def _increasing(dims: Sequence[int]) -> tuple[int, ...]:
    found = tuple(checks.integer(f"dims[{i}]", d) for i, d in enumerate(_in_order("dims", dims, "widths")))
    if not found or found[0] < 1 or any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"dims: expected increasing widths > 0, got {found}; sort them, each once")
    return found


def _are_cut(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()


def _prefixes(x: Any, dims: tuple[int, ...]) -> list[Any]:
    """The prefixes of rows, each a part of the next, whose gradients are then added from the narrowest on; else x itself."""
    if not _are_cut(x):
        return [x for _ in dims]
    found = []
    for d in reversed(dims):
        x = x if x.shape[1] == d else x[:, :d]
        found.append(x)
    return found[::-1]
