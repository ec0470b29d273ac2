"""The one rule of tolerance. With T the float64 definition of the same rounded inputs, what was found may be off by

    16 eps |T|                               a few roundings of the result itself (1 eps in a half dtype's result)
  + 2 eps |L| / |leaf|                       of a gradient: the size of its terms (of a row: over n |x_i|)
  + n a |x| tiny                             of a gradient: weights below the smallest number are lost, and meet the scale a and an
                                             upstream gradient last (of a GPU n a tiny: its products with rows, too)
  + 64 eps of float64                        of an objective's value: its constants, 1 or its numbers, may cancel
  + 4 eps z                                  of label smoothing: the mean of all z is taken out of their log-sum-exp
  + 4 eps of float64 |r| |T|                 what T itself is off by, whose weights are exp(z - r) of a log-sum-exp r
  + 4 eps of float64 n z^2 / |leaf|          of the gradient of one number: the same of terms that cancel (of a row: over n |x_i|)
  + 8 eps z / (n |x_i|)                      of a row in a half dtype, of no labels or listed positives: it has two gradients that
                                             may cancel, each rounded
  + SAFETY min(|P - T|, EXCUSED |C - T|)     what plain PyTorch makes, unless the formula is to blame
                                             (where |z| < 0.1 / eps, so that terms are told apart)

for each row of a matrix (its largest entry), each entry of a vector, each number.

P: the same function on plain PyTorch in the same dtype (plain.py; truth.py draws it): the n x m matrix, float32 accumulation, no
   kernel, no fast path, with z moved by the rounding of another order of summation, and float32 rows, unit or clipped ones, and
   numbers by one unit in the last place.
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

from dataclasses import dataclass

import torch
from torch import Tensor

from .plain import precision

SAFETY, ROUNDINGS = 8.0, 16.0
EXCUSED = {True: 1e2, False: 1e3}  # of a value, of a gradient
NEIGHBOURS = 4  # on each side, of like size


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


@dataclass
class Terms:
    """What is known of one result before it is looked at.

    excusing: how far C excuses P, of the largest result; infinite where terms are not told apart. alike: whether all results lend
    each other their errors. natural: the size of a gradient's terms. own: what T is off by, relative. absolute: and absolutely.
    end, first: beyond the first it may be infinite, beyond the second it is. of_pairs: False of sums whose terms may be infinite
    with both signs, as MINC's and f-MICL's, or second derivatives in float16; they may be NaN where plain PyTorch's are. signed:
    False of a sum over ranks, each of whose parts is infinite with a sign of its own.
    """

    excusing: float
    alike: bool
    natural: Tensor | float
    own: float
    absolute: Tensor | float
    first: float
    end: float
    of_pairs: bool = True
    signed: bool = True


def compare(
    where: str, got: Tensor, t: Tensor, plain: list[Tensor], moved: list[Tensor], dtype: torch.dtype, terms: Terms
) -> Fault | None:
    """The rule, of one result: t is T, plain are draws of P, moved of C."""
    if not got.numel():
        return None
    asked = ~t.isnan()
    certain, beyond = (t.abs() >= e * (1.0 - torch.finfo(got.dtype).eps) for e in (terms.end, terms.first))
    infinite, lost = torch.zeros_like(asked), torch.zeros_like(asked)
    for p in plain:
        infinite |= ~p.isfinite()
        lost |= p.isnan() & (not terms.of_pairs)
    for c in moved:  # a pair at the end of what a function is defined for: on which side, a rounding says
        lost |= c.isnan()
    if bool((got.isnan() & asked & ~beyond & ~lost).any()):
        return Fault("NaN", where)
    for c in moved:  # the truth itself may be no more than what float64 left of terms that cancel
        certain = certain & (c.abs() >= terms.end * (1.0 - torch.finfo(got.dtype).eps)) & (c.sign() == t.sign())
    for p in plain:  # nor is it what autocast rounded to 0 before it was multiplied
        certain = certain & (p.abs() >= 0.5 * terms.end)
    if where.startswith("value") or terms.excusing < 1.0:  # else weights are any
        right_sign = (got.sign() == t.sign()) | (not terms.signed)
        wrong_end = certain & asked & ~((got.double() == t) | ((got.abs() >= 0.5 * terms.end) & right_sign))
        if bool(wrong_end.any()):
            return Fault(f"expected {t[wrong_end][0]:.6g}, got {got[wrong_end][0]:.6g}", where)
    counted = asked & ~beyond & ~infinite & ~(lost & got.isnan())
    error, size = (by_row(torch.where(counted, e, 0.0)) for e in ((got.double() - t).abs(), t.abs()))
    allowed = of_itself(size, got.dtype, dtype, terms)
    if plain:
        order, gone = size.argsort(), size <= 1e-9 * terms.natural  # what cancelled wholly is of like size
        of_plain, of_moved = (
            neighbourly(
                torch.stack([by_row(torch.where(counted, distance(s, t), 0.0)) for s in samples]).amax(0),
                order,
                terms.alike,
                gone,
            )
            for samples in (plain, moved)
        )
        excused = of_moved + terms.excusing * (size.amax() + terms.natural + 1e-300)
        allowed = allowed + SAFETY * torch.minimum(of_plain, EXCUSED[where.startswith("value")] * excused)
    error = torch.where(
        error.isinf() & (size + allowed >= terms.end), 0.0, error
    )  # what is right to that may be beyond
    worst = int((error / allowed).argmax())
    if bool(error[worst] <= allowed[worst]):
        return None
    return Fault("wrong", where, float(error[worst]), float(allowed[worst]))


def of_itself(size: Tensor, given: torch.dtype, dtype: torch.dtype, terms: Terms) -> Tensor:
    """What a result of this size in the dtype `given` may be off by without a look at plain PyTorch."""
    limits, eps = torch.finfo(given), precision(dtype)
    coarser = limits.eps > torch.finfo(dtype).eps
    least = max(limits.smallest_normal * (limits.eps if coarser else 1.0), torch.finfo(dtype).smallest_normal)
    if (
        dtype == torch.float64
    ):  # in whose subnormals the kernels form weights of rows that are e^500 below their positives
        least = max(least, 1e-200)
    return (
        (ROUNDINGS * eps + terms.own + limits.eps * coarser) * size + least + 2.0 * eps * terms.natural + terms.absolute
    )


def distance(found: Tensor, t: Tensor) -> Tensor:
    """|found - t|, infinite where that is NaN."""
    return (found.double() - t).abs().nan_to_num(nan=float("inf"))


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
