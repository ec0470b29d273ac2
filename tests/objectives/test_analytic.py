"""Values that follow on paper: at the regular simplex, between objectives, and what the f-MICL paper proves."""

import math

import pytest
import torch
from torch import Tensor

import fastcl.functional as F
from tests.oracle.fmicl import CONJUGATES, DIVERGENCES, GENERATORS

from .cases import two_views
from .configurations import cross_polytope, simplex, two_clusters
from .witnesses import close, gradients, served

M, TAU = 7, 0.3
Q = -M / ((M - 1) * TAU)  # (s_ij - s_ii) / tau at the aligned simplex
DOUBLE = torch.float64

# Koromilas et al. 2024: the InfoNCE family shares its minimisers; at the aligned simplex each has this value.
AT_THE_SIMPLEX = {
    "info_nce": (lambda x: F.info_nce(x, x, temperature=TAU), math.log1p((M - 1) * math.exp(Q))),
    "clip": (lambda x: F.clip(x, x, logit_scale=1 / TAU), math.log1p((M - 1) * math.exp(Q))),
    "nt_xent": (lambda x: F.nt_xent(x, x, temperature=TAU), math.log1p(2 * (M - 1) * math.exp(Q))),
    "dcl": (lambda x: F.dcl(x, x, temperature=TAU), math.log(2 * (M - 1)) + Q),
    "dhel-joint": (
        lambda x: F.dhel(x, x, temperature=TAU),
        2 * math.log(M - 1) - 1 / TAU - 2 / ((M - 1) * TAU),
    ),
    "dhel-anchor": (lambda x: F.dhel(x, x, temperature=TAU, form="anchor"), math.log(M - 1) + Q),
    "dhel-symmetric": (lambda x: F.dhel(x, x, temperature=TAU, form="symmetric"), math.log(M - 1) + Q),
    "kcl-gaussian": (lambda x: F.kcl(x, x, t=2.0, gamma=16.0), -2 + 2 * 16 * math.exp(-2 * 2 * M / (M - 1))),
    "uniformity": (lambda x: F.uniformity(x, t=2.0), -2 * 2 * M / (M - 1)),
    "spread_out": (F.spread_out, 1 / (M - 1) ** 2),  # the second moment is below 1 / d
    "spectral": (lambda x: F.spectral(x, x, mu=2.0), (-2 + 1 / (M - 1) ** 2) / 2.0),
    "siglip": (
        lambda x: F.siglip(x, x, logit_scale=1 / TAU, logit_bias=-1.0),
        (M - 1) * math.log1p(math.exp(-1 / ((M - 1) * TAU) - 1)) + math.log1p(math.exp(1 - 1 / TAU)),
    ),
}


@pytest.mark.parametrize("name", AT_THE_SIMPLEX)
def test_value_at_the_aligned_simplex(name: str) -> None:
    value, expected = AT_THE_SIMPLEX[name]
    close(value(simplex(M)), torch.tensor(expected, dtype=DOUBLE), rtol=1e-12)


@pytest.mark.parametrize("name", AT_THE_SIMPLEX)
def test_the_aligned_simplex_is_stationary(name: str) -> None:
    """Along the sphere: a gradient that is not 0 there would move a minimiser."""
    x = simplex(M).requires_grad_()
    (g,) = gradients(AT_THE_SIMPLEX[name][0](x), [x])
    along = g - (g * x).sum(1, keepdim=True) * x
    assert float(along.detach().abs().max()) < 1e-12


def test_kcl_at_the_cross_polytope() -> None:
    """Koromilas et al. 2024: another minimiser. Each row has 2d - 2 rows at d^2 = 2 and one at 4."""
    d, t, gamma = 4, 1.5, 3.0
    x = cross_polytope(d)
    energy = ((2 * d - 2) * math.exp(-2 * t) + math.exp(-4 * t)) / (2 * d - 1)
    close(F.kcl(x, x, t=t, gamma=gamma), torch.tensor(-2 + 2 * gamma * energy, dtype=DOUBLE), rtol=1e-12)


