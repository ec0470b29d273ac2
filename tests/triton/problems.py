"""Problems of every kind for the Triton kernels, and the measure that their answers are held to.

|truth - ours| <= |truth - torch| + a few roundings, where truth is the float64 reference on the same inputs and torch is the
plain n x m computation in the inputs' own dtype, differentiated by autograd.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl.backends import blocked, reference
from fastcl.equation.masks import KINDS, Mask
from fastcl.equation.pairs import PairFunction, pair_function
from fastcl.equation.problem import Gradients, Problem, Wanted, accumulation_dtype
from tests.engine.test_limits import between

MASKS = KINDS
# Of a constant that is not named here: 0.5.
CONSTANTS = {"p": -1.5, "eps": 0.3}
# Every registered pair function but the identity, whose sum needs no sweep: the name stands for the log-sum-exp here.
PAIRS: dict[str, PairFunction] = {
    name: cls(*(CONSTANTS.get(constant, 0.5) for constant in cls.constant_names))
    for name, cls in PairFunction.registry.items()
    if cls.built_in and name != "identity"
}
# What u of unit rows can be, and scales and shifts to try.
REACHED = {"dot": (-1.0, 1.0), "sqdist": (0.0, 4.0)}
AFFINE = {"dot": ((1.0, 0.1), (1.0, 2.0)), "sqdist": ((-1.5, 0.1), (0.5, 1.0))}


def affine(pair: PairFunction, operand: str) -> tuple[float, float]:
    """A scale and a shift that keep z within the domain of f, a good part of it where the slope is not 0."""
    u = torch.linspace(*REACHED[operand], 101, dtype=torch.float64)
    for scale, shift in AFFINE[operand]:
        f, df = pair.f(scale * u + shift), pair.df(scale * u + shift)
        if bool(torch.isfinite(f + df).all()) and (df != 0.0).sum() > len(u) // 3:
            return scale, shift
    raise ValueError(f"{pair}: expected one of {AFFINE[operand]} to suit it on {operand}; add one")


def problem(
    n: int, m: int | None, d: int, *, operand: str = "dot", pair: str | PairFunction = "identity", mask: str = "off_diagonal",
    bias: bool = False, columns: bool = False, scale: float | None = None, dtype: torch.dtype = torch.float32,
    seed: int = 0, length: float = 1.0, limits: bool = False, guides: bool = False,
) -> Problem:  # fmt: skip
    """Unit rows (times length); m None takes x with itself; "identity" is the log-sum-exp, every other pair a sum.

    limits: of logits, of each row and, beside y, of each column. guides: limits of the products of guides, likewise.
    """
    g = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        return length * torch.nn.functional.normalize(torch.randn(count, d, generator=g, dtype=torch.float64), dim=1)

    x, y = unit(n).to(dtype), None if m is None else unit(m).to(dtype)
    cols = n if m is None else m
    group_x, group_y = torch.randint(0, 3, (n,), generator=g), torch.randint(0, 3, (cols,), generator=g)
    grouped = [group_x, None if m is None else group_y] if "groups" in mask else [None, None]
    # The diagonal leaves the first rows and crosses tile borders; one of two, which only their period brings near, likewise.
    row_offset = {"off_diagonal": 2, "two_diagonals": 345}.get(mask, 0) if m is not None else 0
    period = 330 if mask == "two_diagonals" else 0
    small = accumulation_dtype(dtype)
    biases = [(torch.randn(size, generator=g) * 0.1).to(small) if bias and m else None for size in (n, cols)]
    f = pair if isinstance(pair, PairFunction) else PAIRS.get(pair) or pair_function(pair)
    default, shift = affine(f, operand)
    if f.name == "identity" and operand == "dot":
        default = 5.0
    visited = Mask("off_diagonal" if period else mask, row_offset, 0, *grouped, period)
    p = Problem(
        x, y, torch.tensor(default if scale is None else scale, dtype=small), torch.tensor(shift, dtype=small), *biases,
        visited, operand, f, "logsumexp" if f.name == "identity" else "sum", columns,
    )  # fmt: skip
    return guided(p, g) if guides else limited(p) if limits else p


def limited(p: Problem) -> Problem:
    """The problem without the pairs whose logit is above about three quarters of its row's, or of its column's."""
    z = reference._matrix(p)[1]
    of_cols = None if p.y is None else between(z.T, 0.75).to(p.dtype)
    return replace(p, mask=p.mask._replace(limit_x=between(z, 0.75).to(p.dtype), limit_y=of_cols))


def guided(p: Problem, g: torch.Generator) -> Problem:
    """The problem without the pairs whose guides, of small integers and 19 wide, have a product above either side's limit."""
    s, t = (torch.randint(-3, 4, (size, 19), generator=g).to(p.dtype) for size in (p.n, p.m))
    of_rows, of_cols = (torch.randint(-6, 19, (size,), generator=g).to(p.dtype) + 0.5 for size in (p.n, p.m))
    of_rows[3::17], of_rows[5::23] = math.inf, -math.inf
    others = (None, None) if p.y is None else (of_cols, t)
    return replace(p, mask=p.mask._replace(limit_x=of_rows, guide_x=s, limit_y=others[0], guide_y=others[1]))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation of torch's has made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return made


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
    of_rows, of_cols = p.limits
    decides = z.detach() if p.guides is None else p.guides[0] @ p.guides[1].T
    keep = keep if of_rows is None else keep & (decides <= of_rows[:, None])
    keep = keep if of_cols is None else keep & (decides <= of_cols)
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


