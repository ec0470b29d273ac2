"""Both sides of every bound of csrc/cpu/range.h, on every instruction set that was built: right against float64, and never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.backends import extension
from fastcl.equation.problem import TENSORS

from .test_process import python

assert extension.library is not None, extension.reason
OTHERS = [isa for isa in extension.library.usable_isas() if isa != extension.library.chosen_isa()]


def rows(n: int, d: int, seed: int = 0, norm: float | Tensor = 1.0) -> Tensor:
    unit = torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return (unit * norm).float()


def answers(x: Tensor, y: Tensor | None, backend: str, form: str, **more: object) -> dict[str, Tensor]:
    """The value of a form, and the gradients to rows, scale and shift."""
    dtype = torch.float64 if backend == "reference" else x.dtype
    leaves = [t.to(dtype).requires_grad_() for t in (x, y) if t is not None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = (more.pop("scale", 1.0), more.pop("shift", 0.0))
    numbers = [torch.tensor(v, dtype=torch.float32).to(wide).requires_grad_() for v in given]
    upstream = more.pop("upstream", 1.0)
    more |= {"scale": numbers[0], "shift": numbers[1], "backend": backend}
    more = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in more.items()}
    if form == "rows":
        out = fastcl.pair_reduce(*leaves, **more)
    elif form == "both":
        out = torch.cat(fastcl.pair_reduce(*leaves, columns=True, **more))
    else:
        out = fastcl.pair_total(*leaves, outer=form, **more)
    names = [*["x", "y"][: len(leaves)], "scale", "shift"]
    gradients = torch.autograd.grad(out, [*leaves, *numbers], torch.full_like(out, upstream))
    return {"value": out.detach(), **dict(zip(names, gradients, strict=True))}


def assert_right(x: Tensor, y: Tensor | None, form: str, reach: float, backend: str = "cpu", **more: object) -> None:
    """Each result within float32's rounding of z, whose largest magnitude is `reach`, relative to its largest element.

    What is beyond the dtype is infinite with its sign.
    A gradient to scale is a sum over pairs of either sign: it is compared with at most what their magnitudes sum to.
    """
    want, got = answers(x, y, "reference", form, **more), answers(x, y, backend, form, **more)
    for name, truth in want.items():
        rounded = truth.to(got[name].dtype)
        assert torch.equal(got[name].isinf(), rounded.isinf()) and torch.equal(
            got[name][rounded.isinf()], rounded[rounded.isinf()]
        )
        truth = torch.where(rounded.isinf(), 0.0, truth)
        size = truth.abs().max()
        if name == "scale":
            size = reach / abs(float(more.get("scale", 1.0))) * want["shift"].abs()
        eps = torch.finfo(got[name].dtype).eps
        tolerance = (3e-6 + 2 * eps + 3e-7 * reach) * size + torch.finfo(torch.float32).tiny
        error = (torch.where(rounded.isinf(), 0.0, got[name].double()) - truth).abs().max()
        assert error <= tolerance, f"{form} {name}: {error:.3g} off, of {size:.3g} (allowed {tolerance:.3g})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tau", [0.02, 0.01, 0.0085, 0.0075, 0.005])
def test_totals_whose_rows_lie_far_below_the_largest_z(tau: float, dtype: torch.dtype) -> None:
    for seed in range(4):
        x, y = rows(16, 64, seed).to(dtype), rows(16, 64, seed + 100).to(dtype)
        for more in ({"form": "sum"}, {"form": "contrast", "positive": torch.zeros(16)}, {"form": "pooled"}):
            assert_right(x, y, reach=1 / tau, scale=1 / tau, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("below", [0, 55, 85, 100, 110, 111, 130, 160, 190, 215, 240, 600])
@pytest.mark.parametrize("norm", [2.0**-7, 2.0**-5, 1.0, 2.0**31])
def test_every_distance_from_the_largest_z(below: float, norm: float) -> None:
    """All z of row 0 lie so far (to base 2) below the bound of Cauchy and Schwarz, the other rows' near it."""
    scale, cosine = 1000.0, 1 - below / 1000.0 / math.log2(math.e)
    x = torch.zeros(40, 8)
    x[:, 0] = 1.0
    x[0, :2] = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    y = torch.zeros(50, 8)
    y[:, 0] = 1.0
    y[:, 2:] = 0.01 * rows(50, 6)
    x *= norm
    for form, more in (
        ("sum", {}),
        ("contrast", {"positive": torch.linspace(800, 1200, 40)}),
        ("both", {}),
        ("pooled", {}),
    ):
        assert_right(x, y, form, 1e3, scale=scale / norm, **more)
        assert_right(
            y * norm,
            x / norm,
            form,
            1e3,
            scale=scale / norm,
            **({"positive": torch.full((50,), 1050.0)} if more else {}),
        )


