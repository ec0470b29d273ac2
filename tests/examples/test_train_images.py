"""The main job as one calls it: a short run, its files, its messages, and the same numbers again."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import images, objectives, train_images, training
from examples.objectives import OBJECTIVES
from examples.training import Schedule

pytestmark = pytest.mark.slow

SHORT = Schedule(epochs=6, batch_size=256, dim=16)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "examples.train_images", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_quick_run(tmp_path: Path) -> None:
    done = run("--quick", "--objectives", "info_nce,f_micl.kl,f_micl.neyman", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for expected in (
        "InfoNCE",
        "f-MICL KL",
        "f-MICL Neyman",
        "raw pixels",
        "untrained",
        "The paper predicts",
        "eager PyTorch",
    ):
        assert expected in done.stdout
    assert "step/s" in done.stderr, "the progress bar"
    assert (tmp_path / "out/train_images.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out/train_images.json").read_text())
    for one in results["trained"]:
        assert len(one["losses"]) == 4 * (1397 // 256)
        assert one["quality"]["linear"] > results["untrained"]["linear"] + 0.05
    peaks = {(cost["loss"], cost["way"]): cost["peak"] for cost in results["costs"]}
    assert 0 < peaks["f-MICL KL", "fastcl"] < peaks["f-MICL KL", "eager"]


def test_help_names_every_option() -> None:
    done = run("--help")
    assert done.returncode == 0
    for option in ("data", "objectives", "epochs", "batch-size", "dim", "seed", "backend", "output", "quick"):
        assert f"--{option}" in done.stdout
    assert all(name in done.stdout for name in OBJECTIVES)
    assert "apt-get install dataset-fashion-mnist" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "/nowhere"), "/nowhere is not a folder"),
        (("--objectives", "info_nce,f_micl.k"), "got 'f_micl.k'"),
        (("--epochs", "0"), "expected a number > 0, got 0.0"),
        (("--dim", "0"), "expected a number >= 1, got 0"),
        (("--backend", "cupy"), "invalid choice: 'cupy'"),
    ],
)
def test_bad_arguments(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = train_images.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str) -> None:
    """A few steps change the encoder, with finite losses, and the baseline stays what it was."""
    digits = images.digits()
    steps: list[float] = []
    model, losses, _ = training.train(
        digits, OBJECTIVES[name], dataclasses.replace(SHORT, epochs=1), None, steps.append
    )
    assert steps == losses and len(losses) == 5 and torch.tensor(losses).isfinite().all()
    before = training.encoder(8, SHORT.dim, SHORT.seed)
    for (which, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new), which


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_steps_by_the_norm_of_each_weight(momentum: float) -> None:
    """v <- m v + rate TRUST (|w| / |g|) g, w <- w - v; a bias goes by its gradient alone, at the rate TRUST of the weights'."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (2, 3, 2, 2), (5,))]
    parameters = [torch.nn.Parameter(one.clone()) for one in start]
    schedule = Schedule(1, 1, learning_rate=2.0, optimizer="lars", momentum=momentum, constant=True)
    optimizer, _ = training._optimizer(parameters, schedule, 1)
    moved = [torch.zeros_like(one) for one in start]
    for _ in range(3):
        for parameter, weight, v in zip(parameters, start, moved, strict=True):
            gradient = 100 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.clone()
            ratio = weight.norm() / gradient.norm() if weight.ndim > 1 else 1.0
            v.mul_(momentum).add_(2.0 * training.TRUST * ratio * gradient)
            weight.sub_(v)
        optimizer.step()
    for parameter, weight in zip(parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["f_micl.vlc", "moco", "siglip", "sup_con"])
def test_the_same_seed_gives_the_same_numbers(name: str) -> None:
    digits = images.digits()

    def course(seed: int) -> tuple[list[float], training.Quality]:
        torch.rand(3)  # what happened before must not matter
        schedule = dataclasses.replace(SHORT, seed=seed, epochs=2)
        model, losses, _ = training.train(digits, OBJECTIVES[name], schedule, None, lambda _: None)
        return losses, training.assess(model, digits, seed)

    first = course(0)
    assert first == course(0)
    assert first[0] != course(1)[0]


def test_all_objectives_start_alike() -> None:
    """From the same weights and the same views, so that InfoNCE's first loss does not depend on what ran before."""
    digits = images.digits()
    short = dataclasses.replace(SHORT, epochs=1)
    _, there = train_images.train_all(digits, ["info_nce", "f_micl.kl"], short, None)
    _, back = train_images.train_all(digits, ["f_micl.kl", "info_nce"], short, None)
    assert [one.losses for one in there] == [one.losses for one in reversed(back)]


def test_a_backend_that_is_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = torch.ops.fastcl.pair_total

    def spy(*arguments: object) -> object:
        asked.append(str(arguments[-1]))
        return real(*arguments)

    monkeypatch.setattr(torch.ops.fastcl, "pair_total", spy)
    training.train(
        images.digits(),
        objectives.OBJECTIVES["info_nce"],
        dataclasses.replace(SHORT, epochs=1),
        "blocked",
        lambda _: None,
    )
    assert asked == ["blocked"] * 5
