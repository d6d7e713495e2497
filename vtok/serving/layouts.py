"""How the visual tokens of an image are laid out, from sizes alone: what an engine knows before it encodes an image.

Shapes: n visual tokens of an image, V views of it that the vision tower sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vtok.core.prompt import View
from vtok.ops.crops import Cut
from vtok.ops.packing import best_grid, packing


class ImageLayout(NamedTuple):
    """What the n visual tokens of an image or a video are. Hashable; equal for images that are laid out alike.

    Attributes:
        views: rectangles of tokens that together cover 0 .. n-1.
        modality: "image" or "video".
        cut: how the image was cut into views of the vision tower, for methods that look at the tower; `None` = not known.
    """

    views: tuple[View, ...]
    modality: str = "image"
    cut: Cut | None = None

    @property
    def length(self) -> int:
        """n."""
        return self.views[-1].stop

    @property
    def tower_views(self) -> int:
        """V; of videos, their frames."""
        return sum(not view.newline for view in self.views) if self.cut is None else len(self.cut.whole)


def grid_layout(rows: int, columns: int) -> ImageLayout:
    """One grid of tokens (LLaVA-1.5, PaliGemma, a single tile of InternVL)."""
    return ImageLayout((View(0, rows, columns),), cut=Cut((True,), (0,), rows * columns))


def square_layout(n: int) -> ImageLayout:
    """A square grid of n tokens; one row where n is no square."""
    side = math.isqrt(n)
    return grid_layout(side, side) if side * side == n else grid_layout(1, n)


def tiles_layout(tiles: int, rows: int, columns: int) -> ImageLayout:
    """Tiles one behind the other, the last of which shows the whole image (Idefics3, SmolVLM)."""
    size = rows * columns
    cut = Cut((*[False] * (tiles - 1), True), tuple(range(tiles)), size)
    return ImageLayout(tuple(View(i * size, rows, columns) for i in range(tiles)), cut=cut)


def frames_layout(frames: int, rows: int, columns: int, modality: str = "image", newline: bool = False) -> ImageLayout:
    """One grid for every frame (Qwen-VL: an image has one frame).

    Args:
        frames: of the video.
        rows: of tokens, after merging.
        columns: likewise.
        modality: "image" or "video".
        newline: whether one newline token stands behind all frames (LLaVA-OneVision).
    """
    views = tuple(View(i * rows * columns, rows, columns) for i in range(frames))
    end = (View(views[-1].stop, 1, 1, newline=True),) if newline else ()
    return ImageLayout((*views, *end), modality)


def packed_crops_layout(
    image_size: tuple[int, int],
    pinpoints: Sequence[Sequence[int]],
    view: int,
    patch: int,
    max_views: int | None = None,
) -> ImageLayout:
    """A view of the whole image, then crops joined to one grid, a newline token behind every row (LLaVA-NeXT, LLaVA-OneVision).

    Args:
        image_size: (height, width) in pixels.
        pinpoints: `image_grid_pinpoints`, (height, width) each.
        view: pixels along a side of a view.
        patch: pixels along a side of a patch; every patch becomes a token.
        max_views: N of LLaVA-OneVision's "anyres_max_N": joined crops that hold many more tokens are shrunk; `None` = never.
    """
    side, grid = view // patch, best_grid(image_size, pinpoints, view)
    how = packing(grid, side, image_size, max_views)
    crops, (rows, columns) = grid[0] * grid[1], how.size
    cut = Cut((True, *[False] * crops), tuple(range(1 + crops)), packing=how)
    first = View(0, side, side, overview=columns > 0)
    return ImageLayout((first, View(first.stop, rows, columns + 1, newline=True)), cut=cut)
