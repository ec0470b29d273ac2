"""false_negative_margin= of the losses of one positive a row: against double loops, by every backend, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl import functional, losses
from tests.oracle import pairwise

from .witnesses import gradients, served

N, D, TAU, BIAS = 9, 5, 0.3, -1.0
Stays = Callable[[int, int], bool]
Views = tuple[Tensor, Tensor]


def views(n: int = N, m: int = N, seed: int = 0) -> Views:
    """Rows near their partners, and some near each other's: whichever margin, some pairs are above it and some below."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    y = torch.randn(m, D, generator=g, dtype=torch.float64)
    y[:n] = x + 0.7 * y[:n]
    y[1], x[4] = x[0] + 0.2 * y[1], x[3] + 0.1 * x[4]
    return x.requires_grad_(), y.requires_grad_()


def limits(s: Tensor, margin: float, strategy: str) -> Tensor:
    return (s + margin * (s.abs() if strategy == "relative" else 1.0)).detach()


def energy(z: Tensor, stays: Stays) -> list[Tensor]:
    """Of each row the log-sum-exp of what stays, -inf of nothing."""
    return [pairwise.lse([z[i, j] for j in range(z.shape[1]) if stays(i, j)], z) for i in range(len(z))]


def softplus(r: Tensor, p: Tensor) -> Tensor:
    return torch.log1p(torch.exp(r - p)) if r > -math.inf else 0.0 * p


def by_loops(
    name: str, x: Tensor, y: Tensor, margin: float, strategy: str, guide: Views | None = None, **arguments: Any
) -> Tensor:
    """The mean, as its docstring says it; with a guide pairs are told apart by its similarities."""
    x, y = pairwise.unit(x), pairwise.unit(y)
    gx, gy = (x, y) if guide is None else map(pairwise.unit, guide)
    n, m, positive = len(x), len(y), (x * y[: len(x)]).sum(1)
    top = limits((gx * gy[: len(x)]).sum(1), margin, strategy).tolist()
    rows, cols = top, [*top, *[math.inf] * (m - n)]

    def other(i: int, j: int) -> bool:
        return i != j and bool(told[i, j] <= rows[i])

    def either(i: int, j: int) -> bool:
        return other(i, j) and bool(told[i, j] <= cols[j])

    if name in ("info_nce", "clip", "siglip"):
        s, told = x @ y.T, gx @ gy.T
        if name == "siglip":
            z, p = s / TAU + BIAS, positive / TAU + BIAS
            terms = [torch.log1p(torch.exp(z[i, j])) for i in range(n) for j in range(m) if either(i, j)]
            return (torch.log1p(torch.exp(-p)).sum() + pairwise.add(terms, z)) / n
        z, p = s / TAU, positive / TAU
        if name == "info_nce":
            return pairwise.add([softplus(r, q) for r, q in zip(energy(z, other), p, strict=True)], z) / n
        both = [energy(z, either), energy(z.T, lambda j, i: either(i, j))]
        return pairwise.add([softplus(r, q) for e in both for r, q in zip(e[:n], p, strict=True)], z) / (2 * n)
    if name == "dhel":
        total = -positive.sum() / TAU
        for own, g in ((x, gx), (y, gy)):
            s, told = own @ own.T, g @ g.T
            total = total + pairwise.add([r for r in energy(s / TAU, either) if r > -math.inf], s)
        return total / n
    w, g = torch.cat([x, y]), torch.cat([gx, gy])
    s, told, rows, cols = w @ w.T, g @ g.T, top * 2, top * 2
    if name == "nt_xent":
        p = torch.cat([positive, positive]) / TAU
        r = energy(s / TAU, lambda i, j: either(i, j) and j != (i + n) % (2 * n))
        return pairwise.add([softplus(a, b) for a, b in zip(r, p, strict=True)], s) / (2 * n)
    r = energy(s / TAU, lambda i, j: either(i, j) and j != (i + n) % (2 * n))
    used = r if arguments.get("symmetric", True) else r[:n]
    return pairwise.add([e for e in used if e > -math.inf], s) / len(used) - positive.sum() / TAU / n


