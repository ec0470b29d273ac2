"""Every combination that the op promises: operand x pair function x reduction x mask x (x with y, x with itself).

Adding a pair function or a mask to the library adds its tests here, unasked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastcl
from fastcl.equation.masks import KINDS
from fastcl.equation.pairs import PairFunction, pair_function
from fastcl.equation.problem import OPERANDS, OUTERS
from tests import oracle
from tests.oracle import pairwise

# A value for each constant by name: chosen so that some z fall on either side of eps.
CONSTANTS = {"p": -0.5, "eps": 0.3}


def pair_functions() -> Iterator[PairFunction]:
    for cls in PairFunction.registry.values():
        if cls.built_in:
            yield cls(*(CONSTANTS[name] for name in cls.constant_names))


@dataclass(frozen=True)
class Combination:
    operand: str
    pair: PairFunction
    reduce: str
    mask: str
    itself: bool

    @property
    def id(self) -> str:
        sides = "x" if self.itself else "xy"
        return f"{self.operand}-{self.pair.name}-{self.reduce}-{self.mask}-{sides}"


def combinations() -> list[Combination]:
    result = []
    for operand in OPERANDS:
        for mask in KINDS:
            for itself in (False, True):
                result.append(Combination(operand, pair_function("identity"), "logsumexp", mask, itself))
                for pair in pair_functions():
                    # log(1 + z) and (1 + z)^-1/2 live on z > -1: distances
                    if operand == "sqdist" or pair.name not in ("log1p", "rsqrt1p"):
                        result.append(Combination(operand, pair, "sum", mask, itself))
    return result


def totals() -> list[tuple[Combination, str]]:
    """Each combination with the outer forms that go with its reduction."""
    outers = {"sum": ("sum",), "logsumexp": OUTERS}
    return [(c, outer) for c in combinations() for outer in outers[c.reduce]]


def total_id(value: Combination | str) -> str:
    return value if isinstance(value, str) else value.id


@dataclass
class Inputs:
    """Leaves that may want gradients, and the arguments of the op."""

    leaves: dict[str, Tensor]
    mask: Any
    keep: Any
    combination: Combination
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[Tensor, Tensor | None]:
        return self.leaves["x"], self.leaves.get("y")

    def affine(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in self.leaves.items() if name not in ("x", "y", "positive")}

    def call(self, backend: str, columns: bool = False, **more: Any) -> Any:
        c = self.combination
        form = fastcl.pair_total if "outer" in more else fastcl.pair_reduce
        if "outer" not in more:
            more["columns"] = columns
        return form(
            *self.sides,
            operand=c.operand,
            pair=c.pair,
            reduce=c.reduce,
            mask=self.mask,
            backend=backend,
            **self.affine(),
            **more,
        )

    def loops(self, columns: bool = False, **more: Any) -> Any:
        c = self.combination
        form = oracle.pair_total if "outer" in more else oracle.pair_reduce
        if "outer" not in more:
            more["columns"] = columns
        return form(
            *self.sides, operand=c.operand, pair=c.pair.name, constants=c.pair.constants, reduce=c.reduce, keep=self.keep,
            **self.affine(), **more,
        )  # fmt: skip


def inputs(
    c: Combination, n: int, m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0, biases: bool = True
) -> Inputs:
    """Random inputs; everything wants gradients. With sqdist the scale is positive, so that z > -1."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    small = torch.float64 if dtype == torch.float64 else torch.float32
    m = n if c.itself else m
    length = 1.2 / max(d, 1) ** 0.5
    leaves = {"x": (length * random(n, d)).to(dtype)}
    if not c.itself:
        leaves["y"] = (length * random(m, d)).to(dtype)
    leaves["scale"] = torch.tensor(0.8, dtype=small)
    leaves["shift"] = torch.tensor(0.1, dtype=small)
    if biases and not c.itself:
        leaves["bias_x"], leaves["bias_y"] = random(n).abs().mul(0.3).to(small), random(m).abs().mul(0.3).to(small)
    for leaf in leaves.values():
        leaf.requires_grad_()
    # Groups are unsorted and uneven; group 9 of x has no partner in y, so that whole rows are masked within groups.
    group_x = torch.tensor([9, 1, 0, 2, 1, 0, 0, 2], dtype=torch.int64).repeat(n // 8 + 1)[:n]
    group_y = group_x if c.itself else torch.tensor([1, 0, 2, 0, 3, 1, 0], dtype=torch.int64).repeat(m // 7 + 1)[:m]
    offset = (0, 0) if c.itself else (1, 3)
    mask: Any = {
        "all": "all",
        "off_diagonal": fastcl.off_diagonal(*offset),
        "across_groups": fastcl.across_groups(group_x, None if c.itself else group_y),
        "within_groups": fastcl.within_groups(group_x, None if c.itself else group_y),
    }[c.mask]
    gx, gy = group_x.tolist(), group_y.tolist()
    keep = {
        "all": pairwise.everything,
        "off_diagonal": pairwise.off_diagonal(*offset),
        "across_groups": pairwise.across_groups(gx, gy),
        "within_groups": pairwise.within_groups(gx, gy),
    }[c.mask]
    return Inputs(leaves, mask, keep, c)


def eager(i: Inputs, dtype: torch.dtype, columns: bool) -> Any:
    """What a user of plain PyTorch writes, in `dtype`: the yardstick of rounding errors."""
    c = i.combination
    x, y = (i.leaves[k].to(dtype) for k in ("x", "x" if c.itself else "y"))
    u = x @ y.T if c.operand == "dot" else ((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T).clamp(min=0)
    z = i.leaves["scale"] * u + i.leaves["shift"]
    if "bias_x" in i.leaves:
        z = z + i.leaves["bias_x"][:, None] + i.leaves["bias_y"]
    keep = torch.tensor([[i.keep(a, b) for b in range(y.shape[0])] for a in range(x.shape[0])])
    if c.reduce == "logsumexp":
        z = z.masked_fill(~keep, float("-inf"))
        return (z.logsumexp(1), z.logsumexp(0)) if columns else z.logsumexp(1)
    f = torch.where(keep, c.pair.f(torch.where(keep, z, 1.0)), 0.0)
    return (f.sum(1), f.sum(0)) if columns else f.sum(1)


def weighted(outputs: Any) -> Tensor:
    """A scalar with a different upstream gradient for every row and column; -inf of empty rows is left out."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = outputs[0].new_zeros(())
    for k, out in enumerate(outputs):
        weight = torch.sin(torch.arange(out.numel(), dtype=out.dtype) + 1.0 + k)
        total = total + (torch.where(torch.isneginf(out), 0.0, out) * weight).sum()
    return total


def value_and_gradients(outputs: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs and the gradient of `weighted` to each leaf (zeros where the leaf does not matter), by name."""
    flat = outputs if isinstance(outputs, tuple) else (outputs,)
    result = {f"output{k}": out.detach() for k, out in enumerate(flat)}
    scalar = weighted(outputs)
    names = list(leaves)
    wanted = [leaves[n] for n in names]
    # Where every pair is clamped or masked, the double loops leave no graph at all.
    gradients = torch.autograd.grad(scalar, wanted, allow_unused=True) if scalar.requires_grad else [None] * len(names)
    for name, gradient in zip(names, gradients, strict=True):
        result[name] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return result


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value.double(), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
