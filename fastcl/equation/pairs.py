# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""Pair functions f and their slopes f', each written once.

The bodies of `value` and `slope` are PyTorch (they are the reference) in a small language: + - * /, literals, the constants of
the class, local names, and the intrinsics of intrinsics.py. `python -m fastcl.equation.codegen` translates them to C++,
CUDA and Triton.
To add one: a class here, codegen, rebuild; `slope` may be left out (derivative.py). The pure PyTorch backends need no rebuild.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import get_annotations, signature
from typing import Any, ClassVar, get_origin

import torch
from torch import Tensor
from typing_extensions import Self

from .arguments import Check, PositiveReal, checks_of_fields, kind_of, meant
from .derivative import derived_slope
from .intrinsics import exp, expm1, log, log1p, maximum, minimum, pow, rsqrt, select_less, sigmoid, softplus
from .language import numbers_of

LOG_2 = 0.6931471805599453


@dataclass(frozen=True)
class PairFunction:
    """A scalar function of z_ij with its slope; its constants are the fields of the class."""

    name: ClassVar[str]
    constant_names: ClassVar[tuple[str, ...]] = ()
    registry: ClassVar[dict[str, type[PairFunction]]] = {}  # by name: the latest of each
    key: ClassVar[str]  # by which an op knows the class: its name, with a number where an earlier class has it
    by_key: ClassVar[dict[str, type[PairFunction]]] = {}
    checks: ClassVar[dict[str, Check]] = {}
    listed: ClassVar[bool] = True  # whether errors name it: not what a Divergence makes of its f
    built_in: ClassVar[bool] = False  # whether it is one of this file, which the kernels know

    def __init_subclass__(cls, name: str) -> None:
        known = PairFunction.registry.get(name)
        if known is not None and known.built_in:
            raise ValueError(f"name: expected one that no pair function of fastcl has, got {name!r}; choose another")
        cls.name = name
        cls.built_in = cls.__module__ == __name__
        fields = {name: kind for name, kind in get_annotations(cls).items() if not _of_class(kind)}
        cls.constant_names = tuple(dict.fromkeys((*cls.constant_names, *fields)))
        cls.checks = cls.checks | checks_of_fields(cls, fields)
        for written in ("value", "slope"):
            if written in vars(cls):
                setattr(cls, written, staticmethod(_of_z(cls, written)))
        if "value" in vars(cls) and "slope" not in vars(cls):
            cls.slope = staticmethod(derived_slope(cls))  # type: ignore[method-assign]
        cls.key, count = name, 1
        while cls.key in PairFunction.by_key:  # defined anew: what was made of the earlier class stays what it was
            count += 1
            cls.key = f"{name} ({count})"
        PairFunction.by_key[cls.key] = PairFunction.registry[name] = cls

    def __post_init__(self) -> None:
        for name, value in self.checked().items():
            object.__setattr__(self, name, value)

    def checked(self, x: Tensor | None = None) -> dict[str, Any]:
        """The constants, each of which must stay what it is in the dtype of the results of x."""
        return {name: check(f"{self.name}: {name}", getattr(self, name), x) for name, check in self.checks.items()}

    @classmethod
    def of(cls, constants: Sequence[float]) -> Self:
        """The one of these constants, which were checked when it was made."""
        made = object.__new__(cls)
        for name, value in zip(cls.constant_names, constants, strict=True):
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def text(cls) -> tuple[Any, ...]:
        """All that kernels are made from: the functions, and the numbers that their modules give them now."""
        return cls.value, cls.slope, cls.constant_names, numbers_of(cls.value), numbers_of(cls.slope)

    @property
    def constants(self) -> tuple[float, ...]:
        return tuple(float(getattr(self, name)) for name in self.constant_names)

    @staticmethod
    def value(z: Any, *constants: Any) -> Any:
        """f(z) in the language above."""
        raise NotImplementedError

    @staticmethod
    def slope(z: Any, *constants: Any) -> Any:
        """f'(z) in the language above; derived from `value` where a class does not write it."""
        raise NotImplementedError

    def f(self, z: Tensor) -> Tensor:
        """f(z), elementwise."""
        return _elementwise(self.value(z, *self.constants), z)

    def df(self, z: Tensor) -> Tensor:
        """f'(z), elementwise."""
        return _elementwise(self.slope(z, *self.constants), z)


def _elementwise(result: Any, z: Tensor) -> Tensor:
    return result if isinstance(result, Tensor) else torch.full_like(z, result)


def _of_class(annotation: Any) -> bool:
    """Whether it says ClassVar, as itself or as text: no field."""
    if isinstance(annotation, str):
        return annotation.partition("[")[0].rpartition(".")[2] == "ClassVar"
    return annotation is ClassVar or get_origin(annotation) is ClassVar


