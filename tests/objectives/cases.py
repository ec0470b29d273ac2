"""The one table of this folder: every objective with inputs, arguments and what is special about it.

A new objective is one line here (and its double loop in tests/oracle); every test in this folder finds it unasked, and
test_cases.py fails while a public function has no line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]
Arguments = dict[str, Any]


def generator(seed: int) -> torch.Generator:
    """A CPU generator of that seed."""
    return torch.Generator("cpu").manual_seed(seed)


def two_views(n: int, d: int, seed: int = 0) -> Rows:
    """Rows and their noisy copies, (n, d) float64."""
    g = generator(seed)
    u = torch.randn(n, d, generator=g, dtype=torch.float64)
    return u, u + 0.5 * torch.randn(n, d, generator=g, dtype=torch.float64)


def one_view(n: int, d: int, seed: int = 0) -> Rows:
    """One matrix of rows."""
    return two_views(n, d, seed)[:1]


def off_centre(n: int, d: int, seed: int = 0) -> Rows:
    """One matrix of rows about (3, ..., 3): similarities above those of uniform directions."""
    return (3.0 + one_view(n, d, seed)[0],)


def more_columns(n: int, d: int, seed: int = 0) -> Rows:
    """Two views, the second with 3 more rows."""
    u, v = two_views(n, d, seed)
    return u, torch.cat([v, torch.randn(3, d, generator=generator(seed + 1), dtype=torch.float64)])


def more_rows(n: int, d: int, seed: int = 0) -> Rows:
    """Two views, the first with 3 more rows."""
    return more_columns(n, d, seed)[::-1]


def more_of_both(n: int, d: int, seed: int = 0) -> Rows:
    """Two views of n rows that match, then 2 rows of the first and 3 of the second that match nothing."""
    return torch.cat([more_rows(n, d, seed)[1], 0.5 * one_view(2, d, seed + 3)[0]]), more_columns(n, d, seed)[1]


def with_queue(n: int, d: int, seed: int = 0) -> Rows:
    """Queries, keys and a queue of n + 2 rows."""
    u, v = two_views(n, d, seed)
    return u, v, torch.randn(n + 2, d, generator=generator(seed + 1), dtype=torch.float64)


def four_views(n: int, d: int, seed: int = 0) -> Rows:
    """Two queries and two keys."""
    return (*two_views(n, d, seed), *two_views(n, d, seed + 1))


def three_views(n: int, d: int, seed: int = 0) -> Rows:
    """Three views of each row."""
    u, v = two_views(n, d, seed)
    return u, v, u + 0.7 * torch.randn(n, d, generator=generator(seed + 2), dtype=torch.float64)


def both_views_at_once(n: int, d: int, seed: int = 0) -> Rows:
    """Both views in one matrix, (2n, d)."""
    return (torch.cat(two_views(n, d, seed)),)


def labels(n: int, d: int, u: Tensor) -> Arguments:
    """A class for each row, three or so rows to a class, a class of two rows, and one row alone in its class."""
    value = torch.arange(u.shape[0]) % max(1, n // 2)
    if len(value) > 1:
        value[-1] = 99
    if len(value) > 4:
        value[0] = value[-3] = -5
    return {"labels": value}


def pairs(n: int, d: int, u: Tensor) -> Arguments:
    """How many rows match: all but those that `more_of_both` adds, none of nothing."""
    return {"pairs": min(n, u.shape[0])}


def several(n: int, d: int, u: Tensor) -> Arguments:
    """Positives by index, weighted: each row with the row of its index but the last, which has none, and where there are enough:
    a row with two columns, two rows with one column, three pairs of two rows and two columns, a pair listed twice.
    """
    i = torch.arange(max(min(n, u.shape[0]) - 1, min(n, u.shape[0], 1)))
    extra = [(0, len(i)), (2, 1), (3, 4), (5, 5)] if len(i) > 5 else [(0, len(i))] if len(i) > 2 else []
    if len(i) > 5:
        i = i[i != 2]  # which has but the column of row 1
    more = torch.tensor(extra, dtype=torch.int64).reshape(-1, 2)
    rows, columns = torch.cat([i, more[:, 0]]), torch.cat([i, more[:, 1]])
    return {"positives": (rows, columns, (0.5 + torch.arange(len(rows)) % 3).to(u.dtype))}


def several_views(n: int, d: int, u: Tensor) -> Arguments:
    """Positives by index among both views: the other view, for most of the rows both ways; some have another row's views too."""
    n = min(n, u.shape[0])
    i = torch.arange(n)
    rows, columns = [i, i[: n - n // 3] + n], [i + n, i[: n - n // 3]]
    if n > 2:
        rows, columns = [*rows, i[:1], i[1:2]], [*columns, i[2:3], i[:1] + n]
    return {"positives": (torch.cat(rows), torch.cat(columns))}


def statistic(n: int, d: int, u: Tensor) -> Arguments:
    """A (d, d) second moment, as float32 as the module keeps it would be; here in the rows' dtype."""
    z = torch.randn(3 * d + 1, d, generator=generator(5), dtype=torch.float64)
    return {"statistic": (z.T @ z / len(z)).to(torch.float32 if u.dtype != torch.float64 else torch.float64)}


def normalizers(columns: int) -> Callable[[int, int, Tensor], Arguments]:
    """Logarithms of normalisers of earlier batches, one of them of a sample that was in none."""

    def given(n: int, d: int, u: Tensor) -> Arguments:
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        value = -2.0 + torch.randn(len(u), columns, generator=generator(8), dtype=torch.float64)
        value[1:2] = -torch.inf
        return {"log_u": value.to(dtype)}

    return given


def nothing(n: int, d: int, u: Tensor) -> Arguments:
    """No argument that depends on the rows."""
    return {}


@dataclass(frozen=True)
class Case:
    """One objective.

    name: in fastcl.functional and in tests.oracle. inputs: (n, d, seed) to rows, float64. grid: keyword arguments to try,
    the first being the one that expensive tests use. scalars: one-element arguments that may be tensors and want
    gradients, with a value. given: arguments made from (n, d, first input). rows: how many values "none" gives for each
    row of the first input, 0 where there are none. groups: whether it takes groups. smallest: the fewest rows that have a
    value. detached: which inputs get no gradient by definition. surrogate: for which arguments the gradient is by
    definition not that of the value. sharp: arguments of an extreme temperature. small: from a sharpness to arguments
    under which aligned rows have a loss near 0. exact: arguments under which rows are used as they are. terms: the size
    of the terms that the value is the difference of. backend: whether a backend is chosen. label: tells two cases of one
    function apart.
    """

    name: str
    inputs: Callable[..., Rows] = two_views
    grid: tuple[Arguments, ...] = ({},)
    scalars: Arguments = field(default_factory=dict)
    given: Callable[[int, int, Tensor], Arguments] = nothing
    rows: int = 1
    groups: bool = True
    smallest: int = 1
    detached: tuple[int, ...] = ()
    surrogate: Callable[[Arguments], bool] = lambda arguments: False
    sharp: Arguments = field(default_factory=dict)
    small: Callable[[float], Arguments] | None = None
    exact: Arguments = field(default_factory=lambda: {"normalize": False})
    terms: Callable[[Arguments], float] = lambda arguments: 1.0
    backend: bool = True
    label: str = ""

    @property
    def id(self) -> str:
        """The name, and which variant."""
        return f"{self.name}{self.label}"

    def rows_of(self, n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        """Fresh leaves; those that are detached by definition want gradients too, and must get none."""
        return [x.to(dtype).requires_grad_() for x in self.inputs(n, d, seed)]

    def groups_of(self, n: int, d: int) -> Tensor:
        """Groups for its rows: two rows share the first group, two the second, the others are alone."""
        m = max(len(x) for x in self.inputs(n, d))
        value = torch.arange(m)
        value[-1] = 0
        if m > 3:
            value[-2] = 1
        return value

    def arguments(self, index: int, n: int, d: int, u: Tensor) -> Arguments:
        """The index-th set of its grid, complete; the set after the last is the first with groups."""
        with_groups = index == len(self.grid)
        chosen = dict(self.grid[0 if with_groups else index]) | self.given(n, d, u)
        return chosen | ({"groups": self.groups_of(n, d)} if with_groups else {})

    def logits(self, arguments: Arguments) -> float:
        """The size of its exponents on unit rows: each is known to eps times that, and so is the value."""
        default = {**self.scalars, **arguments}
        size = max(1.0 / float(default.get("temperature", 1.0)), float(default.get("logit_scale", 1.0)))
        return size * (1.0 + float(default.get("beta", 0.0)))

    def values(self, rows: Sequence[Tensor], arguments: Arguments) -> int:
        """How many values "none" gives."""
        if "positives" not in arguments:
            return self.rows * int(arguments.get("pairs", min(map(len, rows))))
        return len(rows[0]) if self.rows == 1 else len(rows[0]) + len(rows[1])

    def sets(self) -> range:
        """Indices for `arguments`."""
        return range(len(self.grid) + (1 if self.groups else 0))

    def is_surrogate(self, index: int) -> bool:
        """Whether the gradient is by definition not that of the value."""
        return self.surrogate(self.grid[0 if index == len(self.grid) else index])


def by_temperature(sharpness: float) -> Arguments:
    """The sharpness as a temperature."""
    return {"temperature": 1.0 / sharpness}


def by_scale(sharpness: float) -> Arguments:
    """The sharpness as a logit scale."""
    return {"logit_scale": sharpness}


def without_prior(sharpness: float) -> Arguments:
    """The sharpness as a temperature, and no debiasing, whose floor would end the training before the loss is small."""
    return {"temperature": 1.0 / sharpness, "tau_plus": 0.0}


def by_scale_and_bias(sharpness: float) -> Arguments:
    """The sharpness as a logit scale, its threshold half-way."""
    return {"logit_scale": sharpness, "logit_bias": -0.75 * sharpness}


def weight_of_negatives(arguments: Arguments) -> float:
    """f-MICL's alpha times the constants of psi, up to 4."""
    return 4.0 * float(arguments.get("alpha", 40.0))


def _f_micl_grid() -> Iterator[Arguments]:
    for divergence in ("kl", "js", "pearson", "sh", "vlc", "rkl", "neyman", "jeffrey"):
        yield {"divergence": divergence}
    yield {"divergence": "tsallis", "q": 1.5}
    yield {"divergence": "tsallis", "q": 0.5, "normalize": False, "beta": 0.25}
    yield {"divergence": "js", "negatives": "xx+yy", "beta": 2.0, "mu": 1.5, "alpha": 3.0}
    yield {"divergence": "vlc", "negatives": "xy", "beta": 0.5, "mu": 0.5}
    yield {"divergence": "jeffrey", "negatives": "xx+yy"}
    yield {"divergence": "rkl", "negatives": "xy"}


def _f_micl_cosine_grid() -> Iterator[Arguments]:
    for divergence in ("kl", "js", "pearson", "sh", "vlc", "neyman"):
        yield {"similarity": "cosine", "divergence": divergence}
    yield {"similarity": "cosine", "divergence": "tsallis", "q": 1.5, "negatives": "xy"}
    yield {"similarity": "cosine", "divergence": "tsallis", "q": 2.0, "negatives": "xx+yy"}


_KCL_GRID = (
    *({"kernel": kernel} for kernel in ("gaussian", "log", "imq", "riesz", "gaussian_riesz")),
    {"kernel": "riesz", "t": -1.0, "gamma": 2.0},
    {"kernel": "gaussian", "t": 0.5, "gamma": 4.0, "normalize": False},
    {"kernel": "riesz", "t": 1.0, "gamma": 1.0},
    {"kernel": "gaussian_riesz", "t": 1.0},  # aligned at t = 2 all the same
)

CASES = (
    Case(
        "info_nce",
        grid=({}, {"normalize": False, "temperature": 0.5}, {"label_smoothing": 0.1, "temperature": 0.3}),
        scalars={"temperature": 0.2},
        sharp={"temperature": 1e-3},
        small=by_temperature,
    ),
    Case(
        "info_nce",
        more_columns,
        label="-more-columns",
        scalars={"temperature": 0.2},
        sharp={"temperature": 1e-3},
        small=by_temperature,
    ),
    *(
        Case(
            "info_nce",
            inputs,
            label=f"-positives{label}",
            grid=({"temperature": 0.3}, {"normalize": False, "temperature": 8.0, "label_smoothing": 0.2}),
            given=several,
            scalars={"temperature": 0.2},
            groups=False,
        )
        for inputs, label in ((two_views, ""), (more_columns, "-more-columns"), (more_rows, "-more-rows"))
    ),
    Case("info_nce", label="-smooth-groups", grid=({"label_smoothing": 0.4, "temperature": 0.3},)),
    Case("clip", more_of_both, label="-smooth", grid=({"logit_scale": 3.0, "label_smoothing": 0.1},), given=pairs),
    *(
        Case(
            "clip",
            inputs,
            label=f"-positives{label}",
            grid=({"logit_scale": 5.0}, {"logit_scale": 1.5, "normalize": False, "label_smoothing": 0.1}),
            given=several,
            scalars={"logit_scale": 10.0},
            rows=2,
            groups=False,
        )
        for inputs, label in ((two_views, ""), (more_columns, "-more-columns"))
    ),
    Case(
        "nt_xent",
        label="-positives",
        grid=({}, {"normalize": False, "temperature": 1.0}),
        given=several_views,
        scalars={"temperature": 0.5},
        rows=2,
        groups=False,
    ),
    *(
        Case(
            "siglip",
            inputs,
            label=f"-positives{label}",
            grid=({"logit_scale": 10.0, "logit_bias": -10.0},),
            given=several,
            scalars={"logit_scale": 10.0, "logit_bias": -3.0},
            groups=False,
        )
        for inputs, label in ((two_views, ""), (more_rows, "-more-rows"))
    ),
    Case(
        "clip",
        grid=(
            {"logit_scale": 14.3},
            {"logit_scale": 1.5, "normalize": False},
            {"logit_scale": 5.0, "label_smoothing": 0.1},
        ),
        scalars={"logit_scale": 10.0},
        sharp={"logit_scale": 1e3},
        small=by_scale,
    ),
    *(
        Case(
            "clip",
            inputs,
            label=label,
            grid=({"logit_scale": 14.3},),
            given=given,
            scalars={"logit_scale": 10.0},
            sharp={"logit_scale": 1e3},
        )
        for label, inputs, given in (
            ("-more-columns", more_columns, nothing),
            ("-more-rows", more_rows, nothing),
            ("-more-of-both", more_of_both, pairs),
        )
    ),
    Case(
        "nt_xent",
        grid=({}, {"normalize": False, "temperature": 1.0}),
        scalars={"temperature": 0.5},
        rows=2,
        sharp={"temperature": 1e-3},
        small=by_temperature,
    ),
    Case(
        "moco",
        with_queue,
        grid=({}, {"normalize": False, "temperature": 1.0}),
        scalars={"temperature": 0.2},
        groups=False,
        detached=(1, 2),
        sharp={"temperature": 1e-3},
        small=by_temperature,
    ),
    Case(
        "moco_v3",
        four_views,
        grid=({}, {"normalize": False, "temperature": 1.0}),
        scalars={"temperature": 0.2},
        detached=(2, 3),
        sharp={"temperature": 1e-3},
        small=by_temperature,
    ),
    Case(
        "dcl",
        grid=(
            {"temperature": 0.3},
            {"symmetric": False},
            {"sigma": 0.5},
            {"sigma": 0.5, "detach_weight": False, "symmetric": False},
            {"sigma": 0.5, "detach_weight": False},
            {"normalize": False, "temperature": 1.0},
        ),
        scalars={"temperature": 0.1},
        smallest=2,
        surrogate=lambda arguments: "sigma" in arguments and arguments.get("detach_weight", True),
        sharp={"temperature": 1e-3},
    ),
    Case(
        "dhel",
        grid=({}, {"form": "anchor"}, {"form": "symmetric"}, {"normalize": False, "temperature": 1.0}),
        scalars={"temperature": 0.3},
        smallest=2,
        sharp={"temperature": 1e-3},
    ),
    *(
        Case(
            name,
            inputs,
            label=label,
            grid=({"temperature": 0.3}, {"normalize": False, "temperature": 2.0}),
            scalars={"temperature": 0.3},
            smallest=smallest,
            sharp={"temperature": 1e-3},
        )
        for name, smallest in (("mv_info_nce", 1), ("mv_dhel", 2))
        for inputs, label in ((two_views, ""), (three_views, "-three"))
    ),
    *(
        Case("temperature_free_info_nce", inputs, label=label)
        for inputs, label in ((two_views, ""), (more_columns, "-more-columns"))
    ),
    Case(
        "kcl",
        grid=_KCL_GRID,
        scalars={"gamma": 16.0},
        smallest=2,
        terms=lambda arguments: 2.0 * float(arguments.get("gamma", 16.0)),
    ),
    Case(
        "f_micl",
        grid=tuple(_f_micl_grid()),
        scalars={"beta": 1.0, "mu": 1.0, "alpha": 40.0},
        smallest=2,
        sharp={"beta": 50.0},
        terms=weight_of_negatives,
    ),
    Case(
        "f_micl",
        grid=tuple(_f_micl_cosine_grid()),
        scalars={"alpha": 40.0},
        smallest=2,
        label="-cosine",
        terms=weight_of_negatives,
    ),
    Case(
        "f_micl_dv",
        grid=({}, {"normalize": False, "beta": 0.5}),
        scalars={"beta": 1.0},
        rows=0,
        smallest=2,
        sharp={"beta": 500.0},
    ),
    Case(
        "spectral",
        grid=({}, {"mu": 3.0}, {"estimator": "biased"}, {"normalize": True, "mu": 0.5}),
        smallest=2,
        exact={"mu": 4.0},
    ),
    Case(
        "minc",
        grid=({}, {"gha": True}, {"mu": 0.5}, {"normalize": True, "mu": 2.0}),
        given=statistic,
        rows=0,
        groups=False,
        surrogate=lambda arguments: True,
        backend=False,
    ),
    Case(
        "f_mi_alpha",
        grid=(
            {},
            {"alpha": 1.5},
            {"alpha": 1.0},
            {"alpha": 0.0, "eps": 0.05},
            {"alpha": 3.0, "eps": 0.1},
            {"alpha": 4.0, "normalize": True},
            {"alpha": -2.0, "eps": 0.3},
            {"normalize": True},
        ),
        smallest=2,
    ),
    Case(
        "sup_con",
        both_views_at_once,
        grid=({}, {"temperature": 0.5, "base_temperature": 0.1}, {"normalize": False, "temperature": 1.0}),
        given=labels,
        scalars={"temperature": 0.2},
        groups=False,
        smallest=2,
        sharp={"temperature": 1e-3},
    ),
    Case(
        "sincere",
        both_views_at_once,
        grid=({}, {"temperature": 0.5}, {"normalize": False, "temperature": 1.0}),
        given=labels,
        scalars={"temperature": 0.2},
        groups=False,
        sharp={"temperature": 1e-3},
    ),
    *(
        Case(
            name,
            label=label,
            grid=({"temperature": 0.3}, *more, {"gamma": 0.3, "normalize": False, "temperature": 2.0}),
            given=given,
            scalars={"temperature": 0.3} | scalars,
            rows=rows,
            smallest=2,
            surrogate=lambda arguments: True,
            sharp={"temperature": 1e-3},
        )
        for name, columns, rows, more, scalars in (
            ("sogclr", 1, 2, (), {}),
            ("fast_clip", 2, 1, ({"temperature": 0.3, "gamma": 0.5, "eps": 0.1},), {"rho": 2.0}),
        )
        for label, given in (("", normalizers(columns)), ("-new", nothing))
    ),
    Case(
        "siglip",
        grid=(
            {"logit_scale": 10.0, "logit_bias": -10.0},
            {"logit_scale": 1.0, "logit_bias": 0.5, "normalize": False},
        ),
        scalars={"logit_scale": 10.0, "logit_bias": -3.0},
        sharp={"logit_scale": 1e3},
        small=by_scale_and_bias,
    ),
    Case(
        "siglip",
        more_columns,
        label="-more-columns",
        grid=({"logit_scale": 10.0, "logit_bias": -10.0},),
        scalars={"logit_scale": 10.0, "logit_bias": -3.0},
        sharp={"logit_scale": 1e3},
    ),
    Case(
        "alignment",
        grid=({}, {"alpha": 1.0}, {"alpha": 3.0, "normalize": False}),
        groups=False,
        backend=False,
    ),
    Case(
        "uniformity",
        one_view,
        grid=({}, {"t": 0.5, "normalize": False}),
        scalars={"t": 2.0},
        rows=0,
        smallest=2,
        sharp={"t": 500.0},
    ),
    Case(
        "spread_out",
        off_centre,
        grid=({}, {"mean_weight": 0.5, "second_moment_weight": 3.0, "normalize": False}),
        scalars={"mean_weight": 1.0, "second_moment_weight": 1.0},
        rows=0,
        smallest=2,
    ),
    Case(
        "align_uniform",
        grid=({}, {"alpha": 1.0, "t": 3.0, "weight": 0.5, "normalize": False}),
        scalars={"t": 2.0, "weight": 1.0},
        rows=0,
        smallest=2,
        sharp={"t": 500.0},
    ),
    Case(
        "debiased",
        grid=({}, {"temperature": 0.2, "tau_plus": 0.01}, {"normalize": False, "temperature": 2.0}),
        scalars={"temperature": 0.5},
        rows=2,
        sharp={"temperature": 1e-3},
        small=without_prior,
    ),
    Case(
        "hard_negative",
        grid=({}, {"beta": 0.5, "tau_plus": 0.0}, {"temperature": 0.1}, {"normalize": False, "temperature": 2.0}),
        scalars={"temperature": 0.5, "beta": 1.0},
        rows=2,
        sharp={"temperature": 1e-3},
        small=without_prior,
    ),
)

SIZES = (6, 5)  # n, d of the double loops: ragged, and more rows than columns
