"""CachedMultipleNegativesRankingLoss and its symmetric form: the library's own caching around fastcl's loss.

    from fastcl.dropin.sentence_transformers import CachedMultipleNegativesRankingLoss

Imported with these names only, since it stands on sentence-transformers 6 (base/losses/gradcache.py): features of any kind (padded,
flattened, images) are cut as there, and MatryoshkaLoss goes around it as around the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from torch import Tensor, nn

from ..precision import stacked
from .sentence_transformers import BOTH_WAYS, MultipleNegativesRankingLoss

__all__ = ["CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"]


class CachedMultipleNegativesRankingLoss(CachedLossMixin, MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss of any number of rows through a model that holds a mini-batch at a time.

    The original evaluates the loss in slices of mini_batch_size queries, each with its rows of the score matrix; here it is
    evaluated once, in O(n d) memory. Source: Gao et al. 2021 (arXiv 2101.06983).

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength: see
            MultipleNegativesRankingLoss.
        mini_batch_size: how many texts the model holds at a time.
        mini_batch_num_tokens: how many tokens, in place of mini_batch_size; None for that.
        show_progress_bar: whether to show a progress bar.

    Raises:
        NotImplementedError: for other similarities.
        ValueError: for values that do not fit, or a model of static embeddings, whose inputs cannot be cut.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        MultipleNegativesRankingLoss.__init__(
            self, model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength
        )  # fmt: skip
        if isinstance(model, nn.Sequential) and has_static_embedding_input(model):
            raise ValueError(
                "model: expected inputs that can be cut into mini-batches, got static embeddings; use MultipleNegativesRankingLoss"
            )
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch, whose backward embeds each mini-batch again."""
        value: Tensor = self.forward_cached(sentence_features, labels)
        return value

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embedded mini-batches; with_backward, its gradients in them too."""
        value = self.compute_loss_from_embeddings([stacked(*column) for column in reps], labels)
        if not with_backward:
            return value
        value.backward()
        return value.detach()

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for model cards."""
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return super().get_config_dict() | sizes

    @property
    def citation(self) -> str:
        """For model cards."""
        return _CITATION


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """CachedMultipleNegativesRankingLoss in both directions, each with a softmax of its own.

    Args:
        model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar: as there.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, BOTH_WAYS, "per_direction",
            show_progress_bar,
        )  # fmt: skip


_CITATION = """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
