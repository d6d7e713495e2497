"""EVS: Efficient Video Sampling, Pruning Temporally Redundant Tokens for Faster VLM Inference (NVIDIA, arXiv:2510.14624, 2025).
Of a video the tokens stay that differ most from the token at the same place one frame before; the first frame stays whole.

Written from a description of vLLM's program (at d750efb) and arrays that it made.

Shapes: B videos, F frames, m tokens of each, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.core.prompt import ImageFeatures, VLMInfo
from vtok.core.reduction import Plan
from vtok.methods.preset import Official
from vtok.methods.video.video_tokens import Frames, VideoConfig, VideoReducer
from vtok.ops.selection import top

_STILL = 1e-6  # dissimilarity below which a token has not changed: rounding of a cosine


@dataclass(frozen=True)
class EVS(Official, VideoConfig):
    """Config of EVS. Images are left alone.

    Dissimilarities below 1e-6 count as none, so that of a still picture the earlier tokens stay on every device; vLLM's
    program, and `preset="official"`, let rounding decide. Nothing else differs.

    Attributes:
        keep: share of the visual tokens of a video that stay ((0, 1]; default 0.25; paper and vLLM: 1 - q, q the pruning rate),
            rounded down, but at least one frame. 1.0 changes nothing.
        keep_tokens: the same as a count for a video (>= 1); at least one frame stays.
        preset: `"official"`: see above; positions are kept, as always.
    """

    name: ClassVar[str] = "evs"
    official_positions: ClassVar[str] = "original"

    def count(self, n: int) -> int:
        """Rounded down, as in the program."""
        return super().count(n) if self.keep is None else int(n * self.keep)

    def build_vlm(self, info: VLMInfo) -> EVSReducer:
        self.check(info)
        return EVSReducer(self, info)


def dissimilarity(x: Tensor, still: float = _STILL) -> Tensor:
    """1 - cosine of every token to the one at its place a frame before, 0 where less than `still`; 255 in the first frame.
    [B, F, m, D] -> [B, F, m]."""
    change = 1 - F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1, eps=1e-8)
    change = change.masked_fill(change < still, 0)
    return torch.cat([torch.full_like(x[:, :1, :, 0], 255), change], 1)


def changed_tokens(x: Tensor, count: int, still: float = _STILL) -> Tensor:
    """[B, count] int64, rising, numbered over all frames: the tokens that changed most; of equals the earlier ones."""
    return top(dissimilarity(x, still).flatten(1), count).sort(1).values


@dataclass(frozen=True)
class EVSReducer(VideoReducer):
    """EVS for one model."""

    @property
    def fixed_counts(self) -> bool:
        return True

    def choose(self, frames: Frames, images: ImageFeatures) -> Plan:
        still = float("-inf") if self.config.official else _STILL
        return frames.plan(changed_tokens(frames.tokens, self.video_count(*frames.rows.shape), still))

    def video_count(self, frames: int, tokens: int) -> int:
        return min(frames * tokens, max(tokens, self.config.count(frames * tokens)))