# ---- f-MICL ----------------------------------------------------------------------------------------------------------

ORDERS = {"tsallis": 1.5}
SATISFYING = ("kl", "js", "pearson", "sh", "tsallis", "vlc", "jeffrey")


def order(name: str) -> dict[str, float]:
    return {"q": ORDERS[name]} if name in ORDERS else {}


def negatives(name: str, x: Tensor, **arguments: float) -> float:
    """The mean of psi over the pairs of x."""
    return float(F.f_micl(x, x, divergence=name, return_terms=True, **order(name), **arguments).negative)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("mu", [0.5, 1.0, 1.7])
def test_psi_is_the_composition_of_the_tables_own_columns(name: str, mu: float) -> None:
    """psi = f* o f' = u f' - f; for Tsallis f as printed. The paper's printed VLC composition would fail here."""
    q = ORDERS.get(name, math.nan)
    for u in torch.linspace(0.05, 1.0, 9, dtype=DOUBLE) * mu:
        u.requires_grad_()
        slope, psi = (part(u, q) for part in DIVERGENCES[name])
        (derivative,) = torch.autograd.grad(GENERATORS[name](u, q), u)
        close(slope, derivative, rtol=1e-12)
        close(psi, u * slope - GENERATORS[name](u, q), torch.ones(()), rtol=1e-12)
        if name in CONJUGATES:
            close(psi, CONJUGATES[name](slope, q), torch.ones(()), rtol=1e-10)


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("beta", "mu"), [(1.0, 1.0), (0.5, 1.5), (20.0, 1.0)])
def test_f_micl_at_the_simplex(name: str, beta: float, mu: float, backend: str) -> None:
    """d^2 = 2N / (N - 1) for every pair, 0 for the positives."""
    x, q = simplex(M), ORDERS.get(name, math.nan)
    loss, positive, negative = F.f_micl(
        x, x, divergence=name, beta=beta, mu=mu, alpha=3.0, return_terms=True, backend=backend, **order(name)
    )
    f_prime, psi = DIVERGENCES[name]
    apart = torch.tensor(mu * math.exp(-2 * beta * M / (M - 1)), dtype=DOUBLE)
    close(positive, f_prime(torch.tensor(mu, dtype=DOUBLE), q), torch.ones(()), rtol=1e-12)
    close(negative, psi(apart, q), torch.ones(()), rtol=1e-12)
    close(loss, 3.0 * negative - positive, rtol=1e-12)


@pytest.mark.parametrize("name", SATISFYING)
def test_the_simplex_minimises_satisfying_divergences(name: str) -> None:
    """Lu et al. 2023: where psi(G(t)) is strictly convex, the centred regular simplex has the least energy."""
    least = negatives(name, simplex(M))
    generator = torch.Generator().manual_seed(1)
    for distance in (0.05, 0.3, 1.0):
        other = simplex(M) + distance * torch.randn(M, M, generator=generator, dtype=DOUBLE)
        assert negatives(name, other) > least
    assert negatives(name, two_clusters(M + 1, M + 1)) > negatives(name, simplex(M + 1))


