"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (Alvar, Singh, Akbari, Zhang, CVPR 2025). Before
the language model, the visual tokens of an image are thinned out to a subset whose members are as far from each other as a
greedy choice makes them: the max-min diversity problem under the distance 1 - cosine.

Written from a description of the authors' program; it reproduces that program's choices (`tests/golden`). What differs:

* Every image of a batch chooses its own tokens; in the program the first image chooses for all.
* Distances are taken in fp32; the program takes them in the type of the model, where rounding changes the order.
* A token is never taken twice. In the program tokens that were taken stay in the race, so that among exact copies the same
  number comes back.
* An image keeps at least one token.

The tokens of one image are one pool, thumbnail, crops and newline tokens of a high-resolution image together, as in the
program; so are all frames of a video. The program numbers positions without gaps, which `positions="compact"` does.

Shapes: B images, n visual tokens, d width of the language model, k tokens that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.methods.kept_share import FeatureChoice, KeptShare
from vtok.methods.preset import Official
from vtok.ops.diversity import max_min, max_min_macs, rows_of
from vtok.ops.rows import take_rows
from vtok.ops.selection import distinct


@dataclass(frozen=True)
class DivPrune(Official, KeptShare):
    """Config of DivPrune.

    Attributes:
        keep: share of the visual tokens of an image that enter the LLM (program: SUBSET_RATIO; (0, 1], default 0.098: 56 of the
            576 of LLaVA-1.5), rounded to whole tokens, halves to the even number; at least one. 1.0 is an exact no-op.
        keep_tokens: the same as a count for every image, thumbnail and crops together (whole number >= 1); an image with fewer
            tokens keeps them all. Give one of the two.
        preset: `"official"`: distances in the type of the model; tokens that were taken stay in the race, and what comes back
            stands in the prompt twice, at the place of a token that leaves; positions are numbered anew unless `positions` is
            given.
    """

    name: ClassVar[str] = "divprune"
    default_keep: ClassVar[float | None] = 0.098

    def build_vlm(self, info: VLMInfo) -> DivPruneReducer:
        return DivPruneReducer(self, info)


def max_min_select(features: Tensor, k: int) -> Tensor:
    """Starts from the token whose nearest other is farthest and adds, k - 1 times, the one whose nearest chosen is farthest.

    The distance to the nearest chosen one is carried along; equal distances: the lowest token number.

    Args:
        features: [B, n, d], after the connector.
        k: 1 to n.

    Returns:
        [B, k] int64 in order of choice.
    """
    return max_min(features, k)


def official_select(features: Tensor, k: int) -> Tensor:
    """The program's loop: in the type of the features, with what was taken still in the race. Shapes as in `max_min_select`."""
    x = features.detach()
    x = x / x.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # a row of zeros would be nothing but NaN
    distance = 1 - x @ x.transpose(1, 2)
    nearest = distance.topk(min(2, x.shape[1]), dim=1, largest=False).values[:, -1]
    order: list[Tensor] = []
    for step in range(k):
        last = nearest.argmax(1, keepdim=True)
        order.append(last)
        row = rows_of(distance, last)
        nearest = torch.minimum(nearest, row) if step else row
    return torch.cat(order, 1)


@dataclass(frozen=True)
class DivPruneReducer(FeatureChoice):
    """DivPrune for one model."""

    config: DivPrune

    def features(self, images: ImageFeatures) -> Plan | None:
        n = images.tokens.shape[1]
        count = self.config.count(n)
        if not self.config.official or count == n:
            return super().features(images)
        chosen = official_select(images.tokens, count).sort(1).values
        return Plan(distinct(chosen, n), remake=lambda x: take_rows(x, chosen))

    def choose(self, images: ImageFeatures, count: int) -> Tensor:
        return max_min_select(images.tokens, count)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        count = self.config.count(n)
        return 0 if count == n else max_min_macs(n, count, self.info.width)
