"""fastcl: contrastive losses and their gradients at any batch size, in O(n d) memory.

Every contrastive loss is an alignment term plus one pairwise reduction; one family of fused kernels does all reductions.
"""

from . import functional, losses, metrics
from .backends import BackendUnavailableError
from .masks import Mask, across_groups, all_pairs, off_diagonal, within_groups
from .ops import pair_reduce, pair_total
from .reductions import merge
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "Mask",
    "__version__",
    "across_groups",
    "all_pairs",
    "functional",
    "losses",
    "merge",
    "metrics",
    "off_diagonal",
    "pair_reduce",
    "pair_total",
    "within_groups",
]