def check_given_reductions(p: Problem, backend: object) -> None:
    """A log-sum-exp's gradients use the r and c that they are given: over ranks these are those of all pairs, not of p's own."""
    up, wanted = upstream(p), all_wanted(p)
    r, c = backend.rows(p)  # type: ignore[attr-defined]
    own = backend.gradients(p, r, c, up.g, up.h, wanted)  # type: ignore[attr-defined]
    # As if pairs elsewhere had made every sum e^2 times larger, and e^300 times: weights are that much smaller, or nothing.
    for more in (2.0, 300.0):
        given = None if c is None else c + more
        got = backend.gradients(p, r + more, given, up.g, up.h, wanted)  # type: ignore[attr-defined]
        for name, mine, whole in zip(Gradients._fields, got, own, strict=True):
            if whole is not None:
                difference = (mine.double() - whole.double() * math.exp(-more)).abs().max()
                assert difference <= roundings(p) * whole.double().abs().max(), (
                    f"d{name} of sums e^{more:.0f} times larger"
                )


def far_from_the_origin(dtype: torch.dtype) -> Problem:
    """Distances of a cloud around 64 whose rows differ by a few: norms of 1e5 in float32 would leave 1e-3 of each."""
    p = problem(37, 53, 24, operand="sqdist", dtype=dtype, columns=True, scale=-0.25, length=8.0)
    assert p.y is not None
    p.x.add_(64.0)
    p.y.add_(64.0)
    return p


def check_distances_far_from_the_origin(backend: object, dtype: torch.dtype) -> None:
    """Rows and columns as near the truth as plain PyTorch in float32 about a common centre."""
    p = far_from_the_origin(dtype)
    answers = (backend.rows(p), blocked.rows(p), reference.rows(p))  # type: ignore[attr-defined]
    for mine, plain, truth in zip(*answers, strict=True):
        assert error(mine, truth) <= error(plain, truth) + 4e-7


def check_limits_that_are_no_numbers(p: Problem, backend: object) -> None:
    """NaN where a limit is, or one of a guide; -inf leaves out all of a row, whatever its logits are; inf none. p is changed."""
    of_rows = p.mask.limit_x
    assert of_rows is not None
    of_rows[:4] = torch.tensor([math.nan, -math.inf, math.inf, -math.inf])
    p.x[3] = math.nan
    if p.mask.guide_x is not None:
        p.mask.guide_x[4, 2] = math.nan
    up, wanted = upstream(p), Wanted(True, p.y is not None, False, False, False, False)
    found, right = backend.rows(p), reference.rows(p)  # type: ignore[attr-defined]
    for mine, truth in zip(found, right, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6, equal_nan=True)
    # Nothing goes upstream to rows of NaN: what they have no part in is finite, as it is by the definition.
    g = torch.where(right[0].isfinite(), up.g, 0.0).to(p.dtype)
    grads = backend.gradients(p, found[0], None, g, None, wanted)  # type: ignore[attr-defined]
    truths = reference.gradients(p, right[0], None, g, None, wanted)
    for mine, truth in zip(grads, truths, strict=True):
        if truth is not None:
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_nan_rows_of_guides(pair: str, backend: object) -> None:
    """A row of NaN is in the gradients of those that its guide lets in, whatever the slope is, and of no other."""
    p = problem(6, 9, 8, pair="identity" if pair == "logsumexp" else "exp", mask="all", guides=True)
    if pair == "of z itself":
        p = replace(p, pair=pair_function("identity"))
    of_rows, _ = p.mask.limit_x, p.x[2].fill_(math.nan)
    assert of_rows is not None and p.mask.guide_x is not None and p.mask.guide_y is not None
    of_rows.fill_(0.5), p.mask.limit_y.fill_(math.inf)  # type: ignore[union-attr]
    met = p.mask.guide_x[2] @ p.mask.guide_y.T <= 0.5
    assert met.any() and not met.all()
    r, _ = backend.rows(p)  # type: ignore[attr-defined]
    assert torch.equal(r.isnan(), torch.arange(6) == 2)
    for upstream_of_bad in (1.0, 0.0):
        if upstream_of_bad == 0.0 and pair != "of z itself":
            continue  # 0 times NaN
        g = torch.where(torch.isneginf(r), 0.0, 1.0)
        g[2] = upstream_of_bad
        found = backend.gradients(p, r, None, g, None, Wanted(True, True, False, True, False, False))  # type: ignore[attr-defined]
        assert torch.equal(found.y.isnan().any(1), met & (upstream_of_bad > 0.0))
        assert found.x[torch.arange(6) != 2].isfinite().all()
        assert found.shift.isfinite() or pair != "of z itself"


