"""LLaVA-PruMerge and PruMerge+: Adaptive Token Reduction for Efficient Large Multimodal Models (Shang et al., ICCV 2025,
arXiv:2403.15388). The tokens of a view stay that the class token attends to outstandingly (and, in PruMerge+, some that are
evenly spread); each takes in its most similar neighbours, and one more token takes in all that are lost.

Written from a description of the authors' program (42Shawn/LLaVA-PruMerge at 097c041) and arrays that it made.

Shapes: V views, n tokens of each view, W that stay at most, C width of a token, d width of a key with all heads side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.config import flag, whole
from vtok.core.prompt import ImageFeatures, TowerBlock, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.search_space import Choice, Dimension
from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, shown
from vtok.methods.features.view_tokens import Group, KeepConfig, ViewReducer, ViewTokens, looked_at, view_sizes, view_tokens
from vtok.methods.preset import Official
from vtok.ops.attention import cls_attention, received_attention
from vtok.ops.matching import unit
from vtok.ops.rows import take_rows
from vtok.ops.selection import top, upper_outliers

RATIO = 1 / 8  # of the program, where nothing is adaptive
_TYPICAL = 1 / 16, 1 / 4  # share of the tokens that stays adaptively, of PruMerge and PruMerge+: for costs before anything runs


@dataclass(frozen=True)
class PruMerge(Official, KeepConfig):
    """Config of PruMerge and PruMerge+.

    Attention is one softmax over the keys of all heads side by side, as in the program; weights of merged tokens are these
    probabilities, which are not normalised. The program merges in front of the connector; so does vtok where every visual token
    is one patch that the connector takes by itself (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision without shrunk crops), elsewhere
    behind it. Towers without a class token (SigLIP) rank a patch by the attention that it receives on average. Newline tokens
    between rows are dropped.

    What differs from the program unless `preset="official"`: every view decides by its own outliers, where the program takes
    one share for a whole batch (PruMerge+ raises an error there); kept tokens stand where they stood, the extra one at the
    first free place; PruMerge+ repeats no token and never divides by zero.

    Attributes:
        keep: share of the tokens of every view that enter the LLM, the extra one among them ((0, 1]). Default: adaptive, as
            many as are outliers. 1.0 changes nothing.
        keep_tokens: the same as a count for every view.
        plus: PruMerge+. Adaptive: beside the outliers every t-th token, t a third of their mean distance, about four times as
            many in all. Under `keep` a quarter are outliers, the others evenly spread.
        neighbours: tokens that each kept one takes in (paper: k; program: 32; whole number >= 1), at most all others.
        iqr_factor: interquartile ranges above the third quartile at which an outlier begins (program: 1.5; >= 0).
        layer: 0-based block of the vision tower whose queries and keys count, negative from the end; default: the last one, as
            in the program, whose features come from the one before it.
        preset: `"official"`: the program's shares, also over a batch, its order (by attention, then the evenly spread ones, the
            extra token last, at the places of those that stay) and, under `keep`, its count: floor(n keep) and the extra token,
            in PruMerge+ also every (1 / keep)-th token, chosen or not; positions are numbered anew unless `positions` is given.
    """

    name: ClassVar[str] = "prumerge"
    searched: ClassVar[Mapping[str, Dimension]] = {"plus": Choice((False, True)), "neighbours": Choice((8, 16, 32, 64))}
    searched_layer: ClassVar[str] = "layer"
    default_keep: ClassVar[float | None] = None

    plus: bool = False
    neighbours: int = 32
    iqr_factor: float = 1.5
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self.plus, "plus")
        whole(self.neighbours, "neighbours", 1)
        factor = self.iqr_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise ConfigError(f"iqr_factor is a number >= 0, got {shown(factor)}")
        if self.layer is not None:
            whole(self.layer, "layer")

    @property
    def adaptive(self) -> bool:
        """Whether the image decides how many tokens stay."""
        return self.keep is None and self.keep_tokens is None

    def count(self, n: int) -> int:
        if not self.official or self.adaptive:
            return super().count(n)
        first = int(n * self.share(n))
        return min(n, 1 + first + (len(_every(n, first / n)) if self.plus and first else 0))

    def share(self, n: int) -> float:
        """rho, of the program's fixed branch."""
        return self.keep if self.keep is not None else super().count(n) / n

    def build_vlm(self, info: VLMInfo) -> PruMergeReducer:
        tower, block = looked_at(self, info, -1 if self.layer is None else self.layer)
        kind = AdaptiveReducer if self.adaptive else PruMergeReducer
        return kind(self, info, tuple(dict.fromkeys((block, tower.feature_block))))


