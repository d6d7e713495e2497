"""What becomes of the tokens that correlation-guided compression drops: they join the most similar token that stays, or are
lost, or every token takes in its neighbours.

The paper speaks of a weighted sum and no more; weights, neighbours and normalisation are readings of ours. `nearest` is convex
and keeps the scale of the features; `knn` is the rule of LLaVA-PruMerge, which does not divide.

Shapes: V views, m tokens of each at most, L feature rows of an image, M rows that stay, D width of the metric, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.errors import ConfigError
from vtok.methods.correlation_views import Layout
from vtok.ops.matching import unit
from vtok.reduction import Plan, apply_plan
from vtok.state import TokenState, at_least_fp32

AGGREGATIONS = ("nearest", "none", "knn")


def nearest_kept(metric: Tensor, kept: Tensor) -> Tensor:
    """The kept token of its view that each token is most similar to.

    Args:
        metric: [V, m, D], compared by cosine.
        kept: [V, m] bool.

    Returns:
        [V, m] int64, token numbers within the view; a kept token has its own.
    """
    found = []
    for one, stays in zip(unit(metric), kept):  # one m x m matrix at a time
        places = stays.nonzero()[:, 0]
        own = torch.arange(len(one), device=one.device)
        joined = places[(one @ one[places].T).argmax(-1)] if 0 < len(places) < len(own) else own
        found.append(torch.where(stays, own, joined))
    return torch.stack(found) if found else kept.long()


def feature_plan(
    layout: Layout, kept: Tensor, joins: Tensor | None = None, weight: Tensor | None = None, valid: Tensor | None = None
) -> Plan:
    """The plan for an image's feature rows, as one sequence: views of the whole page stay, a newline if its line keeps a token.

    Args:
        layout: of the features.
        kept: [V, m] bool from `select_tokens`.
        joins: [V, m] from `nearest_kept`; `None` = dropped tokens are lost.
        weight: [V, m] > 0, weight of every token in the mean; `None` = all alike.
        valid: [V, m] bool, tokens that may join another; `None` = all.

    Returns:
        Plan of one sequence of L rows.
    """
    kept = (kept | layout.is_global[:, None]) & layout.valid
    stays = torch.zeros(layout.length, dtype=torch.bool, device=kept.device)
    stays[layout.rows[kept]] = True
    if layout.packing is not None:
        height, width = layout.packing.size
        if height:
            lines = stays[layout.packing.side**2 :].view(height, width + 1)
            lines[:, -1] = lines[:, :-1].any(-1)
        else:
            stays[-1] = True
    keep = stays.nonzero().T
    if joins is None:
        return Plan(keep)
    gone = ~kept & layout.valid
    if valid is not None:
        gone = gone & valid
    place = stays.cumsum(0) - 1
    dst = place[layout.rows.gather(1, joins)[gone]]
    share = torch.ones_like(joins, dtype=torch.float32) if weight is None else at_least_fp32(weight).clamp_min(1e-30)
    return Plan(keep, layout.rows[gone][None], dst[None], (share / share.gather(1, joins))[gone][None], use_size=False)


def knn_features(x: Tensor, metric: Tensor, weight: Tensor, k: int = 32, valid: Tensor | None = None) -> Tensor:
    """Every token plus the weighted sum of the k tokens of its view that are most similar to it, kept or not.

    Args:
        x: [V, m, C].
        metric: [V, m, D], compared by cosine.
        weight: [V, m], weight of a token wherever it is a neighbour.
        k: neighbours, at most all others (LLaVA-PruMerge: 32).
        valid: [V, m] bool, tokens that may be neighbours; `None` = all.

    Returns:
        [V, m, C].
    """
    if k < 1:
        raise ConfigError(f"k counts neighbours and starts at 1, got {k}")
    out, weight = at_least_fp32(x), at_least_fp32(weight)
    if valid is not None:
        weight = weight * valid
    found = []
    for view, one in enumerate(unit(metric)):
        cosine = one @ one.T
        if valid is not None:
            cosine.masked_fill_(~valid[view], -2)
        cosine.fill_diagonal_(float("-inf"))
        near = cosine.argsort(dim=-1, descending=True, stable=True)[:, : min(k, len(one) - 1)]
        mixing = torch.zeros_like(cosine).scatter(-1, near, weight[view][near].to(cosine.dtype))
        found.append(out[view] + mixing.to(out.dtype) @ out[view])
    return torch.stack(found).to(x.dtype) if found else x


def compress_features(
    x: Tensor,
    layout: Layout,
    kept: Tensor,
    metric: Tensor,
    weight: Tensor,
    aggregation: str = "nearest",
    k: int = 32,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Drops the rows of an image's features that were not chosen.

    Args:
        x: [L, C] features of the image, as the model packs them.
        layout: of these features.
        kept: [V, m] bool from `select_tokens`.
        metric: [V, m, D] from `feature_metric`.
        weight: [V, m] attention at the low block (`TokenScores.low`).
        aggregation: `"nearest"`: a dropped token joins the most similar kept one, as a mean weighted by `weight`; `"none"`: it
            is lost; `"knn"`: see `knn_features`.
        k: neighbours under `"knn"`.
        valid: [V, m] bool (`TokenScores.valid`).

    Returns:
        (features [M, C], the rows [M] of `x` that stay). Rows of the whole page are copied bit for bit.

    Raises:
        ConfigError: unknown aggregation, or features that do not fit the layout.
    """
    if aggregation not in AGGREGATIONS:
        raise ConfigError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if len(x) != layout.length:
        raise ConfigError(f"the layout has {layout.length} feature rows, the features {len(x)}; build it for this image")
    joins = None
    if aggregation == "nearest":
        joins = nearest_kept(metric, (kept | layout.is_global[:, None]) & layout.valid)
    elif aggregation == "knn":
        real = layout.valid if valid is None else valid & layout.valid
        crops = ~layout.is_global
        here = real[crops]
        changed = knn_features(x[layout.rows[crops]], metric[crops], weight[crops], k, here)
        x = x.index_copy(0, layout.rows[crops][here], changed[here])
    plan = feature_plan(layout, kept, joins, weight, valid)
    out, _ = apply_plan(x[None], TokenState(0, layout.length), plan)
    return out[0], plan.keep[0]
