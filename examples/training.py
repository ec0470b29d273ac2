"""An encoder, its contrastive training, and what its embeddings are worth on images that it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastcl import metrics

from .images import Distortion, Images
from .objectives import Entry

VIEW = Distortion()  # of training
CAMERA = Distortion(erase=0.0)  # of the held-out images: turned, resized, moved and noisy, but whole
LABELS_PER_CLASS, DRAWS, NEIGHBOURS = 10, 5, 5
TRUST = 1e-3  # of LARS


@dataclass(frozen=True)
class Schedule:
    """How long and in what steps to train.

    optimizer: "adamw", "sgd" or "lars" (You et al. 2017, arXiv 1708.03888).
    momentum: of the optimiser; None cycles it against the learning rate, as torch's one-cycle schedule does by default.
    constant: whether the learning rate stays as it is, instead of one cycle.
    """

    epochs: float
    batch_size: int
    dim: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    optimizer: str = "adamw"
    momentum: float | None = None
    constant: bool = False

    def steps(self, images: Images) -> int:
        return max(1, round(self.epochs * (images.train.shape[0] // self.batch_size)))


@dataclass(frozen=True)
class Quality:
    """Accuracies in [0, 1] on held-out images, and how the embeddings of these spread.

    alignment: mean squared distance of two distorted copies, 0 to 4.  uniformity: log mean exp(-2 |x - y|^2), 0 where all
    embeddings are one.  top_direction: the share of <x, v>^2 in their best direction v, 1 where all lie on one line.
    effective_rank: how many directions they use, 1 to the width of an embedding.
    """

    knn: float
    linear: float
    alignment: float
    uniformity: float
    top_direction: float
    effective_rank: float


@dataclass(frozen=True)
class Trained:
    """The course of one training, and what came of it."""

    title: str
    quality: Quality
    losses: list[float]
    seconds: float


def encoder(side: int, dim: int, seed: int) -> nn.Module:
    """Three convolutions and a linear map to (n, dim); the weights depend on the seed alone."""
    first_stride = 1 if side < 16 else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for channels, width, stride in ((1, 16, first_stride), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        size = math.ceil(math.ceil(side / first_stride) / 4)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * size * size, dim))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    images: Images, entry: Entry, schedule: Schedule, backend: str | None, report: Callable[[float], None]
) -> tuple[nn.Module, list[float], float]:
    """An encoder trained by one objective; every objective starts from the same weights and sees the same views.

    Returns:
        The encoder, the loss of each step, and the seconds that it took.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    model = encoder(images.side, schedule.dim, schedule.seed).train()
    target = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(entry.rate), use_buffers=True)
        if entry.momentum
        else None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        objective = entry.build(schedule.dim, backend).train()
    steps = schedule.steps(images)
    optimizer, scheduler = _optimizer([*model.parameters(), *objective.parameters()], schedule, steps)
    losses, start = [], time.perf_counter()
    for batch in batches(images.train.shape[0], schedule.batch_size, steps, generator):
        first, second = (VIEW(images.train[batch], generator) for _ in range(2))
        if target is None:
            u, v = model(torch.cat([first, second])).chunk(2)
        else:
            queries, keys = (torch.cat([first, second]),) * 2 if entry.both else (first, second)
            with torch.no_grad():
                v = target(keys)
            u = model(queries)
        loss = objective(u, v, images.train_labels[batch]) if entry.labels else objective(u, v)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if target is not None:
            target.update_parameters(model)
        losses.append(loss.item())
        report(losses[-1])
    return model, losses, time.perf_counter() - start


def _optimizer(parameters: list[nn.Parameter], schedule: Schedule, steps: int) -> tuple[Optimizer, LRScheduler]:
    rate, momentum = schedule.learning_rate, 0.9 if schedule.momentum is None else schedule.momentum
    optimizer: Optimizer
    if schedule.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum)
    elif schedule.optimizer == "lars":
        optimizer = _lars(parameters, rate, momentum)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(momentum, 0.999), weight_decay=1e-4)
    if schedule.constant:
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    rising = max(0.2, 2 / (steps + 1))  # the share of the steps; torch divides by zero where that is one step
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps + 1,
        pct_start=rising,
        cycle_momentum=schedule.momentum is None,
    )
    return optimizer, one_cycle


