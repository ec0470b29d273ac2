"""The one rule of tolerance. With T the float64 definition of the same rounded inputs, what was found may be off by

    16 eps |T|                                         a few roundings of the result itself (1 eps in a half dtype's result)
  + 2 eps |L| / |leaf|                                 of a gradient: the size of its terms (of a row: over n |x_i|)
  + 64 eps of float64         of an objective's value: its constants, 1 or its numbers, may cancel
  + n a |x| tiny              of a gradient: weights below the smallest number are lost, and meet the scale a and an upstream
                                                       gradient last (of a GPU n a tiny: its products with rows, too)
  + 4 eps z of label smoothing, which takes the mean of all z out of their log-sum-exp
  + 4 eps of float64 |r| |T|                           what T itself is off by, whose weights are exp(z - r) of a log-sum-exp r
  + 4 eps of float64 n z^2 / |leaf|                    of the gradient of one number: the same of terms that cancel
  + SAFETY min(|P - T|, EXCUSED |C - T|)               what plain PyTorch makes, unless the formula is to blame
                                                       (where |z| < 0.1 / eps, so that terms are told apart)

for each row of a matrix (its largest entry), each entry of a vector, each number.

P: the same function on plain PyTorch in the same dtype (plain.py): the n x m matrix, float32 accumulation, no kernel, no fast path,
   with z moved by the rounding of another order of summation, and float32 rows, unit or clipped ones, and numbers by one unit in
   the last place.
   Several draws, the largest. That sqdist comes from norms and dot products is part of it.
C: the float64 definition where rows, unit or clipped rows and numbers are moved by one rounding of their dtype (sqdist by
   eps (|x|^2 + |y|^2), rows also by what the dtype cannot square), and sums by one of theirs: what any evaluation may make. Unit
   rows are, since the cosine of equal rows is the largest there is: rows alone move it by eps^2, and terms that cancel there have
   no other size.
   A formula that cancels is as wrong on plain PyTorch; EXCUSED bounds what that excuses, of a gradient, whose terms are many,
   less strictly than of a value.

Entries of like size lend each other their errors, since one draw can be right by luck; all do where terms are not told apart, and
a row's weights are those of whichever of two came out larger. A result beyond its dtype is infinite.
Nothing is asked where some |z|, or a sum of those of all rows, is beyond float32 (which pair_reduce excludes), of the gradient of
a value beyond it, of a second derivative whose terms are, or of one (above 10) of which one rounding of the arguments takes a
tenth, and where T is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy
import torch
from torch import Tensor

from .case import Case, Found, run
from .formula import rows
from .plain import EXACT, Plain, clamped_as, plainly, precision

SAFETY, ROUNDINGS = 8.0, 16.0
EXCUSED = {True: 1e2, False: 1e3}  # of a value, of a gradient
TIES = (1.0, 0.25, 4.0)  # which of the similarities near that margin tie is for a rounding to say
NEIGHBOURS = 4  # on each side, of like size
DRAWS = (2, 32, 128)  # of P and C: a few first, more before something is called wrong


@dataclass
class Fault:
    """What was wrong with which result."""

    what: str
    where: str
    error: float = 0.0
    allowed: float = 0.0

    def __str__(self) -> str:
        size = f": off by {self.error:.3g}, allowed {self.allowed:.3g}" if self.allowed or self.error else ""
        return f"{self.where}: {self.what}{size}"


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
        dtypes = [
            t.dtype for t in case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()
        ]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        plain_autocast = self.plain_case.autocast
        halves = (
            [getattr(torch, plain_autocast)] if plain_autocast else [t for t in dtypes if torch.finfo(t).bits == 16]
        )
        self.halves = bool(halves)
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
        return max((len(t) for t in self.case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2), default=1)

    def beyond(self) -> bool:
        """Whether some |z|, or the terms that it is the sum of, are beyond the dtype, or rows beyond that of autocast."""
        if self.plain_case.autocast:
            end = torch.finfo(getattr(torch, self.plain_case.autocast)).max
            rows_ = [t for t in self.case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2 and t.numel()]
            if any(float(t.detach().abs().max()) > end for t in rows_):
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
        """Whether one rounding of the arguments moves a value by a tenth: on which side of a clamp a pair lies is for it to say."""
        if at_the_least_length(self.case, self.eps):
            return True
        drawn = [zip(self.found.values, c.values, strict=True) for _, c in self.draws(count)]
        return any(bool(((c - v).abs() > 0.1 * v.abs().clamp(min=10.0)).any()) for values in drawn for v, c in values)

    def _constants(self) -> float:
        """What float64 makes of an objective's own constants, which may cancel: 1, or a number that it was given."""
        given = self.case.function not in ("pair_reduce", "pair_total")
        tensors = [t.detach() for t in self.case.tensors().values() if isinstance(t, Tensor)]
        numbers = [abs(float(t)) for t in tensors if t.numel() == 1 and t.dim() < 2]
        numbers += [abs(float(text)) for text in self.case.keywords.values() if _is_number(text)]
        # Beyond a thousand a number is none that a constant of an objective has.
        return 64.0 * torch.finfo(torch.float64).eps * max([1.0, *(n for n in numbers if n <= 1e3)]) if given else 0.0

    def _of_scales(self, where: str) -> float:
        """What the definition's own gradient of one number is off by: its terms are weights times z, each to eps |z| of float64."""
        leaf = self.case.tensors().get(where.removeprefix("gradient of "))
        if not isinstance(leaf, Tensor) or leaf.numel() != 1 or leaf.dim() > 1:
            return 0.0
        z = self.largest_exponent
        terms = self.most_rows() * abs(self.case.upstream) * z / max(abs(float(leaf.detach())), 1e-30)
        return 4.0 * torch.finfo(torch.float64).eps * z * terms

    def _underflow(self) -> float:
        """What weights lose below the smallest number, times rows and the scale; a GPU's products with rows lose as much, too."""
        given = {"scale": "1.0"} | self.case.keywords
        scale = self.case.tensors().get("scale", given["scale"] if _is_number(given["scale"]) else 1.0)
        matrices = [
            t.detach() for t in self.case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2 and t.numel()
        ]
        longest = max((float(t.double().norm(dim=1).max()) for t in matrices), default=1.0)
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
            plain, moved = ([s[i] for s in samples] for i in (0, 1))
            of_value = where.startswith("value")
            # Beyond 1 / eps a log-sum-exp no longer tells its terms apart: their weights are any, and a limit lets in any of them.
            told_apart = self.largest * (torch.finfo(self.dtype).eps if of_value else self.eps) < 0.1
            excusing = self.eps if told_apart else float("inf")
            end_of_got = torch.finfo(got.dtype).max / (1.0 if of_value else self.times)
            if (
                self.case.derive == "twice"
                and torch.as_tensor(self._natural(where) >= torch.finfo(self.dtype).max).any()
            ):
                continue  # terms beyond the dtype, which may have either sign
            # Between the two it may be infinite, and need not.
            first = torch.finfo(self.dtype).max / (1.0 if of_value else self.first)
            fault = compare(
                where,
                got,
                t,
                plain,
                moved,
                self.dtype,
                excusing,
                bool(self.plain_case.autocast) or not told_apart,
                self._natural(where),
                # A gradient that is a world larger on its way is rounded once more as it is brought back.
                4.0 * torch.finfo(torch.float64).eps * self.largest_exponent
                + (self.times > 1 and not of_value) * torch.finfo(got.dtype).eps,
                end_of_got,
                min(first, end_of_got),
                (self._constants() if of_value else self._underflow() + self._of_scales(where))
                + self._smoothing(where),
                # Of a value of -inf the gradients are of an upstream of 0, times slopes that other terms may have beyond the dtype.
                of_pairs="minc" not in self.case.function.lower()
                and (of_value or all(bool(v.isfinite().all()) for v in self.found.values)),
                signed=len(self.case.sizes) < 2,
            )
            if fault is not None:
                yield fault


