"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (Zhang et al., NeurIPS
2025). Before the language model, of every image a subset of visual tokens stays that a determinantal point process makes
likely: unlike each other, and relevant to what is asked.

Written from a description of the authors' program. Given its inputs, `clip_relevance` and `greedy_dpp` reproduce its choices
(`tests/golden`). The program takes relevance from CLIP's text tower and the projections into CLIP's common space, weights that
vision-language models do not carry:

* `relevance="clip"` reads them from a CLIP that is named, whose vision tower must be the model's
  (`vtok.methods.features.cdpruner_clip`). Questions longer than CLIP's text tower takes are cut into pieces of 75 tokens, our
  interpretation; words of a chat template count as text.
* `relevance="embeddings"`, the default, is **our interpretation** that needs neither: it compares the visual tokens, as they
  enter the LLM, with the embeddings of the prompt's text behind the image, in the LLM's own space: the mean cosine, scaled to
  [0, 1] within the image.
* `relevance="none"` gives all tokens the same: diversity alone, the half of the method that needs no text.

Further differences:

* Relevance is scaled within each image. The program scales over the whole batch, so that an image keeps other tokens in other
  company (`clip_relevance(joint=True)`).
* The program keeps tokens of **low** similarity, although the paper says high: raw similarities of CLIP's patches are inverted,
  as its authors answer. With CLIP's relevance the default is `sign=-1`, too. In the LLM's own space nothing inverts them, and
  the default is the paper's, `sign=1`. What is better depends on the model: a LLaVA on DINOv2 answers questions about small
  things (`reference-scenes`) almost as badly with -1 as from a grey picture, one trained from scratch on simple shapes
  (`reference-llava`) better with -1 (of 800 questions, 32 of 256 tokens: 95.0 %, without relevance 91.1 %, `sign=1` 85.9 %).
  Try both, and "none".
* Once the tokens taken span the rest, the program divides by zero and returns fewer; here the rest follows by relevance.
* The program keeps k tokens of every crop of a fixed canvas, and no newlines; here all tokens of an image are one pool, newline
  tokens included unless `relevance="clip"`. `preset="official"` chooses crop by crop, of the crops that the model makes.

The program numbers positions without gaps, as `positions="compact"` and the preset do.

Shapes: B images, n visual tokens, D width of the language model, e width of CLIP's space, M segments of text, k tokens that
stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, PromptText, View, VLMInfo
from vtok.core.search_space import Choice, Point, Space
from vtok.errors import ConfigError, StateError, shown, unknown
from vtok.methods.features.cdpruner_clip import ClipReducer, build
from vtok.methods.kept_share import FeatureChoice, KeptShare
from vtok.methods.preset import Official
from vtok.ops.determinantal import balanced, greedy_dpp, greedy_dpp_macs, scaled
from vtok.ops.matching import unit

if TYPE_CHECKING:
    from typing_extensions import Self

_SEARCHED: Space = {"sign": Choice((-1, 1)), "theta": Choice((None, 0.3, 0.5, 0.7, 0.9))}
RELEVANCE = ("embeddings", "clip", "none")


@dataclass(frozen=True)
class CDPruner(Official, KeptShare):
    """Config of CDPruner.

    Attributes:
        keep: share of the visual tokens of an image that enter the LLM ((0, 1], default 1/9: 64 of the 576 of LLaVA-1.5),
            rounded to whole tokens, halves to the even number; at least one. 1.0 is an exact no-op.
        keep_tokens: the same as a count for every image, thumbnail and crops together (program: visual_token_num, 128, 64 or
            32; whole number >= 1); an image with fewer tokens keeps them all. Give one of the two.
        relevance: `"embeddings"` of the prompt's text behind the image (our interpretation, see above), `"clip"`, or `"none"`.
            Default: `"clip"` under the preset, else `"embeddings"`.
        sign: 1, tokens like the text are relevant; -1, those unlike it. Default: -1 for CLIP's relevance, else 1 (see above).
        theta: weight of relevance against diversity in [0, 1); relevance r becomes exp(theta r / (2 (1 - theta))). Default
            `None` leaves r as it is, as the program does.
        clip: folder or name of a CLIP of transformers with its tokenizer, for `relevance="clip"` (of LLaVA-1.5:
            `openai/clip-vit-large-patch14-336`).
        tokenizer: folder or name of the vision-language model's tokenizer, for `relevance="clip"`.
        preset: `"official"`: CLIP's relevance, scaled over the crops of an image; `keep` or `keep_tokens` of every crop; no
            newlines; positions are numbered anew unless `positions` is given. The program couples the images of a batch; this
            does not.
    """

    name: ClassVar[str] = "cdpruner"
    default_keep: ClassVar[float | None] = 1 / 9
    image_only: ClassVar[Mapping[str, Any]] = {"relevance": "none"}

    relevance: str | None = None
    sign: int | None = None
    theta: float | None = None
    clip: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance is None:
            object.__setattr__(self, "relevance", "clip" if self.official else RELEVANCE[0])
        if self.relevance not in RELEVANCE:
            raise unknown("relevance", str(self.relevance), RELEVANCE)
        if self.sign is None:
            object.__setattr__(self, "sign", -1 if self.relevance == "clip" else 1)
        if isinstance(self.sign, bool) or self.sign not in (1, -1):
            raise ConfigError(f"sign is 1 or -1, got {shown(self.sign)}")
        theta = self.theta
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta < 1):
            raise ConfigError(f"theta is a number in [0, 1), got {shown(theta)}")
        if self.official and self.relevance != "clip":
            raise ConfigError(f"preset='official' takes relevance from CLIP; drop it or relevance={shown(self.relevance)}")
        for name in ("clip", "tokenizer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, os.PathLike)) or self.relevance != "clip"):
                raise ConfigError(f"{name} names a folder for relevance='clip', got {shown(value)} with {self.relevance!r}")
            object.__setattr__(self, name, None if value is None else os.fspath(value))

    def search_space(self, info: VLMInfo) -> Space:
        """What relevance counts; given parameters are left alone."""
        given = self.given()
        return {name: kind for name, kind in _SEARCHED.items() if name not in given} if self.relevance != "none" else {}

    def candidates_at(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        return self.replace(**point).budget_candidates(info)

    def build_vlm(self, info: VLMInfo) -> CDPrunerReducer | ClipReducer:
        return build(self, info) if self.relevance == "clip" else CDPrunerReducer(self, info)


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
        return greedy_dpp(tokens, balanced(text_relevance(tokens, images.text, config.sign or 1), config.theta), count)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        count = self.config.count(n)
        if count == n:
            return 0
        compared = n * self.info.width if self.reads_text else 0
        return compared + greedy_dpp_macs(n, count, self.info.width)
