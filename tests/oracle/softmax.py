"""The softmax and sigmoid families."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pairwise import Keep, _softplus, add, dot, lse, negatives, reduced, unit

Groups = Sequence[int] | None


def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: Tensor | float = 0.07,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
    pairs: int | None = None,
    label_smoothing: float = 0.0,
    positives: Sequence[Tensor] | None = None,
) -> Tensor:
    """LSE_j x_i.y_j / tau - x_i.y_i / tau (van den Oord et al. 2018, eq. 4).

    Rows of y beyond the number of x are negatives only. `pairs`: only the first so many rows of x. `positives`: the target of
    a row is spread over its pairs by their weights; `label_smoothing`: a share of it evenly over all.
    """
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    keep = negatives(groups)
    rows = []
    if positives is not None:
        logits = [[dot(a, b) / temperature for b in y] for a in x]
        return _of_pairs(logits, positives, label_smoothing, reduction, x)
    for i in range(len(x) if pairs is None else pairs):
        logits = {j: dot(x[i], y[j]) / temperature for j in range(len(y)) if j == i or keep(i, j)}
        spread = add(list(logits.values()), x) / len(logits)
        aligned = (1 - label_smoothing) * logits[i] + label_smoothing * spread
        rows.append(lse(list(logits.values()), x) - aligned)
    return reduced(rows, reduction)


def weights_of(positives: Sequence[Tensor]) -> dict[int, dict[int, float]]:
    """{row: {column: weight}}; the weights of a pair that is listed twice add up."""
    weights = positives[2].tolist() if len(positives) > 2 else [1.0] * len(positives[0])
    found: dict[int, dict[int, float]] = {}
    for i, j, w in zip(positives[0].tolist(), positives[1].tolist(), weights, strict=True):
        row = found.setdefault(i, {})
        row[j] = row.get(j, 0.0) + w
    return found


def _of_pairs(
    logits: Sequence[Sequence[Tensor]], positives: Sequence[Tensor], smoothing: float, reduction: str, like: Tensor
) -> Tensor:
    """Cross entropy of each row with its weights as target; 0 in a row without, which the mean does not count."""
    weights, rows, counted = weights_of(positives), [], 0
    for i, row in enumerate(logits):
        total = sum(weights.get(i, {}).values())
        if total == 0:
            rows.append(like.new_zeros(()))
            continue
        counted += 1
        aligned = add([w / total * row[j] for j, w in weights[i].items()], like)
        visited = [z for z in row if z is not None]
        spread = add(visited, like) / len(visited)
        rows.append(lse(visited, like) - (1 - smoothing) * aligned - smoothing * spread)
    return reduced(rows, reduction) if reduction != "mean" else add(rows, like) / max(counted, 1)


def clip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Tensor | float,
    pairs: int | None = None,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    positives: Sequence[Tensor] | None = None,
) -> Tensor:
    """Half the sum of row and column cross entropy of the rows that match (Radford et al. 2021, figure 3)."""
    way = {"temperature": 1 / logit_scale, "normalize": normalize, "groups": groups, "reduction": "none"}
    way |= {"pairs": min(len(x), len(y)) if pairs is None else pairs, "label_smoothing": label_smoothing}
    if positives is not None:
        way["reduction"], exchanged = reduction, (positives[1], positives[0], *positives[2:])
        parts = [
            info_nce(x, y, **way, positives=positives) / 2,  # type: ignore[arg-type]
            info_nce(y, x, **way, positives=exchanged) / 2,  # type: ignore[arg-type]
        ]
        return torch.cat(parts) if reduction == "none" else parts[0] + parts[1]
    rows = (info_nce(x, y, **way) + info_nce(y, x, **way)) / 2  # type: ignore[arg-type]
    return reduced(list(rows), reduction)


def _two_views(u: Tensor, v: Tensor, normalize: bool, groups: Groups) -> tuple[Tensor, list[int], Keep]:
    """z = [u; v], each row's partner, and which pairs are neither self nor, with groups, of one group."""
    z, n = torch.cat([u, v]), len(u)
    z = unit(z) if normalize else z
    partner = [*range(n, 2 * n), *range(n)]
    if groups is None:
        return z, partner, lambda i, j: i != j
    return z, partner, lambda i, j: i != j and (j == partner[i] or int(groups[i % n]) != int(groups[j % n]))


