"""What becomes of the tokens that correlation-guided compression drops: they join the most similar token that stays, or are
lost, or every token takes in its neighbours.

The paper speaks of a weighted sum and no more; weights, neighbours and normalisation are our interpretation. `nearest` is
convex and keeps the scale of the features; `knn` is the rule of LLaVA-PruMerge, which does not divide.

Shapes: V views, m tokens of each at most, L feature rows of an image, M rows that stay, D width of the metric, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.core.reduction import Plan, apply_plan
from vtok.core.tokens import TokenState, at_least_fp32
from vtok.errors import ConfigError, shown
from vtok.methods.correlation.scores import cosines
from vtok.methods.correlation.views import all_images
from vtok.ops.crops import Layout
from vtok.ops.rows import rows_where

AGGREGATIONS = ("nearest", "none", "knn")


def nearest_kept(metric: Tensor, kept: Tensor) -> Tensor:
    """The kept token of its view that each token is most similar to.

    Args:
        metric: [V, m, D], compared by cosine.
        kept: [V, m] bool.

    Returns:
        [V, m] int64, token numbers within the view; a kept token, and any in a view that keeps none, has its own.
    """
    own = torch.arange(kept.shape[1], device=kept.device)
    found = [cosine.masked_fill_(~kept[views, None], -2).argmax(-1) for views, cosine in cosines(metric)]
    return torch.where(kept | ~kept.any(-1, keepdim=True), own, torch.cat(found))


def feature_plan(
    layout: Layout,
    kept: Tensor,
    joins: Tensor | None = None,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    whole: Tensor | None = None,
    near: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """The plan for images' feature rows: views of the whole page stay, a newline if its line keeps a token.

    Args:
        layout: of the features of one image.
        kept: [V, m] bool from `select_tokens`, of B images one after the other.
        joins: [V, m] from `nearest_kept`; `None` = dropped tokens are lost.
        weight: [V, m] > 0, weight of every token in the mean; `None` = all alike.
        valid: [V, m] bool, tokens that may join another; `None` = all.
        whole: [V] bool, views of the whole page; `None` = those of the layout, in every image.
        near: (token numbers within the view, weights) [V, m, K] from `neighbours`, which kept tokens take in.

    Returns:
        Plan of B sequences of L rows.
    """
    real = all_images(layout.valid, len(kept))
    whole = all_images(layout.is_global, len(kept)) if whole is None else whole
    kept = (kept | whole[:, None]) & real
    batch = len(kept) // len(layout.rows)
    rows = layout.rows.where(layout.valid, layout.length).flatten().expand(batch, -1)  # no token: column L

    def by_row(x: Tensor) -> Tensor:
        """[V, m, ...] -> [B, L, ...]."""
        x = x.reshape(*rows.shape, *x.shape[2:])
        out = x.new_zeros(batch, layout.length + 1, *x.shape[2:])
        place = rows.view(*rows.shape, *(1 for _ in x.shape[2:])).expand(x.shape)
        return out.scatter_(1, place, x)[:, : layout.length]

    stays = by_row(kept)
    if layout.packing is not None:
        height, width = layout.packing.size
        if height:
            lines = stays[:, layout.packing.side**2 :].unflatten(1, (height, width + 1))
            lines[..., -1] = lines[..., :-1].any(-1)
        else:
            stays[:, -1] = True
    goes = by_row(~kept & real if valid is None else ~kept & real & valid)
    left, gone = torch.stack([stays.sum(1), goes.sum(1)]).tolist()
    keep, filled = rows_where(stays, max(left))
    plan = Plan(keep, valid=filled if min(left) < max(left) else None)
    if near is not None:
        tokens = all_images(layout.rows, len(kept))
        taken = tokens[:, None].expand(-1, tokens.shape[1], -1).gather(2, near[0])
        share = near[1] * ~whole[:, None, None]
        picked = keep[..., None].expand(-1, -1, taken.shape[2])
        return plan._replace(near=by_row(taken).gather(1, picked), near_weight=by_row(share).gather(1, picked))
    if joins is None:
        return plan
    share = torch.ones_like(joins, dtype=torch.float32) if weight is None else at_least_fp32(weight).clamp_min(1e-30)
    target, share = by_row(all_images(layout.rows, len(kept)).gather(1, joins)), by_row(share / share.gather(1, joins))
    src, folds = rows_where(goes, max(gone))
    dst = (stays.cumsum(1) - 1).clamp_min(0).gather(1, target.gather(1, src))
    ragged = min(gone) < max(gone)
    return plan._replace(src=src, dst=dst, weight=share.gather(1, src), use_size=False, folds=folds if ragged else None)


def neighbours(metric: Tensor, weight: Tensor, k: int = 32, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k tokens of its view that each token is most similar to, kept or not.

    Args:
        metric: [V, m, D], compared by cosine.
        weight: [V, m], weight of a token wherever it is a neighbour.
        k: neighbours, at most all others (LLaVA-PruMerge: 32).
        valid: [V, m] bool, tokens that may be neighbours; `None` = all.

    Returns:
        (token numbers within the view [V, m, K], their weights [V, m, K]).
    """
    if k < 1:
        raise ConfigError(f"k counts neighbours and starts at 1, got {k}")
    weight, found = at_least_fp32(weight), []
    if valid is not None:
        weight = weight.masked_fill(~valid, 0)
    for views, cosine in cosines(metric):
        if valid is not None:
            cosine.masked_fill_(~valid[views, None], -2)
        cosine.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
        found.append(cosine.argsort(dim=-1, descending=True, stable=True)[..., : min(k, cosine.shape[-1] - 1)])
    near = torch.cat(found)
    return near, weight[:, None].expand(-1, near.shape[1], -1).gather(2, near)


def knn_features(x: Tensor, metric: Tensor, weight: Tensor, k: int = 32, valid: Tensor | None = None) -> Tensor:
    """Every token plus the weighted sum of its `neighbours`: x [V, m, C] -> [V, m, C]."""
    near, share = neighbours(metric, weight, k, valid)
    every = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return apply_plan(x, TokenState(0, x.shape[1]), Plan(every, near=near, near_weight=share))[0]


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
        raise ConfigError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {shown(aggregation)}")
    if len(x) != layout.length:
        raise ConfigError(f"the layout has {layout.length} feature rows, the features {len(x)}; build it for this image")
    plan = compression(layout, kept, metric, weight, aggregation, k, valid)
    out, _ = apply_plan(x[None], TokenState(0, layout.length), plan)
    return out[0], plan.keep[0]


def compression(
    layout: Layout,
    kept: Tensor,
    metric: Tensor,
    weight: Tensor,
    aggregation: str = "nearest",
    k: int = 32,
    valid: Tensor | None = None,
    whole: Tensor | None = None,
) -> Plan:
    """The plan of `compress_features`, for the rows of B images; `whole` as for `feature_plan`."""
    real = all_images(layout.valid, len(kept))
    if aggregation == "nearest":
        whole = all_images(layout.is_global, len(kept)) if whole is None else whole
        return feature_plan(layout, kept, nearest_kept(metric, (kept | whole[:, None]) & real), weight, valid, whole)
    if aggregation == "knn":
        near = neighbours(metric, weight, k, real if valid is None else valid & real)
        return feature_plan(layout, kept, whole=whole, near=near)
    return feature_plan(layout, kept, whole=whole)
