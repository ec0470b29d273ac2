"""Where the images come from, what is said when they are not there, and their distortions."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import images
from examples.images import FILES, Distortion


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four idx files, two of them packed: 7 images to train on and 3 held out, of 28 x 28 pixels."""
    for file, packed in zip(FILES, (".gz", "", "", ".gz"), strict=True):
        n = 7 if file.startswith("train") else 3
        shape = (n, 28, 28) if "images" in file else (n,)
        write_idx(tmp_path / (file + packed), np.arange(math.prod(shape)).reshape(shape) % 251)
    return tmp_path


def test_a_folder_of_idx_files(folder: Path) -> None:
    read, source = images.load(str(folder))
    assert read.train.shape == (7, 1, 28, 28) and read.test.shape == (3, 1, 28, 28) and read.side == 28
    assert read.train.dtype == torch.float32 and read.train_labels.dtype == torch.int64
    assert read.train[0, 0, 1, 2] == (28 + 2) / 255 and read.train_labels.tolist() == list(range(7))
    assert str(folder) in source


def test_fashion_mnist_is_taken_where_it_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FOLDERS", (folder / "nowhere", folder))
    for data in ("auto", "fashion-mnist"):
        read, source = images.load(data)
        assert read.name == "fashion-mnist" and source == f"Fashion-MNIST, found in {folder}"


def test_digits_where_it_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FOLDERS", (tmp_path,))
    read, source = images.load("auto")
    assert read.name == "digits" and read.train.shape == (1397, 1, 8, 8) and read.test.shape == (400, 1, 8, 8)
    assert read.train.min() == 0.0 and read.train.max() == 1.0
    assert f"Fashion-MNIST was not found in {tmp_path}" in source and "apt-get install dataset-fashion-mnist" in source
    with pytest.raises(
        FileNotFoundError, match=r"its files were not found in .*\n.*apt-get install dataset-fashion-mnist"
    ):
        images.load("fashion-mnist")


def test_no_held_out_digit_is_trained_on() -> None:
    read = images.digits()
    rows = torch.cat([read.train, read.test]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 1797
    assert torch.equal(read.train, images.digits().train)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / FILES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {FILES[2]} .*\n.*\n.*--data"):
        images.load(str(folder))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        images.load(str(folder / "nowhere"))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"PNG, perhaps", "expected an idx file of bytes"), (None, "expected 2352 bytes .* got 2351; fetch")],
)
def test_a_broken_file_is_named(folder: Path, data: bytes | None, message: str) -> None:
    path = folder / FILES[2]
    path.write_bytes(path.read_bytes()[:-1] if data is None else data)
    with pytest.raises(ValueError, match=f"{FILES[2]}: {message}"):
        images.load(str(folder))


@pytest.mark.parametrize("side", [8, 28])
def test_distortions_are_of_each_image_and_repeatable(side: int) -> None:
    same = torch.rand(1, 1, side, side).expand(64, 1, side, side)
    once, again = (Distortion()(same, torch.Generator().manual_seed(3)) for _ in range(2))
    assert once.shape == same.shape and torch.equal(once, again)
    assert len(torch.unique(once.flatten(1), dim=0)) == 64


def test_no_distortion_is_the_image_itself() -> None:
    given = torch.rand(5, 1, 9, 9)
    none = Distortion(turn=0, resize=0, shift=0, contrast=0, erase=0, noise=0)
    torch.testing.assert_close(none(given, torch.Generator()), given, rtol=0, atol=1e-5)


def test_each_distortion_does_what_its_name_says() -> None:
    spot = torch.zeros(200, 1, 17, 17)
    spot[:, :, 8, 8] = 1.0  # in the middle: a move of a quarter of the side brings it up to 4 pixels away
    still = {"turn": 0.0, "resize": 0.0, "shift": 0.0, "contrast": 0.0, "erase": 0.0, "noise": 0.0}

    def distorted(**only: float) -> torch.Tensor:
        return Distortion(**(still | only))(spot, torch.Generator().manual_seed(0))

    turned = distorted(turn=90.0)  # the middle stays, its neighbours get what the turned pixel's corners cover
    assert torch.equal(turned[:, :, 8, 8], spot[:, :, 8, 8]) and turned[:, :, 7, 8].unique().numel() > 100
    assert turned.sum((1, 2, 3)).max() < 1.5
    rows, columns = (distorted(shift=0.25).sum(axis).squeeze(1).argmax(1) - 8 for axis in (3, 2))
    for moved in (rows, columns):
        assert moved.min() == -4 and moved.max() == 4 and abs(moved.float().mean()) < 0.5
    heights = distorted(contrast=0.3).amax((1, 2, 3))
    assert 0.7 <= heights.min() < 0.75 and 1.25 < heights.max() <= 1.3
    erased = (distorted(erase=0.5).amax((1, 2, 3)) == 0).float().mean()
    assert 0.15 < erased < 0.35  # a square of half the side, its centre anywhere: one case in four
    assert abs(distorted(noise=0.1).sub(spot).std() - 0.1) < 0.005
