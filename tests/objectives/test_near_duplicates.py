"""Positives that are near-duplicates, late in training: float32 beside plain PyTorch in float32, both against float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from fastcl import functional
from fastcl.functional import positives

from .witnesses import close, gradients

TEMPERATURES = [0.1, 0.05, 0.03]
CLASSES, D = 16, 64


def views(k: int) -> Tensor:
    """k near-duplicates of each of 16 unit rows, (16 k, 64)."""
    made = torch.randn(k, CLASSES, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = F.normalize(made[0], dim=1)
    return torch.cat([first, *(F.normalize(first + 0.0025 * noise, dim=1) for noise in made[1:])]).float()


def evaluated(loss: Callable[..., Tensor], rows: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in rows]
    value = loss(*leaves)
    return [value.detach(), *gradients(value, leaves)]


def errors(loss: Callable[..., Tensor], rows: list[Tensor], right: list[Tensor]) -> list[float]:
    """Of the value and of each gradient, over the largest entry of the right one."""
    return [
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(evaluated(loss, rows), right, strict=True)
    ]


def plain_sup_con(z: Tensor, labels: Tensor, temperature: float, normalize: bool) -> Tensor:
    """The authors' code."""
    z = F.normalize(z, dim=1) if normalize else z
    s, others = z @ z.T / temperature, ~torch.eye(len(z), dtype=torch.bool)
    s = s - s.amax(1, keepdim=True).detach()
    log_share = s - (s.exp() * others).sum(1, keepdim=True).log()
    same = (labels[:, None] == labels) & others
    return -((log_share * same).sum(1) / same.sum(1).clamp(min=1)).mean()


def plain_sincere(z: Tensor, labels: Tensor, temperature: float, normalize: bool) -> Tensor:
    z = F.normalize(z, dim=1) if normalize else z
    s, same = z @ z.T / temperature, labels[:, None] == labels
    r = s.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    same = same & ~torch.eye(len(z), dtype=torch.bool)
    return ((torch.logaddexp(r, s) - s) * same).sum(1).div(same.sum(1)).mean()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["sup_con", "sincere"])
def test_labels(name: str, temperature: float, k: int, normalize: bool) -> None:
    labels, rows = torch.arange(CLASSES).repeat(k), [views(k)]
    way = {"labels": labels, "temperature": temperature, "normalize": normalize}
    more = {"base_temperature": temperature} if name == "sup_con" else {}
    plain = {"sup_con": plain_sup_con, "sincere": plain_sincere}[name]
    right = evaluated(lambda z: plain(z, **way), [rows[0].double()])
    mine = errors(lambda z: getattr(functional, name)(z, **way, **more), rows, right)
    for a, b in zip(mine, errors(lambda z: plain(z, **way), rows, right), strict=True):
        assert a <= b + 5e-6
    if k == 2 or name == "sincere":  # where plain PyTorch has few digits
        assert max(mine) < 2e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_a_positive_by_index(name: str, temperature: float) -> None:
    """One for each row: its gradient is that of the negatives, however small."""
    i = torch.arange(CLASSES)
    pairs = (i, i) if name == "info_nce" else (torch.cat([i, i + CLASSES]), torch.cat([i + CLASSES, i]))
    rows = list(views(2).split(CLASSES))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = getattr(functional, name)(x, y, positives=pairs, temperature=temperature, normalize=False)
        return found

    def right(x: Tensor, y: Tensor) -> Tensor:
        if name == "nt_xent":
            x, y = torch.cat([x, y]), torch.cat([y, x])
        negatives = (pairs[0][:, None] % CLASSES) != pairs[0] % CLASSES
        r = (x @ y.T / temperature).masked_fill(~negatives, -torch.inf).logsumexp(1)
        return F.softplus(r - (x * y).sum(1) / temperature).mean()

    assert max(errors(loss, rows, evaluated(right, [x.double() for x in rows]))) < 2e-5


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "labels",
    [[0] * 9, list(range(9)), [5, -7, 5, 3, -7, 5, 2**40, 3, 5], [1], []],
    ids=["one class", "no positives", "some of each", "one row", "no rows"],
)
def test_logits_of_positives_and_class_sums_agree(
    labels: list[int], normalize: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for few in (4, 0):
        monkeypatch.setattr(positives, "FEW", few)
        z = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        way = {"temperature": temperature, "normalize": normalize, "reduction": reduction, "backend": "reference"}
        value = functional.sup_con(z, torch.tensor(labels, dtype=torch.int64), **way)
        first = torch.autograd.grad(value.square().sum(), [z, temperature], create_graph=True)
        found.append([value, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [z, temperature])])
    for a, b in zip(*found, strict=True):
        close(a, b, rtol=1e-11)


