"""The table is complete: every public objective has a line, a double loop and a module."""

import inspect

import fastcl
from tests import oracle

from .cases import CASES


def public_functions() -> set[str]:
    return {name for name in fastcl.functional.__all__ if inspect.isfunction(getattr(fastcl.functional, name))}


def test_every_public_function_has_a_case_and_every_case_a_function() -> None:
    assert public_functions() == {case.name for case in CASES}


def test_every_case_has_a_double_loop() -> None:
    assert {case.name for case in CASES} <= set(oracle.__all__)


def test_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
