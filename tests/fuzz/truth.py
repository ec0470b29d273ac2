"""What a case is compared with: T, its float64 definition, draws of P and C (rule.py says what they are), and what is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy
import torch
from torch import Tensor

from .case import Case, Found, run
from .formula import rows
from .plain import EXACT, Plain, clamped_as, plainly, precision
from .rule import Fault, Terms, compare

TIES = (1.0, 0.25, 4.0)  # which of the similarities near that margin tie is for a rounding to say
DRAWS = (2, 32, 128)  # of P and C: a few first, more before something is called wrong


class Truth:
    """The definition of a case in float64, and, once asked for, how far plain PyTorch and one rounding are from it."""

    def __init__(self, case: Case) -> None:
        # A direction and a gradient of a gradient are taken on plain PyTorch, which shares no rule of ours with them.
        plain = case.derive in ("jvp", "twice")
        self.case = replace(
            case,
            compiled=False,
            sizes=(1,),
            threads=1,
            held=case.held
            if case.held in (case.settings or {})
            else "",  # what a property states is exact, a parameter float32
            derive=case.derive if plain else "grad",
        )
        self.alone = len(case.sizes) < 2
        self.times = len(case.sizes) if case.gradient == "ddp" else 1  # how much larger a gradient is than here
        # And than it is of a total, whose gradients are formed with its value, for an upstream gradient of 1.
        upstream = abs(case.upstream * float(rows(1, 1, 9)))
        self.first = 1.0 / upstream if case.function != "pair_reduce" and 0.0 < upstream < 1.0 else 1.0
        # Autocast of an objective rounds its rows (as documented), and nothing in a backward; a metric keeps its precision.
        rounds = case.around_forward and not case.function.startswith("metrics")
        self.plain_case = replace(self.case, inside="forward") if rounds else replace(self.case, autocast="")
        dtypes = [t.dtype for t in matrices(case) if t.is_floating_point()]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        plain_autocast = self.plain_case.autocast
        halves = (
            [getattr(torch, plain_autocast)] if plain_autocast else [t for t in dtypes if torch.finfo(t).bits == 16]
        )
        self.halves = bool(halves)
        self.overflowing = case.derive == "twice" and torch.float16 in halves  # which has no loss scaling of ours
        self.of_both_signs = any(name in case.function.lower() for name in ("minc", "f_micl", "fmicl"))
        # A gradient has the dtype of its leaf, and so have the weights of the sum that is differentiated again.
        leaves = [case.tensors()[name].dtype for name in case.wants if case.derive == "twice"]
        self.eps = max(torch.finfo(t).eps for t in (self.dtype, *halves, *leaves))
        with clamped_as(self.dtype), plainly(Plain() if plain else None):
            self.found = run(replace(self.case, autocast=""), double, "reference", number=plain_number)
        self.on_gpu = case.backend in ("triton", "cuda")
        self.unscaled = self.on_gpu or case.function not in ("pair_reduce", "pair_total")
        self.samples: list[tuple[Found, Found]] = []
        self.largest = self.largest_exponent = 0.0  # |z|, and that of log-sum-exps, as far as it was looked at

    def draws(self, count: int) -> list[tuple[Found, Found]]:
        """The first `count` of (P, C)."""
        while len(self.samples) < count:
            k = len(self.samples)
            self.samples.append((self._plainly(k), self._moved(k)))
        return self.samples[:count]

    def _plainly(self, k: int) -> Found:
        eps = torch.finfo(self.dtype).eps

        def change(name: str, t: Tensor) -> Tensor:
            if t.dim() < 2 and torch.finfo(t.dtype).bits == 16 and self.case.derive != "twice":
                t = like(t, t.float())  # numbers keep their precision
            # Rows keep it in every other draw: what half-precision gradients of equal terms leave is 0, or their float32 rounding.
            # Numbers keep it in all, but where their own gradient, in their dtype, is differentiated again.
            number = t.dim() < 2 and t.numel() == 1 and self.case.derive != "twice"
            t = like(t, t.to(self.dtype)) if number or k % 2 else t
            return moved(t, name, k, eps) if k and t.dtype == self.dtype else t

        # By DDP's convention gradients are a world larger on their way, and leave a half dtype earlier.
        larger = replace(self.plain_case, upstream=self.plain_case.upstream * self.times)
        units, unit = (2.0, eps) if k else (0.0, 0.0)
        engine = Plain(
            k,
            units,
            rounds_weights=self.on_gpu,
            unscaled=self.unscaled,
            unit=unit,
            exact=EXACT if self.alone else math.inf,
        )
        with plainly(engine), clamped_as(self.dtype, TIES[k % 3]):
            found = run(larger, change)
        return Found(found.values, {name: g / self.times for name, g in found.gradients.items()})

    def _moved(self, k: int) -> Found:
        def number(name: str, value: Any) -> Any:
            exact = not isinstance(value, float) or value in (0.0, 1.0, 2.0)
            # Equal ones alike: a scale may be its own bound.
            return (
                value
                if exact
                else value * (1.0 + torch.finfo(self.dtype).eps * float(rows(1, 1, k + len(repr(value)))))
            )

        metric = self.case.function.startswith("metrics")  # whose unit rows are in the accumulation dtype
        unit = torch.finfo(self.dtype).eps if metric else self.eps
        engine = Plain(k, 1.0, precision(self.dtype), dot=False, unit=unit, unscaled=self.unscaled)
        least = torch.finfo(self.dtype).tiny ** 0.5
        if self.plain_case.autocast:  # which rounds what is small to whole subnormals
            limits = torch.finfo(getattr(torch, self.plain_case.autocast))
            least = max(least, limits.smallest_normal * limits.eps)
        with plainly(engine), clamped_as(self.dtype, TIES[k % 3]):
            found = run(
                replace(self.case, autocast=""),
                lambda name, t: moved(double(name, t), name, k, self.eps, least),
                number=number,
            )
        self.largest = max(self.largest, engine.largest)
        self.largest_exponent = max(self.largest_exponent, engine.largest_exponent)
        return found

    def most_rows(self) -> int:
        """Of a matrix of the case."""
        return max(map(len, matrices(self.case)), default=1)

    def beyond(self) -> bool:
        """Whether some |z|, or the terms that it is the sum of, are beyond the dtype, or rows beyond that of autocast."""
        if self.plain_case.autocast:
            end = torch.finfo(getattr(torch, self.plain_case.autocast)).max
            if any(float(t.abs().max()) > end for t in matrices(self.case) if t.numel()):
                return True
        engine = Plain(unscaled=self.unscaled, uncentred=self.on_gpu and self.halves)
        with plainly(engine):
            run(replace(self.case, autocast=""), double)
        # Objectives add up such terms of all rows, with either sign.
        terms = self.most_rows() if self.unscaled and not self.on_gpu else 1
        return not max(engine.largest * terms, matching(self.case)) < torch.finfo(self.dtype).max

    def fault(self, found: Found) -> Fault | None:
        """The worst of what is wrong with it, or None."""
        for count in (0, *DRAWS):
            faults = list(self._faults(found, count))
            if not faults:
                return None
        if self.beyond():
            return None
        return max(faults, key=lambda f: (f.allowed == 0.0, f.error / max(f.allowed, 1e-300)))

    def weights_are_any(self) -> bool:
        """Whether z of two sweeps rounds apart: the interpreter multiplies tiles of another shape in another order.

        Beyond 1 / eps of float64 the definition's own log-sum-exp is its largest term, however many there are: weights of two equal
        ones are 1, not 1/2.
        """
        apart = self.case.backend == "triton" and self.largest * torch.finfo(self.dtype).eps > 1e-3
        return apart or self.largest_exponent * torch.finfo(torch.float64).eps > 0.1

    def _natural(self, where: str) -> Tensor | float:
        """|L| / |leaf|, or of a row |L| / (n |x_i|): the size of the terms that its gradient is the sum of."""
        name = where.removeprefix("gradient of ")
        if name not in self.found.gradients:
            return 0.0
        leaf = self.case.tensors().get(name, torch.ones(()))  # a module's own parameter is near 1
        value = sum(float(v.abs().nan_to_num(0, 0, 0).sum()) for v in self.found.values) * abs(self.case.upstream)
        if name.startswith("value"):  # along a direction, in which each z moves by as much as it is
            value = max(value, self.largest * abs(self.case.upstream))
        size = (
            leaf.detach().double().abs().reshape(-1)
            if leaf.dim() < 2
            else leaf.detach().double().norm(dim=1) * len(leaf)
        )
        if (
            self.case.derive == "twice"
        ):  # whose terms are |z| |L| / |leaf|^2, and cancel where those of a log-sum-exp are equal
            value, size = value * max(1.0, self.largest_exponent), size * size
        return torch.where(size > 0.0, value / size, 0.0)

    def _undecided(self, count: int) -> bool:
        """Whether one rounding moves a value by a tenth, or to where it is undefined: a side of a clamp is for it to say."""
        if at_the_least_length(self.case, self.eps):
            return True
        drawn = [zip(self.found.values, c.values, strict=True) for _, c in self.draws(count)]
        return any(
            bool((((c - v).abs() > 0.1 * v.abs().clamp(min=10.0)) | (c.isnan() & ~v.isnan())).any())
            for values in drawn
            for v, c in values
        )

    def _constants(self) -> float:
        """What float64 makes of an objective's own constants, which may cancel: 1, or a number that it was given.

        Of a histogram, half a bin: whichever side of an edge those are counted on that lie on it.
        """
        if self.case.function.endswith("wasserstein_uniformity"):
            return 0.5 / float(self.case.keywords.get("bins", 1 << 16))
        given = self.case.function not in ("pair_reduce", "pair_total")
        tensors = [t.detach() for t in self.case.tensors().values() if isinstance(t, Tensor)]
        numbers = [abs(float(t)) for t in tensors if t.numel() == 1 and t.dim() < 2]
        numbers += [abs(float(text)) for text in self.case.keywords.values() if _is_number(text)]
        # Beyond a thousand a number is none that a constant of an objective has.
        own = 64.0 * torch.finfo(torch.float64).eps * max([1.0, *(n for n in numbers if n <= 1e3)]) if given else 0.0
        return own + of_equal_rows(self.case, self.eps)

    def _of_cancelling(self, where: str) -> Tensor | float:
        """What the definition's own gradient of a number or a row is off by: weights, each to eps |z| of float64, are times z.

        Of a row in a half dtype, what each of two gradients is rounded by that cancel: of a positive and of a log-sum-exp.
        """
        leaf, z = self.case.tensors().get(where.removeprefix("gradient of ")), self.largest_exponent
        if not isinstance(leaf, Tensor):
            return 0.0
        if leaf.dim() == 2:
            keywords = (self.case.settings or {}) | self.case.keywords
            rows_of_mean = len(leaf) if keywords.get("reduction", "'mean'") == "'mean'" else 1
            size = leaf.detach().double().norm(dim=1).clamp(min=1e-12) * rows_of_mean
            each = self.eps * (self.halves and not {"labels", "positives"} & {*self.case.tensors(), *keywords})
            return (4.0 * torch.finfo(torch.float64).eps * z + 8.0 * each) * abs(self.case.upstream) * z / size
        if leaf.numel() != 1 or leaf.dim() > 1:
            return 0.0
        terms = self.most_rows() * abs(self.case.upstream) * z / max(abs(float(leaf.detach())), 1e-30)
        return 4.0 * torch.finfo(torch.float64).eps * z * terms

    def _underflow(self) -> float:
        """What weights lose below the smallest number, times rows and the scale; a GPU's products with rows lose as much, too."""
        given = {"scale": "1.0"} | self.case.keywords
        scale = self.case.tensors().get("scale", given["scale"] if _is_number(given["scale"]) else 1.0)
        longest = max((float(t.double().norm(dim=1).max()) for t in matrices(self.case) if t.numel()), default=1.0)
        # Those of a total are formed with its value, for an upstream gradient of 1.
        times = max(1.0, abs(self.case.upstream)) * self.most_rows() * max(longest, float(self.on_gpu))
        return torch.finfo(self.dtype).smallest_normal * abs(float(scale)) * times

    def _smoothing(self, where: str) -> Tensor | float:
        """Of label smoothing: the mean of all z is taken out of a log-sum-exp of theirs, and one row has nothing but the two."""
        text = ((self.case.settings or {}) | self.case.keywords).get("label_smoothing", "0")
        share = float(text) if _is_number(text) else 1.0
        terms = 4.0 * self.eps * share * self.largest
        if where.startswith("value") or not share:
            return terms
        leaf = self.case.tensors().get(where.removeprefix("gradient of "), torch.ones(())).detach().double()
        size = leaf.abs().reshape(-1) if leaf.dim() < 2 else leaf.norm(dim=1)
        return terms * abs(self.case.upstream) / size.clamp(min=1e-12)

    def _faults(self, found: Found, count: int) -> Iterator[Fault]:
        end = torch.finfo(self.dtype).max
        infinite = any(bool(((v.abs() > end) & ~v.isneginf()).any()) for v in self.found.values)
        # Or beyond it in plain PyTorch: terms left the dtype on their way to a value that is back in it, or infinities cancelled.
        plain = [zip(self.found.values, p.values, strict=True) for p, _ in self.draws(count)]
        infinite |= any(bool((~p.isfinite() & (p != v)).any()) for values in plain for v, p in values)
        infinite |= self._undecided(count)
        for where, got, pick in parts(found):
            t = pick(self.found)
            if where.startswith("gradient") and (infinite or self.weights_are_any()):
                continue  # of a value that is beyond the dtype
            if got.shape != t.shape:
                yield Fault(f"shape {tuple(got.shape)}, expected {tuple(t.shape)}", where)
                continue
            samples = [(pick(p), pick(c)) for p, c in self.draws(count)]
            if (
                self.case.derive == "twice"
                and torch.as_tensor(self._natural(where) >= torch.finfo(self.dtype).max).any()
            ):
                continue  # terms beyond the dtype, which may have either sign
            plain, moved = ([s[i] for s in samples] for i in (0, 1))
            fault = compare(where, got, t, plain, moved, self.dtype, self._terms(where, got.dtype))
            if fault is not None:
                yield fault

    def _terms(self, where: str, given: torch.dtype) -> Terms:
        of_value = where.startswith("value")
        # Beyond 1 / eps a log-sum-exp no longer tells its terms apart: their weights are any, and a limit lets in any of them.
        told_apart = self.largest * (torch.finfo(self.dtype).eps if of_value else self.eps) < 0.1
        end = torch.finfo(given).max / (1.0 if of_value else self.times)
        absolute = self._constants() if of_value else self._underflow() + self._of_cancelling(where)
        # A gradient that is a world larger on its way is rounded once more as it is brought back.
        again = (self.times > 1 and not of_value) * torch.finfo(given).eps
        # Of a value of -inf the gradients are of an upstream of 0, times slopes that other terms may have beyond the dtype.
        finite = of_value or all(bool(v.isfinite().all()) for v in self.found.values)
        return Terms(
            excusing=self.eps if told_apart else math.inf,
            alike=bool(self.plain_case.autocast) or not told_apart,
            natural=self._natural(where),
            own=4.0 * torch.finfo(torch.float64).eps * self.largest_exponent + again,
            absolute=absolute + self._smoothing(where),
            first=min(torch.finfo(self.dtype).max / (1.0 if of_value else self.first), end),
            end=end,
            of_pairs=finite and not (self.overflowing or self.of_both_signs),
            signed=self.alone,
        )


