"""A divergence of the caller's own, from its f alone.

Of the Gaussian similarity u = e^l the conjugate is never needed by itself: f*(f'(u)) = u f'(u) - f(u), and f' is derived from the
text of f (derivative.py). So the potential of the negatives is text of the language too, and its slope is derived once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import intrinsics
from .arguments import positive_real
from .derivative import slope_text
from .language import INTRINSICS, SOURCE, Body
from .pairs import PairFunction

ON_CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # of what is looked at here, whatever the default is
LEAST = -230.0  # u = e^l stays above: u^-3 = 1e300 is a number of float64 there, as f' and f'' of 1 / u need
RETURN = "    return "
F = Callable[[Any], Any]


class Divergence:
    """An f-divergence for f_micl, written as its f alone.

        I_f = E_{p(x) p(y)} f(p(x, y) / (p(x) p(y))),   critic f'(u),   negatives f*(f'(u)) = u f'(u) - f(u)

    Each is worked out as it stands: where u f'(u) and f(u) cancel, their digits do. The nine names of f_micl have closed forms. It
    goes into the kernels as every pair function of one's own does.

    Source: Lu et al. 2023 (arXiv 2402.10150), eq. objective_sample; f*(f'(u)) by Legendre.

    Args:
        name: what errors call it.
        f: a function f(u) of one number u > 0, convex, with f(1) = 0, in the language of pair functions: + - * /, numbers, local
            names and the intrinsics of fastcl.equation.intrinsics. Its source is read, so that it stands in a file, by `def`.
        conjugate: f*(s) in the same language, for similarity="cosine", which has s in [-1, 1]; keep s inside the domain of f*
            by minimum and maximum. None where that similarity is not asked for.

    Raises:
        ValueError: f uses something outside the language (with line and column), is not convex, or is not 0 at 1.
        TypeError: name is no string, or f no function.

    Examples:
        >>> from fastcl.equation.intrinsics import log
        >>> def triangular(u):
        ...     return (u - 1.0) * (u - 1.0) / (u + 1.0)
        >>> divergence = fastcl.Divergence("triangular", triangular)
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.f_micl(x, x, divergence=divergence, alpha=1.0)), 4)
        -0.9432
        >>> divergence.spreads()
        True
    """

    known: ClassVar[dict[str, Divergence]] = {}  # one for each key; two of one key are equal

    def __init__(self, name: str, f: F, conjugate: F | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}; pass what errors shall call it")
        for argument, given in (("f", f), ("conjugate", conjugate)):
            if not (callable(given) or (argument == "conjugate" and given is None)):
                raise TypeError(
                    f"{argument}: expected a function of one number, got {type(given).__name__}; write it by def"
                )
        self.name, self.f, self.conjugate = name, f, conjugate
        body = _body("f", f)
        self._slope = _made("slope", slope_text(body))
        self._check()
        of_slope = _body("f'", _made("value", slope_text(body).replace("def slope(", "def value(", 1)))
        self.pair = _pair(name, _potential(body, of_slope))
        self.of_cosine = None
        if conjugate is not None:
            of_cosine = _body("conjugate", conjugate)
            text = "\n".join([f"def value({of_cosine.argument}):", *_statements(of_cosine), ""])
            self.of_cosine = _pair(f"{name}_conjugate", {"value": text})
        self.key = " ".join(pair.name for pair in (self.pair, self.of_cosine) if pair is not None)
        self.known.setdefault(self.key, self)

    def critic(self, l: Tensor) -> Tensor:
        """f'(e^l), elementwise."""
        slope = self._slope(torch.exp(l.clamp(min=LEAST)))
        return slope if isinstance(slope, Tensor) else torch.full_like(l, slope)

    def spreads(self, beta: float = 1.0, mu: float = 1.0) -> bool:
        """Whether the negatives are strictly convex in the squared distance of unit rows, as the theorem of uniformity asks.

        Equivalently u^2 f''(u) rises on (mu e^{-4 beta}, mu); looked at on a grid.

        Args:
            beta: inverse width > 0 of the Gaussian.
            mu: constant > 0 of the Gaussian.

        Raises:
            ValueError: for a beta or a mu that is not > 0.
            TypeError: for one that is no number.
        """
        beta, mu = (positive_real(name, value) for name, value in (("beta", beta), ("mu", mu)))
        top = torch.tensor(mu, **ON_CPU).log()
        slopes = self.pair.df(torch.linspace(-4.0 * beta, 0.0, 401, **ON_CPU) + top)
        return bool((slopes.diff() > 1e-12 * slopes.abs().max()).all())

    def __repr__(self) -> str:
        return f"Divergence({self.pair.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Divergence) and (self.pair, self.of_cosine) == (other.pair, other.of_cosine)

    def __hash__(self) -> int:
        return hash(self.pair.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Divergence, (self.name, self.f, self.conjugate)

    def _check(self) -> None:
        u = torch.logspace(-4, 2, 601, **ON_CPU)
        slopes = self.critic(u.log())
        at_one = float(self.f(torch.ones((), **ON_CPU)))
        if not abs(at_one) <= 1e-9:
            raise ValueError(
                f"f: expected 0 at u = 1, got {at_one:.6g}; subtract it (the divergence of equal distributions is 0)"
            )
        size = slopes[(u > 0.5) & (u < 2.0)].abs().max()  # f times a small number is as convex as f
        falls = ~(slopes.diff() >= -1e-9 * (size + slopes[1:].abs()))
        if falls.any():
            k = int(falls.nonzero()[0])
            raise ValueError(
                f"f: expected a convex function, got a slope of {float(slopes[k]):.6g} at u = {float(u[k]):.4g} and of "
                f"{float(slopes[k + 1]):.6g} at {float(u[k + 1]):.4g}; -f may be what is meant"
            )


def _potential(f: Body, slope: Body) -> dict[str, str]:
    """The texts of psi(l) = u f'(u) - f(u), u = e^l, and of its slope u^2 f''(u). f' comes first: f may assign u anew."""
    first, second = slope_text(f), slope_text(slope)
    given, found = (_fresh(word, first + second + repr(_statements(f))) for word in ("u_of_l", "f_slope"))
    opening = [f"    {given} = exp(maximum(log_u, {LEAST}))", f"    {f.argument} = {given}"]
    *lines, returned = first.splitlines()[1:]
    value = [*opening, *lines, f"    {found} = {returned.removeprefix(RETURN)}", *_statements(f)]
    value[-1] = f"{RETURN}{given} * {found} - ({value[-1].removeprefix(RETURN)})"
    *lines, returned = second.splitlines()[1:]
    weight = [*opening, *lines]
    weight.append(f"{RETURN}select_less(log_u, {LEAST}, 0.0, {given} * {given} * ({returned.removeprefix(RETURN)}))")
    return {
        "value": "\n".join(["def value(log_u):", *value, ""]),
        "slope": "\n".join(["def slope(log_u):", *weight, ""]),
    }


def _fresh(word: str, text: str) -> str:
    while word in text:
        word += "_"
    return word


def _statements(body: Body) -> list[str]:
    """The lines of a checked body, with the numbers of its module in it."""
    names, lines = {body.argument: body.argument}, []
    for name, value in body.assignments:
        lines.append(f"    {name} = {body.expression(value, repr, '', names)}")
        names[name] = name
    return [*lines, RETURN + body.expression(body.returned, repr, "", names)]


def _body(argument: str, f: F) -> Body:
    """A checked function of one number."""
    body = Body(type(argument, (), {"value": staticmethod(f)}), "value", where=argument)
    body.check()
    if body.constants:
        given = ", ".join([body.argument, *body.constants])
        raise ValueError(
            f"{argument}: expected a function of one number, got ({given}); let numbers of its module be the others"
        )
    return body


def _pair(name: str, texts: dict[str, str]) -> PairFunction:
    """The pair function of checked texts, under a name that says which they are: two of one name are two."""
    key = f"{name}_{hashlib.sha256(repr(texts).encode()).hexdigest()[:12]}"
    if (known := PairFunction.registry.get(key)) is not None:
        return known()
    methods = {method: staticmethod(_made(method, text)) for method, text in texts.items()}
    pair: PairFunction = type(name, (PairFunction,), {"listed": False, **methods}, name=key)()
    return pair


def _made(method: str, text: str) -> F:
    names: dict[str, Any] = {word: getattr(intrinsics, word) for word in INTRINSICS}
    exec(compile(text, f"<{method}>", "exec"), names)  # of a checked tree: nothing but the language is in it
    function: F = names[method]
    setattr(function, SOURCE, text)
    return function
