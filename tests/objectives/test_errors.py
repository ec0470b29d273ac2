"""Bad input gets its one clear error, word for word: what was expected, what was given, and what to do."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl
import fastcl.functional as F

from .cases import CASES, Case
from .witnesses import library, name_of

X, Y = torch.randn(4, 3), torch.randn(4, 3)
Call = Callable[[], Any]


def raises(call: Call, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def parts(case: Case) -> tuple[list[torch.Tensor], dict[str, Any], list[str]]:
    """Rows, arguments, and what the function calls its rows."""
    rows = [x.detach().float() for x in case.rows_of(4, 3)]
    names = list(inspect.signature(getattr(F, case.name)).parameters)
    if names[0] == "views":  # any number of them, each an argument
        names = [f"views[{k}]" for k in range(len(rows))] + names[1:]
    return rows, case.arguments(0, 4, 3, rows[0]), names


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rows_are_floating_matrices(case: Case) -> None:
    rows, arguments, names = parts(case)
    for k, name in enumerate(names[: len(rows)]):

        def given(bad: Any, k: int = k) -> Call:
            return lambda: library(case, [bad if i == k else x for i, x in enumerate(rows)], None, **arguments)

        shape = tuple(rows[k].shape)
        dtypes = "expected float64, float32, bfloat16 or float16"
        raises(given(rows[k].long()), TypeError, f"{name}: {dtypes}, got int64; convert it, e.g. {name}.float()")
        raises(
            given(rows[k].to(torch.complex64)),
            TypeError,
            f"{name}: {dtypes}, got complex64; convert it, e.g. {name}.real.float()",
        )
        raises(given(rows[k].tolist()), TypeError, f"{name}: expected a tensor, got list; pass torch.as_tensor({name})")
        for bad in (rows[k][0], rows[k][None], torch.tensor(1.0)):
            raises(
                given(bad),
                ValueError,
                f"{name}: expected a matrix (rows, d), got shape {tuple(bad.shape)}; flatten or unsqueeze it",
            )
        assert rows[k].shape == shape


@pytest.mark.parametrize("case", [c for c in CASES if len(c.inputs(3, 2)) > 1], ids=name_of)
def test_views_agree(case: Case) -> None:
    rows, arguments, names = parts(case)
    for k in range(1, len(rows)):
        name = names[k]

        def given(bad: Any, k: int = k) -> Call:
            return lambda: library(case, [bad if i == k else x for i, x in enumerate(rows)], None, **arguments)

        # Which view it is compared with, is the function's to choose; that both are named is not.
        for bad, kind, message in (
            (
                rows[k].double(),
                TypeError,
                rf"{re.escape(name)}: expected the dtype of [\w\[\]]+, float32, got float64; convert one of them",
            ),
            (
                rows[k][:, :2],
                ValueError,
                rf"{re.escape(name)}: expected rows of the width of [\w\[\]]+, d = 3, got d = 2; project both to one width",
            ),
            (
                rows[k].to("meta"),
                ValueError,
                rf"{re.escape(name)}: expected the device of [\w\[\]]+, cpu, got meta; move one of them",
            ),
        ):
            with pytest.raises(kind, match=f"^{message}$"):
                given(bad)()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_scalars_are_finite_numbers(case: Case) -> None:
    rows, arguments, _ = parts(case)
    for name in case.scalars:

        def given(bad: Any, name: str = name) -> Call:
            return lambda: library(case, rows, None, **arguments | {name: bad})

        raises(given(float("nan")), ValueError, f"{name}: expected a finite number, got nan")
        raises(given(float("inf")), ValueError, f"{name}: expected a finite number, got inf")
        raises(given("1"), TypeError, f"{name}: expected a number or a tensor with one element, got str")
        raises(
            given(torch.ones(3)), ValueError, f"{name}: expected a number or a tensor with one element, got shape (3,)"
        )
        raises(
            given(torch.tensor(1)),
            TypeError,
            f"{name}: expected a number or a floating-point tensor, got int64; convert it with .float()",
        )
        if name in ("temperature", "logit_scale", "beta", "mu", "t") and (case.name, name) != ("hard_negative", "beta"):
            raises(given(0.0), ValueError, f"{name}: expected a number > 0, got 0.0")
            raises(given(-0.5), ValueError, f"{name}: expected a number > 0, got -0.5")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reductions_are_known(case: Case) -> None:
    rows, arguments, names = parts(case)
    if "reduction" not in names:
        assert not case.rows
        return
    raises(
        lambda: library(case, rows, None, **arguments, reduction="meen"),
        ValueError,
        "reduction: expected one of 'mean', 'sum', 'none', got 'meen'; did you mean 'mean'?",
    )
    if not case.rows:
        for reduction in ("none", "sum"):
            raises(
                lambda r=reduction: library(case, rows, None, **arguments, reduction=r),
                ValueError,
                f"reduction: {case.name} is one number, not a mean over rows; expected 'mean', got {reduction!r}",
            )


@pytest.mark.parametrize("case", [c for c in CASES if c.groups], ids=name_of)
def test_groups_are_int64_one_for_each_row(case: Case) -> None:
    rows, arguments, _ = parts(case)
    m = max(len(x) for x in rows)
    for bad, kind, message in (
        (torch.zeros(m), TypeError, r"groups: expected an int64 tensor, got float32; convert it with \.long\(\)"),
        (
            [0] * m,
            TypeError,
            r"groups: expected an int64 tensor, got list; pass torch\.as_tensor\(groups, dtype=torch\.int64\)",
        ),
        (
            torch.zeros(m + 1).long(),
            ValueError,
            rf"groups: expected shape \({m},\), one group for each row of .*, got \({m + 1},\)",
        ),
        (
            torch.zeros(m, 1).long(),
            ValueError,
            rf"groups: expected shape \({m},\), one group for each row of .*, got \({m}, 1\)",
        ),
    ):
        with pytest.raises(kind, match=f"^{message}$"):
            library(case, rows, None, **arguments | {"groups": bad})


@pytest.mark.parametrize("case", [c for c in CASES if c.backend], ids=name_of)
def test_backends_are_known_and_available(case: Case) -> None:
    rows, arguments, _ = parts(case)
    raises(
        lambda: library(case, rows, "bloked", **arguments),
        ValueError,
        "backend: expected one of 'auto', 'reference', 'blocked', 'cpu', 'triton', 'cuda', got 'bloked'; "
        "did you mean 'blocked'?",
    )
    raises(
        lambda: library(case, rows, "cuda", **arguments),
        fastcl.BackendUnavailableError,
        "backend 'cuda' cannot serve cpu tensors of torch.float32: it serves cuda tensors, and these are on cpu",
    )


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTCL_BACKEND is read at each call, and an argument goes before it."""
    monkeypatch.setenv("FASTCL_BACKEND", "cuda")
    with pytest.raises(fastcl.BackendUnavailableError, match="backend 'cuda' cannot serve cpu tensors"):
        F.info_nce(X, Y)
    F.info_nce(X, Y, backend="blocked")
    monkeypatch.setenv("FASTCL_BACKEND", "bloked")
    with pytest.raises(ValueError, match=r"FASTCL_BACKEND: expected one of .*, got 'bloked'; did you mean 'blocked'"):
        F.info_nce(X, Y)