def _is_number(text: str) -> bool:
    """Whether a keyword's text is one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def matrices(case: Case) -> list[Tensor]:
    """Its tensors that are matrices."""
    return [t.detach() for t in case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2]


def matching(case: Case) -> float:
    """The largest sum of sizes of the terms of some <x_i, y_i>, which may be an objective's positives of rows as they are."""
    if (case.settings or case.keywords).get("normalize") != "False":
        return 0.0
    alike = [(a.double(), b.double()) for a, b in combinations(matrices(case), 2) if a.shape == b.shape and a.numel()]
    return max((float((a * b).abs().sum(1).max()) for a, b in alike), default=0.0)


def at_the_least_length(case: Case, eps: float) -> bool:
    """Whether a row is as long as one must be to be brought to length 1, 1e-12: on which side it is, a rounding says."""
    lengths = (t.double().norm(dim=1) / 1e-12 for t in matrices(case) if t.is_floating_point())
    return any(bool(((length - 1.0).abs() < 8.0 * eps).any()) for length in lengths)


def of_equal_rows(case: Case, eps: float) -> float:
    """What |x_i - y_i|^alpha may be of rows that are equal but for roundings: with alpha = 0.001 that is 0 or 0.98."""
    alpha, pair = ((case.settings or {}) | case.keywords).get("alpha", ""), matrices(case)[:2]
    if not _is_number(alpha) or float(alpha) <= 0.0 or len({t.shape for t in pair}) != 1:
        return 0.0  # f_micl's alpha, which may be negative, is no such exponent
    x, *y = (torch.nn.functional.normalize(t.double(), dim=1, eps=1e-12) for t in pair)
    apart = [float((x - other).norm(dim=1).min()) for other in y if other.numel()]
    return float((8.0 * eps) ** float(alpha)) * len(x) if min(apart, default=1.0) < 8.0 * eps else 0.0