def _is_number(text: str) -> bool:
    """Whether a keyword's text is one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def matching(case: Case) -> float:
    """The largest sum of sizes of the terms of some <x_i, y_i>, which may be an objective's positives of rows as they are."""
    if (case.settings or case.keywords).get("normalize") != "False":
        return 0.0
    matrices = [t.detach().double() for t in case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2]
    alike = [(a, b) for a, b in combinations(matrices, 2) if a.shape == b.shape and a.numel()]
    return max((float((a * b).abs().sum(1).max()) for a, b in alike), default=0.0)


def at_the_least_length(case: Case, eps: float) -> bool:
    """Whether a row is as long as one must be to be brought to length 1, 1e-12: on which side it is, a rounding says."""
    matrices = [t for t in case.tensors().values() if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()]
    lengths = (t.detach().double().norm(dim=1) / 1e-12 for t in matrices)
    return any(bool(((length - 1.0).abs() < 8.0 * eps).any()) for length in lengths)


def parts(found: Found) -> Iterator[tuple[str, Tensor, Any]]:
    """Each value and gradient, with its place in another Found."""
    for i, value in enumerate(found.values):
        yield f"value {i}" if len(found.values) > 1 else "value", value, lambda other, i=i: other.values[i]
    for name, gradient in found.gradients.items():
        yield f"gradient of {name}", gradient, lambda other, name=name: other.gradients[name]


