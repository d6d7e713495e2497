"""Which view of a cropped page is which, and which rows of a model's image features belong to it: DocOwl-1.5, LLaVA-NeXT,
LLaVA-OneVision, InternVL, Idefics3 and SmolVLM, as their code in transformers 5.23 orders them.

The paper was tried on DocOwl-1.5 alone; what the others need is ours: merged tokens, and the choice among LLaVA-OneVision's
shrunken features, where patches and rows do not correspond (scores shrink as features do, and a row belongs to the view that
its middle lies in).

For one image, given keys [V, H, n, d] and attention [V, n] of its views, and its features [L, C] as the model made them:

    layout = packed_layout(packing(best_grid(size, pinpoints, 336), 24, size))  # LLaVA; plain_layout("internvl", tiles, 256)
    scores = feature_scores(keys, low, deep, beta, layout, groups)  # groups = group_map((32, 32), (2, 2)) for InternVL
    kept = select_tokens(scores, alpha)
    metric = feature_metric(keys, layout, groups)
    features, rows = compress_features(features, layout, kept, metric, scores.low, valid=scores.valid)

Shapes: V views of one image, n patches of each, m feature rows of each at most, L feature rows of the image, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import ConfigError, unknown
from vtok.methods.correlation import TokenScores, group_scores, head_metric, score_tokens
from vtok.methods.llava_packing import Packing, pack
from vtok.ops.matching import unit
from vtok.ops.rows import rows_where
from vtok.ops.selection import upper_outliers
from vtok.state import at_least_fp32

# Where the view of the whole page stands among an image's views; a lone view is the whole page.
GLOBAL_VIEW = {
    "docowl": "first",
    "idefics3": "last",
    "internvl": "last",
    "llava_next": "first",
    "llava_onevision": "first",
    "smolvlm": "last",
}
H_REDUCER = (1, 4)  # patches that one token of DocOwl-1.5's connector covers, rows x columns


def global_views(family: str, views: Sequence[int]) -> Tensor:
    """Views of whole pages: [sum of `views`] bool, for images of so many views each. The others follow row by row.

    Raises:
        UnknownNameError: no such family in `GLOBAL_VIEW`.
        ConfigError: an image without views.
    """
    if family not in GLOBAL_VIEW:
        raise unknown("family of cropping models", family, GLOBAL_VIEW)
    if any(count < 1 for count in views):
        raise ConfigError(f"every image has at least one view, got {list(views)}")
    place = {"first": 0, "last": -1}[GLOBAL_VIEW[family]]
    whole = torch.zeros(sum(views), dtype=torch.bool)
    for image in whole.split(list(views)):
        image[place] = True
    return whole


def group_map(grid: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Patches that a connector merges into one token: pixel shuffle (block s x s), the H-Reducer (1 x 4).

    Args:
        grid: rows and columns of patches.
        block: rows and columns of patches that a token covers.

    Returns:
        [G, s] int64: tokens row by row, the patches of each row by row, which is the order of their channels.

    Raises:
        ConfigError: the block does not divide the grid.
    """
    (rows, columns), (high, wide) = grid, block
    if rows % high or columns % wide:
        raise ConfigError(f"blocks of {high} x {wide} patches do not divide a grid of {rows} x {columns}")
    ids = torch.arange(rows * columns).view(rows // high, high, columns // wide, wide)
    return ids.transpose(1, 2).reshape(-1, high * wide)


class Layout(NamedTuple):
    """Feature rows of one image, seen view by view.

    Attributes:
        rows: [V, m] int64, row of every token of a view, in raster order; 0 where there is none.
        valid: [V, m] bool, False = a view with fewer than m rows.
        is_global: [V] bool, views of the whole page, which are not compressed.
        length: L.
        patches: [V, n] bool, patches that hold image; padding is compared with nothing. `None` = all.
        packing: how crops were joined; `None` = rows are the tokens of one view after the other.
    """

    rows: Tensor
    valid: Tensor
    is_global: Tensor
    length: int
    patches: Tensor | None = None
    packing: Packing | None = None

    def to(self, device: torch.device) -> Layout:
        patches = None if self.patches is None else self.patches.to(device)
        rows, valid, whole = (t.to(device) for t in self[:3])
        return self._replace(rows=rows, valid=valid, is_global=whole, patches=patches)


def plain_layout(family: str, views: int, tokens: int, patches: Tensor | None = None) -> Layout:
    """Views one after the other, as many rows each: InternVL, Idefics3 and SmolVLM, and DocOwl-1.5 before its H-Reducer.

    Args:
        family: see `GLOBAL_VIEW`.
        views: of the image, all-zero padding views left out.
        tokens: feature rows of a view, after merging.
        patches: [V, n] bool, the model's patch attention mask; `None` = all real.
    """
    rows = torch.arange(views * tokens).view(views, tokens)
    return Layout(rows, torch.ones_like(rows, dtype=torch.bool), global_views(family, [views]), rows.numel(), patches)


def packed_layout(how: Packing) -> Layout:
    """Features of LLaVA-NeXT or LLaVA-OneVision: the first view, then joined crops with newlines."""
    side, (rows, columns) = how.side, how.grid
    inside = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    inside[how.lines, how.columns] = True
    inside = inside.view(rows, side, columns, side).transpose(1, 2).reshape(-1, side**2)
    inside = torch.cat([inside.new_ones(1, side**2), inside])
    line, column = (  # the patch that the middle of each row's share of the joined grid lies in
        (2 * torch.arange(new) + 1) * (cut.stop - cut.start) // (2 * max(new, 1)) + cut.start
        for new, cut in zip(how.size, (how.lines, how.columns))
    )
    view = 1 + (line // side)[:, None] * columns + column // side
    crops = F.pad(view, (0, 1), value=-1).flatten() if rows else view.new_full((1,), -1)  # -1: newlines
    owner = torch.cat([view.new_zeros(side**2), crops])
    mine = owner == torch.arange(len(inside))[:, None]
    found, valid = rows_where(mine, int(mine.sum(-1).max()))
    return Layout(found, valid, global_views("llava_next", [len(inside)]), len(owner), inside, how)


def to_features(layout: Layout, scores: Tensor) -> Tensor:
    """What belongs to patches, for feature rows: [V, n, ...] -> [V, m, ...]; numbers shrink where features do."""
    if layout.packing is None:
        return scores
    flat = scores.reshape(*scores.shape[:2], -1)
    packed = pack(flat, layout.packing, flat.new_zeros(flat.shape[2]))
    return packed[layout.rows].view(*layout.rows.shape, *scores.shape[2:])


def feature_scores(
    keys: Tensor,
    low: Tensor,
    deep: Tensor,
    beta: float,
    layout: Layout,
    groups: Tensor | None = None,
    factor: float = 1.5,
) -> TokenScores:
    """Scores of an image's feature rows, for `select_tokens`.

    Args:
        keys: [V, H, n, d] keys of the patches at the low block.
        low, deep: [V, n] attention received at the low and at the deep block.
        beta, factor: see `score_tokens`.
        layout: of the features.
        groups: [G, s] from `group_map` where the connector merges patches (m = G), else `None`.
    """
    patch = score_tokens(keys, low, deep, beta, layout.patches, factor)
    if groups is not None:
        return group_scores(patch, groups)
    if layout.packing is None:
        return patch
    critical, low, deep = (to_features(layout, at_least_fp32(score)) for score in (patch.critical, low, deep))
    return TokenScores(critical, low, upper_outliers(deep, factor, layout.valid), layout.valid)


def feature_metric(keys: Tensor, layout: Layout, groups: Tensor | None = None) -> Tensor:
    """What feature rows are compared by when one joins another: [V, H, n, d] -> [V, m, H d]; merged tokens by the sum of
    their patches' unit keys."""
    metric = unit(head_metric(keys.detach()))
    if groups is None:
        return to_features(layout, metric)
    if layout.patches is not None:
        metric = metric.masked_fill(~layout.patches[..., None], 0)
    return metric[:, groups].sum(2)
