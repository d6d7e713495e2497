"""What a method may know of a vision-language model before any prompt has been seen."""

from __future__ import annotations

from dataclasses import dataclass

from vtok.core.tower import TowerFacts


@dataclass(frozen=True)
class VLMInfo:
    """A vision-language model in numbers, and what cannot be done with it.

    Attributes:
        name: class name, for messages.
        depth: decoder layers of the LLM.
        width: of the LLM's hidden states and of the image features.
        num_heads: query heads of a decoder layer, H.
        num_kv_heads: key and value heads, Hk: fewer under grouped-query attention; 0 = as many as query heads.
        head_dim: width of a head, D; 0 = width / heads.
        first_layer: lowest decoder layer in front of which tokens may be dropped; layer 0 (before the LLM) always may.
        last_layer: highest one, behind which layers read keys and values that this or a later one stores; `None` = the last.
        no_earlier: why not in front of an earlier one than `first_layer`.
        no_attention: why the attention of decoder layers cannot be read, or `None` if it can.
        attention_layers: those that have attention, beside others with a recurrent state or a convolution; `None` = all.
        tower: its vision tower; `None` = it cannot be looked into, and `no_tower` says why.
        no_tower: see `tower`; empty if there is one.
        grid: rows and columns of visual tokens, the same for every image; `None` = they depend on the image.
        crops: whether it may cut an image into crops beside a view of the whole.
        connector_macs: multiply-accumulates of `ImageFeatures.connector` for one token; 0 = there is none.
        videos: whether it reads videos.
        no_frames: why the frames of its videos cannot be compared, or `None` if they can.
        no_patches: why patches cannot leave in front of its vision tower, or `None` if they can.
        no_layers: why tokens cannot leave between decoder layers, or `None` if they can; before the LLM they always can.
        generic: whether all that is known of it is what its interfaces say, as no row describes its family.
    """

    name: str
    depth: int
    width: int
    num_heads: int
    first_layer: int = 1
    last_layer: int | None = None
    no_earlier: str = "features of its vision tower are added to visual tokens further on"
    no_attention: str | None = None
    attention_layers: tuple[int, ...] | None = None
    num_kv_heads: int = 0
    head_dim: int = 0
    tower: TowerFacts | None = None
    no_tower: str = "it has no vision tower"
    grid: tuple[int, int] | None = None
    crops: bool = False
    connector_macs: int = 0
    videos: bool = False
    no_frames: str | None = None
    no_patches: str | None = "it takes whole images alone"
    no_layers: str | None = None
    generic: bool = False

    @property
    def inner_layers(self) -> range:
        """Decoder layers in front of which tokens may leave, all but the first one."""
        return range(self.first_layer, self.depth if self.last_layer is None else self.last_layer + 1)

    def judged_layers(self, back: int = 1) -> tuple[int, ...]:
        """Those of `inner_layers` in front of which the attention of a layer can decide that stands `back` layers before."""
        known = self.attention_layers
        return tuple(layer for layer in self.inner_layers if known is None or layer - back in known)

    def probe_macs(self, rows: int, length: int) -> int:
        """Multiply-accumulates of `LayerAttention.probs` for so many query rows over so many columns: keys of all columns,
        queries of the rows, and their products."""
        head = self.head_dim or self.width // self.num_heads
        keys = self.width * (self.num_kv_heads or self.num_heads) * head * length
        return keys + rows * self.num_heads * head * (self.width + length)