def test_reverse_kl_does_not_tell_centred_configurations_apart() -> None:
    """Its psi(G(t)) is linear: every centred configuration is a minimiser, collapsed ones too, as the paper predicts."""
    for m in (6, 8):
        values = [negatives("rkl", x) for x in (simplex(m), cross_polytope(m // 2), two_clusters(m, m))]
        assert max(values) - min(values) < 1e-12


def test_neyman_prefers_collapse() -> None:
    """Its psi(G(t)) is concave: two antipodal clusters have less energy than the simplex."""
    assert negatives("neyman", two_clusters(8, 8)) < negatives("neyman", simplex(8))


def test_kl_at_the_best_weight_is_the_donsker_varadhan_form() -> None:
    """grad f_micl(kl, alpha = 1 / mean u) = grad f_micl_dv: v is approximated by alpha."""
    rows = [x.requires_grad_() for x in two_views(9, 4)]
    _, _, mean = F.f_micl(*rows, divergence="kl", return_terms=True)
    by_weight = gradients(F.f_micl(*rows, divergence="kl", alpha=1.0 / float(mean.detach())), rows)
    for got, want in zip(gradients(F.f_micl_dv(*rows), rows), by_weight, strict=True):
        close(got, want, rtol=1e-12)


def test_donsker_varadhan_is_alignment_and_uniformity() -> None:
    x, y = two_views(9, 4)
    close(F.f_micl_dv(x, y, beta=1.5), 1.5 * F.alignment(x, y) + F.uniformity(x, t=1.5), rtol=1e-12)


def test_pearson_with_cosines_is_a_mean_of_squares() -> None:
    """f*(s) = s^2/4 + s: the spectral loss in other coordinates."""
    x, y = (z / z.norm(dim=1, keepdim=True) for z in two_views(9, 4))
    terms = F.f_micl(x, y, divergence="pearson", similarity="cosine", negatives="xy", return_terms=True)
    s = x @ y.T
    others = s[~torch.eye(9, dtype=torch.bool)]
    close(terms.positive, s.diag().mean(), rtol=1e-12)
    close(terms.negative, (others.square() / 4 + others).mean(), rtol=1e-12)


@pytest.mark.parametrize("backend", served(torch.float32))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_drowning_weight_leaves_terms_and_gradients_exact(name: str, backend: str) -> None:
    """alpha = 409600 and beta = 20, the paper's for text: the positive is lost in the float32 scalar, not in its terms."""
    rows = [x / x.norm(dim=1, keepdim=True) for x in two_views(40, 8)]
    found = []
    for dtype in (torch.float32, DOUBLE):
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        terms = F.f_micl(
            *leaves, divergence=name, beta=20.0, alpha=409600.0, return_terms=True, normalize=False,
            backend=backend if dtype == torch.float32 else "reference", **order(name),
        )  # fmt: skip
        found.append((terms, gradients(terms.loss, leaves)))
    (terms, got), (truth, want) = found
    # 20 |x - y|^2 up to 80 in an exponent: its rounding is 80 eps of the value.
    for part in ("positive", "negative"):
        torch.testing.assert_close(
            getattr(terms, part).double(), getattr(truth, part), rtol=80 * 2.0**-23, atol=4 * 2.0**-23
        )
    for a, b in zip(got, want, strict=True):
        close(a, b, rtol=80 * 2.0**-23)


@pytest.mark.parametrize(
    ("name", "slope"), [("pearson", 2.0), ("sh", 0.5), ("neyman", 2.0), ("jeffrey", 2.0), ("js", 0.5), ("vlc", 1.0)]
)
def test_the_critic_of_close_positives_keeps_its_digits(name: str, slope: float) -> None:
    """f'(u) ~ -slope * beta d^2 near u = 1: at d^2 ~ 1e-6 the difference u - 1 itself has lost its digits in float32."""
    x = two_views(9, 4)[0]
    y = x + 1e-3 * two_views(9, 4, seed=2)[0]
    x, y = x.float(), y.float()
    d2 = (x.double() - y.double()).square().sum(1)
    positive = F.f_micl(x, y, divergence=name, normalize=False, reduction="none", return_terms=True).positive
    torch.testing.assert_close(positive.double(), -slope * d2, rtol=3e-5, atol=0.0)


# ---- relations between objectives --------------------------------------------------------------------------------------


def test_clip_is_the_mean_of_both_directions() -> None:
    x, y = two_views(9, 4)
    both = (F.info_nce(x, y, temperature=0.1) + F.info_nce(y, x, temperature=0.1)) / 2
    close(F.clip(x, y, logit_scale=10.0), both, rtol=1e-12)


def test_info_nce_of_extra_rows_is_a_longer_softmax() -> None:
    x, y = two_views(9, 4)
    extra = two_views(5, 4, seed=3)[0]
    logits = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(torch.cat([y, extra])).T / 0.2
    want = torch.nn.functional.cross_entropy(logits, torch.arange(9))
    close(F.info_nce(x, torch.cat([y, extra]), temperature=0.2), want, rtol=1e-12)


def test_align_uniform_is_its_parts() -> None:
    x, y = two_views(9, 4)
    want = F.alignment(x, y, alpha=3.0) + 0.7 * (F.uniformity(x, t=1.5) + F.uniformity(y, t=1.5)) / 2
    close(F.align_uniform(x, y, alpha=3.0, t=1.5, weight=0.7), want, rtol=1e-12)


def test_groups_of_single_rows_change_nothing() -> None:
    x, y = two_views(9, 4)
    alone = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for call in (
        lambda **k: F.info_nce(x, y, **k),
        lambda **k: F.clip(x, y, logit_scale=5.0, **k),
        lambda **k: F.nt_xent(x, y, **k),
        lambda **k: F.uniformity(x, **k),
        lambda **k: F.f_micl(x, y, divergence="js", **k),
    ):
        close(call(groups=alone), call(), rtol=1e-12)


def test_sup_con_of_pairs_is_nt_xent() -> None:
    u, v = two_views(9, 4)
    pairs = torch.arange(9).repeat(2)
    got = F.sup_con(torch.cat([u, v]), pairs, temperature=0.3, base_temperature=0.3)
    close(got, F.nt_xent(u, v, temperature=0.3), rtol=1e-12)


def test_debiasing_by_nothing_is_nt_xent() -> None:
    u, v = two_views(9, 4)
    close(F.debiased(u, v, tau_plus=0.0), F.nt_xent(u, v, temperature=0.5), rtol=1e-12)
    close(F.hard_negative(u, v, beta=0.0, tau_plus=0.2), F.debiased(u, v, tau_plus=0.2), rtol=1e-12)


def test_the_floor_of_the_debiased_negatives_trains_the_positive_alone() -> None:
    """Chuang et al. 2020: where the estimate falls below K e^{-1/tau}, no negative gets a gradient."""
    u = torch.eye(6, dtype=DOUBLE)
    rows = [u.clone().requires_grad_(), u.clone().requires_grad_()]
    tau, n = 0.1, 6
    value = F.debiased(*rows, temperature=tau, tau_plus=0.3)
    close(value, torch.tensor(math.log1p((2 * n - 2) * math.exp(-2 / tau)), dtype=DOUBLE), rtol=1e-9)
    g, _ = gradients(F.debiased(*rows, temperature=tau, tau_plus=0.3, normalize=False), rows)
    assert float((g - torch.diag(g.diag())).abs().max()) == 0.0
    assert (g.diag() < 0).all()


def test_moco_is_info_nce_against_its_queue() -> None:
    """One query: its key and the queue are the rows of a one-way InfoNCE."""
    q, k = two_views(1, 4)
    queue = two_views(7, 4, seed=3)[0]
    close(F.moco(q, k, queue, temperature=0.2), F.info_nce(q, torch.cat([k, queue]), temperature=0.2), rtol=1e-12)
    assert F.moco(q, k, queue[:0]) == 0


def test_moco_v3_is_two_directions_scaled_by_the_temperature() -> None:
    q1, q2, k1, k2 = (*two_views(9, 4), *two_views(9, 4, seed=5))
    want = 2 * 0.3 * (F.info_nce(q1, k2, temperature=0.3) + F.info_nce(q2, k1, temperature=0.3))
    close(F.moco_v3(q1, q2, k1, k2, temperature=0.3), want, rtol=1e-12)


def test_siglip_counts_positives_once() -> None:
    """softplus(-z) = softplus(z) - z: all pairs' softplus minus the diagonal's z."""
    x, y = two_views(9, 4)
    z = 5.0 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T - 2.0
    want = (torch.nn.functional.softplus(z).sum() - z.diag().sum()) / 9
    close(F.siglip(x, y, logit_scale=5.0, logit_bias=-2.0), want, rtol=1e-12)


def test_dclw_weights_have_mean_one() -> None:
    """Where all positives are equally aligned, DCLW is DCL."""
    u = two_views(9, 4)[0]
    close(F.dcl(u, u, sigma=0.5), F.dcl(u, u), rtol=1e-12)
