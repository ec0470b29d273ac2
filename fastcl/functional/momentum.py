"""Momentum contrast: keys come from a slowly moving copy of the encoder, and carry no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.names import Backend, Reduction
from .aligned import aligned_views
from .reduction import PairTerm, at_least, check_reduction, reduced
from .rows import inverse, normalize_rows, times
from .softmax import info_nce

# A copy that no compiler makes again in the backward, of what has been written over.
library = torch.library.Library("fastcl", "FRAGMENT")
library.define("held(Tensor t) -> Tensor")
library.impl("held", lambda t: t.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake("fastcl::held", lambda t: t.new_empty(t.shape), lib=library)


@over_ranks
def moco(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: Positive = 0.2,
    sharded_queue: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """MoCo: each query finds its key among the keys of earlier batches.

        L = mean_i [ log(e^{p_i} + sum_j e^{z_ij}) - p_i ],   p_i = <q_i, k_i> / tau,   z_ij = <q_i, queue_j> / tau

    No gradient flows to k or to the queue, which fastcl.losses.MoCoQueue keeps: enqueue the keys after the loss.

    Source: He et al. 2020 (arXiv 1911.05722), eq. 1 and algorithm 1.

    Args:
        q: (n, d) floating, the queries.
        k: (n, d), dtype of q; k_i is the positive of q_i.
        queue: (m, d), dtype of q, the negatives of every query; m = 0 gives 0.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        sharded_queue: with a group, whether each rank holds a part of the queue; otherwise each holds all of it.
        normalize: whether to scale rows to unit length first, the queue's too.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> q, queue = torch.eye(4), torch.zeros(16, 4)
        >>> round(float(fastcl.functional.moco(q, q, queue, temperature=0.5)), 4)  # log(1 + 16 / e^2)
        1.1523
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    checks.pair_of_matrices("q", q, "k", k, same_rows=True)
    checks.pair_of_matrices("q", q, "queue", queue)
    q, k, s = aligned_views(q, k.detach(), normalize, ("q", "k"))
    # A copy either way, as in the authors' code: the queue may be overwritten before backward.
    traced = torch.compiler.is_compiling() and not transforms.active()
    queue = torch.ops.fastcl.held(queue.detach()) if traced else queue.detach() if normalize else queue.detach().clone()
    queue = normalize_rows(queue) if normalize else queue
    p = times(a, s)
    term = PairTerm(q, queue, p, sweep={"scale": a, "backend": backend}, shared=sharded_queue)
    return reduced(term, reduction, "moco")


@over_ranks
def moco_v3(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    *,
    temperature: Positive = 0.2,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """MoCo v3: each view's queries find the other view's keys, within the batch.

        L = 2 tau [ info_nce(q1, k2) + info_nce(q2, k1) ]

    No gradient flows to the keys.

    Source: Chen et al. 2021 (arXiv 2104.02057), algorithm 1; the paper's temperature is 0.2, its code's default 1.

    Args:
        q1, q2: (n, d) floating, the queries of both views.
        k1, k2: (n, d), dtype of q1, the keys of both views; k2_i is the positive of q1_i, and k1_i of q2_i.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        groups: (n,) int64, one group per row: pairs of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> q = torch.eye(4)
        >>> round(float(fastcl.functional.moco_v3(q, q, q, q, temperature=0.5)), 4)
        0.6815
    """
    check_reduction(reduction)
    for name, rows in (("q2", q2), ("k1", k1), ("k2", k2)):
        checks.pair_of_matrices("q1", q1, name, rows, same_rows=True)
    factor = checks.number("2 temperature", 2.0 * checks.positive_number("temperature", temperature), q1)
    arguments: dict[str, Any] = {
        "temperature": temperature,
        "groups": groups,
        "normalize": normalize,
        "backend": backend,
    }
    if reduction == "mean":
        at_least(1, q1, "moco_v3")
    way_1, way_2 = (info_nce(q, k.detach(), reduction=reduction, **arguments) for q, k in ((q1, k2), (q2, k1)))
    return times(factor, way_1 + way_2)