def test_an_unbounded_kernel_is_warned_of_once() -> None:
    """Riesz with t > 0 as an alignment goes to -inf as positives meet."""
    from fastcl.functional import kernel

    kernel._warn_unbounded.cache_clear()
    with pytest.warns(
        UserWarning, match=r"kcl: kernel='riesz' with t > 0 is unbounded below: .*; use kernel='gaussian_riesz'"
    ):
        F.kcl(X, Y, kernel="riesz", t=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.kcl(X, Y, kernel="riesz", t=1.0)
        F.kcl(X, Y, kernel="riesz", t=-1.0)
        F.kcl(X, Y, kernel="gaussian_riesz", t=1.0)


SPECIFIC: dict[str, tuple[Call, str]] = {
    "fewer columns than rows": (
        lambda: F.info_nce(X, Y[:3]),
        "y: expected at least one row for each row of x, 4, got 3; y_i is the positive of x_i",
    ),
    "more pairs than rows": (
        lambda: F.clip(X, Y[:3], logit_scale=1.0, pairs=4),
        "pairs: expected at most the rows of either side, 0 to 3, got 4; pass how many rows match",
    ),
    "no pairs": (
        lambda: F.clip(X, Y, logit_scale=1.0, pairs=0),
        "clip: expected at least 1 row, got 0; skip empty batches",
    ),
    "siglip rows": (
        lambda: F.siglip(X, Y[:3], logit_scale=1.0, logit_bias=0.0),
        "y: expected at least one row for each row of x, 4, got 3; y_i is the positive of x_i: "
        "exchange x and y where x has rows that match nothing",
    ),
    "nt_xent rows": (
        lambda: F.nt_xent(X, Y[:3]),
        "v: expected one row for each row of u, 4, got 3; pass rows in matching order",
    ),
    "no rows": (lambda: F.info_nce(X[:0], Y[:0]), "info_nce: expected at least 1 row, got 0; skip empty batches"),
    "one row": (
        lambda: F.f_micl(X[:1], Y[:1]),
        "f_micl: expected at least 2 rows, or there is no pair of different rows, got 1; skip empty batches",
    ),
    "divergence": (
        lambda: F.f_micl(X, Y, divergence="perason"),
        "divergence: expected one of 'kl', 'js', 'pearson', 'sh', 'tsallis', 'vlc', 'rkl', 'neyman', 'jeffrey', "
        "got 'perason'; did you mean 'pearson'?",
    ),
    "similarity": (
        lambda: F.f_micl(X, Y, similarity="cos"),
        "similarity: expected one of 'gaussian', 'cosine', got 'cos'; did you mean 'cosine'?",
    ),
    "negatives": (
        lambda: F.f_micl(X, Y, negatives="yy"),
        "negatives: expected one of 'xx', 'xx+yy', 'xy', got 'yy'",
    ),
    "q missing": (
        lambda: F.f_micl(X, Y, divergence="tsallis"),
        "q: expected the order of 'tsallis', a number > 0 and not 1, got None; pass for instance q=1.5",
    ),
    "q is one": (
        lambda: F.f_micl(X, Y, divergence="tsallis", q=1.0),
        "q: expected a number > 0 and not 1, got 1.0; its limit is divergence='kl'",
    ),
    "q negative": (
        lambda: F.f_micl(X, Y, divergence="tsallis", q=-1.0),
        "q: expected a number > 0, got -1.0",
    ),
    "q without tsallis": (
        lambda: F.f_micl(X, Y, q=2.0),
        "q: expected None for divergence='kl', got 2.0; only 'tsallis' has an order",
    ),
    "kernel": (
        lambda: F.kcl(X, Y, kernel="gausian"),
        "kernel: expected one of 'gaussian', 'log', 'imq', 'riesz', 'gaussian_riesz', got 'gausian'; did you mean 'gaussian'?",
    ),
    "riesz without order": (
        lambda: F.kcl(X, Y, kernel="riesz", t=0.0),
        "t: expected a number other than 0 for a Riesz kernel, got 0; its limit is kernel='log'",
    ),
    "form": (
        lambda: F.dhel(X, Y, form="both"),
        "form: expected one of 'joint', 'anchor', 'symmetric', got 'both'",
    ),
    "estimator": (
        lambda: F.spectral(X, Y, estimator="unbiassed"),
        "estimator: expected one of 'unbiased', 'biased', got 'unbiassed'; did you mean 'unbiased'?",
    ),
    "hardness": (
        lambda: F.hard_negative(X, Y, beta=-1.0),
        "beta: expected a number >= 0, got -1.0; 0 is the debiased loss",
    ),
    "prior": (
        lambda: F.debiased(X, Y, tau_plus=1.0),
        "tau_plus: expected a probability in [0, 1), got 1.0",
    ),
    "statistic": (
        lambda: F.minc(X, Y, torch.eye(4)),
        "statistic: expected shape (3, 3), the second moment of rows, got (4, 4)",
    ),
    "labels": (
        lambda: F.sup_con(X, torch.arange(3)),
        "labels: expected shape (4,), one group for each row of z, got (3,)",
    ),
    "target": (
        lambda: F.minc(X, Y, torch.eye(3), target_u=X[:2]),
        "target_u: expected one row for each row of u, 4, got 2; pass rows in matching order",
    ),
    "cosine beta": (
        lambda: F.f_micl(X, Y, similarity="cosine", beta=2.0),
        "beta: expected its default 1.0 with similarity='cosine', which has no beta; leave it out",
    ),
    "cosine mu": (
        lambda: F.f_micl(X, Y, similarity="cosine", mu=torch.tensor(2.0)),
        "mu: expected its default 1.0 with similarity='cosine', which has no mu; leave it out",
    ),
    "cosine jeffrey": (
        lambda: F.f_micl(X, Y, divergence="jeffrey", similarity="cosine"),
        "divergence: 'jeffrey' has no closed conjugate; use similarity='gaussian'",
    ),
    "cosine rkl": (
        lambda: F.f_micl(X, Y, divergence="rkl", similarity="cosine"),
        "divergence: 'rkl' has a conjugate that is infinite for s >= 0; use similarity='gaussian'",
    ),
    "cosine tsallis": (
        lambda: F.f_micl(X, Y, divergence="tsallis", q=0.5, similarity="cosine"),
        "divergence: 'tsallis' has a conjugate that is infinite for s >= 0; use similarity='gaussian' or q > 1",
    ),
}


@pytest.mark.parametrize("name", SPECIFIC)
def test_specific_errors(name: str) -> None:
    call, message = SPECIFIC[name]
    raises(call, ValueError, message)


@pytest.mark.parametrize("function", [F.mv_info_nce, F.mv_dhel])
def test_stacked_views_are_told_apart(function: Callable[..., torch.Tensor]) -> None:
    """To flatten them, as of any other tensor that is no matrix, would be another loss."""
    message = "views: expected each as an argument of its own, got one tensor of shape (3, 6, 4); unpack it, *views"
    raises(lambda: function(torch.randn(3, 6, 4)), ValueError, message)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: F.info_nce(x, y),  # of one call
        lambda x, y: F.clip(x, y, logit_scale=2.0, groups=torch.arange(6)),  # its views in one pass
        lambda x, y: F.kcl(x, y),  # rows that are normalised by themselves
        lambda x, y: F.uniformity(x) + F.uniformity(y),
    ],
)
def test_hooks_that_give_back_another_dtype_are_told(call: Callable[..., torch.Tensor]) -> None:
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.bfloat16() if t.dim() == 2 else t):
        value = call(x, y)
    with pytest.raises(TypeError, match=r"saved tensor: expected torch\.float32, .* got torch\.bfloat16; let the unpack"):
        torch.autograd.grad(value, (x, y))


def test_a_sparse_statistic_is_refused() -> None:
    with pytest.raises(TypeError, match=r"statistic: expected a dense tensor.*statistic.to_dense\(\)"):
        F.minc(X, Y, torch.eye(3).to_sparse())