def nt_xent(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Tensor | float = 0.5,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
    positives: Sequence[Tensor] | None = None,
) -> Tensor:
    """LSE_{k != i} z_i.z_k / tau - z_i.z_p(i) / tau over the 2n rows of [u; v] (Chen et al. 2020, eq. 1)."""
    z, partner, keep = _two_views(u, v, normalize, groups)
    if positives is not None:
        logits = [[None if i == k else dot(z[i], z[k]) / temperature for k in range(len(z))] for i in range(len(z))]
        return _of_pairs(logits, positives, 0.0, reduction, z)  # type: ignore[arg-type]
    rows = []
    for i in range(len(z)):
        logits = {k: dot(z[i], z[k]) / temperature for k in range(len(z)) if keep(i, k)}
        rows.append(lse(list(logits.values()), z) - logits[partner[i]])
    return reduced(rows, reduction)


def moco(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: Tensor | float = 0.2,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of [q.k+, q.Q] / tau with label 0 (He et al. 2020, eq. 1); no gradient to k and queue."""
    k, queue = k.detach(), queue.detach()
    if normalize:
        q, k, queue = unit(q), unit(k), unit(queue) if len(queue) else queue
    rows = []
    for i in range(len(q)):
        positive = dot(q[i], k[i]) / temperature
        rows.append(lse([positive, *(dot(q[i], key) / temperature for key in queue)], q) - positive)
    return reduced(rows, reduction)


def moco_v3(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    *,
    temperature: Tensor | float = 0.2,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """2 tau [ctr(q1, k2) + ctr(q2, k1)] (Chen et al. 2021, algorithm 1); keys carry no gradient."""
    way = {"temperature": temperature, "normalize": normalize, "groups": groups, "reduction": "none"}
    rows = info_nce(q1, k2.detach(), **way) + info_nce(q2, k1.detach(), **way)  # type: ignore[arg-type]
    return reduced(list(2 * temperature * rows), reduction)


def dcl(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Tensor | float = 0.1,
    sigma: float | None = None,
    detach_weight: bool = True,
    symmetric: bool = True,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-w_i u_i.v_i / tau + LSE over {u_i.u_j, u_i.v_j : j != i} / tau (Yeh et al. 2022, eq. 6 and 7).

    DCLW: w_i = 2 - n softmax_i(u_i.v_i / sigma) over the batch. Symmetric: the mean with u and v exchanged.
    """
    u, v = (unit(u), unit(v)) if normalize else (u, v)
    n, keep = len(u), negatives(groups)
    weight = [u.new_ones(()) for _ in range(n)]
    if sigma is not None:
        aligned = [dot(u[i], v[i]) / sigma for i in range(n)]
        weight = [2 - n * torch.exp(a - lse(aligned, u)) for a in aligned]
        weight = [w.detach() for w in weight] if detach_weight else weight
    rows = []
    for i in range(n):
        others = [j for j in range(n) if keep(i, j)]
        one_way = []
        for a, b in ((u, v), (v, u)) if symmetric else ((u, v),):
            energy = lse([dot(a[i], c[j]) / temperature for j in others for c in (a, b)], u)
            one_way.append(energy - weight[i] * dot(u[i], v[i]) / temperature)
        rows.append(sum(one_way[1:], one_way[0]) / len(one_way))
    return reduced(rows, reduction)


def dhel(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Tensor | float = 0.3,
    form: str = "joint",
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-u_i.v_i / tau + same-view energies (Koromilas et al. 2024), of both views or one."""
    u, v = (unit(u), unit(v)) if normalize else (u, v)
    keep = negatives(groups)
    weight_u, weight_v = {"joint": (1.0, 1.0), "anchor": (1.0, 0.0), "symmetric": (0.5, 0.5)}[form]
    rows = []
    for i in range(len(u)):
        others = [j for j in range(len(u)) if keep(i, j)]
        row = -dot(u[i], v[i]) / temperature
        row = row + weight_u * lse([dot(u[i], u[j]) / temperature for j in others], u)
        if weight_v:
            row = row + weight_v * lse([dot(v[i], v[j]) / temperature for j in others], u)
        rows.append(row)
    return reduced(rows, reduction)


def sup_con(
    z: Tensor,
    labels: Sequence[int],
    *,
    temperature: Tensor | float = 0.07,
    base_temperature: float = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    anchors: int | None = None,
) -> Tensor:
    """-(tau / base) mean_{p in P(i)} [z_i.z_p / tau - LSE_{a != i} z_i.z_a / tau] (Khosla et al. 2020).

    An anchor without positives gives 0 and counts. `anchors`: only the first so many rows (mode 'one').
    """
    z = unit(z) if normalize else z
    rows = []
    for i in range(len(z) if anchors is None else anchors):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if int(labels[p]) == int(labels[i])]
        if not positives:
            rows.append(z.new_zeros(()))
            continue
        normaliser = lse([dot(z[i], z[a]) / temperature for a in others], z)
        mean = add([dot(z[i], z[p]) / temperature - normaliser for p in positives], z) / len(positives)
        rows.append(-(temperature / base_temperature) * mean)
    return reduced(rows, reduction)


def siglip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
    positives: Sequence[Tensor] | None = None,
) -> Tensor:
    """sum_j softplus(-t_ij z_ij), t = 1 on the diagonal, -1 off it, z = scale s + bias (Zhai et al. 2023)."""
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    keep = negatives(groups)
    rows = []
    for i in range(len(x)):
        if positives is not None:
            z = [logit_scale * dot(x[i], b) + logit_bias for b in y]
            weights = weights_of(positives).get(i, {})
            terms = [weights[j] * _softplus(-z[j]) if j in weights else _softplus(z[j]) for j in range(len(y))]
            rows.append(add(terms, x))
            continue
        terms = [_softplus(-(logit_scale * dot(x[i], y[i]) + logit_bias))]
        terms += [_softplus(logit_scale * dot(x[i], y[j]) + logit_bias) for j in range(len(y)) if keep(i, j)]
        rows.append(add(terms, x))
    return reduced(rows, reduction)


def hard_negative(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Tensor | float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-log(e^p / (e^p + N_g)) over the 2n rows (Robinson et al. 2021, eq. 4).

    N = K sum_k w_k e^{s_k/tau} / sum_k w_k, w_k = e^{beta s_k/tau}, over the K negatives of both views;
    N_g = max((N - tau_plus K e^p) / (1 - tau_plus), K e^{-1/tau}). All carry a common factor e^{-shift}.
    """
    z, partner, keep = _two_views(u, v, normalize, groups)
    rows = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if keep(i, k) and k != partner[i]]
        p = dot(z[i], z[partner[i]]) / temperature
        s = [dot(z[i], z[k]) / temperature for k in others]
        shift = max(float(t.detach()) for t in [p, *s])
        if s:
            most = max(float(t.detach()) for t in s)  # of the weights' own, which a common factor leaves
            w = [torch.exp(beta * (t - most)) for t in s]
            hard = len(s) * add([wk * torch.exp(t - shift) for wk, t in zip(w, s, strict=True)], z) / add(w, z)
            corrected = (hard - tau_plus * len(s) * torch.exp(p - shift)) / (1 - tau_plus)
            floor = len(s) * torch.exp(torch.as_tensor(-1 / temperature - shift, dtype=z.dtype))
            negative = floor if corrected <= floor else corrected
        else:
            negative = z.new_zeros(())
        rows.append(torch.log(torch.exp(p - shift) + negative) - (p - shift))
    return reduced(rows, reduction)


def debiased(u: Tensor, v: Tensor, **settings: object) -> Tensor:
    """Hard negatives with beta = 0: N = sum_k e^{s_k/tau} (Chuang et al. 2020, eq. 8)."""
    return hard_negative(u, v, beta=0.0, **settings)  # type: ignore[arg-type]


def sincere(
    z: Tensor,
    labels: Sequence[int],
    *,
    temperature: Tensor | float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """mean_p -log e^{s_ip/tau} / (e^{s_ip/tau} + sum over other labels) (Feeney and Hughes 2023)."""
    z = unit(z) if normalize else z
    rows = []
    for i in range(len(z)):
        logits = [dot(z[i], z[j]) / temperature for j in range(len(z))]
        others = [logits[j] for j in range(len(z)) if int(labels[j]) != int(labels[i])]
        terms = [
            lse([logits[p], *others], z) - logits[p]
            for p in range(len(z))
            if p != i and int(labels[p]) == int(labels[i])
        ]
        rows.append(add(terms, z) / max(1, len(terms)))
    return reduced(rows, reduction)
