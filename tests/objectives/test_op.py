"""The op under every objective: random problems of every kind against its double loop, and what a hostile caller tries."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.equation.pairs import PairFunction
from tests import oracle
from tests.oracle import pairwise

from .witnesses import gradients, name_of, served

DOUBLE = torch.float64
CONSTANTS: dict[str, list[tuple[float, ...]]] = {
    "power": [(-1.0, 1e-3), (0.5, 1e-3), (1.7, 0.1), (-0.5, 1e-4)],
    "log": [(1e-3,)],
    "cosine_js": [(1e-3,)],
}
POSITIVE = ("log1p", "rsqrt1p")  # defined for z > -1


@dataclasses.dataclass
class Drawn:
    """One random problem, for the op and for the double loop."""

    x: Tensor
    y: Tensor | None
    pair: str
    constants: tuple[float, ...]
    reduce: str
    mask: Any
    keep: pairwise.Keep
    columns: bool
    outer: str | None
    positive: Tensor | None
    affine: dict[str, Any]
    leaves: list[Tensor]

    def by_op(self, backend: str) -> list[Tensor]:
        f = PairFunction.registry[self.pair](*self.constants)
        same: dict[str, Any] = {"pair": f, "reduce": self.reduce, "mask": self.mask, "backend": backend, **self.affine}
        if self.outer:
            return [fastcl.pair_total(self.x, self.y, outer=self.outer, positive=self.positive, **same)]
        found = fastcl.pair_reduce(self.x, self.y, columns=self.columns, **same)
        return list(found) if isinstance(found, tuple) else [found]

    def by_loop(self) -> list[Tensor]:
        same: dict[str, Any] = {
            "pair": self.pair, "constants": self.constants, "reduce": self.reduce, "keep": self.keep, **self.affine
        }  # fmt: skip
        if self.outer:
            return [oracle.pair_total(self.x, self.y, outer=self.outer, positive=self.positive, **same)]
        found = oracle.pair_reduce(self.x, self.y, columns=self.columns, **same)
        return list(found) if isinstance(found, tuple) else [found]


# Those that the oracle knows: other tests of the same process leave pair functions of their own in the registry.
BUILT_IN = sorted(name for name, cls in PairFunction.registry.items() if cls.built_in)


def drawn(seed: int) -> Drawn:
    """Sizes from 0 up, either operand, any pair function, mask, offsets, biases, form and set of wanted gradients."""
    luck, g = random.Random(seed), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=DOUBLE)

    itself = luck.random() < 0.4
    n, d = luck.choice([0, 1, 2, 3, 5, 7]), luck.choice([0, 1, 2, 3, 5])
    m = n if itself else luck.choice([0, 1, 2, 4, 6])
    operand, reduce = luck.choice(["dot", "sqdist"]), luck.choice(["sum", "sum", "logsumexp"])
    pair = "identity" if reduce == "logsumexp" else luck.choice(BUILT_IN)
    x, y = luck.choice([0.3, 1.0]) * randn(n, d), None if itself else luck.choice([0.3, 1.0]) * randn(m, d)
    scale, shift = luck.choice([1.0, -0.5, 2.0, 0.0]), luck.choice([0.0, 0.3])
    biased = not itself and pair not in POSITIVE
    if pair in POSITIVE:
        scale = abs(scale) if operand == "sqdist" else 0.02 * scale
    affine = {
        "operand": operand,
        "scale": torch.tensor(scale, dtype=DOUBLE),
        "shift": torch.tensor(shift, dtype=DOUBLE),
        "bias_x": randn(n) if biased and luck.random() < 0.3 else None,
        "bias_y": randn(m) if biased and luck.random() < 0.3 else None,
    }
    gx, gy = torch.randint(0, 3, (n,), generator=g), None if itself else torch.randint(0, 3, (m,), generator=g)
    row_offset = luck.choice([0, 0, 1, 3, -2])
    offsets = (row_offset, row_offset if itself else luck.choice([0, 0, 1, 2]))
    periodic = (*offsets, luck.choice([1, 2, 3, 4]))
    mask, keep = luck.choice(
        [
            ("all", pairwise.everything),
            (fastcl.off_diagonal(*offsets), pairwise.off_diagonal(*offsets)),
            (fastcl.off_diagonal(*periodic), pairwise.off_diagonal(*periodic)),
            (fastcl.across_groups(gx, gy), pairwise.across_groups(gx, gy)),
            (fastcl.within_groups(gx, gy), pairwise.within_groups(gx, gy)),
        ]
    )
    columns = not itself and luck.random() < 0.4
    if luck.random() < 0.3:
        mask, keep = limited(mask, keep, pairwise.pair_logits(x, y, **affine), m, itself, luck, g)
    outers = ["sum", "contrast", "pooled"] if reduce == "logsumexp" else ["sum"]
    outer = luck.choice(outers) if not columns and luck.random() < 0.5 else None
    positive = randn(n) if outer == "contrast" else None
    candidates = [x, y, *(v for v in affine.values() if isinstance(v, Tensor)), positive]
    leaves = [t.requires_grad_() for t in candidates if t is not None and luck.random() < 0.8]
    constants = luck.choice(CONSTANTS.get(pair, [()]))
    return Drawn(x, y, pair, constants, reduce, mask, keep, columns, outer, positive, affine, leaves)


def limited(
    mask: Any, keep: pairwise.Keep, z: list[list[Tensor]], m: int, itself: bool, luck: random.Random, g: torch.Generator
) -> tuple[Any, pairwise.Keep]:
    """The same pairs as far as their logit, or the product of their guides, is at most limits, which may be infinite."""
    infinite = torch.tensor([float("inf"), -float("inf")], dtype=DOUBLE)
    limits = []
    for count in (len(z), m):
        drawn = torch.randn(count, generator=g, dtype=DOUBLE)
        strange = torch.rand(count, generator=g) < 0.2
        limits.append(torch.where(strange, infinite[torch.randint(0, 2, (count,), generator=g)], drawn))
    of_rows, of_cols = limits[0], limits[0] if itself else limits[1]
    which = "rows" if itself else luck.choice(["rows", "columns", "both"])
    guide = None
    if luck.random() < 0.5:
        s = torch.randn(len(z), luck.choice([1, 7, 40]), generator=g, dtype=DOUBLE)
        t = s if itself else torch.randn(m, s.shape[1], generator=g, dtype=DOUBLE)
        guide, z = s if itself else (s, t), [[sum(a * b for a, b in zip(p, q, strict=True)) for q in t] for p in s]
    told = fastcl.at_most(
        None if which == "columns" else of_rows, None if itself or which == "rows" else of_cols, guide=guide, mask=mask
    )

    def within(i: int, j: int) -> bool:
        row, column = which != "columns", itself or which != "rows"
        return keep(i, j) and not (row and z[i][j] > of_rows[i]) and not (column and z[i][j] > of_cols[j])

    return told, within


def weigh(outputs: list[Tensor], upstream: list[Tensor]) -> Tensor:
    """One number of all outputs; an output of -inf has no gradient to give."""
    terms = [(torch.where(t.isinf(), 0.0, t) * g).sum() for t, g in zip(outputs, upstream, strict=True)]
    return sum(terms[1:], terms[0])


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize("chunk", range(6))
def test_random_problems(chunk: int, backend: str) -> None:
    for seed in range(150 * chunk, 150 * (chunk + 1)):
        problem = drawn(seed)
        found, wanted = problem.by_op(backend), problem.by_loop()
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                got.detach(), want.detach(), rtol=1e-10, atol=1e-12, msg=lambda m, s=seed: f"seed {s}: {m}"
            )
        upstream = [torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) for t in wanted]
        weighed = [weigh(outputs, upstream) for outputs in (found, wanted)]
        for got, want in zip(*(gradients(value, problem.leaves) for value in weighed), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m, s=seed: f"seed {s}: {m}")


# ---- a hostile caller --------------------------------------------------------------------------------------------------

X, Y = (torch.randn(7, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
EVERY = pytest.mark.parametrize("backend", served(torch.float32))


@EVERY
def test_biases_of_minus_infinity_leave_pairs_out(backend: str) -> None:
    x, bias = X.clone().requires_grad_(), torch.zeros(7)
    bias[2] = float("-inf")
    bias.requires_grad_()
    r, c = fastcl.pair_reduce(x, Y, bias_y=bias, columns=True, backend=backend)
    others = [j for j in range(7) if j != 2]
    torch.testing.assert_close(r, fastcl.pair_reduce(x, Y[others], backend=backend))
    assert c[2] == float("-inf")
    gx, gb = torch.autograd.grad(r.sum(), [x, bias])
    assert torch.isfinite(gx).all()
    assert torch.isfinite(gb).all()
    assert gb[2] == 0


@EVERY
def test_contrast_of_rows_without_negatives_is_zero(backend: str) -> None:
    x, p = X.clone().requires_grad_(), torch.zeros(7, requires_grad=True)
    mask = fastcl.across_groups(torch.zeros(7, dtype=torch.int64))
    value = fastcl.pair_total(x, outer="contrast", positive=p, mask=mask, backend=backend)
    assert value == 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, [x, p]))


@EVERY
def test_not_a_number_stays_in_its_row(backend: str) -> None:
    x = X.clone()
    x[2, 1] = float("nan")
    for pair, reduce in (("identity", "logsumexp"), ("exp", "sum"), ("identity", "sum"), ("softplus", "sum")):
        r = fastcl.pair_reduce(x, Y, pair=pair, reduce=reduce, backend=backend)
        assert r.isnan().tolist() == [i == 2 for i in range(7)], (pair, reduce)


@EVERY
def test_one_matrix_in_both_places(backend: str) -> None:
    """pair_reduce(x, x) is x against itself, with both gradients in one."""
    found = []
    for y in (None, "x"):
        x = X.clone().requires_grad_()
        r = fastcl.pair_reduce(x, x if y else None, mask="off_diagonal", backend=backend)
        found.append([r.detach(), *torch.autograd.grad(r.square().sum(), x)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@EVERY
def test_tensors_made_under_inference_mode(backend: str) -> None:
    """Whatever wants no gradient may be one: rows, numbers, biases, and all that a mask holds."""

    def made() -> dict[str, Any]:
        groups, guide = torch.arange(7) % 3, X[:, :3].clone()
        within = fastcl.at_most(
            X[:, 0].clone(), guide=(guide, Y[:, :3].clone()), mask=fastcl.across_groups(groups, groups[: len(Y)])
        )
        return {
            "scale": torch.tensor(0.5),
            "shift": torch.tensor(0.1),
            "bias_x": X[:, 1].clone(),
            "bias_y": Y[:, 1].clone(),
            "mask": within,
        }

    with torch.inference_mode():
        y, frozen = Y.clone(), made()
    found = []
    for rows, given in ((Y, made()), (y, frozen)):
        x = X.clone().requires_grad_()
        r, c = fastcl.pair_reduce(x, rows, columns=True, backend=backend, **given)
        positive = given["bias_x"]
        total = fastcl.pair_total(x, rows, outer="contrast", positive=positive, backend=backend, **given)
        values = (r.exp().sum() + c.exp().sum(), total)
        found.append([g for value in values for g in (value.detach(), *gradients(value, [x]))])
        same = fastcl.across_groups(given["mask"].group_x, given["mask"].group_x)
        found[-1].append(fastcl.pair_reduce(x, mask=same, backend=backend).detach())
    assert all(map(torch.equal, *found))


@EVERY
def test_saved_tensors_may_move_away_and_back(backend: str) -> None:
    x = X.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        r = fastcl.pair_reduce(x, mask="off_diagonal", backend=backend).sum()
        total = fastcl.pair_total(x, mask="off_diagonal", outer="sum", backend=backend)
    for value in (r, total):
        (g,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(g, torch.autograd.grad(fastcl.pair_reduce(x, mask="off_diagonal").sum(), x)[0])


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sparse": (
        lambda: fastcl.pair_reduce(X.to_sparse(), Y),
        TypeError,
        "x: expected a dense tensor, got a sparse coo one; convert it, e.g. x.to_dense()",
    ),
    "offset": (
        lambda: fastcl.pair_reduce(X, Y, mask=fastcl.off_diagonal(1.5, 0)),  # type: ignore[arg-type]
        TypeError,
        "row_offset: expected an integer, got float; pass int(row_offset)",
    ),
    "huge offset": (
        lambda: fastcl.pair_reduce(X, Y, mask=fastcl.off_diagonal(0, 2**63)),
        ValueError,
        "col_offset: expected an index within the whole batch, between -2**62 and 2**62, got 9223372036854775808",
    ),
    "a class for a pair": (
        lambda: fastcl.pair_reduce(X, Y, pair=PairFunction.registry["exp"], reduce="sum"),  # type: ignore[arg-type]
        TypeError,
        "pair: expected a name or a fastcl.pairs.PairFunction, got type",
    ),
    "groups of another length": (
        lambda: fastcl.pair_reduce(X, mask=fastcl.across_groups(torch.arange(6))),
        ValueError,
        "group_x: expected shape (7,), one group for each row of x, got (6,)",
    ),
    "a float8 matrix": (
        lambda: fastcl.pair_reduce(X.to(torch.float8_e4m3fn), Y),
        TypeError,
        "x: expected float64, float32, bfloat16 or float16, got float8_e4m3fn; convert it, e.g. x.float()",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_of_the_op(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_every_backend_that_is_asked_answers_in_the_accumulation_dtype(dtype: torch.dtype) -> None:
    for backend in served(dtype):
        r = fastcl.pair_reduce(X.to(dtype), Y.to(dtype), backend=backend)
        assert r.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
