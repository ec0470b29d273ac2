"""f-MICL (Lu et al. 2023, arXiv 2402.10150), from its table's f' and f* o f' at u = mu e^{-beta d^2}."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .pairwise import add, dot, reduced, sqdist, unit
from .pairwise import negatives as kept

Groups = Sequence[int] | None
Scalar = Callable[[Tensor, float], Tensor]
EPS = 1e-6  # how far inside the domain of f* a cosine is kept


def _at_least(value: Tensor, bound: float) -> Tensor:
    return value.new_tensor(bound) if value < bound else value


# The table of the paper (section 3, appendix), one divergence a line: f'(u) and psi(u) = f*(f'(u)), which is
# u f'(u) - f(u). q is Tsallis' order. VLC's psi is the composition of the paper's own f* and f', not the
# expression printed in its table.
DIVERGENCES: dict[str, tuple[Scalar, Scalar]] = {
    "kl": (lambda u, q: torch.log(u) + 1, lambda u, q: u),
    "js": (lambda u, q: math.log(2) + torch.log(u / (1 + u)), lambda u, q: torch.log((1 + u) / 2)),
    "pearson": (lambda u, q: 2 * (u - 1), lambda u, q: u**2 - 1),
    "sh": (lambda u, q: 1 - u**-0.5, lambda u, q: u**0.5 - 1),
    "tsallis": (lambda u, q: q / (q - 1) * u ** (q - 1), lambda u, q: u**q),
    "vlc": (lambda u, q: 1 - 4 / (u + 1) ** 2, lambda u, q: 3 - (8 * u + 4) / (u + 1) ** 2),
    "rkl": (lambda u, q: -1 / u, lambda u, q: torch.log(u) - 1),
    "neyman": (lambda u, q: 1 - u**-2.0, lambda u, q: 2 - 2 / u),
    "jeffrey": (lambda u, q: 1 - 1 / u + torch.log(u), lambda u, q: u - 1 + torch.log(u)),
}

# The same table's f (q / (q - 1)-less Tsallis as printed) and f*, for the identity psi = f* o f' and for the
# cosine similarity.
GENERATORS: dict[str, Scalar] = {
    "kl": lambda u, q: u * torch.log(u),
    "js": lambda u, q: u * torch.log(u) - (1 + u) * torch.log((1 + u) / 2),
    "pearson": lambda u, q: (u - 1) ** 2,
    "sh": lambda u, q: (torch.sqrt(u) - 1) ** 2,
    "tsallis": lambda u, q: u**q / (q - 1),
    "vlc": lambda u, q: (u - 1) ** 2 / (u + 1),
    "rkl": lambda u, q: -torch.log(u),
    "neyman": lambda u, q: (1 - u) ** 2 / u,
    "jeffrey": lambda u, q: (u - 1) * torch.log(u),
}
CONJUGATES: dict[str, Scalar] = {
    "kl": lambda t, q: torch.exp(t - 1),
    "js": lambda t, q: -torch.log(2 - torch.exp(t)),
    "pearson": lambda t, q: t**2 / 4 + t,
    "sh": lambda t, q: 1 / _at_least(1 - t, EPS) - 1,
    # q > 1: the monotone conjugate is 0 for t < 0; fastcl keeps its base at EPS there, and so does this.
    "tsallis": lambda t, q: _at_least((q - 1) * t / q, EPS) ** (q / (q - 1)),
    "vlc": lambda t, q: 4 - t - 4 * torch.sqrt(_at_least(1 - t, EPS)),
    "rkl": lambda t, q: -1 - torch.log(-t),
    "neyman": lambda t, q: 2 - 2 * torch.sqrt(_at_least(1 - t, EPS)),
}


def f_micl(
    x: Tensor,
    y: Tensor,
    *,
    divergence: str = "kl",
    similarity: str = "gaussian",
    beta: Tensor | float = 1.0,
    mu: Tensor | float = 1.0,
    alpha: Tensor | float = 40.0,
    negatives: str = "xx",
    q: float = math.nan,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """-f'(u_ii) + alpha mean_j psi(u_ij), the weighted sample objective; `return_terms` adds the two means.

    Negatives xx: x_i against x_j; xx+yy: both views' mean; xy: x_i against y_j. Cosine: s in place of f'(u).
    """
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    n, keep = len(x), kept(groups)
    f_prime, psi = DIVERGENCES[divergence]

    def positive(a: Tensor, b: Tensor) -> Tensor:
        return dot(a, b) if similarity == "cosine" else f_prime(mu * torch.exp(-beta * sqdist(a, b)), q)

    def negative(a: Tensor, b: Tensor) -> Tensor:
        if similarity == "gaussian":
            return psi(mu * torch.exp(-beta * sqdist(a, b)), q)
        s = dot(a, b)
        if divergence == "js":
            s = -_at_least(-s, EPS - math.log(2))
        return CONJUGATES[divergence](s, q)

    views = {"xx": [(x, x)], "xx+yy": [(x, x), (y, y)], "xy": [(x, y)]}[negatives]
    pairs = max(1, sum(keep(i, j) for i in range(n) for j in range(n)))
    positives, spreads = [], []
    for i in range(n):
        positives.append(positive(x[i], y[i]))
        spread = add([negative(a[i], b[j]) for a, b in views for j in range(n) if keep(i, j)], x)
        spreads.append(spread * n / (pairs * len(views)))
    loss = reduced([-p + alpha * s for p, s in zip(positives, spreads, strict=True)], reduction)
    return (loss, reduced(positives, reduction), reduced(spreads, reduction)) if return_terms else loss


def f_micl_dv(
    x: Tensor, y: Tensor, *, beta: Tensor | float = 1.0, normalize: bool = True, groups: Groups = None
) -> Tensor:
    """mean beta d_ii^2 + log mean_{i != j} e^{-beta |x_i - x_j|^2}: the Donsker-Varadhan shift of KL."""
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    n, keep = len(x), kept(groups)
    terms = [torch.exp(-beta * sqdist(x[i], x[j])) for i in range(n) for j in range(n) if keep(i, j)]
    aligned = add([beta * sqdist(x[i], y[i]) for i in range(n)], x) / n
    return aligned + torch.log(add(terms, x) / max(1, len(terms)))
