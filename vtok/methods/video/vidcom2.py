"""VidCom2: Video Compression Commander, Plug-and-Play Inference Acceleration for Video Large Language Models (Liu et al., EMNLP
2025, arXiv:2505.14454). Frames that are unlike the video get more of the budget; a frame keeps the tokens that are unlike the
mean of the video and the mean of the frame.

Written from a description of the authors' program (xuyang-liu16/VidCom2 at 944a17d) and of vLLM's variant (at 0f17ee0), and
arrays that they made. The programs go beyond the paper: they compare the half of the channels that varies least, by five
Gaussians of the distance where the paper has a cosine.

Shapes: B videos, F frames, m tokens of each, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, VLMInfo
from vtok.core.reduction import Plan
from vtok.methods.preset import Official
from vtok.methods.video.video_tokens import Frames, VideoConfig, VideoReducer
from vtok.ops.matching import unit
from vtok.ops.rows import rows_where

TEMPERATURE = 0.01
_WIDTHS = tuple(2.0**e for e in range(-3, 2))  # variances of the Gaussians


@dataclass(frozen=True)
class VidCom2(Official, VideoConfig):
    """Config of VidCom2. Images are left alone.

    The authors' program keeps about a share of the tokens, as quotas of frames are rounded and capped one by one; vLLM's
    variant, the default here, then drops or adds single tokens until the count is met.

    Attributes:
        keep: share of the visual tokens of a video that stay (program: R_RATIO; (0, 1]; default 0.25; the paper has 0.15 too),
            rounded down, but at least one token a frame. 1.0 changes nothing.
        keep_tokens: the same as a count for a video.
        preset: `"official"`: the authors' counts; positions are numbered anew, on Qwen-VL kept, unless `positions` is given.
    """

    name: ClassVar[str] = "vidcom2"

    def __post_init__(self) -> None:
        super().__post_init__()

    def count(self, n: int) -> int:
        """Rounded down, as in vLLM's program."""
        return super().count(n) if self.keep is None else int(n * self.keep)

    def build_vlm(self, info: VLMInfo) -> VidCom2Reducer:
        self.check(info)
        return (OfficialReducer if self.official else VidCom2Reducer)(self, info)


class Ranked(NamedTuple):
    """What the choice looks at.

    Attributes:
        alike: [B, F, m], similarity of a token to the means of video and frame; the lowest stay.
        quota: [B, F] int64, tokens that every frame keeps.
    """

    alike: Tensor
    quota: Tensor


def rank_frames(x: Tensor, keep: float) -> Ranked:
    """Similarities and quotas.

    Args:
        x: [B, F, m, D].
        keep: share of the tokens that stays.
    """
    tokens, width = x.shape[2:]
    spread = x.flatten(1, 2).var(1, correction=0)
    channels = spread.argsort(dim=1, stable=True)[:, : max(1, width // 2)]
    z = unit(x.gather(3, channels[:, None, None].expand(*x.shape[:3], -1)))
    video, frame = (_similarity(z, z.mean(dims, keepdim=True)) for dims in ((1, 2), (2,)))
    unlike = -video.mean(2)
    share = ((unlike - unlike.amax(1, keepdim=True)) / TEMPERATURE).softmax(1)
    rate = (keep * (1 + share - share.mean(1, keepdim=True))).clamp_max(1)
    quota = (rate.float() * tokens).round().long().clamp_min(1)  # halves to even, in single precision, as the program
    return Ranked(video + frame, quota)


def _similarity(z: Tensor, centre: Tensor) -> Tensor:
    distance = (z - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in _WIDTHS]).sum(0)


def frame_tokens(ranked: Ranked) -> Tensor:
    """[B, F, m] bool: every frame's quota of least similar tokens; of equals the first."""
    place = torch.arange(ranked.alike.shape[2], device=ranked.alike.device).expand(ranked.alike.shape)
    order = ranked.alike.argsort(dim=2, stable=True)
    rank = torch.empty_like(place).scatter_(2, order, place)
    return rank < ranked.quota[..., None]


def exact_tokens(ranked: Ranked, count: int) -> Tensor:
    """[B, count] int64, rising, numbered over all frames: of too many those that are most similar go, of too few the least
    similar of the others come in."""
    inside, alike = frame_tokens(ranked).flatten(1), ranked.alike.flatten(1)
    order = alike.argsort(dim=1, stable=True)
    order = order.gather(1, (~inside.gather(1, order)).int().argsort(dim=1, stable=True))
    return order[:, :count].sort(1).values


@dataclass(frozen=True)
class VidCom2Reducer(VideoReducer):
    """VidCom2 with an exact count."""

    @property
    def fixed_counts(self) -> bool:
        return True

    def choose(self, frames: Frames, images: ImageFeatures) -> Plan:
        count = self.video_count(*frames.rows.shape)
        return frames.plan(exact_tokens(rank_frames(frames.tokens, self._share(frames)), count))

    def _share(self, frames: Frames) -> float:
        config: VidCom2 = self.config
        return config.keep if config.keep is not None else config.count(frames.rows.numel()) / frames.rows.numel()

    def video_count(self, frames: int, tokens: int) -> int:
        return min(frames * tokens, max(frames, self.config.count(frames * tokens)))


@dataclass(frozen=True)
class OfficialReducer(VidCom2Reducer):
    """VidCom2 as its authors count; how many stay costs one host synchronisation."""

    @property
    def fixed_counts(self) -> bool:
        return False

    def choose(self, frames: Frames, images: ImageFeatures) -> Plan:
        stays = frame_tokens(rank_frames(frames.tokens, self._share(frames))).flatten(1)
        counts = stays.sum(1).tolist()
        rows, valid = rows_where(stays, max(counts))
        return frames.plan(rows, valid if min(counts) < max(counts) else None)
