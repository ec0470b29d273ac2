"""GISTEmbedLoss and its cached form beside sentence-transformers' own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fastcl.dropin import sentence_transformers as ours

from . import originals

NAMES = ("GISTEmbedLoss", "CachedGISTEmbedLoss")
WORDS = [f"w{i}" for i in range(12)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"margin": 0.1, "temperature": 0.05},
    {"margin": -0.2, "contrast_anchors": False},
    {"margin": 0.3, "margin_strategy": "relative", "contrast_positives": False},
    {"margin": -2.5, "contrast_anchors": False, "contrast_positives": False, "temperature": 0.2},
]


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    words = ["[PAD]", *words]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


class Embed(nn.Module):
    """Mean of the embeddings of words; dropout as in a model that trains."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table, self.dropout = nn.Embedding(words, width, dtype=torch.float64), nn.Dropout(0.1)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"].unsqueeze(2)
        features["sentence_embedding"] = self.dropout((self.table(features["input_ids"]) * mask).sum(1) / mask.sum(1))
        return features


class Model(nn.Sequential):
    """What the library's losses ask of a model and of a guide."""

    max_seq_length, device = 8, torch.device("cpu")

    def __init__(self, words: list[str] = WORDS, width: int = 6, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(Embed(len(words) + 1, width))
        self.tokenizer = tokenizer(words)

    def preprocess(self, texts: list[str]) -> dict[str, Tensor]:
        read = self.tokenizer(texts, return_tensors="pt", padding=True)
        return {name: read[name] for name in ("input_ids", "attention_mask")}


def original(name: str) -> Any:
    return getattr(originals.sentence_transformers().sentence_transformer.losses, name)


def texts(columns: int, n: int = 11) -> list[dict[str, Tensor]]:
    """Columns of texts of 1 to 4 words; positives share a word with their anchor, and one of them comes twice."""
    g = torch.Generator().manual_seed(3)
    said = torch.randint(0, len(WORDS), (columns, n, 4), generator=g)
    said[:, :, 0] = said[:1, :, 0]
    said[:, 7] = said[:, 2]
    length = 2 + torch.arange(n) % 3
    length[7] = length[2]
    read = Model().preprocess
    return [
        read([" ".join(WORDS[w] for w in row[: length[i]].tolist()) for i, row in enumerate(column)]) for column in said
    ]


def trained(loss: Any, model: nn.Module, columns: int = 3, n: int = 11) -> list[Tensor]:
    """Value and gradients of a step."""
    torch.manual_seed(1)
    model.zero_grad()
    value = loss(texts(columns, n), torch.zeros(n))
    (value / 2).backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max() + 1e-14


@pytest.mark.parametrize("words", [WORDS, [*WORDS[::-1], "more"]], ids=["one vocabulary", "two"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(name: str, settings: dict[str, Any], words: list[str]) -> None:
    """Dropout of the guide too: embeddings of one text differ, and columns are embedded in the library's order."""
    model, guide = Model(), Model(words, 5, seed=9)
    if "Cached" in name:
        settings = {"mini_batch_size": 4} | settings
    for columns in (2, 3):
        losses = (cls(model, guide, **settings) for cls in (getattr(ours, name), original(name)))
        same(*(trained(loss, model, columns) for loss in losses))


@pytest.mark.parametrize("name", NAMES)
def test_texts_that_come_twice(name: str) -> None:
    """Their similarities are the limits themselves: they stay, as there, whatever the products round to."""
    model, guide = Model().eval(), Model(width=384, seed=9).eval()
    for dtype in (torch.float64, torch.float32):
        model, guide = model.to(dtype), guide.to(dtype)
        for anchor_is_positive in (False, True):
            losses = [cls(model, guide, temperature=0.5) for cls in (getattr(ours, name), original(name))]
            columns = texts(2)
            given = [columns[0], columns[0 if anchor_is_positive else 1]]
            with torch.no_grad():
                a, b = (float(loss([dict(c) for c in given], torch.zeros(11))) for loss in losses)
            assert a == pytest.approx(b, rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("of_guide", [torch.float64, torch.bfloat16], ids=str)
def test_texts_that_come_twice_by_a_guide_of_another_dtype(of_guide: torch.dtype) -> None:
    """The similarity that is a limit rounds as those that it is held against, which are in the dtype of the model's."""
    g = torch.Generator().manual_seed(0)
    columns, guides = (torch.randn(2, 32, width, generator=g) for width in (16, 384))
    guides[:, 16:] = guides[:, :16]
    guides = guides.to(of_guide)
    loss = ours.GISTEmbedLoss(Model(), Model(), temperature=0.5)
    want = loss.compute_loss_from_embeddings(columns.double().unbind(), guides.double().unbind())
    got = loss.compute_loss_from_embeddings(columns.unbind(), guides.unbind())
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0.0)


def test_more_negatives_of_the_cached_form() -> None:
    model, guide = Model(), Model(width=5, seed=9)
    losses = (cls(model, guide, mini_batch_size=3) for cls in (ours.CachedGISTEmbedLoss, original(NAMES[1])))
    same(*(trained(loss, model, 4) for loss in losses))


def test_inside_matryoshka() -> None:
    model, guide, nested = Model(), Model(width=5, seed=9), original("MatryoshkaLoss")
    model.get_embedding_dimension = lambda: 6  # type: ignore[assignment]
    losses = (nested(model, cls(model, guide), [6, 3]) for cls in (ours.GISTEmbedLoss, original(NAMES[0])))
    same(*(trained(loss, model) for loss in losses))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_cards(name: str) -> None:
    mine, theirs = getattr(ours, name), original(name)
    assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters)
    cards = [loss(Model(), Model(), margin=0.1).get_config_dict() for loss in (mine, theirs)]
    assert {**cards[0], "guide": 0} == {**cards[1], "guide": 0}
    assert hasattr(mine, "citation") == hasattr(theirs, "citation")


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str) -> None:
    loss = getattr(ours, name)(Model(), Model())
    x = torch.ones(4, 3)
    for columns, guides, message in (
        ([x], [x], "embeddings: expected anchors, positives and as many by the guide, got 1 columns and 1"),
        ([x, x], [x], "embeddings: expected anchors, positives and as many by the guide, got 2 columns and 1"),
        ([x, x[:3]], [x, x], "embeddings.1.: expected one row for each row of embeddings.0., 4, got 3"),
        ([x, x], [x[:3], x[:3]], "guides: expected 4 rows, as embeddings have, got 3"),
        ([x[:0], x[:0]], [x[:0], x[:0]], "embeddings: expected at least 1 row, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.compute_loss_from_embeddings(columns, guides)
    with pytest.raises(ValueError, match="margin_strategy must be 'absolute' or 'relative'"):
        getattr(ours, name)(Model(), Model(), margin_strategy="ratio")
