"""Values of the papers' own codes (independent float64 evaluations where none is public), with their inputs.

`reference_values.json` is data: how its inputs are made, and which repository and commit gave each
number, is written in it. `records()` turns it into one list of Record, in the names of fastcl.functional,
which the oracles and the library both have to meet.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("reference_values.json")

Fact = Callable[[list[Tensor]], Tensor]
Functions = Any  # tests.oracle or fastcl.functional: the same names, the same arguments
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Record:
    """One recorded evaluation.

    name: a unique id. objective: the function's name. inputs: the rows, float64. arguments: its keyword
    arguments. value: the recorded loss. facts: what was recorded of the gradients to the inputs. public:
    False where the recorded form is the oracle's alone. evaluate: how the value follows from the
    functions where it is not one call. noise: the rounding error of the recorded evaluation itself,
    absolute.
    """

    name: str
    objective: str
    inputs: tuple[Tensor, ...]
    arguments: dict[str, Any]
    value: float
    facts: tuple[tuple[str, Fact, Any], ...] = ()
    public: bool = True
    evaluate: Callable[..., Tensor] | None = None
    noise: float = EPS

    def __call__(self, functions: Functions, *inputs: Tensor, **extra: Any) -> Tensor:
        """The objective of `functions` at `inputs` with the recorded arguments."""
        if self.evaluate is not None:
            return self.evaluate(functions, *inputs, **self.arguments, **extra)
        return getattr(functions, self.objective)(*inputs, **self.arguments, **extra)

    def check(self, functions: Functions, rtol: float = 1e-9, **extra: Any) -> None:
        """Assert that the value and the gradients of `functions` are the recorded ones."""
        inputs = [x.clone().requires_grad_() for x in self.inputs]
        value = self(functions, *inputs, **extra)
        recorded = torch.tensor(self.value, dtype=value.dtype)
        torch.testing.assert_close(value.detach(), recorded, rtol=rtol, atol=16 * self.noise)
        if not self.facts:
            return
        grads = torch.autograd.grad(value, inputs, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]
        # A component is only as exact as the matrix it comes from.
        atol = rtol * max(float(g.abs().max()) for g in gradients) + self.noise
        for what, fact, want in self.facts:
            got = fact(gradients)
            torch.testing.assert_close(
                got,
                torch.tensor(want, dtype=got.dtype),
                rtol=rtol,
                atol=atol,
                msg=lambda m, w=what: f"{w}: {m}",
            )


def rows(n: int, d: int, seed: int, mode: str) -> tuple[Tensor, Tensor]:
    """u and v (n, d) float64 as the file's "inputs" line says: mode raw, unit, paired (raw) or indep."""
    g = torch.Generator("cpu").manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=torch.float64)
    e = torch.randn(n, d, generator=g, dtype=torch.float64)
    u, v = a, (e if mode == "indep" else a + 0.5 * e)
    if mode == "unit":
        u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    return u, v


def _norm(k: int) -> Fact:
    return lambda gradients: gradients[k].norm()


def _head(k: int) -> Fact:
    return lambda gradients: gradients[k][0, :3]


def _tail(k: int) -> Fact:
    return lambda gradients: gradients[k][-1, -3:]