# Which tokens stay.
class Ranked(NamedTuple):
    """Tokens of V views, those that stay in front.

    Attributes:
        order: [V, n] int64, token numbers: those that stay, then the others, rising.
        stay: [V] int64, how many stay; one number, if it is the same for all.
    """

    order: Tensor
    stay: Tensor | int


def adaptive_tokens(attention: Tensor, factor: float = 1.5, plus: bool = False, joint: bool = False) -> Ranked:
    """Outliers of attention, by falling attention; in PruMerge+ then evenly spread tokens.

    Args:
        attention: [V, n].
        factor: see `PruMerge.iqr_factor`.
        plus: add the evenly spread ones.
        joint: one share of outliers for all views together, as the program has it.
    """
    views, n = attention.shape
    score = at_least_fp32(attention)
    if joint:
        count = upper_outliers(score.float().view(1, -1), factor).sum().expand(views)
        ratio = count.double() / (views * n)
        count = (n * ratio).long()
    else:
        count = upper_outliers(score, factor).sum(1)
        ratio = count.double() / n
    rank = torch.empty_like(score, dtype=torch.int64)
    place = torch.arange(n, device=score.device).expand(views, n)
    rank.scatter_(1, top(score, n), place)
    outlier = rank < count[:, None]
    spread = torch.zeros_like(outlier)
    if plus:
        step = ((1 / ratio.clamp_min(1 / n)).long() // 3).clamp_min(1)
        spread = (place % step[:, None] == 0) & (place < n - 1) & ~outlier
    key = torch.where(outlier, rank, n + place + n * (~spread))
    return Ranked(key.argsort(1), (outlier | spread).sum(1))


def fixed_tokens(attention: Tensor, k: int, plus: bool = False) -> Ranked:
    """k tokens: those of highest attention; in PruMerge+ a quarter of k + 1, the others evenly spread over the rest."""
    n = attention.shape[1]
    first = min(k, round((k + 1) / 4)) if plus else k
    order = top(attention, n)
    chosen, rest = order[:, :first], order[:, first:].sort(1).values
    more, left = k - first, n - first
    spread = _spread_first(left, more, rest.device)
    return Ranked(torch.cat([chosen, rest[:, spread]], 1), k)


@functools.lru_cache(maxsize=256)
def _spread_first(n: int, count: int, device: torch.device) -> Tensor:
    """[n] int64: 0 .. n-1, so many evenly spread ones in front."""
    places = [(2 * i + 1) * n // (2 * count) for i in range(count)]
    return torch.tensor([*places, *sorted(set(range(n)) - set(places))], dtype=torch.int64, device=device)


def official_fixed_tokens(attention: Tensor, ratio: float, plus: bool = False) -> Ranked:
    """The program's fixed branch: floor(n ratio) tokens by attention, in PruMerge+ then every (1 / ratio)-th token, also if it
    was chosen before. As many others are lost as tokens are repeated: those of lowest number."""
    views, n = attention.shape
    first = int(n * ratio)
    chosen = top(attention, first)
    if plus and first:
        chosen = torch.cat([chosen, _every_row(n, ratio, chosen.device).expand(views, -1)], 1)
    taken = torch.zeros(attention.shape, dtype=torch.bool, device=chosen.device).scatter(1, chosen, True)
    place = torch.arange(n, device=chosen.device).expand(views, n)
    rest = torch.where(taken, -1, place).sort(1).values  # those that stay come first: as many as are repeated go with them
    return Ranked(torch.cat([chosen, rest[:, chosen.shape[1] :]], 1), chosen.shape[1])


def _every(n: int, ratio: float) -> list[int]:
    step = int(1 / ratio)
    return list(range(step // 2, n - 1, step))


@functools.lru_cache(maxsize=256)
def _every_row(n: int, ratio: float, device: torch.device) -> Tensor:
    return torch.tensor(_every(n, ratio), device=device)


def merge_neighbours(
    x: Tensor, keys: Tensor, attention: Tensor, ranked: Ranked, width: int, neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """Kept tokens plus the attention-weighted sum of their neighbours; the weighted sum of all others.

    Args:
        x: [V, n, C].
        keys: [V, n, d], compared by cosine.
        attention: [V, n], the weights.
        ranked: which stay.
        width: W, the largest count.
        neighbours: of each, among all tokens of its view, kept or not; of equals those that stay first.

    Returns:
        (kept [V, W, C], meaningless behind a view's count; extra [V, 1, C]), in at least fp32.
    """
    order, n = ranked.order, x.shape[1]
    x, weight = at_least_fp32(x), attention.to(at_least_fp32(x).dtype)
    z = take_rows(unit(keys), order)
    cosine = z[:, :width] @ z.transpose(1, 2)
    cosine.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    near = top(cosine, min(neighbours, n - 1))  # places in `order`
    token = order[:, None].expand(-1, width, -1).gather(2, near)
    share = weight[:, None].expand(-1, width, -1).gather(2, token)
    joins = x.new_zeros(len(x), width, n).scatter_add(2, token, share)
    place = torch.arange(n, device=x.device)
    count = ranked.stay if isinstance(ranked.stay, int) else ranked.stay[:, None]
    lost = weight.gather(1, order) * (place >= count)
    extra = torch.zeros_like(weight).scatter_add(1, order, lost)
    sums = torch.cat([joins, extra[:, None]], 1) @ x
    return take_rows(x, order[:, :width]) + sums[:, :width], sums[:, width:]


# What it does to a model.
def joint_attention(block: TowerBlock, has_cls: bool) -> Tensor:
    """[V, P]: attention to the patches as one head over all channels: from the class token, or on average from all."""
    view, prefix = block.view, block.num_prefix
    assert view.q is not None and view.k_rot is not None
    if has_cls:
        return cls_attention(view.q[:, :, 0], view.k_rot, prefix, joint=True)
    q, k = (t.transpose(1, 2).flatten(2)[:, None] for t in (view.q, view.k_rot))
    return received_attention(q, k, prefix, None, None if block.valid is None else block.valid[:, prefix:])


@dataclass(frozen=True)
class PruMergeReducer(ViewReducer):
    """PruMerge for one model; the first of `blocks` is looked at, what leaves the last is merged."""

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        config: PruMerge = self.config
        seen, left = images.tower[self.blocks[0]], images.tower[self.blocks[-1]]
        assert seen.view.k is not None
        attention = held.fit(joint_attention(seen, self.has_cls)[..., None])[..., 0]
        keys = held.fit(seen.view.k[:, :, seen.num_prefix :].transpose(1, 2).flatten(2))
        hidden = None if images.connector is None else held.hidden(left)
        connector = None if hidden is None else images.connector
        ranked = [self._ranked(held.of(attention, group)) for group in held.groups]
        widths = _widths(ranked)
        rows, valid, makers = [], [], []
        for group, found, width in zip(held.groups, ranked, widths):
            extra = min(1, group.size - width)
            here, real = _places(found, width, extra, config.official)
            rows.append(held.rows(group, here))
            valid.append(real.view(held.images, -1))
            inside = None if hidden is None else held.of(hidden, group)
            maker = functools.partial(
                _make, held, group, connector, inside, held.of(keys, group), held.of(attention, group), found, width, extra
            )
            makers.append(functools.partial(maker, config.neighbours))
        stays = held.stays.expand(held.images, -1)
        ragged = any(isinstance(found.stay, Tensor) for found in ranked)

        def remake(x: Tensor) -> Tensor:
            parts = [make(x).reshape(held.images, -1, x.shape[-1]) for make in makers]
            return torch.cat([*parts, take_rows(x, stays)], 1)

        all_real = torch.cat([*valid, torch.ones_like(stays, dtype=torch.bool)], 1) if ragged else None
        return Plan(torch.cat([*rows, stays], 1), valid=all_real, remake=remake)

    def _ranked(self, attention: Tensor) -> Ranked:
        config, n = self.config, attention.shape[1]
        if config.official:
            return official_fixed_tokens(attention, config.share(n), config.plus)
        return fixed_tokens(attention, config.count(n) - 1 if config.count(n) < n else n, config.plus)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        tower, config = self.info.tower, self.config
        assert tower is not None
        macs = super().feature_macs(n, views, modality) // len(self.blocks)
        for size in view_sizes(views):
            count = round(size * _TYPICAL[config.plus]) if config.adaptive else config.count(size)
            connector = self.info.connector_macs if size == tower.num_patches else 0
            width = tower.width if connector else self.info.width
            macs += (count - 1) * size * tower.num_heads * tower.head_dim + count * (size * width + connector)
        return macs


@dataclass(frozen=True)
class AdaptiveReducer(PruMergeReducer):
    """The image decides how many tokens stay."""

    exact: ClassVar[bool] = False

    @property
    def fixed_counts(self) -> bool:
        return False

    def features(self, images: ImageFeatures) -> Plan:
        return self.choose(images, view_tokens(images, self.config.name))

    def _ranked(self, attention: Tensor) -> Ranked:
        config = self.config
        return adaptive_tokens(attention, config.iqr_factor, config.plus, joint=config.official)


def _widths(ranked: Sequence[Ranked]) -> list[int]:
    """Largest count of every group, by one host synchronisation if they depend on the image."""
    found: list[Any] = [one.stay if isinstance(one.stay, int) else one.stay.amax() for one in ranked]
    late = [count for count in found if isinstance(count, Tensor)]
    counts = iter(torch.stack(late).tolist() if late else ())
    return [next(counts) if isinstance(count, Tensor) else count for count in found]


def _places(ranked: Ranked, width: int, extra: int, official: bool) -> tuple[Tensor, Tensor]:
    """Where the kept tokens and the extra one stand [V, W + extra], and which of these are real."""
    order, count = ranked.order, ranked.stay
    views, n = order.shape
    place = torch.arange(width + extra, device=order.device).expand(views, -1)
    count = torch.full((views,), count, device=order.device) if isinstance(count, int) else count
    real = (place < count[:, None]) | (place >= width)
    free = order.gather(1, count[:, None].clamp_max(n - 1))  # the first that is lost
    here = torch.cat([order[:, :width], free[:, :extra]], 1)
    if not official:
        return here, real
    taken = torch.zeros(views, n, device=order.device).scatter(1, here, real.to(torch.float32))
    total = real.sum(1, keepdim=True)
    rows = top(taken, width + extra)  # those that stay, then others, for tokens that are repeated
    rows = rows.masked_fill(place >= total, n).sort(1).values  # rising, one for each that is real
    return rows.gather(1, (real.cumsum(1) - 1).clamp_min(0)), real


def _make(
    held: ViewTokens,
    group: Group,
    connector: Callable[[Tensor], Tensor] | None,
    hidden: Tensor | None,
    keys: Tensor,
    attention: Tensor,
    ranked: Ranked,
    width: int,
    extra: int,
    neighbours: int,
    x: Tensor,
) -> Tensor:
    """Features [B, n, D] -> what becomes of a group [B G, W + extra, D]."""
    tokens = held.tokens(x, group) if hidden is None else hidden
    kept, lost = merge_neighbours(tokens, keys, attention, ranked, width, neighbours)
    made = torch.cat([kept, lost[:, :extra]], 1)
    return (made if connector is None else connector(made)).to(x.dtype)
