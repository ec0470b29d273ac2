"""One line that puts fastcl's losses into a library's own programs, and takes them out again.

fastcl.patch("open_clip")                  create_loss and the names ClipLoss, SigLipLoss
fastcl.patch("transformers")               return_loss=True of CLIP-like and SigLIP-like models, without forming their logits
fastcl.patch("sentence_transformers")      the ranking losses of its losses module, those by a guide among them
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import metadata
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import Self

from .equation import checks

RANKING = ("MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss")
MODELS = ("AltCLIPModel", "CLIPModel", "ChineseCLIPModel", "MetaClip2Model", "Siglip2Model", "SiglipModel")


class Replacement(NamedTuple):
    """A name in a library that stands for something else while a patch is on."""

    owner: Any
    name: str
    original: Any
    ours: Any

    @property
    def path(self) -> str:
        """Where it is."""
        owner = self.owner
        return (
            f"{owner.__name__ if inspect.ismodule(owner) else f'{owner.__module__}.{owner.__qualname__}'}.{self.name}"
        )


class Patch:
    """What was replaced; `undo` puts it back, as does leaving it as a context. To enter it again puts ours in again.

    Entered more than once, by a function within its own context or by several threads, it is left when the last of them leaves.
    """

    def __init__(self, library: str, replaced: tuple[Replacement, ...]) -> None:
        self.library, self.replaced = library, replaced
        self._within, self._lock = 0, Lock()
        self._put()

    def _put(self) -> None:
        """Ours in place of the library's own, wherever that stands."""
        for name in self.replaced:
            if getattr(name.owner, name.name) is name.original:
                setattr(name.owner, name.name, name.ours)

    def undo(self) -> None:
        """Put the library's own back, wherever ours still stands."""
        for name in self.replaced:
            if getattr(name.owner, name.name) is name.ours:
                setattr(name.owner, name.name, name.original)

    def __enter__(self) -> Self:
        with self._lock:
            self._within += 1
            self._put()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self.undo()

    def __repr__(self) -> str:
        return f"fastcl.patch({self.library!r}) replaced {', '.join(name.path for name in self.replaced) or 'nothing: it was on'}"


def patch(library: str) -> Patch:
    """Let a library's own programs and models use fastcl's losses, with equal values.

    Names that were imported from the library before (`from open_clip import ClipLoss`) keep what they stand for. A second patch
    finds nothing to replace.

    Args:
        library: "open_clip", "transformers" or "sentence_transformers". Models of transformers return no logits with
            return_loss=True, where they would be n x n; without it they are untouched.

    Returns:
        What was replaced, with `undo()`; also a context that undoes it at its end.

    Raises:
        ValueError: for another library.
        ImportError: the library is not installed, or in a version whose parts are not known.

    Examples:
        >>> with fastcl.patch("transformers"):
        ...     loss = model(**batch, return_loss=True).loss
    """
    checks.one_of("library", library, tuple(LIBRARIES))
    distribution, major, found = LIBRARIES[library]
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"library: expected {distribution} {major}, which is not installed; pip install {distribution}"
        ) from error
    if version.split(".")[0] != major:
        raise ImportError(
            f"library: expected {distribution} {major}, got {version}, whose parts are not known; "
            f"install {distribution}~={major}.0, or use fastcl.dropin and fastcl.losses"
        )
    return Patch(library, tuple(name for name in found() if name.original is not name.ours))


def _classes(modules: tuple[str, ...], names: tuple[str, ...], dropin: str) -> Iterator[Replacement]:
    ours = importlib.import_module(f"fastcl.dropin.{dropin}")
    for path in modules:
        module = importlib.import_module(path)
        for name in names:
            if hasattr(module, name):
                yield Replacement(module, name, getattr(module, name), getattr(ours, name))


def _open_clip() -> Iterator[Replacement]:
    yield from _classes(("open_clip.loss", "open_clip.factory", "open_clip"), ("ClipLoss", "SigLipLoss"), "open_clip")


def _sentence_transformers() -> Iterator[Replacement]:
    names = tuple(f"{cached}{name}" for cached in ("", "Cached") for name in (*RANKING, "GISTEmbedLoss"))
    yield from _classes(("sentence_transformers.sentence_transformer.losses",), names, "sentence_transformers")


def _transformers() -> Iterator[Replacement]:
    library = importlib.import_module("transformers")
    for name in MODELS:
        model = getattr(library, name)
        if not hasattr(model.forward, "without_logits"):
            yield Replacement(model, "forward", model.forward, _without_logits(model))


def _without_logits(model: Any) -> Callable[..., Any]:
    """A forward whose return_loss=True forms no logits: the embeddings, and the loss of them."""
    generic = importlib.import_module("transformers.utils.generic")
    original = model.forward
    signature = inspect.signature(original)
    output = getattr(importlib.import_module(model.__module__), model.__name__.replace("Model", "Output"))
    towers = tuple(
        (
            method,
            set(inspect.signature(getattr(model, method)).parameters) & set(signature.parameters) - {"self", "kwargs"},
        )
        for method in ("get_image_features", "get_text_features")
    )

    @generic.can_return_tuple
    def embed(self: Any, given: dict[str, Any], rest: dict[str, Any]) -> Any:
        images, texts = (
            getattr(self, method)(**{name: given[name] for name in names if name in given}, **rest)
            for method, names in towers
        )
        x, y = (found.pooler_output / found.pooler_output.norm(dim=-1, keepdim=True) for found in (images, texts))
        return output(
            loss=_loss(self, y, x), text_embeds=y, image_embeds=x, text_model_output=texts, vision_model_output=images
        )

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        if not given.pop("return_loss", None):
            return original(self, *args, **kwargs)
        given.pop("self")
        rest = given.pop("kwargs", {})
        settings = {name: rest.pop(name) for name in ("return_dict",) if name in rest}
        return embed(self, given, rest, **settings)

    forward.without_logits = True  # type: ignore[attr-defined]
    return forward


def _loss(model: nn.Module, texts: Tensor, images: Tensor) -> Tensor:
    from .functional import clip, siglip

    scale = model.logit_scale.exp().to(texts.device)  # type: ignore[operator]
    if hasattr(model, "logit_bias"):
        bias: Any = model.logit_bias
        return siglip(texts, images, logit_scale=scale, logit_bias=bias.to(texts.device), normalize=False)
    return clip(texts, images, logit_scale=scale, normalize=False)


LIBRARIES: dict[str, tuple[str, str, Callable[[], Iterator[Replacement]]]] = {
    "open_clip": ("open_clip_torch", "3", _open_clip),
    "transformers": ("transformers", "5", _transformers),
    "sentence_transformers": ("sentence-transformers", "6", _sentence_transformers),
}

__all__ = ["Patch", "patch"]