# The recorded names of related losses: objective, the arguments that the name or its source fixes, whether
# the code normalises.
_RELATED: list[tuple[str, str, Callable[[re.Match[str]], dict[str, Any]]]] = [
    (r"scl_haochen_mu([\d.]+)_\w+", "spectral", lambda m: {"mu": float(m[1])}),
    (
        r"dcl_oneway_tau([\d.]+)",
        "dcl",
        lambda m: {"temperature": float(m[1]), "symmetric": False, "normalize": False},
    ),
    (
        r"dclw_oneway_tau([\d.]+)_sig([\d.]+)",
        "dcl",
        lambda m: {
            "temperature": float(m[1]),
            "sigma": float(m[2]),
            "detach_weight": False,
            "symmetric": False,
            "normalize": False,
        },
    ),
    (r"dcl_sym_tau([\d.]+)", "dcl", lambda m: {"temperature": float(m[1])}),
    (
        r"dclw_sym_tau([\d.]+)_sig([\d.]+)",
        "dcl",
        lambda m: {"temperature": float(m[1]), "sigma": float(m[2])},
    ),
    (r"ntxent_tau([\d.]+)", "nt_xent", lambda m: {"temperature": float(m[1]), "normalize": False}),
    (r"simclr_easy_tau([\d.]+)", "nt_xent", lambda m: {"temperature": float(m[1]), "normalize": False}),
    (
        r"supcon_tau([\d.]+)_base_tau",
        "sup_con",
        lambda m: {"temperature": float(m[1]), "base_temperature": float(m[1]), "normalize": False},
    ),
    (
        r"supcon_(?:one_)?tau([\d.]+)_base([\d.]+)",
        "sup_con",
        lambda m: {"temperature": float(m[1]), "base_temperature": float(m[2]), "normalize": False},
    ),
    (
        r"clip_scale([\d.]+)",
        "clip",
        lambda m: {"logit_scale": {"14.2857": 1 / 0.07, "100": 100.0}[m[1]], "normalize": False},
    ),
    (
        r"siglip_t([\d.]+)_b(-[\d.]+)",
        "siglip",
        lambda m: {"logit_scale": float(m[1]), "logit_bias": float(m[2]), "normalize": False},
    ),
    (r"align_a([\d.]+)", "alignment", lambda m: {"alpha": float(m[1]), "normalize": False}),
    (r"uniform_t([\d.]+)_mean_views", "uniformity", lambda m: {"t": float(m[1]), "normalize": False}),
    (
        r"hcl_tau([\d.]+)_tp([\d.]+)_beta0\.0",
        "debiased",
        lambda m: {"temperature": float(m[1]), "tau_plus": float(m[2]), "normalize": False},
    ),
    (
        r"hcl_tau([\d.]+)_tp([\d.]+)_beta([\d.]+)",
        "hard_negative",
        lambda m: {
            "temperature": float(m[1]),
            "tau_plus": float(m[2]),
            "beta": float(m[3]),
            "normalize": False,
        },
    ),
]


