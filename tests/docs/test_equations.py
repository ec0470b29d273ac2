"""docs/equations.md: every name on it exists, every objective and metric is on it, and its table of divergences is right."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import functional, metrics

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "equations.md").read_text()
CODE = re.findall(r"`([^`]+)`", PAGE)


def resolve(name: str) -> object:
    """The object of that dotted name, importing modules on the way."""
    found: object = fastcl
    path = "fastcl"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        found = getattr(found, part, None) or importlib.import_module(path)
    return found


@pytest.mark.parametrize("name", sorted({m for c in CODE for m in re.findall(r"fastcl(?:\.\w+)+", c)}))
def test_dotted_names_exist(name: str) -> None:
    assert resolve(name) is not None


def test_called_names_exist() -> None:
    called = {m for c in CODE for m in re.findall(r"^([a-z]\w*)\(", c)}
    assert called
    assert called <= set(functional.__all__)


@pytest.mark.parametrize("module", [functional, metrics])
def test_every_public_function_is_on_the_page(module: object) -> None:
    for name in module.__all__:  # type: ignore[attr-defined]
        if name[0].islower():
            assert re.search(rf"`(?:fastcl\.metrics\.)?{name}[`(]", PAGE), name


def table() -> dict[str, list[str]]:
    """The table of divergences: name to f, f', psi and psi in l."""
    lines = PAGE.split("| | f(u) |")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {row[0]: row[1:] for row in rows}


def formula(text: str, **values: torch.Tensor) -> torch.Tensor:
    """The value of a formula as the page writes it."""
    text = re.sub(r"\blog u\b", "log(u)", text)
    text = re.sub(r"\blog 2\b", "log(two)", text)
    text = re.sub(r"\bsqrt u\b", "sqrt(u)", text)
    text = re.sub(r"e\^\{([^}]+)\}", r"exp(\1)", text).replace("e^l", "exp(l)")
    text = re.sub(r"\^\{([^}]+)\}", r"**(\1)", text).replace("^", "**")
    text = re.sub(r"(\d|\bq)([luq]\b|[lu](?=[)*]))", r"\1*\2", text)  # 2l, ql, 8u
    text = re.sub(r"\bq([lu])\b", r"q*\1", text)
    text = re.sub(r"(?<=[\w)]) (?=[a-z(])", " * ", text)  # a product is written as a space
    text = re.sub(r"([\w)]) \* ([-+/])", r"\1 \2", text)
    names = {name: getattr(torch, name) for name in ("log", "sqrt", "exp", "sigmoid")}
    names["softplus"] = torch.nn.functional.softplus
    return eval(text, {"__builtins__": {}}, {**names, **values, "two": torch.tensor(2.0).double()})


@pytest.mark.parametrize("name", ["KL", "JS", "Pearson", "SH", "Tsallis q", "VLC", "RKL", "Neyman", "Jeffrey"])
def test_table_of_divergences(name: str) -> None:
    """f' is the derivative of f, psi = u f' - f, and psi in l is psi at u = e^l."""
    f, slope, psi, psi_in_l = table()[name]
    u = torch.tensor([0.05, 0.4, 1.0, 1.7, 6.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor(1.7, dtype=torch.float64)
    value = formula(f, u=u, q=q)
    derivative = torch.autograd.grad(value.sum(), u)[0]
    at = u.detach()
    torch.testing.assert_close(formula(slope, u=at, q=q), derivative, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(formula(psi, u=at, q=q), at * derivative - value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(formula(psi_in_l, l=at.log(), q=q), formula(psi, u=at, q=q), rtol=1e-12, atol=1e-12)
