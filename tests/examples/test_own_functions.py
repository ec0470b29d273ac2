"""The example of functions of one's own, in a few steps: its figure, its numbers, and that its divergence is one half of JS."""

import json
from pathlib import Path

import pytest
import torch

import fastcl
from examples import own_functions
from fastcl.pairs import PairFunction

OWN = {
    name: PairFunction.registry.pop(name) for name in ("student_t", "logistic")
}  # this module's tests alone have them


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in OWN.items():
        monkeypatch.setitem(PairFunction.registry, name, cls)


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, since judging the embeddings takes a second for each."""
    for name in own_functions.OBJECTIVES.keys() - {"Lin", "Student"}:
        monkeypatch.delitem(own_functions.OBJECTIVES, name)
        monkeypatch.delitem(own_functions.POTENTIALS, name)
    assert own_functions.main(["--epochs", "0.4", "--seeds", "1", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert all(entry.title in out for entry in own_functions.OBJECTIVES.values())
    assert "step/s" in err or "s/step" in err, "the progress bar"
    assert (tmp_path / "own_functions.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "own_functions.json").read_text())["trained"]
    assert found.keys() == {"Lin", "Student"} and all(0.1 < q["knn"] <= 1.0 for (q,) in found.values())


def test_what_each_function_says() -> None:
    """By other formulas: t-SNE's kernel, a logistic curve, and JS as the two halves that Lin gave it."""
    z = torch.linspace(0.0, 4.0, 50, dtype=torch.float64)
    torch.testing.assert_close(own_functions.STUDENT.f(z), 1.0 / (1.0 + z))
    torch.testing.assert_close(own_functions.LOGISTIC.f(z), 1.0 / (1.0 + torch.exp((z - 0.5) / 0.5)))
    u = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3.0 + 0.01
    js = u * torch.log(u) - (1.0 + u) * torch.log(0.5 * (1.0 + u))
    torch.testing.assert_close(own_functions.lin(u) + u * own_functions.lin(1.0 / u), js)
    assert own_functions.LIN.spreads()
    x, y = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1))
    loss = own_functions.AlignAndPush(own_functions.STUDENT, 2.0)(x, y)
    rows = [torch.nn.functional.normalize(t) for t in (x, y)]
    means = [(1.0 / (1.0 + torch.cdist(t, t).square()) - torch.eye(30)).sum() / (30 * 29) for t in rows]
    expected = (rows[0] - rows[1]).square().sum(1).mean() + sum(m.log() for m in means)
    torch.testing.assert_close(loss, expected)
    assert isinstance(own_functions.pair_of("KL"), fastcl.pairs.Exp)
