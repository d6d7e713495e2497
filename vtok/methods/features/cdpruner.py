"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (Zhang et al., NeurIPS
2025). Before the language model, of every image a subset of visual tokens stays that a determinantal point process makes
likely: unlike each other, and relevant to what is asked.

Written from a description of the authors' program. Given its inputs, `clip_relevance` and `greedy_dpp` reproduce its choices
(`tests/golden`). On a vision-language model **relevance is our interpretation**: the program takes it from CLIP's text tower
and the projections into CLIP's common space, weights that these models do not carry. Here:

* `relevance="embeddings"` compares the visual tokens, as they enter the LLM, with the embeddings of the prompt's text behind
  the image, in the LLM's own space: the mean cosine, scaled to [0, 1] within the image.
* `relevance="none"` gives all tokens the same: diversity alone, the half of the method that needs no text.

Further differences:

* Relevance is scaled within each image. The program scales over the whole batch, so that an image keeps other tokens in other
  company (`clip_relevance(joint=True)`).
* The program keeps tokens of **low** similarity, although the paper says high: raw similarities of CLIP's patches are inverted,
  as its authors answer. `sign=-1` does the same and is the default: of 800 test questions of easy-VQA the reference LLaVA, with
  32 of its 256 visual tokens, answers 95.0 % with it, 91.1 % without relevance, 85.9 % with `sign=1` (all tokens: 97.5 %). That
  is one small model; try both on yours.
* Once the tokens taken span the rest, the program divides by zero and returns fewer; here the rest follows by relevance.
* The program keeps k tokens of every crop of a fixed canvas; here all tokens of an image are one pool, newline tokens included.

The program numbers positions without gaps, which `positions="compact"` does.

Shapes: B images, n visual tokens, D width of the language model, e width of CLIP's space, M segments of text, k tokens that
stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, PromptText, View, VLMInfo
from vtok.errors import ConfigError, StateError, shown, unknown
from vtok.methods.kept_share import FeatureChoice, KeptShare
from vtok.ops.determinantal import greedy_dpp, greedy_dpp_macs
from vtok.ops.matching import unit

RELEVANCE = ("embeddings", "none")
_ABOVE_ZERO = 1e-6  # in the numerator of eq. 3


@dataclass(frozen=True)
class CDPruner(KeptShare):
    """Config of CDPruner.

    Attributes:
        keep: share of the visual tokens of an image that enter the LLM ((0, 1], default 1/9: 64 of the 576 of LLaVA-1.5),
            rounded to whole tokens, halves to the even number; at least one. 1.0 is an exact no-op.
        keep_tokens: the same as a count for every image, thumbnail and crops together (program: visual_token_num, 128, 64 or
            32; whole number >= 1); an image with fewer tokens keeps them all. Give one of the two.
        relevance: `"embeddings"` of the prompt's text behind the image (default; our interpretation, see above), or `"none"`.
        sign: -1, tokens unlike the text are relevant (default, see above); 1, similar ones.
        theta: weight of relevance against diversity in [0, 1); relevance r becomes exp(theta r / (2 (1 - theta))). Default
            `None` leaves r as it is, as the program does.
    """

    name: ClassVar[str] = "cdpruner"
    default_keep: ClassVar[float | None] = 1 / 9
    image_only: ClassVar[Mapping[str, Any]] = {"relevance": "none"}

    relevance: str = RELEVANCE[0]
    sign: int = -1
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance not in RELEVANCE:
            raise unknown("relevance", str(self.relevance), RELEVANCE)
        if isinstance(self.sign, bool) or self.sign not in (1, -1):
            raise ConfigError(f"sign is 1 or -1, got {shown(self.sign)}")
        theta = self.theta
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta < 1):
            raise ConfigError(f"theta is a number in [0, 1), got {shown(theta)}")

    def build_vlm(self, info: VLMInfo) -> CDPrunerReducer:
        return CDPrunerReducer(self, info)


def scaled(similarity: Tensor, sign: int = 1, joint: bool = False) -> Tensor:
    """Relevance in (0, 1] (eq. 3): sign times similarity less its minimum, divided by its range; 1 where all are alike.

    Args:
        similarity: [B, n].
        sign: 1 or -1.
        joint: take minimum and maximum over the whole batch.

    Returns:
        [B, n].
    """
    score = sign * similarity
    over = (0, 1) if joint else (1,)
    low, high = score.amin(over, keepdim=True), score.amax(over, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (score - low + _ABOVE_ZERO) / spread.where(spread > 0, 1), 1.0)


def clip_relevance(patch_embeds: Tensor, text_embeds: Tensor, sign: int = -1, joint: bool = False) -> Tensor:
    """Relevance as the program takes it from CLIP.

    Args:
        patch_embeds: [B, n, e], patches in CLIP's common space.
        text_embeds: [M, e], segments of the question there.
        sign: -1 as in the program; see above.
        joint: as in the program: scale over the whole batch.

    Returns:
        [B, n], in at least fp32.
    """
    return scaled(unit(patch_embeds) @ unit(text_embeds).mean(0), sign, joint)


def text_relevance(tokens: Tensor, text: PromptText, sign: int = 1) -> Tensor:
    """[B, n]: relevance by the mean cosine of visual tokens [B, n, D] with the text's embeddings, scaled within each image."""
    words = unit(text.embeds) * text.real[..., None]
    mean = words.sum(1) / text.real.sum(1, keepdim=True).clamp_min(1)
    return scaled(torch.bmm(unit(tokens), mean[..., None]).squeeze(2), sign)


def balanced(relevance: Tensor, theta: float | None) -> Tensor:
    """exp(theta r / (2 (1 - theta))), or r itself without theta."""
    return relevance if theta is None else (relevance * (theta / (2 * (1 - theta)))).exp()


@dataclass(frozen=True)
class CDPrunerReducer(FeatureChoice):
    """CDPruner for one model."""

    config: CDPruner

    @property
    def reads_text(self) -> bool:
        return self.config.relevance == "embeddings"

    def choose(self, images: ImageFeatures, count: int) -> Tensor:
        config, tokens = self.config, images.tokens
        if not self.reads_text:
            return greedy_dpp(tokens, torch.ones_like(tokens[..., 0]), count)
        if images.text is None:
            raise StateError(
                f"cdpruner compares the {images.modality}s of {self.info.name} with the prompt's text, but which prompt they "
                'belong to cannot be told; pass relevance="none"'
            )
        return greedy_dpp(tokens, balanced(text_relevance(tokens, images.text, config.sign), config.theta), count)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        count = self.config.count(n)
        if count == n:
            return 0
        compared = n * self.info.width if self.reads_text else 0
        return compared + greedy_dpp_macs(n, count, self.info.width)
