"""ClipLoss, CoCaLoss, DistillClipLoss and SigLipLoss as in open_clip 3 (open_clip/loss.py).

from open_clip import ClipLoss            ->   from fastcl.dropin.open_clip import ClipLoss
from open_clip.loss import SigLipLoss     ->   from fastcl.dropin.open_clip import SigLipLoss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..distributed import agreed
from ..equation import checks
from ..equation.arguments import absent, kind_of, said
from ..functional.rows import leading
from ..functional.sigmoid import siglip
from ..functional.softmax import clip
from ..ops import pair_total
from ..precision import stacked
from ..transforms import of_keepable
from . import ranks
from .contrast import cross_entropy, distillation

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"]
if not TYPE_CHECKING:  # to type checkers it would say that any name is there
    __getattr__ = absent(__name__)

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """The mean of the cross entropies of images among texts and of texts among images.

        L = mean_i [ (LSE_j z_ij + LSE_j z_ji) / 2 - z_ii ],   z_ij = logit_scale <image_i, text_j>

    Rows are taken as they are: normalise them before. Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.

    Args:
        local_loss: with several processes, each takes its own rows against all, instead of all against all.
        gather_with_grad: gradients flow back to the processes that the rows came from.
        cache_labels: accepted either way: positives are found by index, so there are no labels to form or keep.
        rank: of this process.
        world_size: the number of processes; above 1 torch.distributed must run.
        use_horovod: False; anything else raises.

    Raises:
        NotImplementedError: for use_horovod.
        ValueError: for a rank that is not in the world.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError(
                "use_horovod: expected False, got True; Horovod is not supported, use torch.distributed or open_clip's own class"
            )
        _check_rank(rank, world_size)
        for name, value in (("local_loss", local_loss), ("gather_with_grad", gather_with_grad)):
            checks.boolean(name, value)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def _check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> None:
        checks.pair_of_matrices("image_features", image_features, "text_features", text_features)
        for name, rows in (("image_features", image_features), ("text_features", text_features)):
            checks.some_rows(name, rows)
        checks.positive_number("logit_scale", logit_scale)
        if logit_bias is not None:
            checks.number("logit_bias", logit_bias)

    def _across(self) -> dict[str, object] | None:
        """What all ranks must share, where rows of all are taken in."""
        if self.world_size == 1:
            return None
        shared = {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad}
        return {**shared, **ranks.named(self.rank, self.world_size)}

    @agreed(_check, _across, even=("image_features", "text_features"))
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features: (n, d) floating.
            text_features: (m, d), dtype of image_features; row i belongs to image i. Rows of the longer side beyond the shorter
                one are negatives only (hard captions), where the original raises; every process has as many.
            logit_scale: > 0, a number or a tensor with one element (may want gradients).
            logit_bias: added to every logit; it cancels in the softmax, so that its gradient is 0.
            output_dict: whether to return {"contrastive_loss": loss}.

        Returns:
            The loss, a scalar, or the dictionary.

        Raises:
            ValueError: for shapes or values that do not fit, or another world than the one that runs.
            TypeError: for unsupported or mixed dtypes.
        """
        self._check(image_features, text_features, logit_scale, logit_bias)
        loss = self._loss(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * checks.scalar("logit_bias", logit_bias, image_features)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        if self.world_size == 1:
            return clip(images, texts, logit_scale=scale, normalize=False)
        gather = self._gather()
        k = min(images.shape[0], texts.shape[0])
        all_images, all_texts = (self._pairs_first(gather(rows), k) for rows in (images, texts))
        if not self.local_loss:
            return clip(all_images, all_texts, logit_scale=scale, pairs=self.world_size * k, normalize=False)
        offset = self.rank * k
        rows = cross_entropy(leading(images, k), all_texts, offset, scale)
        return 0.5 * (rows + cross_entropy(leading(texts, k), all_images, offset, scale))

    def _gather(self) -> Callable[[Tensor], Tensor]:
        """How rows of all processes come here."""
        ranks.require(self.rank, self.world_size)
        if self.gather_with_grad:
            return ranks.gathered_with_gradient
        return ranks.gathered if self.local_loss else ranks.gathered_with_own

    def _pairs_first(self, rows: Tensor, k: int) -> Tensor:
        """Rows of all processes, the first k of each before the others of each."""
        shards = rows.unflatten(0, (self.world_size, -1))
        if shards.shape[1] == k:
            return rows
        return stacked(shards[:, :k].flatten(0, 1), shards[:, k:].flatten(0, 1))


class CoCaLoss(ClipLoss):
    """ClipLoss beside the cross entropy of captions, each with its weight.

    Source: Yu et al. 2022 (arXiv 2205.01917), eq. 4.

    Args:
        caption_loss_weight: of the captions' cross entropy.
        clip_loss_weight: of ClipLoss; 0 leaves it out.
        pad_id: the label of positions that do not count.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: see ClipLoss.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = checks.real("clip_loss_weight", clip_loss_weight)
        self.caption_loss_weight = checks.real("caption_loss_weight", caption_loss_weight)
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    @of_keepable
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses of one batch, weighted.

        Args:
            image_features, text_features, logit_scale: see ClipLoss.
            logits: (n, positions, vocabulary) floating, of the captions' tokens.
            labels: (n, positions) int64, the tokens.
            output_dict: whether to return {"contrastive_loss": ..., "caption_loss": ...}.

        Returns:
            (contrastive loss, caption loss), scalars, or the dictionary.

        Raises:
            ValueError, TypeError: as ClipLoss; PyTorch's cross entropy says what is wrong with logits and labels.
        """
        error, several = _of_captions(logits), self.world_size > 1 and ranks.world_size() > 1
        if self.clip_loss_weight:
            wrong = said(str(error), isinstance(error, ValueError)) if error is not None and several else {}  # which no rank takes
            loss = super().forward(image_features, text_features, logit_scale, **wrong)
            if wrong:  # in a graph, whose op raises, on all ranks, before this is anything
                return loss, loss
            assert isinstance(loss, Tensor)
            clip_loss = self.clip_loss_weight * loss
        else:  # as the original's: nothing to train
            clip_loss = torch.zeros((), dtype=torch.int64, device=image_features.device)
        if error is not None:
            raise error
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


def _of_captions(logits: Tensor) -> Exception | None:
    """What is wrong with the decoder's logits, before PyTorch says it."""
    if not isinstance(logits, Tensor):
        return TypeError(f"logits: expected a floating-point tensor, got {kind_of(logits)}; pass the decoder's logits")
    if logits.dim() != 3:
        return ValueError(
            f"logits: expected shape (n, positions, vocabulary), got {tuple(logits.shape)}; pass all positions"
        )
    return None


