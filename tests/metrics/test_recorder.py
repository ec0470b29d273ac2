"""The recorder: what it computes, when, and what it leaves in files."""

from __future__ import annotations

import csv
import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastcl import losses, metrics


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_plain_loop_leaves_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "run" / "metrics.csv"
    encoder, criterion = torch.nn.Linear(8, 4), losses.NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    recorder = metrics.Recorder(every=2, csv=path)
    seen = {}
    for step in range(5):
        x, y = encoder(torch.randn(32, 8)), encoder(torch.randn(32, 8))
        found = recorder(step, x, y)
        assert (found is None) == (step % 2 == 1)
        if found is not None:
            seen[step] = found
            assert found["alignment"] == metrics.alignment(x, y)
            assert found["uniformity"] == metrics.uniformity(x)
            assert found["effective_rank"] == metrics.effective_rank(x)
        optimizer.zero_grad()
        criterion(x, y).backward()
        optimizer.step()
    header, *kept = rows(path)
    assert header == ["step", "alignment", "uniformity", "effective_rank"]
    assert {int(step): [float(v) for v in values] for step, *values in kept} == {
        k: [*v.values()] for k, v in seen.items()
    }


def test_a_run_is_resumed_in_its_file_and_in_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for step in (0, 1):
        metrics.Recorder(every=1, csv=path)(step, torch.eye(3))
    assert [row[0] for row in rows(path)] == ["step", "0", "1"]
    with pytest.raises(ValueError, match=r"expected a file with the columns .*'norm'.*pass another file"):
        metrics.Recorder(csv=path, metrics={"norm": lambda x, y: 0.0})


def test_one_view_has_no_alignment_and_ones_own_metrics_take_both() -> None:
    found = metrics.Recorder()(0, torch.eye(3))
    assert found is not None and math.isnan(found["alignment"]) and found["effective_rank"] == pytest.approx(3, 1e-4)
    own = metrics.Recorder(metrics={"norm": lambda x, y: x.norm(dim=1).mean() + (0 if y is None else 1)})
    assert own(0, torch.eye(3)) == {"norm": 1.0} and own(100, torch.eye(3), torch.eye(3)) == {"norm": 2.0}


def test_a_writer_that_is_there() -> None:
    said = []
    writer = SimpleNamespace(add_scalar=lambda *what: said.append(what), flush=lambda: None)
    metrics.Recorder(every=10, tensorboard=writer)(20, torch.eye(3), torch.eye(3))
    assert [(name, step) for name, _, step in said] == [
        (f"embeddings/{name}", 20) for name in ("alignment", "uniformity", "effective_rank")
    ]


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own imports
def test_events_of_tensorboard(tmp_path: Path) -> None:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: pip install 'fastcl[test]'",
    )
    recorder = metrics.Recorder(every=1, tensorboard=tmp_path)
    for step in range(3):
        recorder(step, torch.eye(4), torch.eye(4))
    events = reading.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("embeddings/effective_rank")] == [
        (step, pytest.approx(4.0, 1e-4)) for step in range(3)
    ]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or pass csv="):
        metrics.Recorder(tensorboard=tmp_path)


def test_a_number_of_steps_below_one() -> None:
    with pytest.raises(ValueError, match="every: expected an integer > 0, got 0"):
        metrics.Recorder(every=0)


@pytest.mark.filterwarnings("ignore")  # of transformers' own imports
def test_a_callback_for_a_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: requirements/dropin.txt")
    callback_module = pytest.importorskip("transformers.trainer_callback")
    recorder = metrics.Recorder(every=2, csv=tmp_path / "metrics.csv")
    model, held_out = torch.nn.Linear(4, 3), torch.eye(4)
    handler = callback_module.CallbackHandler(
        [recorder.trainer_callback(lambda model: (model(held_out), None))], model, None, None, None
    )
    arguments, state = SimpleNamespace(), transformers.TrainerState()
    for state.global_step in range(1, 5):
        handler.on_step_end(arguments, state, transformers.TrainerControl())
    assert [row[0] for row in rows(tmp_path / "metrics.csv")] == ["step", "2", "4"]
    state.is_world_process_zero, state.global_step = False, 6
    handler.on_step_end(arguments, state, transformers.TrainerControl())
    assert len(rows(tmp_path / "metrics.csv")) == 3


def test_a_run_that_was_killed_as_it_wrote_goes_on_in_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    metrics.Recorder(every=1, csv=file)(0, torch.eye(4))
    file.write_bytes(file.read_bytes()[:-9])
    metrics.Recorder(every=1, csv=file)(1, torch.eye(4))
    assert [row[0] for row in rows(file)] == ["step", "0", "1"] and float(rows(file)[2][2]) == pytest.approx(-4.0)


def test_a_step_is_an_integer_of_whatever_type(tmp_path: Path) -> None:
    recorder = metrics.Recorder(every=1, csv=tmp_path / "metrics.csv")
    recorder(torch.tensor(3), torch.eye(4))
    assert rows(tmp_path / "metrics.csv")[1][0] == "3"
    for step in (3.0, "3", None):
        with pytest.raises(TypeError, match="step: expected an integer, got"):
            recorder(step, torch.eye(4))


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\x00")
    for given, error, message in (
        ({"csv": tmp_path}, ValueError, "csv: expected a file, got the folder"),
        ({"csv": tmp_path / "binary.csv"}, ValueError, "csv: expected a file of commas and text"),
        ({"metrics": ["alignment"]}, TypeError, "metrics: expected a dictionary"),
        ({"metrics": {"alignment": 3}}, TypeError, "metrics: expected names and functions"),
    ):
        with pytest.raises(error, match=message):
            metrics.Recorder(**given)


def test_it_goes_to_another_process() -> None:
    recorder = pickle.loads(pickle.dumps(metrics.Recorder(every=5)))
    assert recorder.every == 5 and recorder(0, torch.eye(4))["uniformity"] == pytest.approx(-4.0)


@pytest.mark.parametrize("place", ["csv", "tensorboard"])
def test_a_place_that_is_none_is_named_before_training(place: str) -> None:
    with pytest.raises(TypeError, match=rf"^{place}: expected a f.*, got int; pass its path$"):
        metrics.Recorder(**{place: 5})


@pytest.mark.parametrize("value", [None, "text", torch.ones(2)], ids=["None", "text", "two numbers"])
def test_a_metric_that_returns_no_number_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^metrics: expected a number from 'mine', got .*; return one for all rows$"):
        metrics.Recorder(every=1, metrics={"mine": lambda x, y: value})(0, torch.eye(3))
