"""FastV: An Image is Worth 1/2 Tokens After Layer 2 (Chen et al., ECCV 2024). In front of one early decoder layer the visual
tokens that the last token of the prompt attends to least, in the layer before, leave the prompt for good.

Written from a description of the authors' programs; it reproduces their choices (`tests/golden`). The paper speaks of the
attention that a token receives on average; all three programs look at the last query alone, as here. What differs from them:

* Every prompt of a batch chooses its own tokens; in the programs the first one chooses for all.
* The last query is the last token that is no padding, on whatever side padding stands.
* All visual tokens of a prompt are ranked together, those of several images too; the programs know one image.
* Deciding needs that one row of one layer: it is worked out from the layer's own input, and all layers keep their kernel. The
  programs switch the layer to eager attention, or run it twice and store its keys twice.
* Tokens leave while the prompt is read, and later layers never store them; positions are kept, as in the programs.

Shapes: B prompts, L columns in front of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtok.core.prompt import LayerAttention, Layout, VLMInfo
from vtok.core.tokens import Site
from vtok.methods.in_llm.one_layer import OneLayer, OneLayerReducer
from vtok.methods.preset import Official
from vtok.ops.selection import kept_counts, largest

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class FastV(Official, OneLayer):
    """Config of FastV.

    Attributes:
        keep: share of a prompt's visual tokens that go on (1 - R of the paper; (0, 1], default 0.5), rounded to whole tokens,
            halves to the even number; at least one. 1.0 is an exact no-op.
        keep_tokens: the same as a count (whole number >= 1); a prompt with fewer keeps them all. Give one of the two. Later
            papers' "192 tokens" may mean this count, or the mean over all layers; few say which.
        layer: K, 0-based decoder layer in front of which tokens leave; the attention of layer K - 1 decides (whole number >= 1,
            default 2; the authors' demo has 3).
        preset: `"official"` is what is done anyway: for one prompt the programs choose the same, and positions are kept.
    """

    name: ClassVar[str] = "fastv"
    default_keep: ClassVar[float | None] = 0.5
    official_positions: ClassVar[str] = "original"

    def build_vlm(self, info: VLMInfo) -> FastVReducer:
        return FastVReducer(self, info)


def last_query_attention(attention: LayerAttention, layout: Layout) -> Tensor:
    """[B, L]: attention that the last token of every prompt pays to each column, averaged over heads, in at least fp32."""
    return attention.probs(layout.last[:, None]).mean(1)[:, 0]


def attended(score: Tensor, visual: Tensor, keep: float | None = None, keep_tokens: int | None = None) -> Tensor:
    """The visual tokens of highest score: a share of those that are there, or a number of them.

    Args:
        score: [B, L].
        visual: [B, L] bool, those that may leave.
        keep, keep_tokens: see `FastV`.

    Returns:
        [B, L] bool; of equal scores the first tokens.
    """
    return largest(score, kept_counts(visual.sum(1), keep, keep_tokens), visual)


@dataclass(frozen=True)
class FastVReducer(OneLayerReducer):
    """FastV for one model.

    Attributes:
        config: of the method.
        info: of the model.
    """

    config: FastV

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        assert attention is not None
        config = self.config
        return attended(last_query_attention(attention, layout), layout.visual, config.keep, config.keep_tokens)

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        return self.info.probe_macs(1, visual + text)
