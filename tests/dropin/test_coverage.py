"""docs/guides/coverage.md against the installed libraries: every loss class has a row, and "yes" is said of what fastcl has."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from . import originals

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "coverage.md").read_text()
# The library as the page calls it: its package, the files that name its losses, and the drop-in.
LIBRARIES = {
    "open_clip": ("open_clip", "loss.py", "open_clip"),
    "lightly": ("lightly", "loss/**/*.py", "lightly"),
    "pytorch-metric-learning": ("pytorch_metric_learning", "losses/__init__.py", "pytorch_metric_learning"),
    "sentence-transformers": (
        "sentence_transformers",
        "sentence_transformer/losses/__init__.py",
        "sentence_transformers",
    ),
}
OTHERS = (
    "Mixin",
    "Memory",
    "Losses",
    "LossFunction",
    "Wrapper",
    "Similarity",
    "Negatives",
    "Regularizer",
)  # ends, beside Loss


def classes(library: str) -> set[str]:
    """The names of the library's losses, read without an import."""
    package, pattern, _ = LIBRARIES[library]
    named: set[str] = set()
    for file in originals._folder(package).glob(pattern):
        tree = ast.parse(file.read_text())
        named |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        if file.name == "__init__.py":
            named |= {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    return {name for name in named if name.endswith(("Loss", *OTHERS))}


def table(library: str) -> dict[str, str]:
    """{class: answer} as the page has it."""
    section = re.search(rf"^## {re.escape(library)} [\d.]+\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section
    found: dict[str, str] = {}
    for line in section[1].splitlines():
        if line.startswith("| `"):
            names, answer, _ = (cell.strip() for cell in line.strip("|").split("|"))
            for name in re.findall(r"`(\w+)`", names):
                assert name not in found, f"{name} stands twice"
                found[name] = answer
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_class_has_a_row(library: str) -> None:
    assert set(table(library)) == classes(library)


@pytest.mark.parametrize("library", LIBRARIES)
def test_yes_is_what_the_drop_in_has(library: str) -> None:
    ours = importlib.import_module(f"fastcl.dropin.{LIBRARIES[library][2]}")
    answers = table(library)
    assert set(answers.values()) <= {"yes", "no", "function"}
    assert {n for n, answer in answers.items() if answer == "yes"} == {n for n in answers if hasattr(ours, n)}


def test_functions_that_the_page_names_exist() -> None:
    import fastcl

    for module, name in re.findall(r"`fastcl\.(functional|losses)\.(\w+)`", PAGE):
        assert hasattr(getattr(fastcl, module), name)
    for name in re.findall(r"`(?:(info_nce)\(|(spread_out)`|(clip)`)", PAGE):
        assert hasattr(fastcl.functional, "".join(name))
