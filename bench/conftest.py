"""The option of test_speed.py."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=int, help="another number of rows than the cases have")
