"""What methods share that act once, in front of one decoder layer, by what the layer before it has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vtok.config import whole
from vtok.core.prompt import VLMInfo, VLMReducer
from vtok.core.search_space import Choice, Point, Space
from vtok.core.tokens import Place, Site
from vtok.methods.kept_share import KeptShare

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_LAYER = 2


@dataclass(frozen=True)
class OneLayer(KeptShare):
    """Fields of a method that keeps a share of a prompt's visual tokens in front of one decoder layer.

    Attributes:
        keep, keep_tokens: see `KeptShare`.
        layer: 0-based decoder layer in front of which tokens leave (whole number >= 1, default 2).
    """

    layer: int = DEFAULT_LAYER

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.layer, "layer", 1)

    @classmethod
    def alternatives(cls, info: VLMInfo) -> Sequence[Mapping[str, Any]]:
        layers = info.judged_layers()
        return ({"layer": layers[0]},) if layers and DEFAULT_LAYER not in layers else ()

    def search_space(self, info: VLMInfo) -> Space:
        """In front of which layer; given ones are left alone."""
        layers = info.judged_layers()
        return {"layer": Choice(layers)} if self.layer == DEFAULT_LAYER and layers else {}

    def candidates_at(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        return self.replace(layer=point.get("layer", self.layer)).budget_candidates(info)


@dataclass(frozen=True)
class OneLayerReducer(VLMReducer):
    """Such a method for one model; subclasses say which tokens stay (`keep`) and what that costs (`layer_macs`).

    Attributes:
        config: of the method.
        info: of the model.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    exact: ClassVar[bool] = True

    config: OneLayer
    info: VLMInfo

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.config.idle else (Site(Place.DECODER_IN, self.config.layer),)

    def probe(self, at: Site) -> int:
        return at.index - 1

    def layer_count(self, at: Site, visual: int, entered: int) -> int:
        return self.config.count(visual)
