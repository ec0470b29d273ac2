"""What embeddings look like: alignment, uniformity, rank, retrieval; no gradients, and never an n x n matrix.

Sums over pairs go tile by tile (retrieval, histogram of cosines) or through the engine in blocks of rows (log-sum-exps), each
unordered pair once where x meets itself; n = 100,000 rows are a matter of a minute on a CPU. `progress=True` shows a bar.
All results are Python numbers, the same from run to run; rows with a NaN give NaN.
"""

from typing import TYPE_CHECKING

from ..equation.arguments import absent
from .cosines import wasserstein_uniformity
from .dimensions import effective_rank, rank
from .recorder import Recorder
from .retrieval import RetrievalAccuracy, retrieval_accuracy
from .spread import alignment, mean_log_sum_exp, uniformity

__all__ = [
    "Recorder",
    "RetrievalAccuracy",
    "alignment",
    "effective_rank",
    "mean_log_sum_exp",
    "rank",
    "retrieval_accuracy",
    "uniformity",
    "wasserstein_uniformity",
]

if not TYPE_CHECKING:  # to type checkers it would say that any name is there
    __getattr__ = absent(__name__)
