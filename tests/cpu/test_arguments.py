"""What the compiled op itself refuses: callers of torch.ops.fastcl pass no Python check on the way."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastcl.backends import extension

assert extension.library is not None, extension.reason
VALID: dict[str, Any] = {
    "x": torch.ones(4, 3), "y": torch.ones(5, 3), "scale": torch.tensor(1.0), "shift": torch.tensor(0.0), "bias_x": None,
    "bias_y": None, "group_x": None, "group_y": None, "limit_x": None, "limit_y": None, "guide_x": None, "guide_y": None,
    "row_offset": 0, "col_offset": 0, "period": 0, "mask": "all", "operand": "dot", "pair": "identity", "constants": [],
    "reduce": "logsumexp", "columns": False,
}  # fmt: skip
BOTH = "expected guides of rows and of columns, and of x with itself guide_x alone"
GUIDED: dict[str, Any] = {"limit_x": torch.ones(4), "guide_x": torch.ones(4, 2), "guide_y": torch.ones(5, 2)}
MASKS = "'all', 'off_diagonal', 'across_groups', 'within_groups'"
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.ones(4)}, ValueError, "x: expected a matrix (n, d), got shape [4]"),
    ({"x": torch.ones(4, 3).int()}, TypeError, "x: expected float64, float32, bfloat16 or float16, got int32"),
    ({"y": torch.ones(5, 2)}, ValueError, "y: expected a matrix (m, 3), got shape [5, 2]"),
    ({"y": torch.ones(5, 3).double()}, TypeError, "y: expected the dtype of x, float32, got float64"),
    ({"scale": torch.ones(2)}, ValueError, "scale: expected one element, got shape [2]"),
    ({"bias_x": torch.ones(3)}, ValueError, "bias_x: expected shape (4,), got [3]"),
    ({"bias_y": torch.ones(5).double()}, TypeError, "bias_y: expected float32, got float64"),
    ({"group_x": torch.ones(4)}, TypeError, "group_x: expected int64, got float32"),
    ({"limit_x": torch.ones(3)}, ValueError, "limit_x: expected shape (4,), got [3]"),
    ({"limit_y": torch.ones(5).double()}, TypeError, "limit_y: expected float32, got float64"),
    ({"guide_x": torch.ones(4, 2)}, ValueError, f"guide_y: {BOTH}"),
    ({"guide_y": torch.ones(5, 2), "limit_x": torch.ones(4)}, ValueError, f"guide_y: {BOTH}"),
    (GUIDED | {"y": None, "guide_y": torch.ones(4, 2)}, ValueError, f"guide_y: {BOTH}"),
    (GUIDED | {"limit_x": None}, ValueError, "guide_x: expected limits beside it, got none"),
    (GUIDED | {"guide_x": torch.ones(8)}, ValueError, "guide_x: expected a matrix (4, k), got shape [8]"),
    (GUIDED | {"guide_y": torch.ones(4, 2)}, ValueError, "guide_y: expected a matrix (5, k), got shape [4, 2]"),
    (
        GUIDED | {"guide_y": torch.ones(5, 3)},
        ValueError,
        "guide_y: expected rows of the width of guide_x, 2, got shape [5, 3]",
    ),
    (GUIDED | {"guide_y": torch.ones(5, 2).double()}, TypeError, "guide_y: expected float32, got float64"),
    ({"mask": "other"}, ValueError, f"mask: expected one of {MASKS}, got 'other'"),
    ({"mask": "across_groups"}, ValueError, "mask: 'across_groups' needs group_x"),
    ({"mask": "within_groups", "group_x": torch.arange(4)}, ValueError, "group_y: expected 5 groups, got none"),
    ({"operand": "u"}, ValueError, "operand: expected one of 'dot', 'sqdist', got 'u'"),
    ({"reduce": "max"}, ValueError, "reduce: expected one of 'sum', 'logsumexp', got 'max'"),
    ({"pair": "exp"}, ValueError, "pair: reduce='logsumexp' goes with 'identity' only, got 'exp'"),
    ({"pair": "power", "reduce": "sum"}, ValueError, "constants: 'power' needs 2, got 0"),
    (
        {"y": None, "columns": True},
        ValueError,
        "y: x with itself takes no columns, biases, second groups or second limits; pass y=x",
    ),
    (
        {"y": None, "limit_y": torch.ones(4)},
        ValueError,
        "y: x with itself takes no columns, biases, second groups or second limits; pass y=x",
    ),
    ({"y": None, "row_offset": 1}, ValueError, "mask: x with itself needs equal offsets, got 1 and 0"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_refused(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    torch.ops.fastcl.kernel_rows(*VALID.values())
    # The library knows no Python, and what torch makes of its exceptions is ValueError; TypeError comes from the op above it.
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        torch.ops.fastcl.kernel_rows(*(VALID | change).values())
    assert str(caught.value) == message
    if kind is TypeError:
        name = message.split(":")[0]
        with pytest.raises(TypeError, match=f"^{name}: expected "):
            torch.ops.fastcl.pair_reduce(*(VALID | change).values(), "cpu")


@pytest.mark.parametrize(
    ("outer", "positive", "reduce", "message"),
    [
        ("mean", None, "logsumexp", "outer: expected one of 'sum', 'contrast', 'pooled', got 'mean'"),
        ("contrast", None, "logsumexp", "positive: expected a vector exactly for outer='contrast'"),
        ("sum", torch.ones(4), "logsumexp", "positive: expected a vector exactly for outer='contrast'"),
        ("pooled", None, "sum", "outer: 'contrast' and 'pooled' go with reduce='logsumexp' only"),
    ],
)
def test_refused_totals(outer: str, positive: torch.Tensor | None, reduce: str, message: str) -> None:
    arguments = (VALID | {"reduce": reduce}).values()
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.fastcl.kernel_total(*arguments, positive, outer, [False] * 6)


def test_rows_with_themselves_have_no_gradient_of_y() -> None:
    arguments = (VALID | {"y": None}).values()
    vectors, wanted = [torch.ones(k) for k in (4, 0, 4, 0)], [True, True, *[False] * 4]
    message = re.escape("wanted: x with itself has no gradient of y; pass y=x")
    with pytest.raises(ValueError, match=message):
        torch.ops.fastcl.kernel_gradients(*arguments, *vectors, wanted, False)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastcl.kernel_total(*arguments, None, "sum", wanted)


def test_a_pair_function_that_was_not_built() -> None:
    message = (
        "expected a pair function that was built in, got 'mine'; run python -m fastcl.equation.codegen and build again"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.fastcl.kernel_rows(*(VALID | {"pair": "mine"}).values())
