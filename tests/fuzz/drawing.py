"""The arguments of one call, drawn: rows of every size, layout, norm and dtype, numbers, groups, masks, pair functions.

Sizes lie around the edges of every tile; most rows have norms near 1, a few any that float32 holds.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from hypothesis import strategies as st

import fastcl
from fastcl.backends import choice
from fastcl.equation.masks import KINDS
from fastcl.equation.pairs import PairFunction

from .case import Case
from .public import BY_CALL, names_of

Draw = Callable[[Any], Any]
FLOATS = ("float32", "float32", "float32", "bfloat16", "float16", "float64")
NEAR, FAR = (15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65), (127, 128, 129, 255, 256, 257)
small, edges, large = st.integers(2, 9), st.sampled_from(NEAR), st.sampled_from((*FAR, *FAR, 300, 513))
sizes = st.one_of(*[small] * 5, *[edges] * 5, large, st.sampled_from((2, 3, 0, 1)))
widths = st.one_of(*[small] * 4, *[edges] * 4, st.sampled_from(FAR), st.sampled_from((0, 1)))
# Powers of ten of a norm: most rows are near 1, some losses take any. At the edges norms are clamped, squares leave float32, and
# parts of a float do.
extreme = st.sampled_from((-37, -34, -20, -15, -13, -12, -12, 18, 19, 20, 37))
exponents = st.one_of(*[st.just(0)] * 6, *[st.integers(-4, 4)] * 2, st.integers(-37, 37), extreme)


class Drawing:
    """One case being drawn."""

    def __init__(self, draw: Draw, path: str, dtype: str) -> None:
        self.draw, self.path, self.dtype = draw, path, dtype
        self.statements: list[str] = []
        self.wants: list[str] = []
        self.first: str | None = None
        self.n, self.d = draw(sizes), draw(widths)
        self.exponent = min(max(draw(exponents), -4), 3) if dtype == "float16" else draw(exponents)

    def maybe(self, percent: int) -> bool:
        return bool(self.draw(st.integers(0, 99)) >= 100 - percent)

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def rows(self, name: str, n: int, plain: bool = False) -> str:
        """A matrix (n, d): its statements, and its name. Without specials its norms are near 10^exponent."""
        d, say = self.d, self.statements.append
        size = 1.0 if plain else 10.0**self.exponent
        say(f"{name} = {(3.0 / max(d, 1)) ** 0.5 * size:.3g} * rows({n}, {d}, {self.draw(st.integers(0, 9))})")
        if (
            self.first is not None and self.n and n and self.maybe(40)
        ):  # near another input: aligned positives, or the same rows
            say(
                f"{name} = {self.first}.double()[torch.arange({n}) % {self.n}] + {self.one_of('0', '1e-3', '0.3')} * {name}"
            )
        if n and d and not plain:
            for _ in range(self.one_of(0, 0, 1, 1, 2)):
                say(self._special(name, n, size))
        say(f"{name} = {name}.to(torch.{self.dtype})")
        if n and d and not plain:
            self._layout(name, n)
        self.first = self.first or name
        return name

    def _special(self, name: str, n: int, size: float) -> str:
        i, p = self.draw(st.integers(0, n - 1)), self.draw(st.integers(1, 3))
        power = self.one_of(-37, -12, -12, -6, -3, -1, 1, 2, 3, 6, 6, 7, 7, 12)
        return self.one_of(
            *[f"{name}[{i}] *= 1e{power}"] * 3,
            f"{name}[{i}] = 0",
            f"{name} = {name}[torch.arange({n}) % {p}]",
            f"{name} = {name}[torch.arange({n}) % {p}] + 1e-{p} * {name}",  # classes that are nearly points
            f"{name} = {name}[torch.arange({n}) // 2] * (1 - 2 * (torch.arange({n}) % 2))[:, None]",
            f"{name} = {name} * torch.logspace(-{p}, {p}, {n}, dtype=torch.float64)[:, None]",
            f"{name} = {name} + {p * size:.3g}",
            f"{name} = {name} + {10**p * size:.3g}",
            f"{name} = {name} / {name}.norm(dim=1, keepdim=True).clamp(min=1e-300) * {size:.3g}",
        )

    def _layout(self, name: str, n: int) -> None:
        how = self.one_of(
            "", "", "", "", "t", "rows", "columns", "offset", *(("expanded", "one column") if self.d > 1 else ())
        )
        text = {
            "t": f"{name}.T.contiguous().T",
            "rows": f"{name}.repeat_interleave(2, 0)[::2]",
            "columns": f"{name}.repeat_interleave(2, 1)[:, ::2]",
            "expanded": f"{name}[:1].expand({n}, -1)",
            "offset": f"torch.cat([{name}.new_zeros(3), {name}.flatten()])[3:].view({n}, {self.d})",
            "one column": f"{name}[:, :1].expand(-1, {self.d})",
        }
        if how:
            self.statements.append(f"{name} = {text[how]}")

    def groups(self, name: str, n: int) -> str:
        """One int64 a row: all alike, all apart, pairs, a few, one stranger."""
        k = self.draw(st.integers(1, 5))
        index = f"torch.arange({n})"
        text = self.one_of(
            f"{index} % {k}",
            f"{index} // 2",
            f"{index} * 0 - 7",
            f"{index} * 10**12",
            f"{index} * 2**32",
            f"{index} * 0 - 7",
            f"({index} == {n // 2}).long()",
            f"{index}.clamp(max=2)",
            f"{index} // {k + 1}",
        )
        self.statements.append(f"{name} = {text}")
        return name

    def number(self, said: str, default: Any) -> float:
        """What the line of the docstring allows: near the default, or anywhere in range."""
        usual = default if isinstance(default, (int, float)) and default is not True else 1.0
        if "[0, 1)" in said:
            return float(self.one_of(usual, 0.0, 0.01, 0.1, 0.5, 0.9))
        if "(0, 1]" in said:
            return float(self.one_of(usual, 1.0, 0.01, 0.1, 0.5, 0.9))
        near = usual * 10.0 ** (self.draw(st.integers(-20, 20)) / 20.0)
        anywhere = 10.0 ** (self.draw(st.one_of(st.integers(-120, -20), st.integers(-120, 120))) / 40.0)
        positive = "> 0" in said or "> 1" in said or ">= 0" in said
        if not positive and self.maybe(20):
            return float(self.one_of(0.0, 1.0, -1.0, -near, -anywhere, 0.5, 2.0))
        return float(f"{self.one_of(usual, near, near, anywhere, anywhere):.3g}")

    def scalar(self, name: str, said: str, default: Any, learned: bool = False) -> str:
        """A number, or a tensor with one element, which may want gradients."""
        value = self.number(said, default)
        if self.dtype != "float64":
            value = min(max(value, -3e38), 3e38)
        if self.maybe(60):
            return self.one_of("{!r}", "{!r}", "{!r}", "numpy.float32({!r})", "numpy.array({!r})").format(value)
        dtype = self.one_of(*["float32"] * 8, "float64", "float64", "bfloat16", "float16")
        if dtype == "float16":
            value = min(max(value, 1e-3), 6e4) if value > 0 else value
        tensor = f"torch.tensor({value!r}, dtype=torch.{dtype})"
        tensor = f"{tensor}.view(1)" if self.maybe(20) else tensor
        self.statements.append(f"{name} = torch.nn.Parameter({tensor})" if learned else f"{name} = {tensor}")
        if self.maybe(60) or learned:
            self.wants.append(name)
        return name

    def arguments(
        self, parameters: Sequence[inspect.Parameter], said: dict[str, str], learned: bool = False
    ) -> dict[str, str]:
        """Arguments as text, by annotation."""
        given: dict[str, str] = {}
        for p in parameters:
            about, kind = said.get(p.name, ""), str(p.annotation)
            optional = p.default is None
            if p.name in BY_CALL or (optional and not self.maybe(50)):
                continue
            if p.name == "positives":
                m = len_of(self, given.get("y"))
                if self.n and m and self.maybe(50):
                    given[p.name] = self.positives(m)
                continue
            if p.name == "matches":
                m, n = len_of(self, given.get("y")), max(self.n, 1)
                text = self.one_of("{0} % {1}", "{0} * 3 % {1}", "({0} * 5 + 2) % ({1} + 1) - 1", "{0} * 0")
                given[p.name] = text.format(f"torch.arange({m})", n)
                continue
            if "Tensor" in kind and "float" not in kind:
                many = self.length(about, optional, given.get("y"))
                if "int64" in about:
                    given[p.name] = self.groups(p.name, many)
                elif about.lstrip().startswith("(d,"):
                    given[p.name] = self.square(p.name)
                elif narrow := re.match(r"\s*\(n, (\d+)\)", about):
                    self.statements.append(f"{p.name} = (3.0 * rows({many}, {narrow[1]}, 4) - 2.0).float()")
                    given[p.name] = p.name
                else:
                    given[p.name] = self.rows(p.name, many)
                    if self.maybe(80):
                        self.wants.append(p.name)
            elif "float" in kind and "Tensor" in kind:
                given[p.name] = self.scalar(p.name, about, p.default, learned)
            elif p.name == "false_negative_margin":  # what no rounding decides
                given[p.name] = repr(self.one_of(2.5, 2.5, -2.5))
            elif "float" in kind:
                given[p.name] = repr(self.number(about, p.default))
            elif kind == "bool":
                given[p.name] = repr(self.one_of(True, False))
            elif kind == "int":
                given[p.name] = repr(self.d if p.default is p.empty else p.default)
            elif p.name == "margin_strategy":
                continue  # a relative margin may be as small as a rounding
            elif p.name == "guide":
                if "false_negative_margin" in given:
                    given[p.name] = guides(self, self.n, len_of(self, given.get("y")))
            elif allowed := names_of(self.path, p.name):
                given[p.name] = repr(self.one_of(*allowed))
        if "positives" in given:  # in their place
            for name in ("groups", "pairs", "false_negative_margin", "guide"):
                given.pop(name, None)
        return given

    def positives(self, m: int) -> str:
        """Pairs by their indices, some of them twice, with weights or without; of views in one their own pairs are none."""
        n, k = max(self.n, 1), self.draw(st.integers(1, 2 * max(self.n, 1)))
        index, step = f"torch.arange({k})", self.one_of(1, 3, 5)
        i, j = f"{index} * {step} % {n}", f"({index} * 2 + 1) % {max(m, 1)}"
        if self.path.endswith("nt_xent"):
            i, j = f"{index} % {2 * n}", f"({index} + 1 + {index} // {2 * n}) % {2 * n}"
        return f"({', '.join([i, j, *([f'({index} % 3).float()'] if self.maybe(40) else [])])})"

    def length(self, about: str, optional: bool, y: str | None) -> int:
        """How many rows a line of the docstring gives an argument: (n, ...), (m, ...) or (max(n, m), ...)."""
        first = (re.match(r"\s*\((\w+(?:\(n, m\))?),", about) or ["", "n"])[1]
        if first == "m" and not optional:
            if "m = n without" in about and self.maybe(70):  # else it goes with what may be absent
                return self.n
            return (
                self.n + self.draw(st.integers(0, 20))
                if "m >= n" in about
                else self.draw(st.one_of(st.just(self.n), sizes))
            )
        m = len_of(self, y)
        return {"m": m, "max(n, m)": max(self.n, m)}.get(first, self.n)

    def square(self, name: str) -> str:
        """(d, d), the second moment of some rows."""
        self.statements += [
            f"{name} = rows({2 * self.d + 1}, {self.d}, 5)",
            f"{name} = ({name}.T @ {name} / {2 * self.d + 1}).float()",
        ]
        if self.dtype == "float64":
            self.statements.append(f"{name} = {name}.double()")
        return name

    def case(self, **more: Any) -> Case:
        return Case(self.path, statements=tuple(self.statements), wants=tuple(self.wants), **more)


def len_of(drawing: Drawing, name: str | None) -> int:
    """The rows of an input that is drawn already."""
    found = [re.match(rf"{name} = \S+ \* rows\((\d+),", s) for s in drawing.statements]
    found = [match for match in found if match]
    return int(found[0][1]) if name and found else drawing.n


def mask(drawing: Drawing, n: int, m: int, alone: bool, limited: int = 20) -> str:
    """A mask as text, so many per cent with limits: infinite ones, and numbers that no rounding of a logit near 1 crosses."""
    text = indices(drawing, n, m, alone)
    if not drawing.maybe(limited):
        return text
    limits = {"guide": guides(drawing, n, m, alone)} if drawing.maybe(50) else {}
    finite = ("0.5", "2.5", "-1.5") if limits else ("1e30", "-1e30")
    for name, count in (("limit_x", n), ("limit_y", 0 if alone else m)):
        if name == "limit_x" or (not alone and drawing.maybe(50)):
            inside, outside = drawing.one_of("inf", "inf", finite[0]), drawing.one_of("-inf", "inf", *finite[1:])
            every = drawing.draw(st.integers(1, 5))
            limits[name] = f"torch.where(torch.arange({count}) % {every} == 0, float({outside!r}), float({inside!r}))"
    return f"fastcl.at_most({', '.join(f'{name}={value}' for name, value in limits.items())}, mask={text})"


def guides(drawing: Drawing, n: int, m: int, alone: bool = False) -> str:
    """Guides of small whole numbers, whose products every dtype holds, as text."""
    k, dtype = drawing.draw(st.integers(1, 20)), drawing.one_of(*FLOATS)
    both = (f"(torch.arange({count * k}) * {step} % 7 % 4 - 1).view({count}, {k}).to(torch.{dtype})"
            for count, step in zip((n, m), (drawing.one_of(1, 3, 5), 2), strict=True))  # fmt: skip
    first, second = both
    return first if alone else f"({first}, {second})"


def indices(drawing: Drawing, n: int, m: int, alone: bool) -> str:
    """A mask without limits."""
    kind = drawing.one_of(*KINDS)
    if kind == "off_diagonal" and drawing.maybe(50) and not alone:
        return f"fastcl.off_diagonal({drawing.draw(st.integers(0, 9))}, {drawing.draw(st.integers(0, 9))})"
    if not kind.endswith("groups"):
        return repr(kind)
    both = [drawing.groups("group_x", n)] + ([] if alone else [drawing.groups("group_y", m)])
    return f"fastcl.{kind}({', '.join(both)})"


# To base 2: how far below the bound of z a log-sum-exp may lie, in csrc/cpu/range.h, before a kernel takes another form.
EDGES = (126, 160, 190)


def distance(drawing: Drawing, names: Sequence[str], mask: str) -> str:
    """A scale of <x, y>, by which the row farthest below the bound of z, |a| |x| |y|, is about an edge below it."""
    tensors = drawing.case().tensors()
    sides = [tensors[name].double() for name in names]
    bound = math.prod(float(sides[k].norm(dim=1).max()) if len(sides[k]) else 0.0 for k in (0, -1))
    if not 1e-30 < bound < 1e30:
        return "1.0"
    steep = 1e9 / bound  # there a log-sum-exp is its largest term
    visits = eval(mask, {"torch": torch, "fastcl": fastcl, **tensors})
    r = fastcl.pair_reduce(*sides, scale=steep, mask=visits, backend="reference") / steep
    below = (bound - r[r.isfinite()].detach()).clamp(min=1e-6 * bound)
    nats = (drawing.one_of(*EDGES) - drawing.draw(st.integers(-80, 120)) / 10.0) * math.log(2.0)
    steepness = min(max(nats / float(below.max()), 1e-37), 3e38) if len(below) else 1.0
    value = repr(float(f"{steepness:.6g}"))
    if drawing.maybe(60):
        return value
    drawing.statements.append(f"scale = torch.tensor({value})")
    drawing.wants += ["scale"] if drawing.maybe(60) else []
    return "scale"


def pair(drawing: Drawing) -> str:
    """A pair function as text, with constants in its range."""
    known = [name for name, cls in PairFunction.registry.items() if cls.built_in]
    # Two have closed forms, which cancel where sweeps do not.
    cls = PairFunction.registry[drawing.one_of(*known, *("identity", "square") * 4)]
    constants = {
        # In float32 2 - exp(log 2 - eps) is 2 eps to within 1.2e-7: at an eps of 1e-6 that alone is 6%.
        f.name: f"{drawing.one_of(1e-5, 1e-3, 0.1)}"
        if f.name == "eps"
        else f"{drawing.one_of(-2.0, -1.0, -0.5, 0.5, 1.5, 2.0, 3.0)}"
        for f in fields(cls)
    }
    return f"fastcl.pairs.{cls.__name__}({', '.join(f'{k}={v}' for k, v in constants.items())})"


def way(drawing: Drawing) -> dict[str, Any]:
    """How it is called: backend, upstream gradient, autocast."""
    backends = [
        name
        for name in ("cpu", "cpu", "blocked", "blocked", "reference")
        if choice.reason(name, torch.device("cpu"), torch.float32) is None
    ]
    found: dict[str, Any] = {"backend": drawing.one_of("auto", *backends)}
    found["upstream"] = float(drawing.one_of(1.0, 1.0, 1.0, -2.0, 1e-3, 1e3, 65536.0))
    metric = drawing.path.startswith("metrics")
    if drawing.dtype != "float64" and drawing.maybe(40 if metric else 20):
        inside = "forward" if metric else drawing.one_of("forward", "both", "backward", "backward")
        found |= {"autocast": drawing.one_of("bfloat16", "bfloat16", "float16"), "inside": inside}
    found["threads"] = drawing.one_of(1, 1, 1, 3)
    if found["backend"] == "blocked":  # tiles of a few rows, of which matrices of the sizes that are drawn have several
        found["workspace"] = drawing.one_of("", "0.0005", "0.002", "0.02")
    return found
