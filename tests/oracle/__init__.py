"""The definitions as double loops over rows and pairs: the first of the three witnesses.

Nothing here imports fastcl. Every function takes float64 rows and uses only Python loops and operations
on single rows and scalars, so that it can be read beside the formula in its paper, and autograd through
it gives the gradient. Comparisons ask for what is put in a value's place: none holds of NaN, which stays.
Names and arguments are those of fastcl.functional. Meant for n ~ 10.

    pairwise.py    the one equation, its masks, pair functions and reductions: fastcl.pair_reduce
    softmax.py     InfoNCE, CLIP, NT-Xent, MoCo, DCL, DHEL, SupCon, debiased and hard negatives, SigLIP
    kernels.py     alignment, uniformity, KCL, spectral, MINC and the alpha-divergences
    multiview.py   MV-InfoNCE, MV-DHEL, and InfoNCE without a temperature
    normalizers.py SogCLR, FastCLIP
    fmicl.py       f-MICL: f', f* and f* o f' of each divergence, and the Donsker-Varadhan form
"""

from .fmicl import f_micl, f_micl_dv
from .kernels import (
    align_uniform,
    alignment,
    f_mi_alpha,
    kcl,
    minc,
    minc_value,
    second_moment,
    spectral,
    spread_out,
    uniformity,
)
from .multiview import mv_dhel, mv_info_nce, temperature_free_info_nce
from .normalizers import fast_clip, sogclr
from .pairwise import pair_reduce, pair_total
from .softmax import (
    clip,
    dcl,
    debiased,
    dhel,
    hard_negative,
    info_nce,
    moco,
    moco_v3,
    nt_xent,
    siglip,
    sincere,
    sup_con,
)

__all__ = [
    "align_uniform",
    "alignment",
    "clip",
    "dcl",
    "debiased",
    "dhel",
    "f_mi_alpha",
    "f_micl",
    "f_micl_dv",
    "fast_clip",
    "hard_negative",
    "info_nce",
    "kcl",
    "minc",
    "minc_value",
    "moco",
    "moco_v3",
    "mv_dhel",
    "mv_info_nce",
    "nt_xent",
    "pair_reduce",
    "pair_total",
    "second_moment",
    "siglip",
    "sincere",
    "sogclr",
    "spectral",
    "spread_out",
    "sup_con",
    "temperature_free_info_nce",
    "uniformity",
]
