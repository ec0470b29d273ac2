"""Each metric against its definition on all pairs at once, in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastcl import metrics
from fastcl.metrics import cosines, sweep

SIZES = [(2, 3), (13, 5), (200, 16)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged tiles and blocks at sizes that a test can afford."""
    monkeypatch.setattr(sweep, "TILE", (7, 12))


def views(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + d)
    u = torch.randn(n, d, generator=g, dtype=torch.float64)
    v = u + torch.randn(n, d, generator=g, dtype=torch.float64)
    return u.to(dtype), v.to(dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def off_diagonal(m: Tensor) -> Tensor:
    return m.masked_fill(torch.eye(*m.shape, dtype=torch.bool), -math.inf)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "d"), SIZES)
class TestDefinitions:
    def rows(self, n: int, d: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = views(n, d)
        return x, y, unit(x) if normalize else x, unit(y) if normalize else y

    @pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
    def test_alignment(self, n: int, d: int, normalize: bool, alpha: float) -> None:
        x, y, u, v = self.rows(n, d, normalize)
        expected = ((u - v).norm(dim=1) ** alpha).mean().item()
        assert metrics.alignment(x, y, alpha=alpha, normalize=normalize) == pytest.approx(expected, rel=1e-13)

    @pytest.mark.parametrize("t", [0.5, 2.0, 50.0])
    def test_uniformity(self, n: int, d: int, normalize: bool, t: float) -> None:
        x, _, u, _ = self.rows(n, d, normalize)
        expected = (-t * torch.pdist(u).square()).logsumexp(0).item() - math.log(n * (n - 1) / 2)
        assert metrics.uniformity(x, t=t, normalize=normalize) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("temperature", [1e-3, 0.07, 1.0])
    def test_mean_log_sum_exp(self, n: int, d: int, normalize: bool, temperature: float) -> None:
        x, y, u, v = self.rows(n, d, normalize)
        for other, w in ((y, v), (None, u)):
            expected = off_diagonal(u @ w.T / temperature).logsumexp(1).mean().item()
            got = metrics.mean_log_sum_exp(x, other, temperature=temperature, normalize=normalize)
            assert got == pytest.approx(expected, rel=1e-12)

    def test_mean_log_sum_exp_with_more_rows(self, n: int, d: int, normalize: bool) -> None:
        x, y, u, v = self.rows(n, d, normalize)
        x, u = x[: n // 2 + 1], u[: n // 2 + 1]
        expected = off_diagonal(u @ v.T / 0.07).logsumexp(1).mean().item()
        assert metrics.mean_log_sum_exp(x, y, normalize=normalize) == pytest.approx(expected, rel=1e-12)

    def test_effective_rank(self, n: int, d: int, normalize: bool) -> None:
        x, _, u, _ = self.rows(n, d, normalize)
        sigma = torch.linalg.svdvals(u)
        p = sigma / sigma.sum() + 1e-7
        expected = math.exp(-(p * p.log()).sum().item())
        assert metrics.effective_rank(x, normalize=normalize) == pytest.approx(expected, rel=1e-12)

    def test_rank(self, n: int, d: int, normalize: bool) -> None:
        x, _, u, _ = self.rows(n, d, normalize)
        for tol in (1e-5, 0.3 / d):
            expected = torch.linalg.matrix_rank(torch.cov(u.T), hermitian=True, atol=tol, rtol=0.0).item()
            assert metrics.rank(x, tol=tol, normalize=normalize) == expected

    def test_retrieval_accuracy(self, n: int, d: int, normalize: bool) -> None:
        x, y, u, v = self.rows(n, d, normalize)
        got = metrics.retrieval_accuracy(x, y, k=(1, 2, 5, 1000), normalize=normalize)
        for shares, s in ((got.x_to_y, u @ v.T), (got.y_to_x, v @ u.T)):
            place = (s > s.diagonal()[:, None]).sum(1)
            assert shares == {k: pytest.approx((place < k).double().mean().item(), abs=1e-15) for k in (1, 2, 5, 1000)}


class TestEffectiveRank:
    def test_of_a_known_spectrum(self) -> None:
        for k in (1, 3, 8):
            x = torch.zeros(100, 8, dtype=torch.float64)
            x[torch.arange(100), torch.arange(100) % k] = 1.0
            x = x[: 100 - 100 % k]
            assert metrics.effective_rank(x) == pytest.approx(k, rel=2e-5)
            assert metrics.rank(x) == k - 1
        assert metrics.effective_rank(torch.zeros(5, 3)) == 0.0
        assert metrics.rank(torch.ones(5, 3)) == 0

    def test_covariance_is_over_n_minus_1(self) -> None:
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # variance 2 over n - 1, 1 over n
        assert metrics.rank(x, tol=1.9) == 1
        assert metrics.rank(x, tol=2.1) == 0

    def test_many_blocks_of_rows_are_one(self) -> None:
        x = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(
            0, -9, 6
        )
        sigma = torch.linalg.svdvals(x.double())
        p = sigma / sigma.sum() + 1e-7
        assert metrics.effective_rank(x) == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-12)


class TestWassersteinUniformity:
    """scipy has the Beta distribution; the exact distance is an integral over quantiles."""

    @pytest.mark.parametrize("d", [2, 3, 4, 5, 17, 128, 2048, 4097])
    def test_distribution_of_cosines(self, d: int) -> None:
        c = torch.linspace(-1.001, 1.001, 1001, dtype=torch.float64)
        a = (d - 1) / 2
        expected = stats.beta(a, a).cdf(((1.0 + c.numpy()) / 2.0).clip(0.0, 1.0))
        # scipy's own function is right to some 1e-13 for large a.
        assert np.abs(cosines._uniform_cosine_cdf(c, d).numpy() - expected).max() < 1e-12

    def test_area_between_points(self) -> None:
        """|t| over [-1, 1] from its ends alone, and over [-1, 2] where 0 is no point."""
        assert cosines._absolute_area(torch.tensor([-1.0, 1.0]).double(), 2.0) == pytest.approx(1.0, rel=1e-15)
        assert cosines._absolute_area(torch.tensor([-1.0, 0.5, 2.0]).double(), 1.5) == pytest.approx(2.5, rel=1e-15)
        assert cosines._absolute_area(torch.zeros(3).double(), 1.0) == 0.0

    @staticmethod
    def exact(cosine: np.ndarray, d: int) -> float:
        """int |F - F_d| by a fine grid between the jumps of F, to well below a bin."""
        a = (d - 1) / 2
        fine = np.linspace(-1.0, 1.0, 2_000_001)
        f = np.searchsorted(np.sort(cosine), fine, side="right") / cosine.size
        return float(np.abs(f - stats.beta(a, a).cdf((1.0 + fine) / 2.0)).mean() * 2.0)

    @pytest.mark.parametrize("bins", [64, 1000, 1 << 16])
    @pytest.mark.parametrize(("n", "d"), [(2, 2), (2, 16), (50, 3), (200, 16), (300, 2)])
    def test_within_its_stated_error(self, n: int, d: int, bins: int) -> None:
        x, _ = views(n, d)
        i, j = np.triu_indices(n, 1)
        cosine = (unit(x) @ unit(x).T).numpy()[i, j]
        # 1e-6: the steps of the fine grid.
        assert abs(metrics.wasserstein_uniformity(x, bins=bins) - self.exact(cosine, d)) <= 1.001 / bins + 1e-6

    def test_known_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sweep, "TILE", (512, 1024))
        # All rows alike: every cosine is 1, and the distance is that of the mean, 1 - 0.
        x = torch.ones(40, 7, dtype=torch.float64)
        assert metrics.wasserstein_uniformity(x) == pytest.approx(1.0, abs=2e-5)
        # Many uniform rows: near 0, at the rate of n independent draws.
        x, _ = views(2000, 8)
        assert 0.0 <= metrics.wasserstein_uniformity(x) < 0.003
        # Collapse to a half space is further away than uniform rows are.
        assert metrics.wasserstein_uniformity(x.abs()) > 0.3


