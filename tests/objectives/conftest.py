"""kcl warns once of a Riesz kernel's unbounded alignment: test_errors.py asks for it, and elsewhere it may come or not."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:kcl. kernel='riesz' with t > 0 is unbounded below"))
