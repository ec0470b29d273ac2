"""A name that is not there is answered with the nearest that is: keywords, attributes of modules, letters of another case."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle

import pytest
import torch

import fastcl
from fastcl import functional, losses, metrics
from fastcl.equation.arguments import ALSO_CALLED

ROWS = torch.eye(4)


@pytest.mark.parametrize(
    ("module", "name", "meant"),
    [
        ("fastcl", "clip", "fastcl.functional.clip"),
        ("fastcl", "NTXentLoss", "fastcl.losses.NTXentLoss"),
        ("fastcl", "pair_reduc", "fastcl.pair_reduce"),
        ("fastcl.functional", "cilp", "fastcl.functional.clip"),
        ("fastcl.functional", "NT_Xent", "fastcl.functional.nt_xent"),
        ("fastcl.losses", "ClipLoss", "fastcl.losses.CLIPLoss"),
        ("fastcl.losses", "InfoNCE", "fastcl.losses.InfoNCELoss"),
        ("fastcl.metrics", "alignement", "fastcl.metrics.alignment"),
        ("fastcl.dropin.open_clip", "CLIPLoss", "fastcl.dropin.open_clip.ClipLoss"),
        ("fastcl.dropin.lightly", "NTXentLos", "fastcl.dropin.lightly.NTXentLoss"),
        ("fastcl.dropin.pytorch_metric_learning", "SupconLoss", "fastcl.dropin.pytorch_metric_learning.SupConLoss"),
        ("fastcl.dropin.sentence_transformers", "CachedMNRL", None),
        ("fastcl.dropin.sentence_transformers", "MultipleNegativeRankingLoss", "MultipleNegativesRankingLoss"),
        ("fastcl.functional", "simclr", "fastcl.functional.nt_xent"),  # sogclr is nearer in letters
        ("fastcl", "SimCLRLoss", "fastcl.losses.NTXentLoss"),
        ("fastcl.losses", "MultipleNegativesRankingLoss", "fastcl.losses.InfoNCELoss"),
        ("fastcl", "__nothing__", None),
        ("fastcl", "quaternion", None),
    ],
)
def test_attributes_of_modules(module: str, name: str, meant: str | None) -> None:
    with pytest.raises(AttributeError) as raised:
        getattr(importlib.import_module(module), name)
    expected = f"module {module!r} has no attribute {name!r}" + (f"; did you mean {meant!r}?" if meant else "")
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.nt_xent(ROWS, ROWS, temprature=0.5), "nt_xent() got an unexpected keyword argument 'temprature'"),
        (lambda: losses.NTXentLoss(temprature=0.5), "NTXentLoss() got an unexpected keyword argument 'temprature'"),
        (lambda: losses.NTXentLoss()(ROWS, ROWS, Groups=ROWS), "nt_xent() got an unexpected keyword argument 'Groups'"),
        (lambda: metrics.uniformity(ROWS, normalise=True), "uniformity() got an unexpected keyword argument 'normalise'"),
    ],
)  # fmt: skip
def test_keywords(call: object, message: str) -> None:
    meant = {"temprature": "temperature", "Groups": "groups", "normalise": "normalize"}[message.split("'")[1]]
    with pytest.raises(TypeError) as raised:
        call()  # type: ignore[operator]
    assert str(raised.value) == f"{message}; did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("call", "end"),
    [
        (lambda: functional.nt_xent(ROWS, ROWS, tau=0.5), "'tau'; did you mean 'temperature'?"),
        (lambda: functional.nt_xent(ROWS, ROWS, logit_scale=2.0), "did you mean 'temperature', which is 1 / logit_scale?"),
        (lambda: functional.clip(ROWS, ROWS, temperature=0.5), "did you mean 'logit_scale', which is 1 / temperature?"),
        (lambda: functional.clip(ROWS, ROWS, tau=0.5), "'tau'; did you mean 'logit_scale', which is 1 / tau?"),
        (lambda: functional.clip(ROWS, ROWS, scale=0.5), "'scale'; did you mean 'logit_scale'?"),
        (lambda: losses.CLIPLoss(temperature=0.5), "'temperature'; did you mean 'logit_scale', which is 1 / temperature?"),
        (lambda: losses.InfoNCELoss(margin=0.1), "'margin'; did you mean 'false_negative_margin'?"),
        (lambda: fastcl.pair_reduce(ROWS, temperature=0.1), "pair_reduce() got an unexpected keyword argument 'temperature'"),
    ],
)  # fmt: skip
def test_what_the_field_calls_it(call: object, end: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()  # type: ignore[operator]
    assert str(raised.value).endswith(end)


def test_every_other_name_stands_for_one_that_is_there() -> None:
    known = {*functional.__all__, *losses.__all__}
    known |= {p for f in functional.__all__ for p in inspect.signature(getattr(functional, f)).parameters}
    assert {each for names in ALSO_CALLED.values() for each in names} <= known


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: functional.f_micl(ROWS, ROWS, divergence="KL"), "kl"),
        (lambda: losses.FMICLLoss(divergence="JS"), "js"),
        (lambda: functional.clip(ROWS, ROWS, logit_scale=1.0, backend="CPU"), "cpu"),
        (lambda: fastcl.pair_reduce(ROWS, operand="DOT"), "dot"),
        (lambda: fastcl.pair_reduce(ROWS, pair="EXP"), "exp"),
    ],
)
def test_letters_of_another_case(call: object, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'\\?"):
        call()  # type: ignore[operator]


def test_modules_are_modules_still() -> None:
    assert not hasattr(fastcl, "clip") and "clip" not in dir(fastcl)
    loss = losses.NTXentLoss(temperature=0.5)
    assert copy.deepcopy(loss).temperature == pickle.loads(pickle.dumps(loss)).temperature == 0.5
