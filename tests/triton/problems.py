"""Problems of every kind for the Triton kernels, and the measure that their answers are held to.

|truth - ours| <= |truth - torch| + a few roundings, where truth is the float64 reference on the same inputs and torch is the
plain n x m computation in the inputs' own dtype, differentiated by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.backends import reference
from fastcl.equation.masks import Mask
from fastcl.equation.pairs import CosineJS, Log, PairFunction, Power, pair_function
from fastcl.equation.problem import Gradients, Problem, Wanted, accumulation_dtype

MASKS = ("all", "off_diagonal", "across_groups", "within_groups")
PAIRS: dict[str, PairFunction] = {
    **{name: pair_function(name) for name in ("exp", "softplus", "sigmoid_squared", "square", "log1p", "rsqrt1p")},
    "power": Power(-1.5, 0.3),
    "log": Log(0.3),
    "cosine_js": CosineJS(0.1),
}
# log1p and rsqrt1p need 1 + z > 0: a shift of 2 keeps every dot product of unit rows inside.
_SHIFT = {"log1p": 2.0, "rsqrt1p": 2.0, "power": 1.0, "log": 1.0}


def problem(
    n: int, m: int | None, d: int, *, operand: str = "dot", pair: str = "identity", mask: str = "off_diagonal",
    bias: bool = False, columns: bool = False, scale: float | None = None, dtype: torch.dtype = torch.float32,
    seed: int = 0, length: float = 1.0,
) -> Problem:  # fmt: skip
    """Unit rows (times length); m None takes x with itself; "identity" is the log-sum-exp, every other pair a sum."""
    g = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        return length * torch.nn.functional.normalize(torch.randn(count, d, generator=g, dtype=torch.float64), dim=1)

    x, y = unit(n).to(dtype), None if m is None else unit(m).to(dtype)
    cols = n if m is None else m
    group_x, group_y = torch.randint(0, 3, (n,), generator=g), torch.randint(0, 3, (cols,), generator=g)
    grouped = (group_x, None if m is None else group_y) if "groups" in mask else (None, None)
    # An offset of two: the diagonal leaves the first rows and crosses tile borders.
    row_offset = 2 if mask == "off_diagonal" and m is not None else 0
    small = accumulation_dtype(dtype)
    biases = [(torch.randn(size, generator=g) * 0.1).to(small) if bias and m else None for size in (n, cols)]
    # Distances reach 4: a scale of -1.5 for exp and its kin, and a positive one where z must stay positive.
    default = 5.0 if pair == "identity" else 1.0
    if operand == "sqdist":
        default = 0.5 if pair in _SHIFT else -1.5
    return Problem(
        x, y, torch.tensor(default if scale is None else scale, dtype=small),
        torch.tensor(_SHIFT.get(pair, 0.1), dtype=small), *biases,
        Mask(mask, row_offset, 0, *grouped), operand, PAIRS.get(pair) or pair_function(pair),
        "logsumexp" if pair == "identity" else "sum", columns,
    )  # fmt: skip


class Upstream(NamedTuple):
    """Upstream gradients of rows and columns, and the positives of the contrast form."""

    g: Tensor
    h: Tensor | None
    positive: Tensor


def upstream(p: Problem) -> Upstream:
    gen = torch.Generator().manual_seed(99)
    g, positive = torch.randn(p.n, generator=gen), torch.randn(p.n, generator=gen)
    h = torch.randn(p.m, generator=gen) if p.columns and p.y is not None else None
    return Upstream(g, h, positive)


def all_wanted(p: Problem) -> Wanted:
    return Wanted(True, p.y is not None, True, True, p.bias_x is not None, p.bias_y is not None)


def torch_answer(p: Problem, up: Upstream) -> tuple[Tensor, Tensor | None, Gradients]:
    """r, c and the gradients of <g, r> + <h, c> by plain PyTorch in the dtype of x, with autograd."""
    x = p.x.clone().requires_grad_()
    y = x if p.y is None else p.y.clone().requires_grad_()
    leaves = {"scale": p.scale.clone().requires_grad_(), "shift": p.shift.clone().requires_grad_()}
    for name, bias in (("bias_x", p.bias_x), ("bias_y", p.bias_y)):
        if bias is not None:
            leaves[name] = bias.clone().requires_grad_()
    u = x @ y.T
    if p.operand == "sqdist":
        u = (x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * u).clamp(min=0)
    z = u.to(p.dtype) * leaves["scale"] + leaves["shift"]
    z = z + leaves["bias_x"][:, None] if "bias_x" in leaves else z
    z = z + leaves["bias_y"][None, :] if "bias_y" in leaves else z
    keep = reference.visited(p.mask, torch.arange(p.n), torch.arange(p.m))
    keep = torch.ones(p.n, p.m, dtype=torch.bool) if keep is None else keep
    r, c = (reference._reduce(p, z, keep, dim) for dim in (1, 0))
    loss = (torch.where(torch.isneginf(r), 0.0, r) * up.g).sum()
    if up.h is not None:
        loss = loss + (torch.where(torch.isneginf(c), 0.0, c) * up.h).sum()
    loss.backward()
    grads = Gradients(x.grad, None if p.y is None else y.grad, **{name: leaf.grad for name, leaf in leaves.items()})
    return r.detach(), c.detach() if p.columns else None, grads


def error(got: Tensor, truth: Tensor, magnitude: float = 0.0) -> float:
    """The largest difference, relative to the largest value of the truth (or to what its sum is made of, where it cancels).

    Infinities and NaN must stand in the same places.
    """
    got, truth = got.double(), truth.double()
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(got), finite), "infinite or NaN where the truth is not, or the other way round"
    assert torch.equal(got[~finite], truth[~finite]), "another infinity than the truth's"
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().clamp(min=max(magnitude, 1e-30))
    return ((got - truth)[finite].abs().max() / scale).item()


def roundings(p: Problem) -> float:
    """A few roundings of float32 sums; of the weights too where they are stored in 16 bits; tf32 has the 10 of float16."""
    tf32 = p.x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    wide = {torch.float64: 1e-14, torch.float32: 2e-3 if tf32 else 4e-6}
    return (wide | {torch.float16: 1.5e-3, torch.bfloat16: 8e-3})[p.x.dtype]


def check(
    name: str,
    got: Tensor | None,
    truth: Tensor | None,
    by_torch: Tensor | None,
    slack: float,
    magnitude: Tensor | None = None,
) -> None:
    if truth is None:
        assert got is None, f"{name}: expected none"
        return
    assert got is not None, f"{name}: missing"
    size = 0.0 if magnitude is None else magnitude.abs().max().item() if magnitude.numel() else 0.0
    known = by_torch is not None and bool(torch.isfinite(by_torch).all())
    allowed = slack + (error(by_torch, truth, size) if known and by_torch is not None else 0.0)
    found = error(got, truth, size)
    assert found <= allowed, f"{name}: off by {found:.2e} of its largest value, allowed {allowed:.2e}"


def check_rows_and_gradients(p: Problem, backend: object) -> None:
    """The rows form of a backend module against the reference, every gradient wanted."""
    up, wanted, slack = upstream(p), all_wanted(p), roundings(p)
    r, c = backend.rows(p)  # type: ignore[attr-defined]
    true_r, true_c = reference.rows(p)
    torch_r, torch_c, torch_grads = torch_answer(p, up)
    # Rows need no stored weights: float32 sums of exact products, except in tf32.
    wide = p.x.dtype in (torch.float64, torch.float32)
    exact = slack if wide else 4e-6
    check("r", r, true_r, torch_r if wide else None, exact)
    check("c", c, true_c, torch_c if wide else None, exact)
    got = backend.gradients(p, r, c, up.g, up.h, wanted)  # type: ignore[attr-defined]
    truth = reference.gradients(p, true_r, true_c, up.g, up.h, wanted)
    # Upstream gradients of both signs make the scalars cancel: their size is that of the sum of absolute values.
    absolute = reference.gradients(p, true_r, true_c, up.g.abs(), None if up.h is None else up.h.abs(), wanted)
    for name, mine, theirs, by_torch, size in zip(Gradients._fields, got, truth, torch_grads, absolute, strict=True):
        check(f"d{name}", mine, theirs, by_torch, slack, size)


def check_total(p: Problem, outer: str, backend: object) -> None:
    """The total form of a backend module against the reference, every gradient wanted."""
    positive = upstream(p).positive if outer == "contrast" else None
    value, grads, dpositive = backend.total(p, positive, outer, all_wanted(p))  # type: ignore[attr-defined]
    true_value, true_grads, true_dpositive = reference.total(p, positive, outer, all_wanted(p))
    slack = roundings(p)
    check("value", value, true_value, None, slack)
    check("dpositive", dpositive, true_dpositive, None, slack)
    for name, mine, theirs in zip(Gradients._fields, grads, true_grads, strict=True):
        check(f"d{name}", mine, theirs, None, slack)