def compare(
    where: str,
    got: Tensor,
    t: Tensor,
    plain: list[Tensor],
    moved: list[Tensor],
    dtype: torch.dtype,
    excusing: float,
    alike: bool,
    natural: Tensor | float,
    own: float,
    end: float,
    first: float,
    constants: Tensor | float,
    of_pairs: bool = True,
    signed: bool = True,
) -> Fault | None:
    """The rule, of one result; not `signed`: a sum over ranks, each of whose parts is infinite with a sign of its own.

    Not `of_pairs`: sums whose terms may be infinite with both signs, as MINC's; they may be NaN where plain PyTorch's are.
    """
    if not got.numel():
        return None
    asked = ~t.isnan()
    limits = torch.finfo(got.dtype)
    certain, beyond = (t.abs() >= e * (1.0 - limits.eps) for e in (end, first))
    lost = torch.zeros_like(asked)
    for p in () if of_pairs else plain:
        lost |= p.isnan()
    if bool((got.isnan() & asked & ~beyond & ~lost).any()):
        return Fault("NaN", where)
    for c in moved:  # the truth itself may be no more than what float64 left of terms that cancel
        certain = certain & (c.abs() >= end * (1.0 - limits.eps)) & (c.sign() == t.sign())
    wrong_end = (
        certain
        & asked
        & (where.startswith("value") or excusing < 1.0)  # else weights are any
        & ~((got.double() == t) | ((got.abs() >= 0.5 * end) & ((got.sign() == t.sign()) | (not signed))))
    )
    excused = torch.zeros_like(asked)
    for p in plain:
        excused |= ~p.isfinite()
    if bool((wrong_end & ~excused).any()):
        return Fault(f"expected {t[wrong_end][0]:.6g}, got {got[wrong_end][0]:.6g}", where)
    counted = asked & ~beyond & ~excused
    error, size = (by_row(torch.where(counted, e, 0.0)) for e in ((got.double() - t).abs(), t.abs()))
    eps, coarser = precision(dtype), limits.eps > torch.finfo(dtype).eps
    least = max(limits.smallest_normal * (limits.eps if coarser else 1.0), torch.finfo(dtype).smallest_normal)
    if (
        dtype == torch.float64
    ):  # whose weights of rows that are e^500 below their positives the kernels form in its subnormals
        least = max(least, 1e-200)
    allowed = (ROUNDINGS * eps + own + limits.eps * coarser) * size + least
    allowed = allowed + 2.0 * eps * natural + constants
    if plain:
        order = size.argsort()
        gone = size <= 1e-9 * natural  # what cancelled wholly is of like size
        of_plain, of_moved = (
            neighbourly(
                torch.stack(
                    [
                        by_row(torch.where(counted, (s.double() - t).abs().nan_to_num(nan=float("inf")), 0.0))
                        for s in samples
                    ]
                ).amax(0),
                order,
                alike,
                gone,
            )
            for samples in (plain, moved)
        )
        allowed = allowed + SAFETY * torch.minimum(
            of_plain, EXCUSED[where.startswith("value")] * (of_moved + excusing * (size.amax() + natural + 1e-300))
        )
    error = torch.where(error.isinf() & (size + allowed >= end), 0.0, error)  # what is right to that may be beyond
    worst = int((error / allowed).argmax())
    if bool(error[worst] <= allowed[worst]):
        return None
    return Fault("wrong", where, float(error[worst]), float(allowed[worst]))


def by_row(t: Tensor) -> Tensor:
    """The largest of each row; a vector or a number as they are."""
    return t.reshape(-1) if t.dim() < 2 or not t.numel() else t.amax(1)


def neighbourly(errors: Tensor, order: Tensor, alike: bool, gone: Tensor) -> Tensor:
    """The largest among results of like size; with `alike` among all."""
    if errors.numel() < 2 or alike:
        return errors if errors.numel() < 2 else errors.amax().expand_as(errors)
    around = torch.nn.functional.max_pool1d(errors[order][None], 2 * NEIGHBOURS + 1, 1, NEIGHBOURS)[0]
    found = torch.empty_like(errors).index_copy_(0, order, around)
    return torch.where(gone, torch.where(gone, errors, 0.0).amax(), found)


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
