"""What methods share that choose among the frames of a video, before the LLM.

Frames are the views of a video: a grid of visual tokens each, as the model merges patches (and, in Qwen-VL, pairs of pictures).
What stands behind a whole video (LLaVA-OneVision's newline) stays.

Shapes: B videos that are laid out alike, F frames, m tokens of each, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, View, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site, at_least_fp32
from vtok.errors import StateError, UnsupportedModelError
from vtok.methods.features.view_tokens import KeepConfig


class Frames(NamedTuple):
    """The tokens of B videos, frame by frame.

    Attributes:
        tokens: [B, F, m, D], in at least fp32.
        rows: [F, m] int64, their places in the video.
        behind: [r] int64, rows of no frame.
    """

    tokens: Tensor
    rows: Tensor
    behind: Tensor

    def plan(self, chosen: Tensor, valid: Tensor | None = None) -> Plan:
        """The plan that keeps tokens [B, k] (numbered over all frames) and what stands behind them."""
        behind = self.behind.expand(len(chosen), -1)
        if valid is not None:
            valid = torch.cat([valid, torch.ones_like(behind, dtype=torch.bool)], 1)
        return Plan(torch.cat([self.rows.flatten()[chosen], behind], 1), valid=valid)


def frames_of(images: ImageFeatures, method: str) -> Frames:
    """The frames of videos.

    Raises:
        StateError: it cannot be told which tokens are which frame.
    """
    shown = [view for view in images.views if not view.newline]
    sizes = {view.stop - view.start for view in shown}
    grids = {(view.rows, view.columns) for view in shown}
    if len(sizes) != 1 or grids == {(1, images.tokens.shape[1])}:
        raise StateError(
            f"{method} must know which of the {images.tokens.shape[1]} visual tokens of this video belong to which frame, and "
            "the inputs do not say: pass them as the processor returns them, video_grid_thw and input_ids included, with no "
            "token left out already (video_compression_mask)"
        )
    rows, behind = _places(images.views, images.tokens.device)
    return Frames(at_least_fp32(images.tokens[:, rows.flatten()]).unflatten(1, rows.shape), rows, behind)


@functools.lru_cache(maxsize=64)
def _places(views: tuple[View, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the frames [F, m], and of what stands behind them."""
    shown = [view for view in views if not view.newline]
    size = shown[0].stop - shown[0].start
    rows = torch.tensor([view.start for view in shown], device=device)[:, None] + torch.arange(size, device=device)
    behind = [row for view in views if view.newline for row in range(view.start, view.stop)]
    return rows, torch.tensor(behind, dtype=torch.int64, device=device)


def shape_of(views: tuple[View, ...]) -> tuple[int, int, int]:
    """(F, m, tokens behind) of a video."""
    shown = [view for view in views if not view.newline]
    return len(shown), shown[0].stop - shown[0].start, sum(view.stop - view.start for view in views if view.newline)


@dataclass(frozen=True)
class VideoConfig(KeepConfig):
    """A method for videos: images are left alone.

    Attributes:
        keep: share of the visual tokens of a video that stay ((0, 1]; default 0.25).
        keep_tokens: the same as a count.
    """

    default_keep: ClassVar[float | None] = 0.25

    def check(self, info: VLMInfo) -> None:
        """Raises unless a model reads videos."""
        if info.videos and info.no_frames is not None:
            raise UnsupportedModelError(
                f"{self.name} compares the frames of a video, which cannot be told of {info.name}: {info.no_frames}; choose "
                "another method, such as downsample"
            )
        if not info.videos:
            raise UnsupportedModelError(
                f"{self.name} drops visual tokens of videos, and {info.name} reads none; for images choose another method, "
                "such as downsample"
            )


@dataclass(frozen=True)
class VideoReducer(VLMReducer):
    """Chooses among the frames of videos; subclasses say how.

    A stated prompt holds images, of which nothing leaves: costs are measured on videos (`calibration=`), hence not `exact`.
    """

    exact: ClassVar[bool] = False

    config: Any
    info: VLMInfo

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.config.keep == 1 else (Site(Place.IMAGE_FEATURES, 0),)

    def features(self, images: ImageFeatures) -> Plan | None:
        if images.modality != "video":
            return None
        found = frames_of(images, self.config.name)
        if self.video_count(*found.rows.shape) == found.rows.numel():
            return None
        return self.choose(found, images)

    def choose(self, frames: Frames, images: ImageFeatures) -> Plan:
        """Some tokens leave."""
        raise NotImplementedError

    def video_count(self, frames: int, tokens: int) -> int:
        """Tokens that stay of so many frames of so many tokens."""
        raise NotImplementedError

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        if modality != "video":
            return n
        frames, tokens, behind = shape_of(views)
        return self.video_count(frames, tokens) + behind