class TestTies:
    def test_collapsed_rows_score_k_over_n(self) -> None:
        x = torch.ones(20, 3)
        accuracy = metrics.retrieval_accuracy(x, x, k=(1, 5, 40))
        assert accuracy.x_to_y == accuracy.y_to_x == pytest.approx({1: 0.05, 5: 0.25, 40: 1.0})

    def test_rows_of_nothing_and_of_any_length(self) -> None:
        nothing = metrics.retrieval_accuracy(torch.zeros(20, 3), torch.zeros(20, 3), k=(5,), normalize=False)
        assert nothing.x_to_y == nothing.y_to_x == pytest.approx({5: 0.25})
        x, y = views(30, 8)
        expected = metrics.retrieval_accuracy(x, y, normalize=False)
        for factor in (1e-200, 1e200):
            assert metrics.retrieval_accuracy(factor * x, factor * y, normalize=False) == expected

    def test_duplicated_rows_share(self) -> None:
        x, _ = views(30, 8, torch.float32)
        x[1] = x[0]
        accuracy = metrics.retrieval_accuracy(x, x, k=(1, 2))
        assert accuracy.x_to_y == accuracy.y_to_x == pytest.approx({1: 29 / 30, 2: 1.0})


METRICS: dict[str, Callable[..., object]] = {
    "alignment": lambda x, **k: metrics.alignment(x, x.flip(0), **k),
    "uniformity": metrics.uniformity,
    "mean_log_sum_exp": metrics.mean_log_sum_exp,
    "mean_log_sum_exp of two": lambda x, **k: metrics.mean_log_sum_exp(x, x.flip(0), **k),
    "effective_rank": metrics.effective_rank,
    "rank": metrics.rank,
    "wasserstein_uniformity": metrics.wasserstein_uniformity,
    "retrieval_accuracy": lambda x, **k: metrics.retrieval_accuracy(x, x.flip(0), **k).x_to_y[5],
}


