"""A divergence written as its f alone: the nine of f_micl again, what is refused, and where it goes."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch

import fastcl
from fastcl.equation.intrinsics import log, maximum, minimum, pow, rsqrt
from fastcl.functional import f_micl

from .cases import two_views
from .witnesses import close, gradients

Q, LOG_2 = 1.5, 0.6931471805599453


def kl(u):
    return u * log(u)


def js(u):
    u = 0.0 + u  # assigned anew
    sum_of_both = u + 1.0
    return u * log(u) - sum_of_both * log(sum_of_both) + 2.0 * LOG_2 * 1.0 + (u - 1.0) * LOG_2


def pearson(u):
    return (u - 1.0) * (u - 1.0)


def sh(u):
    """The squared Hellinger, 1 - 1/sqrt(u) its critic."""
    return u + 1.0 - 2.0 * u * rsqrt(u)


def tsallis(u):
    return (pow(u, Q) - 1.0) / (Q - 1.0)


def vlc(u):
    return (u - 1.0) * (u - 1.0) / (u + 1.0)


def rkl(u):
    return -log(u)


def neyman(u):
    return (u - 1.0) * (u - 1.0) / u


def jeffrey(u):
    return (u - 1.0) * log(u)


NAMED = {f.__name__: f for f in (kl, js, pearson, sh, tsallis, vlc, rkl, neyman, jeffrey)}


@pytest.mark.parametrize("beta", [0.3, 2.0, 12.0])
@pytest.mark.parametrize("name", NAMED)
def test_the_nine_again(name: str, beta: float) -> None:
    """Up to what f_micl leaves out of its critic and its potential: their gradients are the same."""
    arguments = {"alpha": 3.0, "beta": beta, "negatives": "xx+yy"}
    own = fastcl.Divergence(name, NAMED[name])
    ours, theirs = ([x.clone().requires_grad_() for x in two_views(9, 5)] for _ in range(2))
    a = f_micl(*ours, divergence=own, **arguments)
    b = f_micl(*theirs, divergence=name, q=Q if name == "tsallis" else None, **arguments)
    for got, want in zip(gradients(a, ours), gradients(b, theirs), strict=True):
        close(got, want, rtol=1e-9)


@pytest.mark.parametrize("name", NAMED)
def test_its_derivatives_are_those_of_autograd(name: str) -> None:
    own = fastcl.Divergence(name, NAMED[name])
    l = torch.linspace(-3.0, 1.5, 40, dtype=torch.float64).requires_grad_()
    u = l.exp().detach().requires_grad_()
    (slope,) = torch.autograd.grad(NAMED[name](u).sum(), u)
    close(own.critic(l), slope, rtol=1e-10)
    close(own.pair.f(l), u * slope - NAMED[name](u), rtol=1e-9)
    close(own.pair.df(l), torch.autograd.grad(own.pair.f(l).sum(), l)[0], rtol=1e-8)


def test_which_spread_rows() -> None:
    """Lu et al. 2023: all but reverse KL and Neyman; VLC while mu < 2."""
    spreads = {name: fastcl.Divergence(name, f).spreads() for name, f in NAMED.items()}
    assert spreads == dict.fromkeys(NAMED, True) | {"rkl": False, "neyman": False}
    own = fastcl.Divergence("vlc", vlc)
    assert own.spreads(beta=0.1, mu=1.9) and not own.spreads(beta=0.1, mu=4.0)
    for name in ("beta", "mu"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            own.spreads(**{name: 0.0})


def square_conjugate(s):
    return s + 0.25 * maximum(minimum(s, 9.0), -9.0) * s


def test_the_cosine_takes_a_conjugate() -> None:
    x, y = (t.requires_grad_() for t in two_views(9, 5))
    with pytest.raises(
        ValueError, match=r"divergence: 'square' has no conjugate.*pass conjugate= to fastcl.Divergence"
    ):
        f_micl(x, y, divergence=fastcl.Divergence("square", pearson), similarity="cosine")
    own = fastcl.Divergence("square", pearson, conjugate=square_conjugate)
    a, b = (f_micl(x, y, divergence=d, similarity="cosine", alpha=2.0) for d in (own, "pearson"))
    close(a, b, rtol=1e-12)
    for got, want in zip(gradients(a, (x, y)), gradients(b, (x, y)), strict=True):
        close(got, want, rtol=1e-12)


def with_a_constant(u, p):
    return pow(u, p) - 1.0


def concave(u):
    return log(u)


def hardly_concave(u):
    return 1e-10 * (1.0 - u * u)


def not_zero_at_one(u):
    return u * u


def outside(u):
    return u**2 - 1.0


def local_of_an_intrinsics_name(u):
    exp = log(u)
    return u * exp


def argument_of_an_intrinsics_name(maximum):
    return maximum * log(maximum)


def tripled(f):
    @functools.wraps(f)
    def wrapper(u):
        return 3.0 * f(u)

    return wrapper


@tripled
def decorated(u):
    return u * log(u)


def by_math(u):
    return u * math.log(u)


def by_torch(u):
    return u * torch.log(u)


def by_an_import_of_its_surroundings():
    import cmath

    def f(u):
        return u * cmath.log(u)

    return f


def by_what_its_surroundings_assign_later():
    def f(u):
        return u * log(u) * k

    yield f
    k = 1.0


assigned = lambda u: u * log(u)  # noqa: E731

INFINITE, HUGE = float("inf"), 10**400


def infinite(u):
    return minimum(u * log(u), INFINITE)


def huge(u):
    return minimum(u * log(u), HUGE)


@pytest.mark.parametrize(
    ("f", "kind", "message"),
    [
        (local_of_an_intrinsics_name, ValueError, "f: expected names that no intrinsic has, got 'exp'; choose another"),
        (argument_of_an_intrinsics_name, ValueError, "f: expected names that no intrinsic has, got 'maximum'"),
        (decorated, ValueError, "f: expected a function by `def`, got one with a decorator"),
        (functools.partial(kl), ValueError, "f: expected a function by `def`, got partial"),
        (torch.exp, ValueError, "f: expected a function by `def`, got builtin_function_or_method"),
        (infinite, ValueError, "f: 'INFINITE' is outside the language"),
        (huge, ValueError, "f: 'HUGE' is outside the language"),
        (with_a_constant, ValueError, r"f: expected a function of one number, got \(u, p\)"),
        (concave, ValueError, r"f: expected a convex function, got a slope of .* at u = 0.0001"),
        (hardly_concave, ValueError, r"f: expected a convex function, got a slope of .* at u = 0.0001"),
        (not_zero_at_one, ValueError, "f: expected 0 at u = 1, got 1;"),
        (outside, ValueError, r"f: 'u \*\* 2' is outside the language \(.*line \d+, column 12\)"),
        (lambda u: u * log(u), ValueError, "f: expected a function by `def`, got a lambda; write it as one"),
        (assigned, ValueError, "f: expected a function by `def`, got a lambda; write it as one"),
        # Not "the file was edited after its import", though Python's code for them is another where the file imports the module.
        (by_math, ValueError, r"f: 'math.log\(u\)' is outside .*; expected log by its bare name, `from fastcl.equation.intr"),
        (by_torch, ValueError, r"f: 'torch.log\(u\)' is outside .*; expected log by its bare name, `from fastcl.equation.intr"),
        (by_an_import_of_its_surroundings(), ValueError, r"f: 'cmath.log\(u\)' is outside .*; expected log by its bare name"),
        (next(by_what_its_surroundings_assign_later()), ValueError, "f: expected numbers of .*, got 'k' of an enclosing function"),
        ("u log u", TypeError, "f: expected a function of one number, got str"),
    ],
)
def test_what_is_refused(f, kind, message) -> None:
    with pytest.raises(kind, match=message):
        fastcl.Divergence("mine", f)
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        fastcl.Divergence(3, kl)


def test_two_of_one_name_are_two() -> None:
    x, y = two_views(9, 5)
    first, second, again = (fastcl.Divergence("mine", f) for f in (kl, pearson, kl))
    assert first == again and first != second and hash(first) == hash(again)
    f_micl(x, y, divergence=second)
    close(f_micl(x, y, divergence=first), f_micl(x, y, divergence=again), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_and_wide_gaussians(dtype: torch.dtype) -> None:
    """u of 1e-21 at beta = 12, of 1e-87 at beta = 50; beyond 57 no power of u has room."""
    x, y = (t.to(dtype) for t in two_views(9, 5))
    for beta in (0.5, 12.0, 50.0):
        for name in ("kl", "jeffrey"):
            leaves = [[t.detach().to(d).requires_grad_() for t in (x, y)] for d in (dtype, torch.float64)]
            got, want = (
                f_micl(*rows, divergence=d, beta=beta, alpha=1.0)
                for rows, d in zip(leaves, (fastcl.Divergence(name, NAMED[name]), name), strict=True)
            )
            for a, b in zip(gradients(got, leaves[0]), gradients(want, leaves[1]), strict=True):
                there = b.abs() <= torch.finfo(dtype).max
                assert a[~there].isinf().all()
                a, b = a[there], b[there]
                assert (a.double() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm() + 1e-12


def quartic(u):
    return u * u * u * u - 4.0 * u + 3.0


def test_large_constants_of_the_gaussian() -> None:
    """u f'(u) and f(u) of 1e48 are both infinite in float32, and so is what they differ by."""
    own, (x, y) = fastcl.Divergence("quartic", quartic), two_views(9, 5)
    loss = f_micl(x.float(), y.float(), divergence=own, mu=1e12, alpha=1.0)
    assert loss == float("inf")


def test_gaussians_too_narrow() -> None:
    with pytest.raises(ValueError, match=r"beta: expected at most 57.5 with Divergence.*, got 60"):
        f_micl(*two_views(9, 5), divergence=fastcl.Divergence("kl", kl), beta=60)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_a_module_is_copied_pickled_and_compiled() -> None:
    loss = fastcl.losses.FMICLLoss(divergence=fastcl.Divergence("vlc", vlc), alpha=2.0)
    x, y = two_views(9, 5)
    want = loss(x, y)
    for other in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.compile(loss, backend="aot_eager", fullgraph=True),
    ):
        close(other(x, y), want, rtol=1e-12)
    assert "vlc_" in repr(loss)


def test_kernels_say_that_they_do_not_know_it() -> None:
    with pytest.raises(fastcl.BackendUnavailableError, match="has no kernel for the pair function 'kl_"):
        f_micl(*two_views(9, 5), divergence=fastcl.Divergence("kl", kl), backend="cpu")


def test_it_is_made_whatever_the_default_device() -> None:
    with torch.device("meta"):
        own = fastcl.Divergence("kl", kl)
        assert own.spreads(0.1)
    assert f_micl(*two_views(9, 5), divergence=own).isfinite()
