"""Every objective at the edges of half precision: extreme arguments, norms, upstream gradients give infinities at worst."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastcl.functional as F
from fastcl import loss_scaling

from ..fuzz.formula import rows
from .cases import CASES, Case, two_views
from .witnesses import HALF, gradients, library, name_of, served

N, D = 9, 5
SCALE = 65536.0  # where torch.amp.GradScaler begins
EXTREMES: dict[str, list[dict[str, Any]]] = {
    "dcl": [{"temperature": 1e-3, "sigma": 1e-3}, {"sigma": 1e-3, "detach_weight": False}],
    "kcl": [
        {"kernel": "log", "t": 1e3},
        {"kernel": "imq", "t": 1e-3},
        {"kernel": "riesz", "t": 20.0},
        {"kernel": "gaussian_riesz", "t": 8.0},
        {"gamma": 1e6},
    ],
    "f_micl": [
        *({"divergence": d, "beta": 50.0} for d in ("js", "sh", "vlc", "rkl", "neyman", "jeffrey")),
        {"divergence": "rkl", "beta": 20.0, "alpha": 1e6},
        {"divergence": "tsallis", "q": 0.1, "beta": 50.0},
        {"divergence": "neyman", "beta": torch.tensor(50.0)},
    ],
    "spectral": [{"mu": 1e-4}, {"mu": 1e4}],
    "f_mi_alpha": [{"alpha": -4.0}, {"alpha": 20.0}],
    "siglip": [{"logit_scale": 1e3, "logit_bias": 1e3}],
    "alignment": [{"alpha": 0.01}, {"alpha": 8.0}],
    "hard_negative": [{"temperature": 1e-3, "beta": 50.0}],
}
CONDITIONS = [  # of rows, and the upstream gradient
    ("plain", torch.float16, SCALE),
    ("long", torch.float16, SCALE),
    ("short", torch.float16, 1.0),
    ("equal", torch.float16, 1.0),
    ("plain", torch.bfloat16, SCALE),
    ("equal", torch.float32, 1.0),
    ("plain", torch.float32, 1.0),
]


def rows_of(case: Case, which: str, dtype: torch.dtype) -> list[Tensor]:
    rows = [x.detach() for x in case.rows_of(N, D)]
    if which == "equal":
        rows = [rows[0][:1].expand(len(x), -1) for x in rows]
    if which in ("long", "short"):
        rows = [x / x.norm(dim=1, keepdim=True) * {"long": 1e4, "short": 1e-7}[which] for x in rows]
    return [x.to(dtype).requires_grad_() for x in rows]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_nan_from_numbers(case: Case) -> None:
    """Where the value and gradient exist in the dtype they are finite; beyond its range they are infinite, with their sign."""
    extremes = [] if case.label == "-cosine" else EXTREMES.get(case.name, [])
    for arguments in (case.grid[0], case.grid[0] | case.sharp, *extremes):
        for which, dtype, upstream in CONDITIONS:
            leaves = rows_of(case, which, dtype)
            given = arguments | case.given(N, D, leaves[0])
            exact = [x.detach().double().requires_grad_() for x in leaves]
            truth = library(case, exact, "reference", **given)
            wanted = [upstream * g for g in gradients(truth, exact)]
            for backend in served(dtype, definition=False) if case.backend else [None]:
                said = f"{arguments}, {which} rows in {name_of(dtype)}, upstream {upstream:g}, {backend}"
                value = library(case, leaves, backend, **given)
                assert not value.isnan(), said
                assert value.isfinite() or truth.abs() > 0.9 * torch.finfo(torch.float32).max, said
                for got, want in zip(gradients(value, leaves, torch.tensor(upstream)), wanted, strict=True):
                    assert not got.isnan().any(), said
                    most, largest = torch.finfo(dtype).max, want.abs().max()
                    # A gradient is known to the rounding of its largest entry, here of unit rows at a temperature of 1e-3.
                    if largest < 0.3 * most:
                        assert got.isfinite().all(), said
                    beyond = want.abs() > max(2.0 * most, 0.3 * float(largest))
                    if beyond.any() and "riesz" not in arguments.get("kernel", ""):
                        assert torch.equal(got[beyond].double(), want[beyond].sign() * float("inf")), said


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_nan_from_numbers_under_a_transform(case: Case) -> None:
    """torch.func.vjp, which no autograd.Function scales: what overflows is infinite."""
    extremes = [] if case.label == "-cosine" else EXTREMES.get(case.name, [])
    for arguments in (case.grid[0], case.grid[0] | case.sharp, *extremes):
        for which, autocast in (("plain", False), ("long", False), ("equal", False), ("plain", True)):
            leaves = [x.detach() for x in rows_of(case, which, torch.float32 if autocast else torch.float16)]
            given = arguments | case.given(N, D, leaves[0])
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                value, pull = torch.func.vjp(lambda *rows: library(case, rows, None, **given), *leaves)  # noqa: B023
            assert value.dtype == torch.float32
            for got in (value, *pull(torch.tensor(SCALE))):
                assert not got.isnan().any(), f"{arguments}, {which} rows, autocast {autocast}"


@pytest.mark.parametrize("name", ["sogclr", "fast_clip", "minc"])
def test_what_a_loss_keeps_is_no_row_of_two_dtypes(name: str) -> None:
    """Under a transform rows are widened, and a float32 logarithm or statistic beside them had left them as they were."""
    x, y = (v.half() for v in two_views(N, D))
    state = torch.eye(D) if name == "minc" else torch.full((N, 1 if name == "sogclr" else 2), 2.0)
    given: dict[str, Any] = {} if name == "minc" else {"reduction": "sum"}

    def loss(x: Tensor) -> Tensor:
        return 2.0**19 * getattr(F, name)(x, y.to(x.dtype), state, **given)

    got, want = torch.func.grad(loss)(x), torch.func.grad(loss)(x.double())
    inside = want.abs() < torch.finfo(torch.float16).max
    assert inside.any() and not got.isnan().any()
    assert (got.double() - want)[inside].abs().max() <= 2e-3 * want.abs().max()


def test_a_slope_without_bound() -> None:
    """Near its clamp log(1 - tau e^-r) multiplies two sweeps' gradients, which nearly cancel, until either leaves float16."""
    x = 1.22 * rows(15, 2)
    u, v = (t.half().requires_grad_() for t in (x, x / x.norm(dim=1, keepdim=True)))
    value = F.hard_negative(u, v, tau_plus=0.9, beta=266.0, normalize=False, reduction="sum")
    (found,) = torch.autograd.grad(value, [u], torch.tensor(float(rows(1, 1, 9))))
    assert not found.isnan().any()


