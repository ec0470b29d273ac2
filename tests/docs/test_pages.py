"""The pages: blocks of `python` run (a fragment is marked `py`), and every public name is in the reference, with its formula."""

import re
from pathlib import Path

import pytest

import fastcl
from fastcl import functional, losses, metrics

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> str:
    return "\n".join(BLOCK.findall((ROOT / page).read_text()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=str)
def test_python_blocks_run(page: Path) -> None:
    """One after the other, in one namespace for each page, as a reader would type them."""
    exec(compile(blocks(page), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize(
    ("page", "module"), [("functional", functional), ("losses", losses), ("metrics", metrics), ("primitive", fastcl)]
)
def test_every_public_name_is_in_the_reference(page: str, module: object) -> None:
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text()
    prefix = module.__name__  # type: ignore[attr-defined]
    elsewhere = {"functional", "losses", "metrics", "pairs", "__version__"}
    missing = [
        n
        for n in module.__all__
        if n not in elsewhere and not re.search(rf"^::: {re.escape(prefix)}\.{n}$", text, re.M)
    ]  # type: ignore[attr-defined]
    assert missing == []


def test_every_function_of_the_reference_has_a_formula() -> None:
    text = (ROOT / "docs" / "reference" / "functional.md").read_text()
    entries = re.findall(r"^::: fastcl\.functional\.([a-z]\w*)$(.*?)(?=^::: |^## |\Z)", text, re.M | re.S)
    assert len(entries) >= 20
    assert [name for name, body in entries if "$$" not in body] == []


def test_every_variable_of_the_environment_is_in_the_table() -> None:
    """Those that the package and its kernels read; by a constant named ..._VARIABLE, by environ or by getenv."""
    places = ("fastcl", "*.py"), ("triton_kernels", "*.py"), ("csrc", "*.py"), ("csrc", "*.cpp")
    sources = [path for folder, kind in places for path in (ROOT / folder).rglob(kind)]
    read = re.compile(r"^\w*VARIABLE(?:, \w+)* = .*|(?:environ\.get|getenv)\(\"FASTCL_\w+", re.MULTILINE)
    names = {n for p in sources for line in read.findall(p.read_text()) for n in re.findall(r"FASTCL_\w+", line)}
    of_the_tests = {"FASTCL_POISON", "FASTCL_BUILD_MODELS"}
    assert len(names) >= 8
    page = (ROOT / "docs" / "guides" / "measure.md").read_text()
    assert sorted(name for name in names - of_the_tests if f"`{name}`" not in page) == []


def test_the_readme_fits_a_screen_and_its_links_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 130
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
