"""FasterVLM: [CLS] Attention is All You Need for Training-Free Visual Token Pruning (Zhang et al., arXiv:2412.01818v1, 2024).
Of every view the visual tokens stay that the class token of the vision tower attends to most.

Written from a description of the authors' program (Theia-4869/FasterVLM at f5d5f12) and arrays that it made.

Shapes: V views, H heads, n tokens of each view, k that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtok.config import whole
from vtok.core.prompt import ImageFeatures, VLMInfo
from vtok.core.reduction import Plan
from vtok.methods.features.view_tokens import KeepConfig, ViewReducer, ViewTokens, chosen_rows, looked_at
from vtok.methods.preset import Official
from vtok.ops.selection import top


@dataclass(frozen=True)
class FasterVLM(Official, KeepConfig):
    """Config of FasterVLM. It agrees with the authors' program wherever no scores are equal; of equal ones the first stays.

    Towers without a class token (SigLIP) rank a patch by the attention that it receives on average. Newline tokens between
    rows are dropped, as the program has none.

    Attributes:
        keep: share of the tokens of every view that stay ((0, 1]; default 1/9, 64 of 576; the authors report 0.25, 0.1, 0.05).
            1.0 changes nothing.
        keep_tokens: the same as a count for every view (program: `visual_token_num`, 144, 58 or 29 of 576; on LLaVA-NeXT for
            each of the five crops).
        layer: 0-based block of the vision tower whose attention counts, negative from the end; default: the one that the model
            takes its features from, as in the program.
        preset: `"official"`: positions are numbered anew, as in the program, unless `positions` is given.
    """

    name: ClassVar[str] = "fastervlm"
    searched_layer: ClassVar[str] = "layer"

    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            whole(self.layer, "layer")

    def build_vlm(self, info: VLMInfo) -> FasterVLMReducer:
        return FasterVLMReducer(self, info, (looked_at(self, info, self.layer)[1],))


def most_attended(attention: Tensor, k: int) -> Tensor:
    """[V, k] int64, rising: tokens of the highest attention [V, n] (averaged over heads); of equals the first."""
    return top(attention, k).sort(-1).values


@dataclass(frozen=True)
class FasterVLMReducer(ViewReducer):
    """FasterVLM for one model."""

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        scores = self.scores(images, held)
        return Plan(chosen_rows(held, lambda g: most_attended(held.of(scores, g), self.config.count(g.size))))
