"""Losses of prefixes: against the sum of losses of cut rows, with state, over transforms, and what is refused."""

import copy

import numpy
import pytest
import torch

import fastcl
from fastcl import losses

DIMS, WEIGHTS = (2, 3, 6), (0.5, 1.0, 2.0)


def views(*seeds):
    return [
        torch.randn(7, 6, generator=torch.Generator().manual_seed(s), dtype=torch.float64).requires_grad_()
        for s in seeds
    ]


@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (losses.CLIPLoss(logit_scale=10.0), 2),
        (losses.FMICLLoss(divergence="js"), 2),
        (losses.MVDHELLoss(), 3),
        (torch.nn.functional.mse_loss, 2),
    ],
)
def test_value_and_gradients(loss, count):
    rows = views(*range(count))
    value = losses.MatryoshkaLoss(loss, DIMS, WEIGHTS)(*rows)
    parts = [w * loss(*(x[:, :d].contiguous() for x in rows)) for d, w in zip(DIMS, WEIGHTS, strict=True)]
    torch.testing.assert_close(value, sum(parts))
    for got, right in zip(torch.autograd.grad(value, rows), torch.autograd.grad(sum(parts), rows), strict=True):
        torch.testing.assert_close(got, right)


def test_labels_are_not_cut_and_a_shared_scale_is_learned_once():
    (z,) = views(0)
    labels = torch.arange(7) % 3
    own = losses.MatryoshkaLoss(losses.SupConLoss(temperature=torch.nn.Parameter(torch.tensor(0.2))), DIMS)
    value = own(z, labels)
    value.backward()
    parts = [fastcl.functional.sup_con(z[:, :d], labels, temperature=0.2) for d in DIMS]
    torch.testing.assert_close(value, sum(parts))
    assert [name for name, _ in own.named_parameters()] == list(own.state_dict()) == ["losses.0.temperature"]
    copied = copy.deepcopy(own)
    assert copied(z, labels) == value and copied.losses[0] is not own.losses[0]


def test_a_state_for_each_width():
    u, v = views(0, 1)
    own = losses.MatryoshkaLoss([losses.SogCLRLoss(7) for _ in DIMS], DIMS)
    alone = [losses.SogCLRLoss(7) for _ in DIMS]
    for _ in range(2):
        value = own(u, v, index=torch.arange(7))
        right = sum(loss(u[:, :d], v[:, :d], index=torch.arange(7)) for loss, d in zip(alone, DIMS, strict=True))
        torch.testing.assert_close(value, right)
    for mine, other in zip(own.losses, alone, strict=True):
        torch.testing.assert_close(mine.log_u, other.log_u)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own
def test_compiled_whole():
    x, y = views(0, 1)
    own = losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS)
    found = torch.compile(own, backend="aot_eager", fullgraph=True)(x, y)
    torch.testing.assert_close(found, own(x, y))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"dims": (3, 2)}, ValueError, "dims: expected increasing widths"),
        ({"dims": ()}, ValueError, "dims: expected increasing widths"),
        ({"dims": (2.0, 3)}, TypeError, r"dims\[0\]: expected an integer, got float; pass int\(dims\[0\]\)"),
        ({"dims": 8}, TypeError, "dims: expected widths in order, got int; pass a list"),
        ({"dims": {2, 3}}, TypeError, "dims: expected widths in order, got set; pass a list"),
        ({"weights": (1.0,)}, ValueError, "weights: expected one for each of the 3 dims, got 1"),
        ({"weights": 1.0}, TypeError, "weights: expected numbers in order, got float; pass a list"),
        ({"weights": {2: 0.5, 3: 1.0, 6: 2.0}}, TypeError, "weights: expected numbers in order, got dict; pass a list"),
        (
            {"weights": torch.ones(3)},
            TypeError,
            r"weights\[0\]: expected a number, got a tensor; pass float\(weights\[0\]\)",
        ),
        ({"loss": [losses.CLIPLoss(logit_scale=1.0)]}, ValueError, "loss: expected one for each of the 3 dims, got 1"),
        (
            {"loss": losses.SogCLRLoss(7)},
            ValueError,
            "loss: expected a SogCLRLoss for each of dims, since it has a state, got one",
        ),
        (
            {"loss": torch.nn.Sequential(losses.SogCLRLoss(7))},
            ValueError,
            "loss: expected a Sequential for each of dims, since it has a",
        ),
        (
            {"loss": losses.CLIPLoss},
            TypeError,
            r"loss: expected a module or a function of rows, got the class CLIPLoss; pass CLIPLoss\(",
        ),
        ({"loss": None}, TypeError, "loss: expected a module or a function of rows, got NoneType"),
    ],
)
def test_refused(change, error, said):
    with pytest.raises(error, match=f"^{said}"):
        losses.MatryoshkaLoss(**({"loss": losses.CLIPLoss(logit_scale=1.0), "dims": DIMS} | change))


def test_widths_and_weights_of_numpy():
    own = losses.MatryoshkaLoss(losses.InfoNCELoss(), numpy.array([2, 3]), numpy.array([0.5, 2.0]))
    assert own.dims == (2, 3) and own.weights == (0.5, 2.0) and {type(d) for d in own.dims} == {int}


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda own, x: own(x=x, y=x), TypeError, r"rows: expected them in their places, as loss\(x, y\), got none"),
        (lambda own, x: own(x.to_sparse(), x), TypeError, r"rows\[0\]: expected a dense tensor, got a sparse coo one"),
    ],
)
def test_other_calls_are_refused(call, error, said):
    with pytest.raises(error, match=f"^{said}"):
        call(losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS), torch.ones(3, 6))


def test_narrow_rows_are_refused():
    with pytest.raises(ValueError, match=r"^rows\[1\]: expected at least 6 columns, the largest of dims, got 5"):
        losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS)(torch.ones(3, 6), torch.ones(3, 5))


def test_what_another_module_calls_its_group_is_its_own():
    """Only losses of this library say over which ranks they are."""

    class Own(torch.nn.Module):
        group, wide = 4, True

        def forward(self, x):
            return x.sum()

    loss = losses.MatryoshkaLoss([Own(), Own()], (2, 6))
    assert loss._group() is None
    assert loss(torch.ones(3, 6)) == 24.0
