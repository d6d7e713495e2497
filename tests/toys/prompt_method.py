"""A toy method for prompts: before the LLM the visual tokens of largest norm stay, and none in front of its last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, LayerAttention, Layout, VLMInfo
from vtok.core.tokens import Place, Site
from vtok.methods.kept_share import FeatureChoice, KeptShare


@dataclass(frozen=True)
class Strongest(KeptShare):
    """Config of the toy.

    Attributes:
        keep: share of the visual tokens of an image that enter the LLM ((0, 1], default 0.4); 1.0 is an exact no-op.
        keep_tokens: the same as a count.
    """

    name: ClassVar[str] = "strongest"
    default_keep: ClassVar[float] = 0.4

    def build_vlm(self, info: VLMInfo) -> StrongestReducer:
        return StrongestReducer(self, info)


@dataclass(frozen=True)
class StrongestReducer(FeatureChoice):
    """The toy for one model."""

    @property
    def sites(self) -> tuple[Site, ...]:
        first = super().sites
        return (*first, Site(Place.DECODER_IN, self.info.depth - 1)) if first else ()

    def choose(self, images: ImageFeatures, count: int) -> Tensor:
        return images.tokens.float().norm(dim=2).topk(count).indices

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        return torch.zeros_like(layout.visual)

    def layer_count(self, at: Site, visual: int, entered: int) -> int:
        return 0