def check_decisions_at_equality(m: int | None, pair: str, backend: str, dtype: torch.dtype) -> None:
    """Hundreds of logits, or products of guides, are their limits but for rounding, and the forward and its backward decide alike.

    The shift's gradient of a sum of exponentials is that sum, and the weights of a log-sum-exp are 1 in each row that has any.
    """
    gen = torch.Generator().manual_seed(5)

    def repeated(times: int) -> Tensor:
        return torch.randn(10, 24, generator=gen, dtype=dtype).div(5.0).repeat(times, 1)

    x, s = repeated(8), repeated(8)
    y, t = (None, s) if m is None else (repeated(m // 10), repeated(m // 10))
    for guided in (False, True):
        products = s @ t.T if guided else 3.0 * (x @ (x if y is None else y).T) + 0.1
        guide = None if not guided else s if y is None else (s, t)
        mask = fastcl.at_most(products[:, 7], None if y is None else products[9], guide=guide, mask="off_diagonal")
        shift = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        call: dict[str, Any] = {"scale": 3.0, "shift": shift, "mask": mask, "backend": backend}
        if pair == "exp":
            call |= {"pair": "exp", "reduce": "sum"}
        sides = (x,) if y is None else (x, y)
        for outer in ("rows", "sum" if pair == "exp" else "pooled"):
            r = fastcl.pair_reduce(*sides, **call) if outer == "rows" else fastcl.pair_total(*sides, outer=outer, **call)
            assert isinstance(r, Tensor)
            some = torch.isfinite(r)
            assert some.any()
            (slope,) = torch.autograd.grad(torch.where(some, r, 0.0).sum(), shift)
            wanted = r.detach().sum() if pair == "exp" else some.sum().to(slope.dtype)
            torch.testing.assert_close(slope, wanted, rtol=4e-6, atol=0.0)


# The losses that take false_negative_margin, with settings at which -0.1 leaves some pairs out and others in.
MARGINS: dict[str, dict[str, Any]] = {
    "info_nce": {"temperature": 0.5},
    "clip": {"logit_scale": 2.0},
    "siglip": {"logit_scale": 2.0, "logit_bias": -1.0},
    "nt_xent": {"temperature": 0.5},
    "dcl": {"temperature": 0.5},
    "dhel": {"temperature": 0.5},
}


def check_margin(name: str, backend: str, dtype: torch.dtype, guided: bool, strategy: str = "absolute") -> None:
    """The loss with a margin, by similarities or by guides, and its gradients; some pairs are above the margin."""
    gen = torch.Generator().manual_seed(0)
    u = torch.randn(17, 6, generator=gen, dtype=torch.float64)
    v = u + 0.7 * torch.randn(17, 6, generator=gen, dtype=torch.float64)
    guide = tuple(torch.randn(2, 17, 9, generator=gen, dtype=torch.float64)) if guided else None
    u, v = (t.to(dtype).double() for t in (u, v))
    margin: dict[str, Any] = {"false_negative_margin": 0.2 if guided else -0.1, "margin_strategy": strategy, "guide": guide}
    answers = []
    for by, of, more in ((backend, dtype, margin), ("reference", torch.float64, margin), ("reference", torch.float64, {})):
        rows = [t.to(of, copy=True).requires_grad_() for t in (u, v)]
        value = getattr(fastcl.functional, name)(*rows, **MARGINS[name], **more, backend=by)
        answers.append([value.detach(), *torch.autograd.grad(value, rows)])
    allowed = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for mine, right in zip(*answers[:2], strict=True):
        assert (mine - right).abs().max() <= allowed * right.abs().max().clamp(min=1.0)
    assert (answers[1][0] - answers[2][0]).abs() > 1e-2, "the margin leaves nothing out"
