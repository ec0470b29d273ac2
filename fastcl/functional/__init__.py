"""Every objective as a function: its body is its formula. An nn.Module of each stands in fastcl.losses."""

from .divergence import FMICLTerms, f_micl, f_micl_dv
from .softmax import clip, info_nce, nt_xent
from .uniformity import align_uniform, alignment, uniformity

__all__ = [
    "FMICLTerms",
    "align_uniform",
    "alignment",
    "clip",
    "f_micl",
    "f_micl_dv",
    "info_nce",
    "nt_xent",
    "uniformity",
]
