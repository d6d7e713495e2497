"""Which view of a cropped page is which, and which rows of a model's image features belong to it: DocOwl-1.5, LLaVA-NeXT,
LLaVA-OneVision, InternVL, Idefics3 and SmolVLM, as `vtok.ops.crops` describes them.

The paper was tried on DocOwl-1.5 alone; what the others need is ours: merged tokens, and the choice among LLaVA-OneVision's
shrunken features, where patches and rows do not correspond (scores shrink as features do, and a row belongs to the view that
its middle lies in).

For one image, given keys [V, H, n, d] and attention [V, n] of its views, and its features [L, C] as the model made them:

    layout = packed_layout(packing(best_grid(size, pinpoints, 336), 24, size))  # LLaVA; plain_layout("internvl", tiles, 256)
    scores = feature_scores(keys, low, deep, beta, layout, groups)  # groups = group_map((32, 32), (2, 2)) for InternVL
    kept = select_tokens(scores, alpha)
    metric = feature_metric(keys, layout, groups)
    features, rows = compress_features(features, layout, kept, metric, scores.low, valid=scores.valid)

Shapes: V views of one image, n patches of each, m feature rows of each at most, L feature rows of the image, C width. All
functions take the views of several images that are laid out alike, one image after the other: V is then B V.
"""

from __future__ import annotations

from torch import Tensor

from vtok.core.tokens import at_least_fp32
from vtok.methods.correlation.scores import TokenScores, group_scores, head_metric, score_tokens
from vtok.ops.crops import Layout
from vtok.ops.matching import unit
from vtok.ops.packing import pack
from vtok.ops.selection import upper_outliers


def to_features(layout: Layout, scores: Tensor) -> Tensor:
    """What belongs to patches, for feature rows: [V, n, ...] -> [V, m, ...]; numbers shrink where features do."""
    if layout.packing is None:
        return scores
    views, (total, n) = len(layout.rows), scores.shape[:2]
    flat = scores.reshape(total // views, views, n, -1).permute(1, 2, 0, 3)  # [V, n, B, C]
    packed = pack(flat.flatten(2), layout.packing, scores.new_zeros(flat[0, 0].numel()))[layout.rows]
    packed = packed.unflatten(2, flat.shape[2:]).permute(2, 0, 1, 3)
    return packed.reshape(total, -1, *scores.shape[2:])


def all_images(part: Tensor, views: int) -> Tensor:
    """What is the same for all images [V, ...], for `views` views in all."""
    return part.repeat(views // len(part), *(1 for _ in part.shape[1:]))


def feature_scores(
    keys: Tensor,
    low: Tensor,
    deep: Tensor,
    beta: float,
    layout: Layout,
    groups: Tensor | None = None,
    factor: float = 1.5,
    patches: Tensor | None = None,
) -> TokenScores:
    """Scores of feature rows, for `select_tokens`.

    Args:
        keys: [V, H, n, d] keys of the patches at the low block.
        low, deep: [V, n] attention received at the low and at the deep block.
        beta, factor: see `score_tokens`.
        layout: of the features.
        groups: [G, s] from `group_map` where the connector merges patches (m = G), else `None`.
        patches: [V, n] bool, patches that hold image; `None` = those of the layout.
    """
    if patches is None and layout.patches is not None:
        patches = all_images(layout.patches, len(keys))
    patch = score_tokens(keys, low, deep, beta, patches, factor)
    if groups is not None:
        return group_scores(patch, groups)
    if layout.packing is None:
        return patch
    valid = all_images(layout.valid, len(keys))
    critical, low, deep = (to_features(layout, at_least_fp32(score)) for score in (patch.critical, low, deep))
    return TokenScores(critical, low, upper_outliers(deep, factor, valid), valid)


def feature_metric(keys: Tensor, layout: Layout, groups: Tensor | None = None, patches: Tensor | None = None) -> Tensor:
    """What feature rows are compared by when one joins another: [V, H, n, d] -> [V, m, H d]; merged tokens by the sum of
    their patches' unit keys. `patches` as for `feature_scores`."""
    metric = unit(head_metric(keys.detach()))
    if groups is None:
        return to_features(layout, metric)
    if patches is None and layout.patches is not None:
        patches = all_images(layout.patches, len(keys))
    if patches is not None:
        metric = metric.masked_fill(~patches[..., None], 0)
    return metric[:, groups].sum(2)
