"""The pair functions f of the equation, at their public address; fastcl/equation/pairs.py says how to write one."""

from .equation.pairs import (
    CosineJS,
    Exp,
    Identity,
    Log,
    Log1p,
    PairFunction,
    Power,
    Rsqrt1p,
    SigmoidSquared,
    Softplus,
    Square,
    pair_function,
)

__all__ = [
    "CosineJS",
    "Exp",
    "Identity",
    "Log",
    "Log1p",
    "PairFunction",
    "Power",
    "Rsqrt1p",
    "SigmoidSquared",
    "Softplus",
    "Square",
    "pair_function",
]
