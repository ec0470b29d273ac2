"""Every objective as an nn.Module: settings at construction, rows at the call. The formulas are in fastcl.functional."""

from typing import TYPE_CHECKING

from ..equation.arguments import absent
from .debiasing import DebiasedLoss, HardNegativeLoss
from .decoupled import DCLLoss, DHELLoss
from .divergence import FMICLDVLoss, FMICLLoss
from .kernel import KCLLoss
from .labels import SINCERELoss, SupConLoss
from .matryoshka import MatryoshkaLoss
from .momentum import MoCoLoss, MoCoQueue, MoCoV3Loss
from .multiview import MVDHELLoss, MVInfoNCELoss
from .normalizers import FastCLIPLoss, SogCLRLoss
from .objective import Objective
from .scale import LogitScale
from .sigmoid import SigLIPLoss
from .softmax import CLIPLoss, InfoNCELoss, NTXentLoss, TemperatureFreeInfoNCELoss
from .spectral import FMIAlphaLoss, MINCLoss, SpectralLoss
from .uniformity import AlignmentLoss, AlignUniformLoss, SpreadOutLoss, UniformityLoss

__all__ = [
    "AlignUniformLoss",
    "AlignmentLoss",
    "CLIPLoss",
    "DCLLoss",
    "DHELLoss",
    "DebiasedLoss",
    "FMIAlphaLoss",
    "FMICLDVLoss",
    "FMICLLoss",
    "FastCLIPLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "KCLLoss",
    "LogitScale",
    "MINCLoss",
    "MVDHELLoss",
    "MVInfoNCELoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "MoCoQueue",
    "MoCoV3Loss",
    "NTXentLoss",
    "Objective",
    "SINCERELoss",
    "SigLIPLoss",
    "SogCLRLoss",
    "SpectralLoss",
    "SpreadOutLoss",
    "SupConLoss",
    "TemperatureFreeInfoNCELoss",
    "UniformityLoss",
]

if not TYPE_CHECKING:  # to type checkers it would say that any name is there
    __getattr__ = absent(__name__)