def test_rows_that_are_no_numbers_are_seen() -> None:
    z = torch.randn(6, 4)
    z[2, 1] = torch.nan
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6) % 3):
        assert functional.sup_con(z, labels).isnan()


def test_few_pairs_are_listed_once() -> None:
    labels = torch.tensor([4, -1, 4, 9, -1, 4])
    i, j = positives.within_classes(labels, 4) or ((), ())
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 2), (0, 5), (1, 4), (2, 5)]
    assert positives.within_classes(labels, 3) is None


@pytest.mark.parametrize("backend", ["auto", "blocked"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("classes", "temperature", "spread"), [(1, 100.0, 9.0), (4, 100.0, 9.0), (4, 0.07, 0.1)])
def test_sums_of_many_positives_round_a_gradient_once(
    classes: int, temperature: float, spread: float, dtype: torch.dtype, autocast: bool, backend: str
) -> None:
    """The log-sum-exp and the mean of the positives have gradients that cancel: in a half dtype neither is rounded alone."""
    n = 200
    labels = torch.arange(n) % classes
    made = torch.randn(n + classes, 16, generator=torch.Generator().manual_seed(0))
    z = made[n:][labels] + spread * made[:n]
    if not autocast:
        z = z.to(dtype)

    def wide(x: Tensor) -> Tensor:
        return plain_sup_con(x.float(), labels, temperature, True)

    def ours(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return functional.sup_con(x, labels, temperature=temperature, base_temperature=temperature, backend=backend)

    right = evaluated(lambda x: plain_sup_con(x, labels, temperature, True), [z.double()])
    ends = [torch.finfo(dtype).eps / (2.0 if autocast else 1.0)] * 2
    allowed = [2.0 * e + end for e, end in zip(errors(wide, [z], right), ends, strict=True)]
    assert all(e <= a for e, a in zip(errors(ours, [z], right), allowed, strict=True)), (
        errors(ours, [z], right),
        allowed,
    )


def plain_of_classes(name: str, x: Tensor, y: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Every pair of a label is a positive."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    if name in ("sup_con", "nt_xent"):
        return plain_sup_con(torch.cat([x, y]), labels.repeat(2), temperature, False)
    s, same = x @ y.T / temperature, labels[:, None] == labels
    if name == "siglip":
        return F.softplus(torch.where(same, -s, s) + torch.where(same, 10.0, -10.0)).sum(1).mean()
    rows, columns = (
        -((log_share * same).sum(1) / same.sum(1)).mean() for log_share in (s.log_softmax(1), s.T.log_softmax(1))
    )
    return rows if name == "info_nce" else (rows + columns) / 2


def listed_and_labels(name: str, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a label, of x with y; of nt_xent those of two rows of [x; y]."""
    labels = labels.repeat(2) if name == "nt_xent" else labels
    same = labels[:, None] == labels
    i, j = (same if name != "nt_xent" else same & ~torch.eye(len(labels), dtype=torch.bool)).nonzero().T
    return i, j


def of_classes(name: str, labels: Tensor, temperature: float, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The objective of two views where every pair of a label is a positive."""
    if name == "sup_con":
        more = {"temperature": temperature, "base_temperature": temperature, "backend": backend}
        return lambda x, y: functional.sup_con(torch.cat([x, y]), labels.repeat(2), **more)
    more = {"positives": listed_and_labels(name, labels), "backend": backend}
    more |= {"logit_scale": 1 / temperature} if name in ("clip", "siglip") else {"temperature": temperature}
    return partial(getattr(functional, name), **more, **({"logit_bias": -10.0} if name == "siglip" else {}))


def near_points(n: int, classes: int, spread: float) -> tuple[Tensor, list[Tensor]]:
    """Labels, and two float64 views of n rows of 32 columns each, apart by `spread` within a class."""
    labels = torch.arange(n) % classes
    # Centres along no axis: rounding errors in the direction of a row are none of its gradient's.
    drawn = torch.randn(2 * n + classes, 32, generator=torch.Generator().manual_seed(0)).double()
    centres, *made = drawn.split([classes, n, n])
    return labels, [F.normalize(centres, dim=1)[labels] + spread * part / 32**0.5 for part in made]


NAMES = ("sup_con", "info_nce", "clip", "nt_xent", "siglip")


@pytest.mark.parametrize("backend", ["auto", "blocked"])
@pytest.mark.parametrize("temperature", [0.1, 0.05])
@pytest.mark.parametrize("spread", [0.1, 0.01])
@pytest.mark.parametrize("name", NAMES)
def test_classes_that_are_nearly_points(name: str, spread: float, temperature: float, backend: str) -> None:
    """The end of supervised training: many positives, and rows of a class that are apart by `spread`."""
    labels, rows = near_points(100, 4, spread)
    rows = [x.float() for x in rows]
    right = evaluated(lambda x, y: plain_of_classes(name, x, y, labels, temperature), [x.double() for x in rows])
    mine = errors(of_classes(name, labels, temperature, backend), rows, right)
    theirs = errors(lambda x, y: plain_of_classes(name, x, y, labels, temperature), rows, right)
    assert all(a <= b + 2e-6 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize("how", ["compiled", "torch.func"])
@pytest.mark.parametrize("name", NAMES)
def test_they_are_where_nobody_looks(name: str, how: str) -> None:
    """In a graph and under torch.func, on a CPU."""
    labels, rows = near_points(100, 4, 0.01)
    rows = [x.float() for x in rows]
    ours = of_classes(name, labels, 0.1, "auto")
    if how == "compiled":
        ours = torch.compile(ours, backend="aot_eager")
    right = evaluated(lambda x, y: plain_of_classes(name, x, y, labels, 0.1), [x.double() for x in rows])
    theirs = errors(lambda x, y: plain_of_classes(name, x, y, labels, 0.1), rows, right)
    if how == "compiled":
        mine = errors(ours, rows, right)
    else:
        found = torch.func.grad(ours, argnums=(0, 1))(*rows)
        mine = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, right[1:], strict=True)]
        theirs = theirs[1:]
    assert all(a <= 2.0 * max(theirs) + 2e-6 for a in mine), (mine, theirs)


@pytest.mark.parametrize("classes", [4, 25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_they_are_in_a_half_dtype(name: str, dtype: torch.dtype, classes: int) -> None:
    """As accurate as plain PyTorch on the same rows in float32, but for the rounding of a gradient; few positives or many."""
    labels, rows = near_points(100, classes, 0.1)
    rows = [x.to(dtype) for x in rows]
    right = evaluated(lambda x, y: plain_of_classes(name, x, y, labels, 0.05), [x.double() for x in rows])
    mine = errors(of_classes(name, labels, 0.05, "auto"), rows, right)
    theirs = errors(lambda x, y: plain_of_classes(name, x.float(), y.float(), labels, 0.05), rows, right)
    assert all(a <= 2.0 * b + 2e-6 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def test_pairs_without_weight_have_no_say_in_what_is_near() -> None:
    """A tenth of the pairs are of points, the others count for nothing."""
    n, labels = 40, torch.arange(40) % 2
    made = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = ((torch.eye(8)[0] * (1 - 2 * labels[:, None]) + 0.003 * part).float() for part in (made, made.flip(0)))
    same = labels[:, None] == labels
    i, j = torch.cat([same.nonzero(), (~same).nonzero().repeat(20, 1)]).T
    weight = (torch.arange(len(i)) < int(same.sum())).float()

    def listed(*positives: Tensor) -> list[Tensor]:
        return evaluated(lambda x, y: functional.info_nce(x, y, positives=positives, temperature=0.1), [x, y])

    for a, b in zip(listed(i, j, weight), listed(*same.nonzero().T), strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_is_refused_whatever_the_rows_are(backend: str) -> None:
    """Also of classes that are nearly points."""
    z, labels = torch.ones(200, 4), torch.arange(200) % 2
    for rows in (z, torch.randn(200, 4)):
        with pytest.raises(fastcl.BackendUnavailableError):
            functional.sup_con(rows, labels, backend=backend)
