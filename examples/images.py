"""Real images, found on this machine, and the random distortions that make views of them.

    digits          scikit-learn's 1797 handwritten digits of 8 x 8 pixels: comes with scikit-learn, always there
    fashion-mnist   70000 articles of clothing of 28 x 28 pixels, in the idx format of MNIST: taken when its files are found

Nothing is downloaded. Any folder with the four idx files of MNIST, packed by gzip or not, will do for --data.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"), Path("data/FashionMNIST/raw"))
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
HELD_OUT = 4000  # of 10000: an accuracy of 50% to 0.8%, and every objective is judged by a few distorted copies of them
HOW_TO_GET_IT = (
    "On Debian and Ubuntu `apt-get install dataset-fashion-mnist` puts it where it is found; elsewhere get the four files from\n"
    "https://github.com/zalandoresearch/fashion-mnist and name their folder by --data."
)


@dataclass(frozen=True)
class Images:
    """Images to train on and images held out.

    train, test: (n, 1, side, side) float32 in [0, 1].  train_labels, test_labels: (n,) int64; only the probes read them.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def side(self) -> int:
        return self.train.shape[-1]


def load(data: str) -> tuple[Images, str]:
    """The images that `data` names, and a sentence on where they come from.

    Args:
        data: "digits", "fashion-mnist", a folder of idx files, or "auto": Fashion-MNIST where it is found, otherwise digits.

    Raises:
        FileNotFoundError: for a folder, or files in it, that are not there; the message says how to get them.
    """
    if data == "digits":
        return digits(), "scikit-learn's digits"
    if data not in ("auto", "fashion-mnist"):
        return from_folder(Path(data)), f"idx files of {data}"
    for folder in FOLDERS:
        if all(found(folder, file) for file in FILES):
            return from_folder(folder, "fashion-mnist"), f"Fashion-MNIST, found in {folder}"
    where = ", ".join(map(str, FOLDERS))
    if data == "auto":
        return digits(), f"scikit-learn's digits, since Fashion-MNIST was not found in {where}\n{HOW_TO_GET_IT}"
    raise FileNotFoundError(f"--data fashion-mnist: its files were not found in {where}\n{HOW_TO_GET_IT}")


def digits() -> Images:
    """scikit-learn's digits: 1397 to train on, 400 held out, classes in proportion."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels.astype(np.int64), test_size=400, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = map(torch.from_numpy, split)
    return Images("digits", train, train_labels, test, test_labels)


def from_folder(folder: Path, name: str | None = None) -> Images:
    """The four idx files of a folder as images; of those held out the first HELD_OUT."""
    missing = [file for file in FILES if not found(folder, file)]
    if missing:
        what = "is not a folder" if not folder.is_dir() else f"has no {', '.join(missing)} (.gz or not)"
        raise FileNotFoundError(
            f"--data: expected a folder with the idx files of MNIST, but {folder} {what}\n{HOW_TO_GET_IT}"
        )
    train, train_labels, test, test_labels = (read_idx(found(folder, file) or folder) for file in FILES)
    return Images(
        name or folder.name,
        train.unsqueeze(1).float() / 255.0,
        train_labels.long(),
        test[:HELD_OUT].unsqueeze(1).float() / 255.0,
        test_labels[:HELD_OUT].long(),
    )


def found(folder: Path, file: str) -> Path | None:
    """The file, packed by gzip or not."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """A uint8 array of the idx format: two zero bytes, the type (8), the number of dimensions, each as a big-endian int32.

    Raises:
        ValueError: for a file of another format, or one that was cut off.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\x00\x00\x08" or len(data) < 4:
        raise ValueError(f"{path}: expected an idx file of bytes (it starts with 00 00 08), got {data[:3].hex(' ')}")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4).tolist()
    start = 4 + 4 * data[3]
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes for shape {shape}, got {len(data) - start}; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


@dataclass(frozen=True)
class Distortion:
    """A random change of each image: turned, resized, moved, its contrast changed, a rectangle of it erased, noise added.

    turn: largest angle, degrees.  resize: largest relative change of size.  shift: largest move, as a share of the side.
    contrast: largest relative change.  erase: side of the erased square, as a share of the side.  noise: standard deviation.
    """

    turn: float = 30.0
    resize: float = 0.2
    shift: float = 0.125
    contrast: float = 0.3
    erase: float = 0.3
    noise: float = 0.1

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Each of (n, 1, side, side) distorted by itself; the same for the same state of the generator."""
        n = images.shape[0]

        def between(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        angle = torch.deg2rad(between(-self.turn, self.turn))
        size = between(1 - self.resize, 1 + self.resize)
        cos, sin = angle.cos() / size, angle.sin() / size
        moved = between(-2 * self.shift, 2 * self.shift, 2)  # grid_sample's image is 2 wide
        matrix = torch.stack([cos, -sin, moved[:, 0], sin, cos, moved[:, 1]], dim=1).view(n, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        images = images * between(1 - self.contrast, 1 + self.contrast, 1, 1, 1)
        images = images.masked_fill(self._square(between(-1, 1, 2), images.shape[-1]), 0.0)
        return images + self.noise * torch.randn(images.shape, generator=generator)

    def _square(self, centre: Tensor, side: int) -> Tensor:
        """(n, 1, side, side), where the pixel's middle is in the erased square."""
        middle = (2 * torch.arange(side) + 1) / side - 1
        down, across = ((middle - centre[:, k : k + 1]).abs() < self.erase for k in (0, 1))
        return (down[:, :, None] & across[:, None, :]).unsqueeze(1)