def test_moments_of_long_rows() -> None:
    """Two sums' gradients beyond float16 with opposite signs, whose sum has one."""
    x = (775.0 * rows(65, 5)).half().requires_grad_()
    (found,) = torch.autograd.grad(F.spread_out(x, normalize=False, mean_weight=59.6, second_moment_weight=0.15), [x])
    assert not found.isnan().any()


def test_a_transform_refuses_rows_of_two_dtypes() -> None:
    x, y = (v.half() for v in two_views(N, D))
    with pytest.raises(TypeError, match="dtype"):
        torch.func.grad(lambda x: F.info_nce(x, y.float()))(x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_upstream_gradients_beyond_float16_are_right(dtype: torch.dtype, reduction: str) -> None:
    """Gradients of unit rows are beyond float16; those of the rows, over their norms, are not. Learnable scalars too.

    Logits of 10 are rounded by 10 eps or so, and so are the weights that the gradients are made of.
    """
    upstream = 64.0 * SCALE
    x, y = (1e3 * v for v in two_views(N, D))
    labels = torch.arange(N) % 3
    for call in (
        lambda x, y, t: F.info_nce(x, y, temperature=t, reduction=reduction),
        lambda x, y, t: F.clip(x, y, logit_scale=1.0 / t, reduction=reduction),
        lambda x, y, t: F.dcl(x, y, temperature=t, reduction=reduction),
        lambda x, y, t: F.sup_con(x, labels, temperature=t, reduction=reduction),
        lambda x, y, t: F.moco(x, y, y, temperature=t, reduction=reduction),
    ):
        answers = []
        for made in (dtype, torch.float64):
            t = torch.tensor(0.1, dtype=torch.promote_types(made, torch.float32), requires_grad=True)
            leaves = [v.to(dtype).to(made).requires_grad_() for v in (x, y)] + [t]
            value = call(*leaves)
            answers.append(gradients(value, leaves, torch.full_like(value, upstream)))
        for got, want in zip(*answers, strict=True):
            assert float((got.double() - want).abs().max()) <= 32 * torch.finfo(dtype).eps * float(want.abs().max())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1e5, 1e20, 1e28])
@pytest.mark.parametrize("learned", [True, False])
def test_steep_losses_are_infinite_where_they_should_be(
    scale: float, normalize: bool, reduction: str, learned: bool
) -> None:
    """The parts of a gradient are beyond float16 with opposite signs; their sum has the sign of the larger, or is a number."""
    labels = torch.arange(N) % 3
    options: dict[str, Any] = {"normalize": normalize, "reduction": reduction}
    for call in (
        lambda x, y, a: F.clip(x, y, logit_scale=a, **options),
        lambda x, y, a: F.siglip(x, y, logit_scale=a, logit_bias=-1.0, **options),
        lambda x, y, a: F.info_nce(x, y, temperature=1.0 / a, **options),
        lambda x, y, a: F.nt_xent(x, y, temperature=1.0 / a, **options),
        lambda x, y, a: F.sup_con(torch.cat([x, y]), torch.cat([labels, labels]), temperature=1.0 / a, **options),
    ):
        answers = []
        for made in (torch.float16, torch.float64):
            leaves = [v.half().to(made).requires_grad_() for v in two_views(N, D)]
            a = torch.tensor(scale, dtype=torch.promote_types(made, torch.float32)) if learned else scale
            value = call(*leaves, a)
            answers.append(gradients(value.sum(), leaves))
        for got, want in zip(*answers, strict=True):
            most, largest = torch.finfo(torch.float16).max, float(want.abs().max())
            assert not got.isnan().any()
            sure = want.abs() > 1e-3 * largest  # the rounding of the largest entry, of which the others are differences
            beyond = sure & (want.abs() > 1.1 * most)
            assert torch.equal(got[beyond].double(), want[beyond].sign() * float("inf"))
            if scale == 1e5:
                within = sure & (want.abs() < 0.9 * most)
                torch.testing.assert_close(got[within].double(), want[within], rtol=2e-2, atol=1e-3 * largest)


