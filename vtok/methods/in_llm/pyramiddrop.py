"""PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction (Xing et al., CVPR 2025).
In front of a few decoder layers, evenly spread over the depth, the visual tokens that the last token of the prompt attends to
least in that layer leave, each time half of them.

Written from a description of the authors' program; it reproduces that program's choice (`tests/golden`). What differs:

* Positions are kept. The program counts them anew behind every stage, so that later layers see other distances, and choices
  behind the first stage differ: `positions="compact"`, which `preset="official"` stands for, does the same, in decoding too.
* Padding may stand on either side, rows may have several images or none, and masks stay whatever they were.
* Shares are of the visual tokens that entered the LLM, all images of a prompt together; at least one token stays.

The paper trains models under this schedule as well; here it shortens prompts of trained ones.

Shapes: B prompts, L columns in front of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.config import block_numbers
from vtok.core.prompt import LayerAttention, Layout, VLMInfo, VLMReducer
from vtok.core.search_space import Blocks, Point, Space
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError
from vtok.methods.in_llm.fastv import last_query_attention
from vtok.methods.in_llm.stages import check_stages, shares
from vtok.methods.preset import Official
from vtok.ops.selection import largest

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PyramidDrop(Official):
    """Config of PyramidDrop.

    Attributes:
        keep: shares of the visual tokens that entered the LLM which go on at each stage (the program's list of ratios without
            its leading 1; falling numbers in (0, 1], default 0.5, 0.25, 0.125), rounded down, at least one token. Stages with
            1.0 do nothing.
        layers: 0-based decoder layers in front of which tokens leave, one for each share (default: in front of equal parts of
            the depth, 8, 16 and 24 of 32 layers).
        preset: `"official"`: positions are numbered anew at every stage, as in the program, unless `positions` is given.
    """

    name: ClassVar[str] = "pyramiddrop"
    set_by_budget: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Sequence[float] = (0.5, 0.25, 0.125)
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", shares(self.keep, "keep"))
        if self.layers is not None:
            object.__setattr__(self, "layers", check_stages(block_numbers(self.layers), len(self.keep)))

    def budget_candidates(self, info: VLMInfo) -> Sequence[Self]:
        """Every stage leaves the same share of what arrives, as in the paper."""
        rates = [(1000 - step) / 1000 for step in range(1000)]
        return [self.replace(keep=tuple(rate ** (i + 1) for i in range(len(self.keep)))) for rate in rates]

    @classmethod
    def alternatives(cls, info: VLMInfo) -> Sequence[Mapping[str, Any]]:
        """Other layers, where a model lets no token go at the quarters of its depth."""
        usual = cls()
        layers = info.judged_layers(0)[: len(usual.keep)]
        if set(usual.quarters(info)) <= set(info.judged_layers(0)) or not layers:
            return ()
        return ({"keep": list(usual.keep[: len(layers)]), "layers": list(layers)},)

    def search_space(self, info: VLMInfo) -> Space:
        """In front of which layers; given ones are left alone."""
        stages, layers = len(self.keep), info.judged_layers(0)
        if self.layers is not None or len(layers) < stages:
            return {}
        return {"layers": Blocks(layers, stages, stages, self.stages(info))}

    def candidates_at(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        return self.replace(layers=point.get("layers", self.layers)).budget_candidates(info)

    def quarters(self, info: VLMInfo) -> tuple[int, ...]:
        """The default layers: as many equal parts of the depth as there are stages, and one more."""
        return tuple(info.depth * (i + 1) // (len(self.keep) + 1) for i in range(len(self.keep)))

    def stages(self, info: VLMInfo) -> tuple[int, ...]:
        """The decoder layer of every stage.

        Raises:
            ConfigError: the model is too shallow for the default.
        """
        if self.layers is not None:
            return tuple(self.layers)
        layers = self.quarters(info)
        if info.depth < len(self.keep) + 1:
            raise ConfigError(
                f"{len(self.keep)} stages need a deeper LLM than that of {info.name}, which has {info.depth} layers"
            )
        return layers

    def build_vlm(self, info: VLMInfo) -> PyramidDropReducer:
        found = tuple((layer, share) for layer, share in zip(self.stages(info), self.keep) if share < 1)
        return PyramidDropReducer(found, info)


def staged_counts(entered: Tensor, share: float) -> Tensor:
    """floor(n share) of the visual tokens n [B] that entered, at least one where there are any: [B] int64."""
    return torch.minimum(entered, (entered.double() * share).floor().long().clamp_min(1))


@dataclass(frozen=True)
class PyramidDropReducer(VLMReducer):
    """PyramidDrop for one model.

    Attributes:
        stages: (decoder layer, share of the tokens that entered the LLM).
        info: of the model.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    exact: ClassVar[bool] = True

    stages: tuple[tuple[int, float], ...]
    info: VLMInfo

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.DECODER_IN, layer) for layer, _ in self.stages)

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        assert attention is not None
        count = staged_counts(layout.num_entered, dict(self.stages)[at.index])
        return largest(last_query_attention(attention, layout), count, layout.visual)

    def layer_count(self, at: Site, visual: int, entered: int) -> int:
        return min(visual, max(1, math.floor(entered * dict(self.stages)[at.index])))

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        return self.info.probe_macs(1, visual + text)
