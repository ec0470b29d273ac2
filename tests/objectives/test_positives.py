"""Positives by index and label smoothing: what they equal, how exact small losses are, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from fastcl import functional

from .cases import more_columns, two_views
from .witnesses import close, gradients

N, D = 9, 6
CALLS = {
    "info_nce": {"temperature": 0.2},
    "clip": {"logit_scale": 5.0},
    "siglip": {"logit_scale": 10.0, "logit_bias": -5.0},
}


def both(call, plain, rows):
    """Value and gradients of two ways to say the same."""
    ours, theirs = ([x.clone().requires_grad_() for x in rows] for _ in range(2))
    a, b = call(*ours), plain(*theirs)
    close(a, b, rtol=1e-12)
    for got, want in zip(gradients(a, ours), gradients(b, theirs), strict=True):
        close(got, want, rtol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_each_row_with_its_own_is_the_objective_itself(name: str) -> None:
    f, i = getattr(functional, name), torch.arange(N)
    both(
        lambda x, y: f(x, y, positives=(i, i, torch.full((N,), 0.3)) if name != "siglip" else (i, i), **CALLS[name]),
        lambda x, y: f(x, y, **CALLS[name]),
        two_views(N, D),
    )


def test_the_first_rows_of_clip_are_its_pairs() -> None:
    rows, k = more_columns(N, D), torch.arange(4)
    both(
        lambda x, y: functional.clip(x, y, logit_scale=5.0, positives=(k, k), label_smoothing=0.1),
        lambda x, y: functional.clip(x, y, logit_scale=5.0, pairs=4, label_smoothing=0.1),
        rows,
    )


def test_the_other_views_of_nt_xent() -> None:
    i = torch.arange(2 * N)
    both(
        lambda u, v: functional.nt_xent(u, v, positives=(i, (i + N) % (2 * N))),
        lambda u, v: functional.nt_xent(u, v),
        two_views(N, D),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_torchs_cross_entropy_of_probabilities(smoothing: float) -> None:
    """Rows and columns with any number of positives, one listed twice; every row has one."""
    x, y = more_columns(N, D)
    i, j = (
        torch.cat([torch.arange(N), torch.tensor([0, 0, 3, 5, 5])]),
        torch.cat([torch.arange(N), torch.tensor([10, 4, 5, 11, 11])]),
    )
    w = torch.rand(len(i), generator=torch.Generator().manual_seed(0)).double() + 0.1

    def dense(x, y):
        target = torch.zeros(N, N + 3).double().index_put((i, j), w, accumulate=True)
        target = target / target.sum(1, keepdim=True)
        z = F.normalize(x) @ F.normalize(y).T / 0.2
        return F.cross_entropy(z, target, label_smoothing=smoothing)

    both(
        lambda x, y: functional.info_nce(x, y, temperature=0.2, positives=(i, j, w), label_smoothing=smoothing),
        dense,
        (x, y),
    )


@pytest.mark.parametrize("captions", [1, 3])
def test_captions_of_confident_images_keep_their_digits(captions: int) -> None:
    """Stars (images with their captions) are masked: in float32 the loss of a caption, e^-30, is not the rounding of a logit."""
    x = torch.eye(D, dtype=torch.float64)
    y = x.repeat_interleave(captions, 0)
    pairs = torch.arange(D).repeat_interleave(captions), torch.arange(D * captions)
    for a, b, (i, j) in ((y, x, pairs[::-1]), (x, y, pairs) if captions == 1 else (y, x, pairs[::-1])):
        wide, narrow = (t.requires_grad_() for t in (a.clone(), a.float()))
        truth = functional.info_nce(wide, b, temperature=1 / 30, positives=(i, j))
        value = functional.info_nce(narrow, b.float(), temperature=1 / 30, positives=(i, j))
        assert 0 < truth < 1e-12
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(
            gradients(value, [narrow])[0].double(), gradients(truth, [wide])[0], rtol=1e-5, atol=1e-18
        )


def test_rows_without_positives_count_for_nothing() -> None:
    x, y = two_views(N, D)
    i = torch.arange(4)
    some = functional.info_nce(x, y, positives=(i, i))
    close(some, functional.info_nce(x, y, reduction="none")[:4].mean())
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0])
    close(functional.info_nce(x, y, positives=(i, i, weights)), functional.info_nce(x, y, reduction="none")[0])


def test_weights_take_no_gradient() -> None:
    x, y = (t.requires_grad_() for t in two_views(N, D))
    i, w = torch.arange(N), torch.ones(N, requires_grad=True)
    functional.clip(x, y, logit_scale=5.0, positives=(i, i, w)).backward()
    assert w.grad is None and x.grad is not None


@pytest.mark.parametrize(
    ("positives", "more", "kind", "message"),
    [
        (torch.zeros(3, 2), {}, TypeError, r"positives: expected \(rows, columns\)"),
        ((torch.arange(3),), {}, ValueError, "got 1 parts"),
        ((torch.arange(3), [0, 1, 2]), {}, TypeError, r"positives\[1\]: expected an int64 tensor, got list"),
        ((torch.arange(3.0), torch.arange(3)), {}, TypeError, r"positives\[0\]: expected an int64 tensor.*\.long\(\)"),
        ((torch.arange(3), torch.arange(4)), {}, ValueError, r"positives\[1\]: expected shape \(3,\)"),
        ((torch.arange(3), torch.arange(3), torch.ones(4)), {}, ValueError, r"positives\[2\]: expected shape \(3,\)"),
        (
            (torch.arange(2), torch.arange(2), torch.tensor([1.0, -0.5])),
            {},
            ValueError,
            "expected finite weights >= 0, got -0.5",
        ),
        (
            (torch.arange(2), torch.arange(2), torch.tensor([1.0, torch.inf])),
            {},
            ValueError,
            "finite weights >= 0, got inf",
        ),
        ((torch.arange(0), torch.arange(0)), {}, ValueError, "at least 1 row with a positive"),
        ((torch.arange(3), torch.arange(3)), {"groups": torch.arange(N)}, ValueError, "groups: expected None beside"),
    ],
)
def test_what_is_refused(positives, more, kind, message) -> None:
    x, y = two_views(N, D)
    with pytest.raises(kind, match=message):
        functional.info_nce(x, y, positives=positives, **more)


def test_pairs_and_positives_and_shares_beyond_one() -> None:
    x, y = two_views(N, D)
    i = torch.arange(3)
    with pytest.raises(ValueError, match="pairs: expected None beside positives"):
        functional.clip(x, y, logit_scale=5.0, pairs=3, positives=(i, i))
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"label_smoothing: expected a share in \[0, 1\]"):
            functional.info_nce(x, y, label_smoothing=share)


@pytest.mark.parametrize("wrong", [N, 3 * N, -1])
@pytest.mark.parametrize("name", CALLS)
def test_indices_are_of_rows_that_are_there(name: str, wrong: int) -> None:
    x, y = two_views(N, D)
    right, i = torch.arange(3), torch.tensor([0, wrong, 2])
    for place, positives in enumerate([(i, right), (right, i)]):
        with pytest.raises(
            ValueError, match=rf"positives\[{place}\]: expected indices of own rows, 0 to 8, got {wrong};"
        ):
            getattr(functional, name)(x, y, positives=positives, **CALLS[name])


def test_indices_in_a_sparse_or_nested_tensor() -> None:
    x, y = two_views(N, D)
    i = torch.arange(3)
    with pytest.raises(TypeError, match=r"positives\[0\]: expected a dense tensor, got a sparse coo one"):
        functional.info_nce(x, y, positives=(i.to_sparse(), i))
    with pytest.raises(TypeError, match=r"positives\[1\]: expected a dense tensor, got a nested one"):
        functional.info_nce(x, y, positives=(i, torch.nested.nested_tensor([i], layout=torch.jagged)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["info_nce", "clip"])
def test_weights_of_any_size(name: str, dtype: torch.dtype) -> None:
    """A mean by weights is the same whatever their unit is, and their sum need not be a number of the dtype."""
    x, y = (t.to(dtype) for t in two_views(N, D))
    i, j = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 1])
    weights = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    want, *others = (
        getattr(functional, name)(x, y, positives=(i, j, unit * weights), reduction="none", **CALLS[name])
        for unit in (1.0, 1e-300, 1e-40, 1e40, 4e307)
    )
    for got in others:
        close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("name", CALLS)
def test_a_weight_that_is_no_number_is_seen(name: str) -> None:
    x, y = two_views(N, D)
    i = torch.arange(3)
    loss = getattr(functional, name)(x, y, positives=(i, i, torch.tensor([1.0, torch.nan, 1.0])), **CALLS[name])
    assert loss.isnan()


@pytest.mark.parametrize("name", CALLS)
def test_gradients_near_the_end_of_the_range(name: str) -> None:
    """An upstream of 1e34, as a loss scale gone wild: the gradient is that many times the one of 1."""
    x, y = (t.float().requires_grad_() for t in two_views(N, D))
    i, j = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    for more in ({}, {"positives": (i, j)}):
        arguments = (
            CALLS[name] | more | ({"logit_scale": 90.0} if "logit_scale" in CALLS[name] else {"temperature": 0.01})
        )
        loss = getattr(functional, name)(x, y, **arguments)
        one = torch.autograd.grad(loss, x, retain_graph=True)[0]
        many = torch.autograd.grad(loss, x, torch.tensor(1e34))[0]
        close(many / 1e34, one, rtol=1e-4)