def _of_z(cls: type[PairFunction], name: str) -> Callable[..., Any]:
    """The function of that name, whose arguments are z and the constants: it may be written without @staticmethod.

    Raises:
        TypeError: it has others, or these in another order, of which a value would be silently wrong.
    """
    function: Callable[..., Any] = getattr(vars(cls)[name], "__func__", vars(cls)[name])
    z, *constants = (*signature(function).parameters, "")
    if z == "self" or tuple(constants[:-1]) != cls.constant_names:
        expected, got = ", ".join(("z", *cls.constant_names)), ", ".join(signature(function).parameters)
        raise TypeError(
            f"{cls.__name__}.{name}: expected {name}({expected}), z and the fields of the class in their order, got {name}({got})"
        )
    return function


@dataclass(frozen=True)
class Identity(PairFunction, name="identity"):
    """f(z) = z."""

    @staticmethod
    def value(z):
        return z

    @staticmethod
    def slope(z):
        return 1.0


@dataclass(frozen=True)
class Exp(PairFunction, name="exp"):
    """f(z) = e^z."""

    @staticmethod
    def value(z):
        return exp(z)

    @staticmethod
    def slope(z):
        return exp(z)


@dataclass(frozen=True)
class Softplus(PairFunction, name="softplus"):
    """f(z) = log(1 + e^z)."""

    @staticmethod
    def value(z):
        return softplus(z)

    @staticmethod
    def slope(z):
        return sigmoid(z)


@dataclass(frozen=True)
class SigmoidSquared(PairFunction, name="sigmoid_squared"):
    """f(z) = sigmoid(z)^2."""

    @staticmethod
    def value(z):
        s = sigmoid(z)
        return s * s

    @staticmethod
    def slope(z):
        s = sigmoid(z)
        return 2.0 * s * s * sigmoid(-z)


@dataclass(frozen=True)
class Square(PairFunction, name="square"):
    """f(z) = z^2."""

    @staticmethod
    def value(z):
        return z * z

    @staticmethod
    def slope(z):
        return 2.0 * z


@dataclass(frozen=True)
class Log1p(PairFunction, name="log1p"):
    """f(z) = log(1 + z), for z > -1."""

    @staticmethod
    def value(z):
        return log1p(z)

    @staticmethod
    def slope(z):
        return 1.0 / (1.0 + z)


@dataclass(frozen=True)
class Rsqrt1p(PairFunction, name="rsqrt1p"):
    """f(z) = (1 + z)^(-1/2), for z > -1."""

    @staticmethod
    def value(z):
        return rsqrt(1.0 + z)

    @staticmethod
    def slope(z):
        s = rsqrt(1.0 + z)
        return -0.5 * s * s * s


@dataclass(frozen=True)
class Power(PairFunction, name="power"):
    """f(z) = max(z, eps)^p; the slope is 0 where z < eps."""

    p: float
    eps: PositiveReal

    @staticmethod
    def value(z, p, eps):
        return pow(maximum(z, eps), p)

    @staticmethod
    def slope(z, p, eps):
        return select_less(z, eps, 0.0, p * pow(maximum(z, eps), p - 1.0))


@dataclass(frozen=True)
class Log(PairFunction, name="log"):
    """f(z) = log max(z, eps); the slope is 0 where z < eps."""

    eps: PositiveReal

    @staticmethod
    def value(z, eps):
        return log(maximum(z, eps))

    @staticmethod
    def slope(z, eps):
        return select_less(z, eps, 0.0, 1.0 / maximum(z, eps))


@dataclass(frozen=True)
class CosineJS(PairFunction, name="cosine_js"):
    """f(z) = -log(2 - e^min(z, log 2 - eps)); the slope is 0 beyond."""

    # The difference 2 - e^z keeps no digit near 0, where 1 - (e^z - 1) does, nor near log 2, where -2 (e^(z - log 2) - 1) does.
    eps: PositiveReal

    @staticmethod
    def value(z, eps):
        m = expm1(select_less(z, 0.35, z, minimum(z - LOG_2, -eps)))
        return select_less(z, 0.35, -log1p(-m), -log(select_less(z, 0.35, 1.0, -2.0 * m)))

    @staticmethod
    def slope(z, eps):
        e = exp(minimum(z, LOG_2 - eps))
        return select_less(z, LOG_2 - eps, 1.0, 0.0) * e / (2.0 - e)


def pair_function(pair: str | PairFunction) -> PairFunction:
    """The pair function of that name (one without constants), or the given one itself.

    Raises:
        ValueError: for an unknown name, or one that needs constants.
        TypeError: for anything that is neither a name nor a PairFunction.
    """
    if isinstance(pair, PairFunction):
        return pair
    if not isinstance(pair, str):
        raise TypeError(f"pair: expected a name or a fastcl.pairs.PairFunction, got {kind_of(pair)}")
    cls = PairFunction.registry.get(pair)
    if cls is None:
        names = sorted(name for name, known in PairFunction.registry.items() if known.listed)
        raise ValueError(f"pair: expected one of {names}, got {pair!r}{meant(pair, names)}")
    if cls.constant_names:
        call = f"fastcl.pairs.{cls.__name__}({', '.join(f'{k}=...' for k in cls.constant_names)})"
        raise ValueError(f"pair: {pair!r} needs constants; pass {call}")
    return cls()