class DistillClipLoss(ClipLoss):
    """ClipLoss beside the cross entropy of a teacher's softmaxes with the student's, in both directions.

        D = mean_i [ LSE_j z_ij - sum_j q_ij z_ij ] / 2 + the same of columns,   q_i = softmax_j of the teacher's logits

    The student's log-sum-exps are those of its logits; the teacher's expectation is taken in blocks of rows, which are
    formed again in the backward pass: memory is that of a block.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: see ClipLoss.
    """

    def _check_both(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> None:
        ClipLoss._check(self, image_features, text_features, logit_scale)
        names = ("dist_image_features", "dist_text_features")
        checks.pair_of_matrices(names[0], dist_image_features, names[1], dist_text_features, same_rows=True)
        checks.pair_of_matrices("image_features", image_features, "text_features", text_features, same_rows=True)
        if dist_image_features.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"dist_image_features: expected one row for each row of image_features, {image_features.shape[0]}, got "
                f"{dist_image_features.shape[0]}"
            )
        if dist_image_features.device != image_features.device:
            raise ValueError(
                f"dist_image_features: expected the device of image_features, {image_features.device}, got "
                f"{dist_image_features.device}; move the teacher's"
            )
        checks.positive_number("dist_logit_scale", dist_logit_scale)

    @agreed(_check_both, ClipLoss._across, even=("image_features", "text_features"))
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses of one batch.

        Args:
            image_features, text_features, logit_scale: the student's; see ClipLoss.
            dist_image_features: (n, e) floating, the teacher's.
            dist_text_features: (n, e), dtype of dist_image_features.
            dist_logit_scale: > 0, a number or a tensor with one element.
            output_dict: whether to return {"contrastive_loss": ..., "distill_loss": ...}.

        Returns:
            (contrastive loss, distillation loss), scalars, or the dictionary.

        Raises:
            ValueError, TypeError: as ClipLoss, for student and teacher.
        """
        self._check_both(
            image_features, text_features, logit_scale, dist_image_features, dist_text_features, dist_logit_scale
        )
        contrastive = self._loss(image_features, text_features, logit_scale)
        sides = self._sides(image_features, text_features)
        teacher = self._sides(dist_image_features, dist_text_features)
        offset = self.rank * image_features.shape[0] if self.world_size > 1 and self.local_loss else 0
        parts = [
            distillation(*student, offset, logit_scale, *of, dist_logit_scale)
            for student, of in zip(sides, teacher, strict=True)
        ]
        distill = 0.5 * (parts[0] + parts[1])
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _sides(self, images: Tensor, texts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The rows of each direction's logits and what they are compared with."""
        if self.world_size == 1:
            return [(images, texts), (texts, images)]
        gather = self._gather()
        all_images, all_texts = gather(images), gather(texts)
        if self.local_loss:
            return [(images, all_texts), (texts, all_images)]
        return [(all_images, all_texts), (all_texts, all_images)]


