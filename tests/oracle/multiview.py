"""Several views at once, and InfoNCE without a temperature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pairwise import dot, lse, negatives, reduced, unit

Groups = Sequence[int] | None


def _views(views: Sequence[Tensor], normalize: bool) -> list[Tensor]:
    return [unit(x) if normalize else x for x in views]


def mv_info_nce(
    *views: Tensor,
    temperature: Tensor | float = 0.1,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-log sum_{l != m} e^{u_i^l.u_i^m / tau} / sum over all pairs of a view of i with another row (2507.06979)."""
    z, keep = _views(views, normalize), negatives(groups)
    rows = []
    for i in range(len(z[0])):
        aligned = [dot(a[i], b[i]) / temperature for a in z for b in z if a is not b]
        others = [dot(a[i], b[j]) / temperature for a in z for b in z for j in range(len(b)) if keep(i, j)]
        rows.append(lse([*aligned, *others], z[0]) - lse(aligned, z[0]))
    return reduced(rows, reduction)


def mv_dhel(
    *views: Tensor,
    temperature: Tensor | float = 0.3,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-log sum_{l < m} e^{u_i^l.u_i^m / tau} + the energy of each view (2507.06979)."""
    z, keep = _views(views, normalize), negatives(groups)
    rows = []
    for i in range(len(z[0])):
        row = -lse([dot(a[i], b[i]) / temperature for l, a in enumerate(z) for b in z[l + 1 :]], z[0])
        for a in z:
            row = row + lse([dot(a[i], a[j]) / temperature for j in range(len(a)) if keep(i, j)], a)
        rows.append(row)
    return reduced(rows, reduction)


def temperature_free_info_nce(
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 1e-6,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy whose logits are 2 artanh(s) = log((1 + s) / (1 - s)) (2501.17683); 1 - s and 1 + s at least eps."""
    (x, y), keep = _views([x, y], normalize), negatives(groups)

    def odds(s: Tensor) -> Tensor:
        return 2 / torch.clamp(1 - s, min=eps) - 1  # (1 + s) / (1 - s) of cosines; as documented of other s

    rows = []
    for i in range(len(x)):
        s = dot(x[i], y[i])
        positive = torch.clamp(1 + s, min=eps) / torch.clamp(1 - s, min=eps)
        logits = [torch.log(odds(dot(x[i], y[j]))) for j in range(len(y)) if keep(i, j)]
        rows.append(lse([torch.log(positive), *logits], x) - torch.log(positive))
    return reduced(rows, reduction)
