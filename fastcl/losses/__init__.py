"""Every objective as an nn.Module: settings at construction, rows at the call. The formulas are in fastcl.functional."""

from .divergence import FMICLDVLoss, FMICLLoss
from .objective import LogitScale, Objective
from .softmax import CLIPLoss, InfoNCELoss, NTXentLoss
from .uniformity import AlignmentLoss, AlignUniformLoss, UniformityLoss

__all__ = [
    "AlignUniformLoss",
    "AlignmentLoss",
    "CLIPLoss",
    "FMICLDVLoss",
    "FMICLLoss",
    "InfoNCELoss",
    "LogitScale",
    "NTXentLoss",
    "Objective",
    "UniformityLoss",
]
