"""What is public is drawn unasked; see __main__.py for the drawing itself."""

import inspect

from . import public
from .case import resolve


def test_everything_public_is_drawn() -> None:
    """Every public function and module can be drawn from its signature, and every name that an argument takes is known."""
    for kind, paths in public.public().items():
        assert paths, kind
        for path in paths:
            for parameter in inspect.signature(resolve(path)).parameters.values():
                if parameter.annotation == "str" and parameter.name not in public.BY_CALL and kind == "objectives":
                    assert len(public.names_of(path, parameter.name)) > 1, (path, parameter.name)