@pytest.mark.parametrize("lead", [5.0, 30.0, 60.0, 75.0])
@pytest.mark.parametrize("itself", [False, True])
def test_rows_that_hardly_count(lead: float, itself: bool) -> None:
    """Positives that lead by so much leave weights sigmoid(r - p) of e^-lead: their gradients keep their digits."""
    x, y = rows(30, 6), rows(40, 6, 1)
    more = {"mask": "off_diagonal", "positive": torch.full((30,), lead + 20.0), "scale": 20.0}
    assert_right(x, None if itself else y, "contrast", 20.0, **more)


@pytest.mark.parametrize("upstream", [1e-33, 1e-20, 1e20, 1e33])
@pytest.mark.parametrize("scale", [1.0, 40.0, 200.0, 1e3])
def test_upstream_gradients_of_any_size(upstream: float, scale: float) -> None:
    x, y = rows(30, 6) * torch.linspace(0.1, 1, 30)[:, None], rows(40, 6, 1)
    assert_right(x, y, "both", scale, scale=scale, upstream=upstream)
    assert_right(x, None, "rows", scale, scale=scale, upstream=upstream)


@pytest.mark.parametrize("scale", [5e37, 2.3e38, 2.35e38, 2.37e38, 3.3e38, -3.3e38])
@pytest.mark.parametrize("mask", ["all", "off_diagonal"])
def test_scale_near_the_end(scale: float, mask: str) -> None:
    """A finite z gives a finite r, although z / log 2 would overflow; the gradients are those of the largest z."""
    x = torch.eye(8).roll(1, 1)[:6] * 0.9
    y = torch.eye(8)[:7] + 0.1
    for form in ("rows", "both", "sum"):
        got, want = (answers(x, y, backend, form, scale=scale, mask=mask) for backend in ("cpu", "reference"))
        assert torch.isfinite(got["value"]).all() or form == "sum"
        torch.testing.assert_close(got["value"], want["value"].float(), rtol=1e-6, atol=0)
        assert not any(t.isnan().any() for t in got.values())
    small = rows(9, 4, 5, 1e-19)  # z of a few: what one unit in the coarse unit is
    assert_right(small, torch.cat([small, 1e3 * small[:2]]), "both", 3e3, scale=2.5e38)


@pytest.mark.parametrize("size", [1e37, 5e37, 6e37, 2.3e38, 3.4e38])
def test_biases_near_the_end(size: float) -> None:
    """They cancel, or tower over all else; those of -inf pad."""
    x, y = rows(20, 6), rows(30, 6, 1)
    for bias_x, bias_y in ((size, 0.0), (-size, 0.0), (0.0, size), (-size, size), (0.0, -math.inf)):
        a, b = torch.full((20,), bias_x), torch.zeros(30)
        b[::2] = bias_y
        got, want = (answers(x, y, k, "both", bias_x=a, bias_y=b) for k in ("cpu", "reference"))
        for name in got:
            assert not got[name].isnan().any()
        torch.testing.assert_close(got["value"], want["value"].float(), rtol=1e-6, atol=3e-6)


NORMS = [0.0, 1e-37, 1e-33, 1e-23, 2.0**-41, 2.0**-38, 1e-6, 1.0, 1e6, 2.0**38, 2.0**41, 1e19, 1e30, 1e37]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", ["all rows", "one row", "all but one"])
def test_norms_of_any_size(norm: float, which: str, dtype: torch.dtype) -> None:
    """z is 20 for the longest rows; each row's gradient is right beside its own size."""
    chosen = {"all rows": slice(None), "one row": slice(4, 5), "all but one": slice(1, None)}[which]
    norms = torch.ones(70, 1, dtype=torch.float64)
    norms[chosen] = norm
    x, y = rows(70, 12, norm=norms).to(dtype), rows(60, 12, 1).to(dtype)
    scale = 20.0 / max(float(norms.max()), 1e-37)
    for form in ("both", "sum"):
        assert_right(x, y, form, 25.0, scale=scale)
        assert_right(y, x, form, 25.0, scale=scale)
    if dtype == torch.float32 and 1e-18 < float(norms.max()) < 1e18:
        assert_right(x, None, "rows", 25.0, scale=scale / float(norms.max()), mask="off_diagonal")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [2.0**-59, 2.0**-61, 1e-30, 4e-38, 1e-39])
