"""ptxemu - run, check and count compiled GPU code (PTX) on a machine without a GPU.

    from ptxemu import Module
    stats = Module(ptx_text).launch("kernel", grid=(4,), block=(128,), shared_bytes=0, args=[x, y, 1.0, n])

See README.md for what a successful run proves and what it cannot prove.
"""

from .errors import (
    Deadlock,
    Divergence,
    GlobalRace,
    LaunchError,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PtxError,
    ReadOnly,
    SharedRace,
    SyntaxFault,
    Trap,
    Uninitialized,
    UninitializedRegister,
    Unsupported,
)
from .module import Module, TensorMap, assert_order_independent
from .stats import Stats

__all__ = [
    "Deadlock",
    "Divergence",
    "GlobalRace",
    "LaunchError",
    "Misaligned",
    "MissingWait",
    "Module",
    "OutOfBounds",
    "PtxError",
    "ReadOnly",
    "SharedRace",
    "Stats",
    "SyntaxFault",
    "TensorMap",
    "Trap",
    "Uninitialized",
    "UninitializedRegister",
    "Unsupported",
    "assert_order_independent",
]
__version__ = "1.0"