def _mean_uniformity(functions: Functions, u: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return (functions.uniformity(u, **arguments) + functions.uniformity(v, **arguments)) / 2


def _related(data: dict[str, Any]) -> Iterator[Record]:
    for r in data["related"]:
        objective, arguments = next(
            (objective, make(match))
            for pattern, objective, make in _RELATED
            if (match := re.fullmatch(pattern, r["name"]))
        )
        inputs = rows(r["N"], r["D"], r["seed"], r["mode"])
        facts: list[tuple[str, Fact, Any]] = []
        for k, view in enumerate("uv"):
            facts += [
                ("grad_norm", _norm(k), r[f"grad_norm_{view}"]),
                ("grad", _head(k), r[f"grad_{view}_0_3"]),
            ]
        keys: dict[str, Any] = {}
        if objective == "sup_con":
            # The code takes both views at once; so does the function, concatenated.
            n = r["N"]
            arguments["labels"] = torch.arange(2 * n) % n % 4
            if "_one_" in r["name"]:
                keys = {"public": False}
                arguments["anchors"] = n
            facts = [(what, lambda g, f=f, n=n: f([g[0][:n], g[0][n:]]), want) for what, f, want in facts]
            yield Record(
                f"{r['name']}-{r['N']}",
                objective,
                (torch.cat(inputs),),
                arguments,
                r["loss"],
                tuple(facts),
                **keys,
            )
            continue
        if objective == "uniformity":
            keys = {"evaluate": _mean_uniformity}
        if objective == "clip":
            # open_clip keeps the positive inside its softmax, so its logits' rounding stays in the small
            # differences.
            keys = {"noise": arguments["logit_scale"] * EPS}
        yield Record(f"{r['name']}-{r['N']}", objective, inputs, arguments, r["loss"], tuple(facts), **keys)


def _dhel_kcl(data: dict[str, Any]) -> Iterator[Record]:
    for r in data["dhel_kcl"]:
        a = dict(r["args"])
        if r["loss_fn"] == "DHEL":
            objective = "dhel"
            arguments = {"temperature": a["tau"], "form": "joint" if a["include_augs"] else "anchor"}
        else:
            objective, arguments = "kcl", a
        facts = (
            ("grad_norm_anchor", _norm(0), r["grad_norm_anchor"]),
            ("grad_norm_pos", _norm(1), r["grad_norm_pos"]),
            ("grad_anchor_0_3", _head(0), r["grad_anchor_0_3"]),
            ("grad_pos_last_3", _tail(1), r["grad_pos_last_3"]),
        )
        label = "-".join(str(value) for value in arguments.values())
        name = f"{objective}-{label}-{r['mode']}-{r['N']}"
        yield Record(name, objective, rows(r["N"], r["D"], r["seed"], r["mode"]), arguments, r["loss"], facts)


def _f_micl(data: dict[str, Any]) -> Iterator[Record]:
    for block in data["f_micl"]:
        raw = rows(block["N"], block["D"], block["seed"], block["kind"])
        unit = tuple(x / x.norm(dim=1, keepdim=True) for x in raw)
        for r in block["cases"]:
            divergence, q = re.fullmatch(r"([a-z]+)([\d.]*)", r["div"]).groups()  # type: ignore[union-attr]
            arguments = {
                "divergence": divergence,
                "beta": r["beta"],
                "alpha": r["alpha"],
                "mu": r["mu"],
                "negatives": r["pairs"],
            }
            arguments |= {"q": float(q)} if q else {}
            # Recorded as f* of f', which for Pearson cancels: alpha ulps of 1 stay in its gradient (4e-11 at
            # alpha = 409600).
            noise = r["alpha"] * EPS
            name = f"f_micl-{r['div']}-{r['beta']:g}-{r['alpha']:g}-{r['pairs']}-{block['kind']}-{block['N']}"
            raw_facts = (("gnorm_rawx", _norm(0), r["gnorm_rawx"]), ("gnorm_rawy", _norm(1), r["gnorm_rawy"]))
            unit_facts = (
                ("gnorm_x", _norm(0), r["gnorm_x"]),
                ("gnorm_y", _norm(1), r["gnorm_y"]),
                ("gx00", lambda g: g[0][0, 0], r["gx00"]),
            )
            yield Record(name, "f_micl", raw, arguments, r["loss"], raw_facts, noise=noise)
            yield Record(
                f"{name}-rows",
                "f_micl",
                unit,
                arguments | {"normalize": False},
                r["loss"],
                unit_facts,
                noise=noise,
            )


def _pooled_spectral(functions: Functions, u: Tensor, v: Tensor) -> Tensor:
    """-2 mean <u_i, v_i> + ||Lambda||_F^2 (pooled over both views), which is no public objective."""
    aligned = sum(((a * b).sum() for a, b in zip(u, v, strict=True)), u.new_zeros(())) / len(u)
    return -2 * aligned + (functions.second_moment(u, v) ** 2).sum()


def _unclipped(functions: Functions, u: Tensor, v: Tensor, *, estimator: str, **extra: Any) -> Tensor:
    """The spectral loss without clipping and without 1/mu: mu so large that no row is clipped, times mu."""
    wide = 2.0**20
    return wide * functions.spectral(u, v, mu=wide, estimator=estimator, **extra)


def _minc(data: dict[str, Any]) -> Iterator[Record]:
    for block in data["minc"]:
        u, v = rows(block["N"], block["D"], block["seed"], block["mode"])
        batch = (u.T @ u + v.T @ v) / (2 * len(u))
        averaged = 0.8 * torch.eye(block["D"], dtype=torch.float64) / block["D"] + 0.2 * batch
        for key, r in block.items():
            if not isinstance(r, dict):
                continue
            name = f"{key}-{block['mode']}-{block['N']}"
            facts = (("gu", _norm(0), r["gu"]), ("gv", _norm(1), r["gv"]), ("gu_0_3", _head(0), r["gu_0_3"]))
            if key.startswith("fmi_alpha"):
                arguments = {"alpha": float(key.removeprefix("fmi_alpha").split("_")[0]), "eps": 1e-3}
                yield Record(name, "f_mi_alpha", (u, v), arguments, r["loss"], facts)
            elif key.startswith("minc"):
                statistic = averaged if "ema" in key else batch
                arguments = {"statistic": statistic, "gha": key.endswith("gha")}
                yield Record(name, "minc", (u, v), arguments, r["surrogate"], facts)
                arguments = {"statistic": statistic}
                yield Record(f"{name}-value", "minc_value", (u, v), arguments, r["value"], public=False)
            elif key == "scl_pooled":
                yield Record(name, "spectral", (u, v), {}, r["loss"], facts, public=False, evaluate=_pooled_spectral)
            else:
                arguments = {"estimator": key.removeprefix("scl_")}
                yield Record(name, "spectral", (u, v), arguments, r["loss"], facts, evaluate=_unclipped)


@functools.cache
def records() -> tuple[Record, ...]:
    """Every recorded evaluation."""
    data = json.loads(FILE.read_text())
    return (*_related(data), *_dhel_kcl(data), *_f_micl(data), *_minc(data))
