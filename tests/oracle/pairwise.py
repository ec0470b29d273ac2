"""The one equation, as two loops.

z_ij = a u(x_i, y_j) + b + bx_i + by_j
r_i = REDUCE_{j in M(i)} f(z_ij)          c_j = REDUCE_{i : j in M(i)} f(z_ij)
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Keep = Callable[[int, int], bool]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of two rows."""
    return (a * b).sum()


def sqdist(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of two rows, from their difference: exact where norms and dot products cancel."""
    return ((a - b) ** 2).sum()


def unit(rows: Tensor) -> Tensor:
    """Rows divided by max(|row|, 1e-12), as torch.nn.functional.normalize."""
    return torch.stack([row / torch.linalg.vector_norm(row).clamp_min(1e-12) for row in rows])


def add(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of scalars; 0 over none."""
    return torch.stack(list(terms)).sum() if terms else like.new_zeros(())


def lse(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """log sum_k e^{t_k}; -inf over none, or over nothing but -inf, with gradient 0."""
    terms = [t for t in terms if t != -math.inf]
    return torch.stack(terms).logsumexp(0) if terms else like.new_full((), -math.inf)


def reduced(rows: Sequence[Tensor], reduction: str) -> Tensor:
    """The rows, their sum or their mean."""
    terms = torch.stack(list(rows))
    return {"none": terms, "sum": terms.sum(), "mean": terms.sum() / len(terms)}[reduction]


# ---------------------------------------------------------------- masks: keep(i, j)


def everything(i: int, j: int) -> bool:
    """All pairs."""
    return True


def off_diagonal(row_offset: int = 0, col_offset: int = 0, period: int = 0) -> Keep:
    """Pairs of different global index; with a period, of indices that differ modulo it."""
    if period:
        return lambda i, j: (i + row_offset - j - col_offset) % period != 0
    return lambda i, j: i + row_offset != j + col_offset


def across_groups(gx: Sequence[int], gy: Sequence[int] | None = None) -> Keep:
    """Pairs of different group."""
    gy = gx if gy is None else gy
    return lambda i, j: int(gx[i]) != int(gy[j])


def within_groups(gx: Sequence[int], gy: Sequence[int] | None = None) -> Keep:
    """Pairs of the same group."""
    gy = gx if gy is None else gy
    return lambda i, j: int(gx[i]) == int(gy[j])


def negatives(groups: Sequence[int] | None) -> Keep:
    """The negatives of a batch: other rows, of another group where groups are given."""
    return off_diagonal() if groups is None else across_groups(groups)


# ---------------------------------------------------------------- pair functions


def _sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z)) if z >= 0 else torch.exp(z) / (1 + torch.exp(z))


def _softplus(z: Tensor) -> Tensor:
    return z + torch.log1p(torch.exp(-z)) if z > 0 else torch.log1p(torch.exp(z))


def _power(z: Tensor, p: float, eps: float) -> Tensor:
    return z.new_tensor(eps**p) if z < eps else z**p


def _log(z: Tensor, eps: float) -> Tensor:
    return z.new_tensor(math.log(eps)) if z < eps else torch.log(z)


def _cosine_js(z: Tensor, eps: float) -> Tensor:
    limit = math.log(2) - eps
    return -torch.log(2 - torch.exp(z.new_tensor(limit) if z >= limit else z))


PAIRS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z,
    "exp": torch.exp,
    "softplus": _softplus,
    "sigmoid_squared": lambda z: _sigmoid(z) ** 2,
    "square": lambda z: z**2,
    "log1p": torch.log1p,
    "rsqrt1p": lambda z: (1 + z) ** -0.5,
    "power": _power,
    "log": _log,
    "cosine_js": _cosine_js,
}
OPERANDS = {"dot": dot, "sqdist": sqdist}
REDUCTIONS = {"sum": add, "logsumexp": lse}


# ---------------------------------------------------------------- the op


def pair_logits(
    x: Tensor,
    y: Tensor | None = None,
    *,
    operand: str = "dot",
    scale: Tensor | float = 1.0,
    shift: Tensor | float = 0.0,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
) -> list[list[Tensor]]:
    """z_ij, one scalar a pair."""
    y = x if y is None else y
    z = [[scale * OPERANDS[operand](xi, yj) + shift for yj in y] for xi in x]
    if bias_x is not None:
        z = [[zij + bias_x[i] for zij in row] for i, row in enumerate(z)]
    if bias_y is not None:
        z = [[zij + bias_y[j] for j, zij in enumerate(row)] for row in z]
    return z


def pair_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    pair: str = "identity",
    constants: Sequence[float] = (),
    reduce: str = "logsumexp",
    keep: Keep = everything,
    columns: bool = False,
    **affine: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """r (n,), or (r, c) with columns; `affine` as in pair_logits, `keep` is the mask."""
    m = len(x if y is None else y)
    z = pair_logits(x, y, **affine)  # type: ignore[arg-type]
    f = [[PAIRS[pair](zij, *constants) for zij in row] for row in z]
    fold = REDUCTIONS[reduce]
    r = [fold([f[i][j] for j in range(m) if keep(i, j)], x) for i in range(len(x))]
    rows = torch.stack(r) if r else x.new_zeros(0)
    if not columns:
        return rows
    c = [fold([f[i][j] for i in range(len(x)) if keep(i, j)], x) for j in range(m)]
    return rows, torch.stack(c) if c else x.new_zeros(0)


def pair_total(
    x: Tensor,
    y: Tensor | None = None,
    *,
    outer: str,
    positive: Tensor | None = None,
    pair: str = "identity",
    constants: Sequence[float] = (),
    reduce: str = "logsumexp",
    keep: Keep = everything,
    **affine: object,
) -> Tensor:
    """sum_i r_i | sum_i softplus(r_i - p_i) | log-sum-exp over every pair of the mask."""
    if outer == "pooled":
        z = pair_logits(x, y, **affine)  # type: ignore[arg-type]
        return lse([zij for i, row in enumerate(z) for j, zij in enumerate(row) if keep(i, j)], x)
    r = pair_reduce(x, y, pair=pair, constants=constants, reduce=reduce, keep=keep, **affine)
    assert isinstance(r, Tensor)
    if outer == "sum":
        return add(list(r), x)
    assert positive is not None
    return add([_softplus(ri - p) for ri, p in zip(r, positive, strict=True) if ri != -math.inf], x)
