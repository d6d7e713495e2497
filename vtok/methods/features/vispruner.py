"""VisPruner: Beyond Text-Visual Attention, exploiting visual cues for effective token pruning in VLMs (Zhang et al., ICCV 2025,
arXiv:2412.01818v2). Of every view some tokens stay for the attention that the class token pays them; of the others, near
duplicates go in rounds, until as many are left as shall be.

Written from a description of the authors' program (Theia-4869/VisPruner at aefa01a) and arrays that it made.

Shapes: V views, n tokens of each view, k that stay, C width of what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.config import whole
from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.search_space import Dimension, Real
from vtok.errors import ConfigError, shown
from vtok.methods.features.view_tokens import Group, KeepConfig, ViewReducer, ViewTokens, chosen_rows, looked_at, view_sizes
from vtok.methods.preset import Official
from vtok.ops.matching import unit
from vtok.ops.rows import take_rows
from vtok.ops.selection import top

_ROUND = 8  # tokens that go in one round


@dataclass(frozen=True)
class VisPruner(Official, KeepConfig):
    """Config of VisPruner.

    Tokens are compared as they leave the vision tower, like in the program, where every visual token is one patch; elsewhere
    (InternVL, Idefics3, SmolVLM, Gemma3, PaliGemma, pooled frames, shrunk crops) behind the connector. The program raises an
    error where the number of other tokens is odd or few are left; here the last one of an odd round is among those that may go,
    and at most half of a round does: what the program can do is unchanged. Towers without a class token (SigLIP) rank a patch
    by the attention that it receives on average. Newline tokens between rows are dropped, as the program has none.

    Attributes:
        keep: share of the tokens of every view that stay ((0, 1]; default 1/9, 64 of 576). 1.0 changes nothing.
        keep_tokens: the same as a count for every view (program: `visual_token_num`, 128, 64 or 32 of 576; on LLaVA-NeXT for
            each of the five crops).
        important: share of them that stays for its attention, rounded down (program: `important_ratio`, r; [0, 1]; default 0.5;
            the authors' example for 64 tokens has 0.75). 1.0 is FasterVLM.
        layer: 0-based block of the vision tower whose attention counts, negative from the end; default: the one that the model
            takes its features from, as in the program.
        preset: `"official"`: positions are numbered anew, as in the program, unless `positions` is given.
    """

    name: ClassVar[str] = "vispruner"
    searched: ClassVar[Mapping[str, Dimension]] = {"important": Real(0, 1)}
    searched_layer: ClassVar[str] = "layer"

    important: float = 0.5
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.important
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ConfigError(f"important is a share of the tokens that stay, in [0, 1]; got {shown(share)}")
        if self.layer is not None:
            whole(self.layer, "layer")

    def build_vlm(self, info: VLMInfo) -> VisPrunerReducer:
        tower, block = looked_at(self, info, self.layer)
        return VisPrunerReducer(self, info, tuple(dict.fromkeys((block, tower.feature_block))))


def prune_views(attention: Tensor, features: Tensor, k: int, important: float = 0.5) -> Tensor:
    """Important tokens by attention, diverse ones by dropping near duplicates of the rest.

    The rest is ranked by attention and split by even and odd place; the even tokens that are most similar to some odd one go,
    eight at a time; those of them that stay come first in the next round, most similar first. Of equals the first one in that
    order counts as more similar.

    Args:
        attention: [V, n], averaged over heads.
        features: [V, n, C], compared by cosine.
        k: tokens that stay.
        important: share of k, rounded down.

    Returns:
        [V, k] int64, rising.
    """
    n = attention.shape[1]
    first = int(k * important)
    order = top(attention, n)
    if first == k:
        return order[:, :k].sort(1).values
    kept, rest, other = order[:, :first], order[:, first:], k - first
    x = unit(take_rows(features, rest))
    cosine = x @ x.transpose(1, 2)  # of the rest, by rank of attention
    left = torch.arange(n - first, device=order.device).expand(len(order), -1)
    while (count := left.shape[1]) > other:
        gone = min(_ROUND, count - other, count // 2)
        even, odd = left[:, 0::2], left[:, 1::2]
        pair = even[..., None] * cosine.shape[2] + odd[:, None]
        alike = cosine.flatten(1).gather(1, pair.flatten(1)).view(pair.shape).amax(2)
        left = torch.cat([even.gather(1, top(alike, even.shape[1])[:, gone:]), odd], 1)
    return torch.cat([kept, rest.gather(1, left)], 1).sort(1).values


@dataclass(frozen=True)
class VisPrunerReducer(ViewReducer):
    """VisPruner for one model; the first of `blocks` is looked at, what leaves the last is compared."""

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        config: VisPruner = self.config
        scores, block = self.scores(images, held), images.tower[self.blocks[-1]]
        hidden = held.hidden(block)

        def chosen(group: Group) -> Tensor:
            features = held.tokens(images.tokens, group) if hidden is None else held.of(hidden, group)
            return prune_views(held.of(scores, group), features, config.count(group.size), config.important)

        return Plan(chosen_rows(held, chosen))

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        tower = self.info.tower
        assert tower is not None
        macs = super().feature_macs(n, views, modality) // len(self.blocks)
        for size in view_sizes(views):
            count = self.config.count(size)
            first = int(count * self.config.important)
            if first < count < size:
                macs += (size - first) ** 2 * (tower.width if size == tower.num_patches else self.info.width)
        return macs
