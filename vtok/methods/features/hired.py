"""HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models (Arif et al., AAAI
2025, arXiv:2408.10945). Of an image in crops the view of the whole spends a share of the budget; the rest goes to the crops by
how much of the whole they hold that the class token of a low block attends to. Each view keeps what the class token of a late
block attends to most.

Written from a description of the authors' program (hasanar1f/HiRED at 502d6dd) and arrays that it made.

Shapes: B images, V views of each, the whole first, m tokens of a view at most, n visual tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.config import whole
from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.search_space import Dimension, Real
from vtok.errors import ConfigError, shown
from vtok.methods.features.view_tokens import (
    KeepConfig,
    ViewReducer,
    ViewTokens,
    chosen_rows,
    looked_at,
    patch_attention,
    view_sizes,
    view_tokens,
)
from vtok.methods.preset import Official
from vtok.ops.rows import rows_where
from vtok.ops.selection import top


@dataclass(frozen=True)
class HiRED(Official, KeepConfig):
    """Config of HiRED.

    An image of one view keeps floor(n keep) of its n tokens by the late block alone, as the program does on LLaVA-1.5; so does
    every frame of a video. The share of a crop is that of marked tokens in a run of consecutive tokens of the whole view, as in
    the program, which cuts the view into horizontal bands where quadrants were meant. What rounding loses is not handed on.
    Towers without a class token (SigLIP) rank a patch by the attention that it receives on average. Newlines are dropped.

    What differs from the program unless `preset="official"`: padding of crops, which the model cuts off later, takes no part,
    neither in the budget nor in the choice; at least one token of an image stays.

    Attributes:
        keep: share of the visual tokens of an image that stay, at most (program: token budget rate; (0, 1]; default 0.2); 1.0
            changes nothing.
        keep_tokens: the same as a count for an image, all views together.
        alpha: share of the budget that the view of the whole spends ([0, 1]; default 0.5).
        first_layer: 0-based block of the vision tower whose attention parts the budget among crops (program: 0), negative from
            the end.
        late_layer: block whose attention chooses; default: the one that the model takes its features from (program: 22 of 24).
        preset: `"official"`: padding counts; positions are numbered anew unless `positions` is given.
    """

    name: ClassVar[str] = "hired"
    searched: ClassVar[Mapping[str, Dimension]] = {"alpha": Real(0.1, 0.9)}
    searched_layer: ClassVar[str] = "late_layer"
    default_keep: ClassVar[float | None] = 0.2

    alpha: float = 0.5
    first_layer: int = 0
    late_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is a share of the budget in [0, 1], got {shown(self.alpha)}")
        whole(self.first_layer, "first_layer")
        if self.late_layer is not None:
            whole(self.late_layer, "late_layer")

    def count(self, n: int) -> int:
        """Rounded down, as in the program."""
        return super().count(n) if self.keep is None else min(n, max(1, int(n * self.keep)))

    def build_vlm(self, info: VLMInfo) -> HiREDReducer:
        late = looked_at(self, info, self.late_layer, "late_layer")[1]
        first = looked_at(self, info, self.first_layer, "first_layer")[1]
        return HiREDReducer(self, info, tuple(dict.fromkeys((late, first))))


def part_budgets(first: Tensor, parts: int, total: int, alpha: float = 0.5) -> tuple[int, Tensor]:
    """How many tokens the whole view and every crop may keep.

    Args:
        first: [B, n], attention to the tokens of the whole view in the low block.
        parts: V - 1, crops.
        total: T, budget of an image.
        alpha: share of the whole view.

    Returns:
        (of the whole view, of each crop [B, V - 1] int64).
    """
    batch, n = first.shape
    full = min(int(total * alpha), n)
    rest = min(total - full, parts * n)
    if rest <= 0:
        return full, torch.zeros(batch, parts, dtype=torch.int64, device=first.device)
    marked = top(first, int(n * (1 - alpha)))
    crop = marked * parts // n  # consecutive runs of the flattened view
    counts = torch.zeros(batch, parts, device=first.device).scatter_add(1, crop, torch.ones_like(crop, dtype=torch.float32))
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)  # in single precision, as the program
    return full, (share * rest).long().clamp_max(n)


def part_mask(first: Tensor, late: Tensor, total: int, alpha: float = 0.5, valid: Tensor | None = None) -> Tensor:
    """Which tokens of every view stay.

    Args:
        first: [B, m], attention to the tokens of the whole view in the low block.
        late: [B, V, m], attention to the tokens of every view in the late block, the whole first.
        total: T.
        alpha: see `HiRED`.
        valid: [V, m] bool, tokens that there are; `None` = all.

    Returns:
        [B, V, m] bool.
    """
    batch, views, n = late.shape
    full, budgets = part_budgets(first, views - 1, total, alpha)
    limit = torch.cat([budgets.new_full((batch, 1), full), budgets], 1)
    if valid is not None:
        late = late.masked_fill(~valid, float("-inf"))
        limit = torch.minimum(limit, valid.sum(-1))
    place = torch.arange(n, device=late.device).expand_as(late)
    rank = torch.empty_like(place).scatter_(2, top(late, n), place)
    return rank < limit[..., None]


@dataclass(frozen=True)
class HiREDReducer(ViewReducer):
    """HiRED for one model; the first of `blocks` chooses, the last parts the budget."""

    @property
    def exact(self) -> bool:
        return not self.info.crops

    @property
    def fixed_counts(self) -> bool:
        return self.exact

    def features(self, images: ImageFeatures) -> Plan | None:
        if self.config.keep == 1:
            return None
        held = view_tokens(images, self.config.name)
        if self.config.count(len(held.pool)) == len(held.pool):
            return None
        return self.choose(images, held)

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        if images.source is None or not images.source.cropped:
            scores = self.scores(images, held)
            return Plan(chosen_rows(held, lambda g: top(held.of(scores, g), self._single(held, g.size))))
        mask = self._packed(images, held) if images.source.layout.packing is not None else self._tiled(images, held)
        stays = held.by_row(mask.flatten(0, 1).float()) > 0
        none = ~stays.any(1)
        most = held.by_row(self.scores(images, held)).argmax(1)
        stays = stays.scatter(1, most[:, None], (stays.gather(1, most[:, None]) | none[:, None]))
        counts = stays.sum(1).tolist()
        rows, valid = rows_where(stays, max(counts))
        return Plan(rows, valid=valid if min(counts) < max(counts) else None)

    def _single(self, held: ViewTokens, size: int) -> int:
        """Tokens of a view that is an image, or a frame, of its own."""
        config = self.config
        if config.keep is None and held.views > 1:
            return min(size, max(1, config.keep_tokens // held.views))
        return config.count(size)

    def _packed(self, images: ImageFeatures, held: ViewTokens) -> Tensor:
        """[B, V, M] bool, for views that the model joins and cuts free of padding."""
        config, source = self.config, images.source
        assert source is not None
        layout, shape = source.layout, (held.images, held.views)
        late, first = (patch_attention(images.tower[b], self.has_cls) for b in (self.blocks[0], self.blocks[-1]))
        if config.official and held.patches:
            late, first = late.unflatten(0, shape), first.unflatten(0, shape)
            parts, n = late.shape[1:]
            total = int(parts * n * config.keep) if config.keep is not None else min(parts * n, config.keep_tokens)
            mask = part_mask(first[:, 0], late, total, config.alpha)
            return held.fit(mask.flatten(0, 1).to(late.dtype)[..., None])[..., 0].unflatten(0, shape) > 0.5
        late, first = (held.fit(x[..., None])[..., 0].unflatten(0, shape) for x in (late, first))
        overview = first[:, 0]
        return part_mask(overview, late, config.count(len(held.pool)), config.alpha, layout.valid)

    def _tiled(self, images: ImageFeatures, held: ViewTokens) -> Tensor:
        """[B, V, M] bool, for tiles one after the other, each page's whole view behind its crops. One host synchronisation."""
        source, shape = images.source, (held.images, held.views)
        assert source is not None
        late, first = (
            held.fit(patch_attention(images.tower[b], self.has_cls)[..., None])[..., 0].unflatten(0, shape)
            for b in (self.blocks[0], self.blocks[-1])
        )
        mask = torch.zeros_like(late, dtype=torch.bool)
        for b, wholes in enumerate(source.whole.view(shape).tolist()):
            for page in _pages(wholes):
                total = self.config.count(len(page) * late.shape[2])
                if self.config.keep is None:
                    total = max(1, self.config.keep_tokens * len(page) // held.views)
                if len(page) == 1:
                    mask[b, page[0], top(late[b, page[0]], min(total, late.shape[2]))] = True
                else:
                    mask[b, page] = part_mask(first[b, page[:1]], late[b, page][None], total, self.config.alpha)[0]
        return mask

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        sizes = view_sizes(views)
        pool = sum(sizes)
        if self.config.count(pool) == pool:
            return n
        behind = sum(view.stop - view.start for view in views if view.newline) if modality == "video" else 0
        if any(view.overview for view in views):
            return self.config.count(pool)
        if self.config.keep is None and len(sizes) > 1:
            return sum(min(size, max(1, self.config.keep_tokens // len(sizes))) for size in sizes) + behind
        return sum(self.config.count(size) for size in sizes) + behind

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        macs = super().feature_macs(n, views, modality)
        cropped = any(view.overview for view in views)
        return macs if cropped or len(self.blocks) == 1 else macs // 2  # a single view has no budget to part


def _pages(wholes: Sequence[bool]) -> list[list[int]]:
    """Views of every page, its whole view first, of tiles whose whole views come behind their crops."""
    found, first = [], 0
    for i, is_whole in enumerate(wholes):
        if is_whole:
            found.append([i, *range(first, i)])
            first = i + 1
    return found
