"""Downsampling of the grid of visual tokens: the third baseline, which many methods do not beat (VTC-Bench, arXiv:2510.07143).

Every grid (image, crop, joined crops, frame) is pooled to a smaller one, as if the connector had always made so few tokens.

Shapes: B images, gh x gw tokens of a grid, oh x ow tokens that it becomes, n visual tokens of an image, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.core.prompt import ImageFeatures, View, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site, at_least_fp32
from vtok.errors import UnsupportedModelError, unknown
from vtok.methods.features.view_tokens import KeepConfig, view_sizes
from vtok.ops.rows import take_rows

MODES = ("avg", "max", "bilinear")
SHAPES = ("rectangle", "square")
_STRETCH = 2  # at most so many times as much along one side as along the other


@dataclass(frozen=True)
class Downsample(KeepConfig):
    """Config of downsampling. It needs nothing but the tokens and acts on every model and on videos, frame by frame.

    Crops that a model joins to one grid (LLaVA-NeXT, LLaVA-OneVision) are pooled as that grid; behind every pooled row stands
    one newline. Where no grid is known (a tower that has dropped tokens itself) the tokens are pooled as one row.

    Attributes:
        keep: share of the tokens of every grid that it becomes ((0, 1]; default 1/9, 64 of 576); rounded, then the largest grid
            of at most as many. 1.0 changes nothing.
        keep_tokens: the same as a count for every view; joined crops get it for each crop.
        mode: `"avg"` or `"max"` over windows that overlap where sizes do not divide (adaptive pooling); or `"bilinear"`,
            interpolation without antialiasing, which is what LLaVA does to frames.
        shape: `"rectangle"`, the grid of most tokens that shrinks one side at most twice as much as the other (192 of 24 x 24:
            12 x 16; 128: 8 x 16); or `"square"`, both sides alike (169 and 121 tokens).
    """

    name: ClassVar[str] = "downsample"

    mode: str = "avg"
    shape: str = "rectangle"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("mode", MODES), ("shape", SHAPES)):
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), allowed)

    def build_vlm(self, info: VLMInfo) -> DownsampleReducer:
        """For one model.

        Raises:
            UnsupportedModelError: a class token stands among the tokens that would be pooled.
        """
        if info.tower is not None and info.tower.prefix_kept:
            raise UnsupportedModelError(
                f"downsample pools grids of patches, and {info.name} has the class token of its vision tower among the "
                "features, as vision_feature_select_strategy='full' says"
            )
        return DownsampleReducer(self)


@functools.lru_cache(maxsize=256)
def smaller_grid(grid: tuple[int, int], count: int, shape: str = "rectangle") -> tuple[int, int]:
    """The grid that one of (rows, columns) is pooled to: at most `count` tokens, at least one."""
    high, wide = grid
    if count >= high * wide:
        return grid
    if shape == "square":
        scale = (count / (high * wide)) ** 0.5
        rows, columns = max(1, int(high * scale + 1e-9)), max(1, int(wide * scale + 1e-9))
        return min(rows, max(1, count // columns)), min(columns, count)  # one line may be all that there is
    best, score = (1, min(wide, count)), (0, 0.0)
    for rows in range(1, min(high, count) + 1):
        columns = min(wide, count // rows)
        stretch = max(rows * wide / (columns * high), columns * high / (rows * wide))
        fits = stretch <= _STRETCH or min(high, wide) == 1
        if fits and (rows * columns, -stretch) > score:
            best, score = (rows, columns), (rows * columns, -stretch)
    if score[0]:
        return best
    return smaller_grid(grid, count, "square")


def pool_grid(x: Tensor, grid: tuple[int, int], out: tuple[int, int], mode: str = "avg") -> Tensor:
    """[V, gh gw, D] -> [V, oh ow, D], raster order, in at least fp32.

    Adaptive windows: i covers floor(i gh / oh) to ceil((i + 1) gh / oh). Bilinear: half-pixel centres, no antialiasing.
    """
    if grid == out:
        return at_least_fp32(x)
    planes = at_least_fp32(x).transpose(1, 2).unflatten(2, grid)
    if mode == "bilinear":
        pooled = F.interpolate(planes, out, mode="bilinear")
    else:
        pooled = (F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d)(planes, out)
    return pooled.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class DownsampleReducer(VLMReducer):
    """Downsampling for any model."""

    exact: ClassVar[bool] = True
    fixed_rows: ClassVar[bool] = True

    config: Any

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.config.keep == 1 else (Site(Place.IMAGE_FEATURES, 0),)

    def features(self, images: ImageFeatures) -> Plan | None:
        batch = len(images.tokens)
        outs = self._outs(images.views)
        if all(_grid(view) == out for view, out in zip(images.views, outs)):
            return None
        device = images.tokens.device
        keep = _centres(images.views, outs, device).expand(batch, -1)
        return Plan(keep, remake=functools.partial(_pooled, images.views, outs, self.config.mode, keep))

    def _outs(self, views: tuple[View, ...]) -> tuple[tuple[int, int], ...]:
        """The grid that every view becomes, newlines left out."""
        return tuple(self._out(view, views) for view in views)

    def _out(self, view: View, views: tuple[View, ...]) -> tuple[int, int]:
        high, wide = _grid(view)
        if not wide:
            return high, wide
        count = self.config.count(high * wide)
        if self.config.keep_tokens is not None and view.newline:
            overview = next((v for v in views if v.overview), None)
            crops = 1 if overview is None else len(view_sizes((overview, view))) - 1
            count = min(high * wide, crops * self.config.keep_tokens)
        return smaller_grid((high, wide), count, self.config.shape)

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        return sum(rows * (columns + view.newline) for view, (rows, columns) in zip(views, self._outs(views)))


def _grid(view: View) -> tuple[int, int]:
    """Rows and columns of a view without its newlines."""
    return view.rows, view.columns - view.newline


@functools.lru_cache(maxsize=64)
def _centres(views: tuple[View, ...], outs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Where the pooled tokens stand: at the middle of what they show; newlines behind the middle row."""
    found: list[int] = []
    for view, (rows, columns) in zip(views, outs):
        high, wide = _grid(view)
        for i in range(rows):
            line = view.start + (2 * i + 1) * high // (2 * rows) * view.columns
            found += [line + (2 * j + 1) * wide // (2 * columns) for j in range(columns)]
            found += [line + wide] if view.newline else []
    return torch.tensor(found, dtype=torch.int64, device=device)


def _pooled(views: tuple[View, ...], outs: tuple[tuple[int, int], ...], mode: str, keep: Tensor, x: Tensor) -> Tensor:
    """[B, n, D] -> [B, M, D], in the order of `_centres`."""
    parts: list[Tensor] = []
    first = 0
    for view, (rows, columns) in zip(views, outs):
        high, wide = _grid(view)
        width = columns + view.newline
        same = take_rows(x, keep[:, first : first + rows * width]).unflatten(1, (rows, width))
        first += rows * width
        if columns:
            tokens = x[:, view.start : view.stop].unflatten(1, (high, view.columns))[:, :, :wide].flatten(1, 2)
            made = pool_grid(tokens, (high, wide), (rows, columns), mode).to(x.dtype).unflatten(1, (rows, columns))
            same = torch.cat([made, same[:, :, columns:]], 2)
        parts.append(same.flatten(1, 2))
    return torch.cat(parts, 1)
