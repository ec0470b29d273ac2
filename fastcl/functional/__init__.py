"""Every objective as a function: its body is its formula. An nn.Module of each stands in fastcl.losses."""

from typing import TYPE_CHECKING

from ..equation.arguments import absent
from .debiasing import debiased, hard_negative
from .decoupled import dcl, dhel
from .divergence import FMICLTerms, f_micl, f_micl_dv
from .kernel import kcl
from .labels import sup_con
from .momentum import moco, moco_v3
from .multiview import mv_dhel, mv_info_nce
from .normalizers import NormalizedLoss, fast_clip, sogclr
from .powers import f_mi_alpha
from .sigmoid import siglip
from .sincere import sincere
from .softmax import clip, info_nce, nt_xent
from .spectral import minc, spectral
from .spread import spread_out
from .temperature_free import temperature_free_info_nce
from .uniformity import align_uniform, alignment, uniformity

__all__ = [
    "FMICLTerms",
    "NormalizedLoss",
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
    "moco",
    "moco_v3",
    "mv_dhel",
    "mv_info_nce",
    "nt_xent",
    "siglip",
    "sincere",
    "sogclr",
    "spectral",
    "spread_out",
    "sup_con",
    "temperature_free_info_nce",
    "uniformity",
]

if not TYPE_CHECKING:  # to type checkers it would say that any name is there
    __getattr__ = absent(__name__)
