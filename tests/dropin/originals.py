"""The classes that fastcl.dropin replaces, from the installed packages; a missing package is an error, not a skip.

open_clip and lightly import torchvision in their `__init__`, whose wheels fit one build of torch only. Their loss modules do
not need it, so those are imported with the packages around them left empty: the losses are the originals, unchanged.
lightly's memory bank imports lightly.models.utils, which names torchvision.ops.StochasticDepth once, for vision
transformers: a class of that name stands in while it is imported. Nothing else is replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType


@contextmanager
def _imports(*empty: str, stand_ins: dict[str, ModuleType] | None = None) -> Iterator[None]:
    """Imports with the named packages empty and the stand-ins in place; sys.modules is as before afterwards."""
    before = dict(sys.modules)
    try:
        for name in empty:
            package = ModuleType(name)
            package.__path__ = [str(_folder(name))]
            sys.modules[name] = package
        sys.modules.update(stand_ins or {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in [*empty, *(stand_ins or {})]:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def _folder(name: str) -> Path:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    locations = spec.submodule_search_locations if spec else sys.modules[top].__path__ if top in sys.modules else None
    if not locations:
        raise ModuleNotFoundError(f"{top} is not installed; make setup installs requirements/dropin.txt")
    return Path(next(iter(locations)), *rest)


@cache
def open_clip() -> ModuleType:
    """open_clip.loss."""
    with _imports("open_clip"):
        return importlib.import_module("open_clip.loss")


@cache
def lightly() -> ModuleType:
    """A module with lightly's losses of two views."""
    ops = ModuleType("torchvision.ops")
    ops.StochasticDepth = type("StochasticDepth", (), {})  # type: ignore[attr-defined]
    torchvision = ModuleType("torchvision")
    torchvision.ops = ops  # type: ignore[attr-defined]
    empty = ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.utils")
    with _imports(*empty, stand_ins={"torchvision": torchvision, "torchvision.ops": ops}):
        losses = ModuleType("losses")
        for module in ("ntx_ent_loss", "dcl_loss", "directclr_loss", "macl_loss", "hypersphere_loss"):
            losses.__dict__.update(vars(importlib.import_module(f"lightly.loss.{module}")))
    return losses


@cache
def pytorch_metric_learning() -> ModuleType:
    """pytorch_metric_learning, with its losses, distances, reducers, regularizers and utils.distributed."""
    with _imports():
        for name in ("losses", "distances", "reducers", "regularizers", "utils.distributed"):
            importlib.import_module(f"pytorch_metric_learning.{name}")
        return importlib.import_module("pytorch_metric_learning")


@cache
def pytorch_metric_learning_miners() -> ModuleType:
    """pytorch_metric_learning.miners, which imports scipy beside the losses."""
    pytorch_metric_learning()
    with _imports():
        return importlib.import_module("pytorch_metric_learning.miners")


@cache
def sentence_transformers() -> ModuleType:
    """sentence_transformers, with its losses and util."""
    with _imports():
        importlib.import_module("sentence_transformers.sentence_transformer.losses")
        return importlib.import_module("sentence_transformers")


class _Empty(type):
    """A class whose every attribute is None."""

    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Anything(ModuleType):
    """A module that has every name, each such a class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


@cache
def whole_open_clip() -> ModuleType:
    """open_clip itself, with its factory and its models; what cleans texts and transforms images comes from empty classes."""
    importlib.import_module("transformers").PreTrainedModel  # noqa: B018  # before torchvision seems to be there
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.ops",
        "torchvision.ops.misc",
        "ftfy",
    )
    made = {name: _Anything(name) for name in names}
    for name, module in made.items():
        module.__path__ = []  # type: ignore[attr-defined]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    with _imports(stand_ins=made):
        return importlib.import_module("open_clip")