def _lars(parameters: list[nn.Parameter], rate: float, momentum: float) -> Optimizer:
    """Steps of rate TRUST |w| along each weight's gradient; biases and norms, which LARS leaves to SGD, take rate TRUST alone.

    At the full rate, which is 1 and more, these would leave the finite numbers: Barlow Twins, too, gives them one of their own.
    """
    from pytorch_optimizer import LARS  # here, since nothing else needs that library

    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "lr": rate},
        {"params": [p for p in parameters if p.ndim < 2], "lr": rate * TRUST},
    ]
    return LARS(groups, lr=rate, momentum=momentum, trust_coefficient=TRUST)


def batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of each step: every epoch is a new order of the images, cut into whole batches."""
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size
    orders = [torch.randperm(n, generator=generator) for _ in range(math.ceil(steps / per_epoch))]
    return [order[k * batch_size : (k + 1) * batch_size] for order in orders for k in range(per_epoch)][:steps]


def untrained(images: Images, dim: int, seed: int) -> nn.Module:
    """The encoder as training starts from it, but with its batch statistics taken from the images: a fair baseline."""
    model = encoder(images.side, dim, seed).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        model(VIEW(images.train[:2048], torch.Generator().manual_seed(seed)))
    return model


@torch.no_grad()
def embed(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Unit rows (n, dim)."""
    return F.normalize(torch.cat([model(part) for part in images.split(2048)]))


def assess(model: nn.Module, images: Images, seed: int) -> Quality:
    """Accuracies from a few labels, the mean over DRAWS draws of them, on distorted images that training has not seen."""
    model.eval()
    generator = torch.Generator().manual_seed(seed + 1)
    test, again = (embed(model, CAMERA(images.test, generator)) for _ in range(2))
    known = labelled(images, seed)
    knn, linear = accuracies(embed(model, images.train[known]), images.train_labels[known], test, images.test_labels)
    top = float(torch.linalg.eigvalsh(test.double().T @ test.double() / len(test))[-1])
    spread = metrics.alignment(test, again), metrics.uniformity(test), top, metrics.effective_rank(test)
    return Quality(knn, linear, *spread)


def assess_pixels(images: Images, seed: int) -> tuple[float, float]:
    """The accuracies, in [0, 1], of the two classifiers on raw pixels, from the same labels on the same distorted images."""
    test, known = CAMERA(images.test, torch.Generator().manual_seed(seed + 1)), labelled(images, seed)
    rows = images.train[known].flatten(1)
    return accuracies(rows, images.train_labels[known], test.flatten(1), images.test_labels)


def labelled(images: Images, seed: int) -> Tensor:
    """The images whose labels are known, DRAWS draws one after the other, each of LABELS_PER_CLASS of each class."""
    labels, draws = images.train_labels.numpy(), []
    for draw in range(DRAWS):
        order = np.random.default_rng((seed, draw)).permutation(len(labels))
        draws += [order[labels[order] == c][:LABELS_PER_CLASS] for c in np.unique(labels)]
    return torch.from_numpy(np.concatenate(draws))


def accuracies(known: Tensor, known_labels: Tensor, test: Tensor, test_labels: Tensor) -> tuple[float, float]:
    """Nearest neighbours and logistic regression, the mean over the draws."""
    scores = []
    for rows, labels in zip(known.chunk(DRAWS), known_labels.chunk(DRAWS), strict=True):
        for probe in (KNeighborsClassifier(NEIGHBOURS), LogisticRegression(C=10.0, max_iter=1000)):
            fitted = probe.fit(rows.numpy(), labels.numpy())
            scores.append(fitted.score(test.numpy(), test_labels.numpy()))
    return float(np.mean(scores[0::2])), float(np.mean(scores[1::2]))