@pytest.mark.parametrize("which", ["x", "y", "both", "itself"])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_gradients_of_short_rows_under_a_large_scale(backend: str, which: str, norm: float, dtype: torch.dtype) -> None:
    """Products of weights and rows are below float32's subnormals, and times the scale numbers again."""
    x = rows(40, 12, 0, 1.0 if which == "y" else norm).to(dtype)
    y = rows(60, 12, 1, 1.0 if which == "x" else norm).to(dtype)
    sides = (x, None if which == "itself" else y)
    lengths = [float(t.double().norm(dim=1).max()) for t in (x, y)]
    both = ("both", {}), ("both", {"upstream": 1e-12}), ("rows", {"reduce": "sum", "pair": "softplus"})
    for operand, u in (("dot", lengths[0] * lengths[1]), ("sqdist", sum(lengths) ** 2)):
        for scale in (min(3e38, 20.0 / u if u else 3e38), min(1e10, 1.0 / u if u else 1e10), 1e-10):
            for form, more in both if which != "itself" else (("rows", {}), ("sum", {})):
                if operand == "sqdist" and which in ("x", "y") and form == "both":
                    continue  # of 2 a (x - y) the long rows are what counts
                more = more | {"operand": operand, "scale": scale, "mask": "off_diagonal"}
                assert_right(*sides, form, scale * u, backend, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("operand", ["dot", "sqdist"])
@pytest.mark.parametrize("norm", [1e-4, 1e-10, 1e-15])
def test_small_weights_of_short_rows_under_a_large_scale(norm: float, operand: str) -> None:
    """Weights of 1e-31 times rows of 1e-10 are below float32's subnormals, times a scale of 1e20 numbers again."""
    x, y = rows(40, 12, 0, norm), rows(60, 12, 1, norm)
    for side in (y, None):
        assert_right(x, side, "both" if side is y else "rows", 10.0, scale=1.0 / norm**2, upstream=1e-31, operand=operand)


@pytest.mark.parametrize("norm", [2.0**79, 2.0**81, 1e30, 1e37])
@pytest.mark.parametrize("other", [1e-30, 1e-10, 1.0, 1e10])
@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_gradients_of_weights_and_long_rows(backend: str, which: str, norm: float, other: float) -> None:
    """Products of weights and rows are beyond float32, and times the scale numbers again."""
    x, y = rows(40, 12, 0, norm if which == "x" else other), rows(60, 12, 1, norm if which == "y" else other)
    scale = min(max(5.0 / (norm * other), 1e-38), 1e37)
    for form, more in (("both", {}), ("rows", {"reduce": "sum", "pair": "softplus"})):
        assert_right(x, y, form, scale * norm * other, backend, scale=scale, upstream=1e5, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [1e15, 2.0**59, 2.0**61, 1e19, 1e20])
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_products_beyond_the_range_of_z(norm: float, operand: str) -> None:
    """u overflows, and a u does not."""
    x, y = rows(30, 6, norm=norm), rows(40, 6, 1, norm)
    scale = max(5.0 / norm / norm, 1.2e-38) * (-1 if operand == "sqdist" else 1)
    for form in ("both", "sum"):
        assert_right(x, y, form, 4 * abs(scale) * norm**2, scale=scale, operand=operand)
    assert_right(x, None, "rows", 4 * abs(scale) * norm**2, scale=scale, operand=operand, mask="off_diagonal")
    a = x.clone().requires_grad_()
    more = {"scale": scale, "operand": operand, "pair": "softplus", "reduce": "sum", "backend": "cpu"}
    assert torch.isfinite(torch.autograd.grad(fastcl.pair_reduce(a, y, **more).sum(), a)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e4, 1e6])
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_backward_uses_the_r_and_c_that_it_is_given(operand: str, scale: float, dtype: torch.dtype) -> None:
    """Those of a larger batch: x against two parts of y, one after the other, as ranks do it."""
    scale = min(scale, 1e4) if dtype == torch.float16 else scale  # whose gradients it holds
    x, y = rows(20, 8).to(dtype), rows(60, 8, 1).to(dtype)
    x[3] = 0.01 * x[3]
    truth = [t.double().requires_grad_() for t in (x, y)]
    scale = scale if operand == "dot" else -scale
    r, c = fastcl.pair_reduce(*truth, scale=scale, operand=operand, columns=True, backend="reference")
    dx, dy = torch.autograd.grad(r.sum() + c.sum(), truth)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums, parts = torch.zeros(20, 8, dtype=torch.float64), []
    for part in (slice(0, 45), slice(45, 60)):
        numbers = (torch.tensor(scale, dtype=wide), torch.tensor(0.0, dtype=wide))
        problem = (x, y[part], *numbers, *[None] * (TENSORS - 4), 0, 0, 0, "all", operand, "identity", [], "logsumexp", True)
        upstream = [torch.ones(k, dtype=wide) for k in (20, len(y[part]))]
        given = (r.detach().to(wide), c.detach()[part].to(wide), *upstream)
        of_x, of_y, *_ = torch.ops.fastcl.pair_reduce_backward(*problem, *given, [True, True, *[False] * 4], False, "cpu")
        sums += of_x.double()
        parts.append(of_y.double())
    eps = torch.finfo(dtype).eps
    allowed = 4 * eps + 2 * torch.finfo(wide).eps * abs(scale) * 4
    for got, want in ((sums, dx), (torch.cat(parts), dy)):
        assert (got - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("r", [30.0, 100.0, 126.0, 140.0, 231.0, 255.0, 257.0, 1e3, 1e5])
def test_rows_of_which_one_term_towers_over_the_rest(r: float) -> None:
    """Their weights are 1, to half a unit of an r below 128, although z itself is known to eps |z|: 8 roundings of 8 products.

    Of a row in which several terms share, that rounding shows: a weight p moves by p (1 - p) times the difference of two z.
    """
    x = rows(48, 8)
    y = r * torch.linspace(0.9, 1.0, 48).repeat(2)[:, None] * torch.cat([x, -x])
    got, want = (answers(x, y, backend, "both") for backend in ("cpu", "reference"))
    z = x.double() @ y.double().T
    shared = sum(p * (1 - p) for p in (z.softmax(1), z.softmax(0))) * x.shape[1] * torch.finfo(torch.float32).eps * r
    for name, share, other in (("x", shared, y), ("y", shared.T, x)):
        error = (got[name].double() - want[name]).norm(dim=1)
        assert (error <= (2.0**-18 + 5e-7) * want[name].norm(dim=1) + share @ other.norm(dim=1).double()).all(), name


@pytest.mark.parametrize("sign", [1, -1])
def test_totals_beyond_float32_are_infinite_with_their_sign(sign: int) -> None:
    x = torch.full((50, 4), 2e18)
    for y, more in ((x, {}), (x, {"outer": "sum"}), (None, {"outer": "sum"})):
        scale, shift = torch.tensor(sign * 1e1, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        arguments = {"scale": scale, "shift": shift, "backend": "cpu", **more}
        out = fastcl.pair_total(x, y, **arguments) if more else fastcl.pair_reduce(x, y, **arguments).sum()
        assert out == sign * math.inf
        assert torch.autograd.grad(out, scale)[0] == math.inf
    g = torch.full((50,), 3e38 * sign)
    scale, shift = torch.tensor(1e-36, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    r = fastcl.pair_reduce(x, x, scale=scale, shift=shift, backend="cpu")
    assert [t.item() for t in torch.autograd.grad(r, (scale, shift), g)] == [sign * math.inf] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_rows_of_no_width(operand: str, dtype: torch.dtype) -> None:
    x, y = torch.ones(40, 0, dtype=dtype), torch.ones(50, 0, dtype=dtype)
    for form, more in (("both", {}), ("sum", {}), ("pooled", {}), ("contrast", {"positive": torch.zeros(40)})):
        got, want = (answers(x, y, b, form, operand=operand, **more) for b in ("cpu", "reference"))
        torch.testing.assert_close(got["value"].double(), want["value"], rtol=1e-6, atol=0)
    r = fastcl.pair_reduce(x, operand=operand, pair="softplus", reduce="sum", mask="off_diagonal", backend="cpu")
    torch.testing.assert_close(r.double(), torch.full((40,), 39 * math.log(2.0)).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_z_of_both_orders_is_one_number(operand: str, dtype: torch.dtype) -> None:
    """Bit for bit: a row whose groups leave one partner has that pair's z as its r."""
    x = rows(70, 40, norm=300.0).to(dtype)
    z = torch.zeros(70, 70)
    for j in range(70):
        groups = torch.arange(70) == j
        r = fastcl.pair_reduce(x, operand=operand, mask=fastcl.across_groups(groups.long()), backend="cpu")
        z[:, j] = torch.where(groups, 0.0, r)
    assert torch.equal(z, z.T)


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize("logits", [1e4, 1e5, 5e6, 3e10])
def test_rows_with_themselves_at_large_logits(logits: float, backend: str) -> None:
    """A weight exp(z_ij - r_j) takes off r_j, in which the same rounding of z_ij is."""
    for seed in range(4):
        x = rows(90, 16, seed, math.sqrt(logits))
        want, got = (answers(x, None, b, "rows", mask="off_diagonal")["x"] for b in ("reference", backend))
        leaf = x.clone().requires_grad_()
        z = (leaf @ leaf.T).masked_fill(torch.eye(90, dtype=torch.bool), -math.inf)
        (torchs,) = torch.autograd.grad(z.logsumexp(1).sum(), leaf)
        assert (got.double() - want).norm() <= 3 * (torchs.double() - want).norm() + 1e-6 * want.norm()


@pytest.mark.parametrize("isa", OTHERS)
def test_on_every_instruction_set(isa: str) -> None:
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not every_instruction_set", "tests/cpu/test_range.py"]
    run = python(f"import pytest, sys; sys.exit(pytest.main({arguments}))", FASTCL_CPU_ISA=isa)
    assert run.returncode == 0, run.stdout[-3000:]