def test_a_small_upstream_gradient_changes_nothing() -> None:
    """An upstream of n or less is left as it is, bit for bit; twice as much is exactly twice as much."""
    leaves = [v.half().requires_grad_() for v in two_views(N, D)]
    value = F.info_nce(*leaves, temperature=0.1)
    once = torch.autograd.grad(value, leaves, torch.tensor(1.0), retain_graph=True)
    for upstream in (2.0, 8.0, 64.0, 1024.0):
        for a, b in zip(
            once, torch.autograd.grad(value, leaves, torch.tensor(upstream), retain_graph=True), strict=True
        ):
            normal = a.abs() > 1e-4
            assert torch.equal((upstream * a)[normal], b[normal])


def test_an_infinite_upstream_gradient_is_seen() -> None:
    """torch.amp.GradScaler skips a step by what is not finite."""
    leaves = [v.half().requires_grad_() for v in two_views(N, D)]
    for g in torch.autograd.grad(F.info_nce(*leaves), leaves, torch.tensor(float("inf"))):
        assert not g.isfinite().all()


def test_under_autocast_to_float16() -> None:
    leaves = [v.float().requires_grad_() for v in two_views(N, D)]
    with torch.autocast("cpu", torch.float16):
        value = F.debiased(*leaves, temperature=1e-3)
    for g in torch.autograd.grad(value, leaves, torch.tensor(SCALE)):
        assert g.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Function that torch.compile traces
@pytest.mark.parametrize("name", ["clip", "f_micl", "spectral", "siglip"])
def test_large_upstream_gradients_under_compile(name: str) -> None:
    """The scaling is part of the one graph: the same bits as without it, and no infinity that it would have avoided."""
    torch._dynamo.reset()
    case = next(c for c in CASES if c.name == name and not c.label)  # of listed positives a graph does not look how near they are
    leaves = rows_of(case, "long", torch.float16)
    arguments = case.arguments(0, N, D, leaves[0])

    def run(*rows: Tensor) -> Tensor:
        return library(case, rows, None, **arguments)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    upstream = torch.tensor(64.0 * SCALE)
    wanted = gradients(run(*leaves), leaves, upstream)
    for got, want in zip(gradients(compiled(*leaves), leaves, upstream), wanted, strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_has_no_gradient_wants_none(autocast: bool) -> None:
    """The scaling makes nothing differentiable: a normaliser that is kept would keep the graphs of all batches before it."""
    x, y = (v.float() if autocast else v.half() for v in two_views(N, D))
    wants = x.detach().requires_grad_()
    alpha = torch.tensor(2.0, requires_grad=True)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        answers = {
            "sogclr": (F.sogclr(wants, y, return_log_u=True), (True, False)),
            "fast_clip": (F.fast_clip(wants, y, return_log_u=True), (True, False)),
            "f_micl": (F.f_micl(x, y, alpha=alpha, return_terms=True), (True, False, False)),
            "moco, the keys": ((F.moco(x, wants, y),), (False,)),
        }
    for name, (parts, differentiable) in answers.items():
        assert tuple(part.requires_grad for part in parts) == differentiable, name


def test_state_is_no_rows_wherever_it_stands() -> None:
    """As wide as the rows, or not: neither its entries nor its rows say how steep a loss is."""
    u, v = (x.half().requires_grad_() for x in two_views(6, 4))
    statistic, log_u = torch.eye(4), torch.zeros(6, 1)
    for call in (
        lambda: F.minc(u, v, statistic),
        lambda: F.minc(u, v, statistic=statistic),
        lambda: F.sogclr(u, v, log_u),
        lambda: F.mv_info_nce(*[u, v] * 5),
    ):
        with mock.patch.object(loss_scaling, "_steepness", wraps=loss_scaling._steepness) as asked:
            call()
        assert all(any(x is t for t in (u, v)) for x in asked.call_args.args[0]) and len(asked.call_args.args[0]) >= 2


def test_the_gradient_of_a_number_is_rounded_once_it_has_its_size() -> None:
    """Of short rows it is 3e-6 for an upstream of 1, of which float16 holds 52 units, and 3e-3 for one of 1,000."""
    x, y = (0.00122 * rows(2, 2, k).half() for k in (1, 0))
    found = []
    for dtype in (torch.float16, torch.float64):
        beta = torch.ones((), dtype=dtype, requires_grad=True)
        loss = F.f_micl_dv(x.to(dtype), y.to(dtype), beta=beta, normalize=False)
        found.append(torch.autograd.grad(1000.0 * loss, beta)[0].double())
    assert abs(found[0] / found[1] - 1.0) <= 1e-3