SETTINGS: dict[str, dict[str, Any]] = {
    "info_nce": {"temperature": TAU},
    "clip": {"logit_scale": 1 / TAU},
    "siglip": {"logit_scale": 1 / TAU, "logit_bias": BIAS},
    "nt_xent": {"temperature": TAU},
    "dcl": {"temperature": TAU},
    "dhel": {"temperature": TAU},
}
MARGINS = [(0.1, "absolute"), (-0.4, "absolute"), (-3.0, "absolute"), (-0.3, "relative")]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("margin", "strategy"), MARGINS)
@pytest.mark.parametrize("name", SETTINGS)
def test_double_loop(name: str, margin: float, strategy: str, guided: bool) -> None:
    loss = getattr(functional, name)
    more: list[dict[str, Any]] = [{"symmetric": True}, {"symmetric": False}] if name == "dcl" else [{}]
    sizes = [(N, N), (N, N + 4)] if name in ("info_nce", "clip", "siglip") else [(N, N)]
    for arguments, (n, m), backend in itertools.product(more, sizes, served(torch.float64)):
        x, y = views(n, m)
        guide = tuple(t.detach() for t in views(n, m, seed=7)) if guided else None
        wanted = by_loops(name, x, y, margin, strategy, guide, **arguments)
        same = (
            SETTINGS[name]
            | arguments
            | {"false_negative_margin": margin, "margin_strategy": strategy, "backend": backend, "guide": guide}
        )
        found = loss(x, y, **same)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        for mine, theirs in zip(gradients(found, (x, y)), gradients(wanted, (x, y)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
        rows = loss(x, y, reduction="none", **same)
        torch.testing.assert_close(rows.mean(), wanted, rtol=1e-10, atol=1e-12)
        if margin > -3.0:
            plain = loss(x, y, **(same | {"false_negative_margin": None, "guide": None}))
            assert (plain - wanted).abs() > 1e-3, "no pair was above the margin"
            if guided:
                plain = loss(x, y, **(same | {"guide": None}))
                assert (plain - wanted).abs() > 1e-3, "the guide said what the rows say"


# Of the Function that torch.compile traces, and of the torch.jit that it loads, torch itself warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_groups_scales_that_are_learned_and_graphs(name: str) -> None:
    """Equal to what a mask of groups says of the same pairs; no gradient by way of the limit; one graph."""
    loss, arguments = getattr(functional, name), dict(SETTINGS[name])
    x, y = (t.detach().requires_grad_() for t in views())
    learned = "logit_scale" if "logit_scale" in arguments else "temperature"
    arguments[learned] = torch.tensor(arguments[learned], dtype=torch.float64, requires_grad=True)
    leaves = [x, y, arguments[learned]]
    groups = torch.arange(N) // 2
    # All pairs of other groups stay at a margin that none passes, and none at one that all do.
    for margin, same in ((2.5, {"groups": groups}), (-2.5, {"groups": torch.zeros(N).long()})):
        found = loss(x, y, false_negative_margin=margin, groups=groups, **arguments)
        if margin < 0 and name in ("dcl", "dhel"):
            assert found.isfinite()
            continue
        wanted = loss(x, y, **(arguments | same))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    margin = dict(arguments, false_negative_margin=-0.3, guide=views(seed=7))
    compiled = torch.compile(lambda a, b: loss(a, b, **margin), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y, **margin), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_comes_twice_stays_by_a_guide_without_a_margin(name: str, normalize: bool) -> None:
    """Its similarity is the limit itself, however the products round."""
    x, y = (t.detach().float() for t in views())
    s, t = torch.randn(2, N, 384, generator=torch.Generator().manual_seed(0))
    s[N // 2 :], t[N // 2 :] = s[: N - N // 2].clone(), t[: N - N // 2].clone()
    for backend in served(torch.float32):
        arguments = SETTINGS[name] | {"guide": (s, t), "normalize": normalize, "backend": backend}
        margins = (0.0, 1e-4 if normalize else 1e-2)
        found, wanted = (getattr(functional, name)(x, y, false_negative_margin=m, **arguments) for m in margins)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_program_takes_any_size(name: str) -> None:
    arguments = SETTINGS[name] | {"false_negative_margin": -0.3}

    class Loss(nn.Module):
        def forward(self, x: Tensor, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
            found: Tensor = getattr(functional, name)(x, y, guide=(s, t), **arguments)
            return found

    rows, more = ([rows.detach() for seed in (0, 7) for rows in views(n, n, seed)] for n in (N, N + 4))
    n = torch.export.Dim("n", min=2, max=512)
    program = torch.export.export(Loss(), tuple(rows), dynamic_shapes=({0: n},) * 4).module()
    torch.testing.assert_close(program(*more), Loss()(*more), rtol=1e-12, atol=0.0)


def test_modules_take_it() -> None:
    x, y = (t.detach().float() for t in views())
    for module, name in (
        (losses.InfoNCELoss, "info_nce"),
        (losses.NTXentLoss, "nt_xent"),
        (losses.DCLLoss, "dcl"),
        (losses.DHELLoss, "dhel"),
    ):
        given = {"temperature": TAU, "false_negative_margin": -0.2, "margin_strategy": "relative"}
        assert torch.equal(module(**given)(x, y), getattr(functional, name)(x, y, **given))
        guide = views(seed=7)
        assert torch.equal(module(**given)(x, y, guide=guide), getattr(functional, name)(x, y, guide=guide, **given))
    for module in (losses.CLIPLoss, losses.SigLIPLoss):
        assert module(false_negative_margin=-0.2)(x, y) < module()(x, y)


MARGIN: dict[str, Any] = {"false_negative_margin": 0.1}
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("info_nce", {"margin_strategy": "ratio"}, ValueError, "margin_strategy: expected one of 'absolute', 'relative', got 'ratio'"),
    ("dhel", {"false_negative_margin": "0.1"}, TypeError, "false_negative_margin: expected "),
    ("nt_xent", {"false_negative_margin": torch.tensor(0.1)}, TypeError, "false_negative_margin: expected "),
    (
        "clip",
        {"false_negative_margin": 0.1, "label_smoothing": 0.1},
        ValueError,
        "label_smoothing: expected none beside false_negative_margin",
    ),
    (
        "siglip",
        {"false_negative_margin": 0.1, "positives": (torch.arange(N), torch.arange(N))},
        ValueError,
        "positives: expected none beside false_negative_margin",
    ),
    ("nt_xent", {"false_negative_margin": 0.1, "positives": torch.ones(N)}, ValueError, "positives: expected none beside"),
    *((name, {"guide": views()}, ValueError, "guide: expected false_negative_margin beside it") for name in SETTINGS),
    ("clip", MARGIN | {"guide": torch.ones(N, 2)}, TypeError, "guide: expected two tensors, of the rows of"),
    ("dcl", MARGIN | {"guide": views()[:1]}, TypeError, "guide: expected two tensors, of the rows of"),
    ("dhel", MARGIN | {"guide": (torch.ones(N, 2), torch.ones(N, 3))}, ValueError, "guide[1]: expected rows of the width"),
    ("siglip", MARGIN | {"guide": views(8, N)}, ValueError, "guide[0]: expected one row for each of the first view, 9, got 8"),
    ("info_nce", MARGIN | {"guide": views(N, N + 1)}, ValueError, "guide[1]: expected one row for each of the second view"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "kind", "message"), REFUSED, ids=[r[3][:40] for r in REFUSED])
def test_refused(name: str, given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        getattr(functional, name)(*views(), **(SETTINGS[name] | given))
    assert str(caught.value).startswith(message)
