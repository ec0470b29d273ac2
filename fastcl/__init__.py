"""fastcl: contrastive losses and their gradients at any batch size, in O(n d) memory.

Every contrastive loss is an alignment term plus one pairwise reduction; one family of fused kernels does all reductions.
"""

from typing import TYPE_CHECKING

from . import pairs
from .backends.choice import BackendUnavailableError
from .cached import cached_embeddings, cached_step
from .distributed import Ranks
from .equation.arguments import absent
from .equation.divergence import Divergence
from .equation.masks import Mask, across_groups, all_pairs, at_most, off_diagonal, within_groups
from .equation.reductions import merge
from .ops import pair_reduce, pair_total
from .patching import Patch, patch
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "Divergence",
    "Mask",
    "Patch",
    "Ranks",
    "__version__",
    "across_groups",
    "all_pairs",
    "at_most",
    "cached_embeddings",
    "cached_step",
    "functional",
    "losses",
    "merge",
    "metrics",
    "off_diagonal",
    "pair_reduce",
    "pair_total",
    "pairs",
    "patch",
    "within_groups",
]

if TYPE_CHECKING:
    from . import functional, losses, metrics
else:  # imported at first use; to type checkers this would say that any name is there
    __getattr__ = absent(__name__, "functional", "losses", "metrics")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
