"""The names that arguments take: for type checkers, and for the checks of `arguments`, which read them off the signatures."""

from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["auto", "reference", "blocked", "cpu", "triton", "cuda"]
Operand: TypeAlias = Literal["dot", "sqdist"]
PairReduction: TypeAlias = Literal["sum", "logsumexp"]
Outer: TypeAlias = Literal["sum", "contrast", "pooled"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Gradient: TypeAlias = Literal["ddp", "exact"]
Strategy: TypeAlias = Literal["auto", "gather", "ring"]
DivergenceName: TypeAlias = Literal["kl", "js", "pearson", "sh", "tsallis", "vlc", "rkl", "neyman", "jeffrey"]
Similarity: TypeAlias = Literal["gaussian", "cosine"]
Negatives: TypeAlias = Literal["xx", "xx+yy", "xy"]
MarginStrategy: TypeAlias = Literal["absolute", "relative"]
Form: TypeAlias = Literal["joint", "anchor", "symmetric"]
KernelName: TypeAlias = Literal["gaussian", "log", "imq", "riesz", "gaussian_riesz"]
Estimator: TypeAlias = Literal["unbiased", "biased"]
