"""Decoupled contrast: the positive is left out of the denominator, and energies stand by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import batch
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.masks import Mask, across_groups
from ..equation.names import Backend, Form, MarginStrategy, Reduction
from ..precision import stacked
from .aligned import aligned_views
from .at_once import Whole, at_once
from .energy import Potential
from .false_negatives import Guide, Guides, check_margin, spared
from .reduction import PairTerm, at_least, check_reduction, reduced
from .rows import inverse, own_pairs_left_out, times

FORMS = {"joint": (1.0, 1.0), "anchor": (1.0, 0.0), "symmetric": (0.5, 0.5)}  # weights of the energies of u and v
DECOUPLED, OWN_VIEW, EITHER_VIEW = (
    Whole(sides, reduce="logsumexp", positives=Potential(linear=-1.0)) for sides in ("stacked", "xx", "xx+yy")
)


@over_ranks
def dcl(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Positive = 0.1,
    sigma: Positive | None = None,
    detach_weight: bool = True,
    symmetric: bool = True,
    groups: Tensor | None = None,
    false_negative_margin: float | None = None,
    margin_strategy: MarginStrategy = "absolute",
    guide: Guide | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """DCL: decoupled contrastive learning, and DCLW, its weighted form.

        L(u, v) = mean_i [ -w_i s_ii / tau + LSE_{j != i} {<u_i, u_j>, <u_i, v_j>} / tau ],   s_ii = <u_i, v_i>
        w_i = 1, or with sigma  w_i = 2 - n softmax_i(s_ii / sigma);   symmetric: (L(u, v) + L(v, u)) / 2

    It is negative for aligned rows, and unbounded below in principle as tau goes to 0.

    Source: Yeh et al. 2022 (arXiv 2110.06848), eq. 6 and 7.

    Args:
        u: (n, d) floating, n >= 2, the first views.
        v: (n, d), dtype of u, the second views.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        sigma: concentration of DCLW's weights, > 0 (0.5 in the paper), or None for DCL.
        detach_weight: whether the weights carry no gradient (public codes differ).
        symmetric: whether to take the mean of both directions: one sweep over half the tiles serves both.
        groups: (n,) int64, one group per pair of views: rows of equal groups are no negatives of each other.
        false_negative_margin, margin_strategy, guide: see info_nce. A pair above the limit of either row is no negative of both,
            and a row without any left has no energy, 0.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input). Without any negative it is -inf.

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.dcl(u, u, temperature=0.5)), 4)
        -0.2082
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    check_margin(false_negative_margin, guide)
    concentration = None if sigma is None else inverse("sigma", sigma)
    loss = at_once(
        DECOUPLED, u, v, a, normalize=normalize, reduction=reduction, backend=backend, energy=0.5,
        unless=(sigma, groups, false_negative_margin, None if symmetric else symmetric),
    )  # fmt: skip
    if loss is not None:
        return loss
    u, v, aligned = aligned_views(u, v, normalize, ("u", "v"))
    at_least(2, u, "dcl")
    p = times(a, aligned)
    if concentration is not None:
        weight = 2.0 - batch.count(u) * batch.softmax(times(concentration, aligned))
        p = (weight.detach() if detach_weight else weight) * p
    z = stacked(u, v)
    mask = own_pairs_left_out(groups, z, views=2)
    if mask.group_x is not None and not symmetric:
        mask = across_groups(mask.group_x[: u.shape[0]], mask.group_x)
    sizes = (z.shape[0], None) if symmetric else (u.shape[0], z.shape[0])
    guides = Guides.of(guide, u, v, normalize)
    guides = guides and guides.stacked(symmetric)
    mask = spared(mask, false_negative_margin, margin_strategy, aligned.repeat(2), sizes, a, guides=guides)
    if symmetric:
        return 0.5 * free_energies(z, None, a, mask, reduction, 2, backend) - reduced(p, reduction, "dcl")
    return free_energies(u, z, a, mask, reduction, 1, backend) - reduced(p, reduction, "dcl")


@over_ranks
def dhel(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Positive = 0.3,
    form: Form = "joint",
    groups: Tensor | None = None,
    false_negative_margin: float | None = None,
    margin_strategy: MarginStrategy = "absolute",
    guide: Guide | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """DHEL: decoupled hypersphere energy loss; negatives of a view come from that view alone.

        L = mean_i [ -<u_i, v_i> / tau + a E_i(u) + b E_i(v) ],   E_i(x) = LSE_{j != i} <x_i, x_j> / tau

    "joint" (a = b = 1) is the authors' code, which adds the second view's energy at full weight and the alignment once;
    "anchor" (a = 1, b = 0) is their figure; "symmetric" (a = b = 1/2) is the mean of both directions.

    Source: Koromilas et al. 2024 (arXiv 2405.18045).

    Args:
        u: (n, d) floating, n >= 2, the anchors.
        v: (n, d), dtype of u, their positives.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        form: "joint", "anchor" or "symmetric".
        groups: (n,) int64, one group per row: pairs of equal groups are left out of the energies.
        false_negative_margin, margin_strategy, guide: see info_nce. A pair above the limit of either row is no negative of both,
            and a row without any left has no energy, 0.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input). Without any negative it is -inf.

    Raises:
        ValueError: for shapes, names or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.dhel(u, u, temperature=0.5)), 4)  # -2 + 2 log 3
        0.1972
    """
    check_reduction(reduction)
    checks.one_of("form", form, tuple(FORMS))
    a = inverse("temperature", temperature)
    check_margin(false_negative_margin, guide)
    of_u, of_v = FORMS[form]
    loss = at_once(
        OWN_VIEW if of_v == 0.0 else EITHER_VIEW, u, v, a, normalize=normalize, reduction=reduction, backend=backend, energy=of_u,
        unless=(groups, false_negative_margin),
    )  # fmt: skip
    if loss is not None:
        return loss
    u, v, s = aligned_views(u, v, normalize, ("u", "v"))
    at_least(2, u, "dhel")
    mask = own_pairs_left_out(groups, u)
    guides = Guides.of(guide, u, v, normalize)
    masks = (
        spared(mask, false_negative_margin, margin_strategy, s, (u.shape[0], None), a, guides=own)
        for own in (guides.own() if guides is not None else (None, None))
    )
    loss = -reduced(times(a, s), reduction, "dhel")
    for rows, weight, within in zip((u, v), FORMS[form], masks, strict=True):
        if weight != 0.0:
            loss = loss + weight * free_energies(rows, None, a, within, reduction, 1, backend)
    return loss


def free_energies(
    x: Tensor, y: Tensor | None, a: float | Tensor, mask: Mask, reduction: str, views: int, backend: str | None
) -> Tensor:
    """LSE_{j in M(i)} a <x_i, y_j> of the rows of x, added up over its stacked views, then reduced over n rows.

    A row whose pairs are all above its limit has no energy: -inf for one such row would be the loss of all.
    """
    n = x.shape[0] // views
    term = PairTerm(x, y, sweep={"scale": a, "mask": mask, "backend": backend})
    if reduction == "none" or mask.limited:
        r = term.rows()
        r = torch.where(r.isneginf(), 0.0, r) if mask.limited else r
        return reduced(r.view(views, n).sum(0), reduction, "the energy")
    total = term.total()
    return total / (batch.count(x) // views) if reduction == "mean" else total