class SigLipLoss(nn.Module):
    """Each image with each text is a binary choice of its own.

        L = (1/n) sum_i [ softplus(-z_ii) + sum_{j != i} softplus(z_ij) ],   z_ij = logit_scale <image_i, text_j> + logit_bias

    With several processes j runs over the texts of all of them. Rows are taken as they are: normalise them before.
    Source: Zhai et al. 2023 (arXiv 2303.15343), eq. 1.

    Args:
        cache_labels: accepted either way: there are no labels to form or keep.
        rank: of this process.
        world_size: the number of processes; above 1 torch.distributed must run.
        dist_impl: how texts travel: "bidir" (None) and "shift" around the ring, "reduce" by sums, "gather" all at once.
        chunk_size: None or an integer > 0, accepted either way (as in open_clip 4): no n x n logits are formed, whole or
            in chunks.

    Raises:
        ValueError: for an unknown dist_impl, a chunk_size that is not > 0, or a rank that is not in the world.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_rank(rank, world_size)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = checks.one_of("dist_impl", dist_impl or "bidir", DIST_IMPLS)
        self.chunk_size = None if chunk_size is None else checks.integer("chunk_size", chunk_size, least=1)

    def _check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> None:
        checks.pair_of_matrices("image_features", image_features, "text_features", text_features, same_rows=True)
        checks.some_rows("image_features", image_features)
        checks.positive_number("logit_scale", logit_scale)
        if logit_bias is not None:
            checks.number("logit_bias", logit_bias)

    def _across(self) -> dict[str, object] | None:
        """What all ranks must share, where texts of all are taken in."""
        if self.world_size == 1:
            return None
        return {"dist_impl": self.dist_impl, **ranks.named(self.rank, self.world_size)}

    @agreed(_check, _across, even=("image_features", "text_features"))
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features: (n, d) floating.
            text_features: (n, d), dtype of image_features; row i belongs to image i.
            logit_scale: a number or a tensor with one element (may want gradients).
            logit_bias: a number or a tensor with one element (may want gradients); None for 0.
            output_dict: whether to return {"contrastive_loss": loss}.

        Returns:
            The loss, a scalar, or the dictionary.

        Raises:
            ValueError: for shapes or values that do not fit, no rows, or another world than the one that runs.
            TypeError: for unsupported or mixed dtypes.
        """
        self._check(image_features, text_features, logit_scale, logit_bias)
        bias = 0.0 if logit_bias is None else logit_bias
        terms = [
            siglip(image_features, texts, logit_scale=logit_scale, logit_bias=bias, normalize=False, reduction="sum")
            if own
            else pair_total(
                image_features, texts, outer="sum", pair="softplus", reduce="sum", scale=logit_scale, shift=bias
            )
            for texts, own in self._texts(text_features)
        ]
        loss = torch.stack(terms).sum() / image_features.shape[0]
        return {"contrastive_loss": loss} if output_dict else loss

    def _texts(self, texts: Tensor) -> list[tuple[Tensor, bool]]:
        """The shards of texts, and which of them is this process's own."""
        if self.world_size == 1:
            return [(texts, True)]
        ranks.require(self.rank, self.world_size)
        if self.dist_impl == "reduce":
            return [(shard, k == self.rank) for k, shard in ranks.summed(texts)]
        return [(texts, True), *((shard, False) for shard in ranks.others(texts, self.dist_impl))]


def _check_rank(rank: int, world_size: int) -> None:
    for name, value in (("rank", rank), ("world_size", world_size)):
        checks.integer(name, value)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}; pass torch.distributed's own"
        )
