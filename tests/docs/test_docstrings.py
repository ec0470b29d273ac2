"""Every public name shows how it is used, by an example that runs."""

import doctest
import inspect
import warnings
from typing import Any

import pytest
import torch

import fastcl
from tests.fuzz.public import documented

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
ALIKE = ("backend", "group", "normalize", "temperature")  # arguments that are the same thing in every loss
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


def test_every_argument_has_its_line_and_the_shared_ones_read_alike() -> None:
    said: dict[str, set[str]] = {name: set() for name in ALIKE}
    for name in fastcl.functional.__all__:
        function = getattr(fastcl.functional, name)
        if inspect.isfunction(function):
            lines = documented(function)
            assert lines.keys() >= inspect.signature(function).parameters.keys(), name
            for shared in said.keys() & lines.keys():
                said[shared].add(lines[shared][:20])
    assert all(len(heads) == 1 for heads in said.values()), said