def parts(found: Found) -> Iterator[tuple[str, Tensor, Any]]:
    """Each value and gradient, with its place in another Found."""
    for i, value in enumerate(found.values):
        yield f"value {i}" if len(found.values) > 1 else "value", value, lambda other, i=i: other.values[i]
    for name, gradient in found.gradients.items():
        yield f"gradient of {name}", gradient, lambda other, name=name: other.gradients[name]


def plain_number(name: str, value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return float(value) if isinstance(value, (numpy.generic, numpy.ndarray)) else value


def like(t: Tensor, value: Tensor) -> Tensor:
    """The value as a Parameter where t is one."""
    return torch.nn.Parameter(value.detach()) if isinstance(t, torch.nn.Parameter) else value


def double(name: str, t: Tensor) -> Tensor:
    """In float64."""
    return like(t, t.detach().double())


def moved(t: Tensor, name: str, k: int, eps: float, least: float = 0.0) -> Tensor:
    """Each number moved by up to eps of itself, and each entry of a matrix by `least`, below which its square is 0."""
    noise = rows(max(t.numel(), 1), 1, 100 * k + sum(map(ord, name)))[: t.numel()].view(t.shape)
    return like(t, (t.detach().double() * (1.0 + eps * noise) + least * (t.dim() == 2) * noise).to(t.dtype))
