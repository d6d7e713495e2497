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

from torch import Tensor

from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.methods.kept_share import FeatureChoice, KeptShare
from vtok.ops.diversity import max_min, max_min_macs


@dataclass(frozen=True)
class DivPrune(KeptShare):
    """Config of DivPrune.

    Attributes:
        keep: share of the visual tokens of an image that enter the LLM (program: SUBSET_RATIO; (0, 1], default 0.098: 56 of the
            576 of LLaVA-1.5), rounded to whole tokens, halves to the even number; at least one. 1.0 is an exact no-op.
        keep_tokens: the same as a count for every image, thumbnail and crops together (whole number >= 1); an image with fewer
            tokens keeps them all. Give one of the two.
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


@dataclass(frozen=True)
class DivPruneReducer(FeatureChoice):
    """DivPrune for one model."""

    def choose(self, images: ImageFeatures, count: int) -> Tensor:
        return max_min_select(images.tokens, count)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        count = self.config.count(n)
        return 0 if count == n else max_min_macs(n, count, self.info.width)
