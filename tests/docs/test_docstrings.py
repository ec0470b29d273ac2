"""Every public name shows how it is used, by an example that runs."""

import doctest
import inspect
import warnings
from typing import Any

import pytest
import torch

import fastcl

MODULES = (fastcl, fastcl.functional, fastcl.losses, fastcl.metrics)
WITHOUT = {
    "BackendUnavailableError": "raised, not made",
    "FMICLTerms": "returned by f_micl",
    "Mask": "made by all_pairs, off_diagonal, across_groups and within_groups",
    "NormalizedLoss": "returned by sogclr and fast_clip",
    "Objective": "a base class; its module's docstring shows a subclass",
    "Patch": "returned by patch",
    "RetrievalAccuracy": "returned by retrieval_accuracy",
}
NOT_RUN = {"patch": "its libraries are no requirement"}


def public() -> list[tuple[str, Any]]:
    named = {f"{m.__name__}.{name}": getattr(m, name) for m in MODULES for name in m.__all__}
    return [(name, thing) for name, thing in named.items() if inspect.isfunction(thing) or inspect.isclass(thing)]


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_the_example_runs(name: str, thing: Any) -> None:
    last = name.rpartition(".")[2]
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    assert bool(examples) == (last not in WITHOUT), (
        "an example is missing, or one that was thought not to be needed is there"
    )
    if last in NOT_RUN:
        pytest.skip(NOT_RUN[last])
    test = doctest.DocTest(examples, {"torch": torch, "fastcl": fastcl}, name, None, 0, None)
    output: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doctest.DocTestRunner().run(test, out=output.append)
    assert not output, "".join(output)