@pytest.mark.parametrize("name", METRICS)
class TestEvery:
    def test_the_same_from_run_to_run(self, name: str) -> None:
        x, _ = views(60, 5, torch.float32)
        assert METRICS[name](x) == METRICS[name](x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_narrow_dtypes(self, name: str, dtype: torch.dtype) -> None:
        """Near the value of the same rounded rows in float64; unit rows are rounded to the dtype once more."""
        x = views(60, 5)[0].to(dtype)
        assert METRICS[name](x) == pytest.approx(
            METRICS[name](x.double()), rel=0.05 if dtype != torch.float32 else 1e-4
        )

    def test_takes_no_gradient_and_leaves_the_rows(self, name: str) -> None:
        x = views(30, 5)[0].requires_grad_()
        before = x.detach().clone()
        assert isinstance(METRICS[name](x), (int, float))
        assert x.grad is None and torch.equal(x.detach(), before)

    def test_nan_gives_nan(self, name: str) -> None:
        x = views(30, 5)[0]
        x[3, 2] = math.nan
        assert math.isnan(METRICS[name](x))  # type: ignore[arg-type]

    def test_progress(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        x = views(60, 5)[0]
        if name == "alignment":
            with pytest.raises(TypeError, match="progress"):
                METRICS[name](x, progress=True)
            return
        assert METRICS[name](x, progress=True) == METRICS[name](x)
        shown = capsys.readouterr().err
        assert "100%" in shown

    def test_errors(self, name: str) -> None:
        with pytest.raises(ValueError, match="at least"):
            METRICS[name](torch.zeros(0, 3))
        with pytest.raises(ValueError, match="expected a matrix"):
            METRICS[name](torch.zeros(3))
        with pytest.raises(TypeError, match="expected float64"):
            METRICS[name](torch.zeros(3, 4, dtype=torch.int64))


def test_arguments_that_do_not_fit() -> None:
    x, y = views(6, 3)
    for call, match in (
        (lambda: metrics.alignment(x, y, alpha=0.0), "alpha"),
        (lambda: metrics.alignment(x, y[:4]), "one row for each row"),
        (lambda: metrics.uniformity(x, t=-1.0), "t: expected"),
        (lambda: metrics.uniformity(x[:1]), "at least 2 rows"),
        (lambda: metrics.uniformity(x, backend="fast"), "backend"),
        (lambda: metrics.mean_log_sum_exp(x, y[:4]), "at least 6 rows"),
        (lambda: metrics.mean_log_sum_exp(x[:1]), "at least 2 rows"),
        (lambda: metrics.mean_log_sum_exp(x, temperature=0.0), "temperature"),
        (lambda: metrics.rank(x, tol=-1.0), "tol"),
        (lambda: metrics.wasserstein_uniformity(x[:, :1]), "at least 2 columns"),
        (lambda: metrics.wasserstein_uniformity(x, bins=1), "bins"),
        (lambda: metrics.retrieval_accuracy(x, y, k=()), "k: expected"),
        (lambda: metrics.retrieval_accuracy(x, y, k=(0, 1)), "k: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_an_alignment_beyond_float32() -> None:
    """The metric is a Python number, whatever the dtype of rows."""
    x, y = (1e30 * rows for rows in views(6, 3, torch.float32))
    for alpha in (0.5, 2.0, 6.0):
        expected = ((x.double() - y.double()).norm(dim=1) ** alpha).mean().item()
        assert metrics.alignment(x, y, alpha=alpha, normalize=False) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_alignment_of_rows_that_nearly_agree(dtype: torch.dtype) -> None:
    """Unit rows in a half dtype are further from one another than these rows are."""
    x = views(6, 3)[0].to(dtype)
    y = x.clone()
    y[:, 0] *= 1.0 + 4.0 * torch.finfo(dtype).eps
    expected = metrics.alignment(x.double(), y.double(), alpha=1.0)
    assert metrics.alignment(x, y, alpha=1.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1e-307, 1e300, 3e307])
def test_an_effective_rank_at_the_ends_of_the_range(size: float) -> None:
    x = views(20, 4)[0]
    assert metrics.effective_rank(size * x) == pytest.approx(metrics.effective_rank(x), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_is_below_the_number_of_rows(dtype: torch.dtype) -> None:
    """What is 0 of long rows rounds to more than tol."""
    x = 1e18 * views(33, 64, dtype)[0]
    assert metrics.rank(x, normalize=False) == 32


@pytest.mark.parametrize("name", METRICS)
def test_another_default_device(name: str) -> None:
    """As with torch.set_default_device("cuda"), of rows that are elsewhere."""
    x = views(30, 5)[0]
    expected = METRICS[name](x)
    with torch.device("meta"):
        assert METRICS[name](x) == expected


def test_a_bar_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        metrics.uniformity(views(6, 3)[0], progress=True)
    metrics.uniformity(views(6, 3)[0])


def test_uniformity_of_equal_rows_is_at_most_0() -> None:
    """As documented: log mean e^0 rounded to 8.7e-8."""
    for n in range(2, 40):
        assert -1e-6 < metrics.uniformity(torch.ones(n, 3)) <= 0.0
