"""How LLaVA-NeXT and LLaVA-OneVision join the features of crops (transformers 5.24): side by side, cut free of padding, shrunk
if there are too many, a newline behind every line.

Shapes: n patches of a view, L feature rows of an image, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import ConfigError


class Packing(NamedTuple):
    """How LLaVA-NeXT and LLaVA-OneVision join crops: put side by side, cut free of padding, shrunk if there are too many.

    Attributes:
        grid: rows and columns of crops; (0, 0) = no crops, the image is one view.
        side: patches along a side of a view.
        lines, columns: (first, end) of what is left of the joined grid of patches without padding.
        size: lines and columns after shrinking (bilinear), the same as before if nothing shrinks.
    """

    grid: tuple[int, int]
    side: int
    lines: tuple[int, int]
    columns: tuple[int, int]
    size: tuple[int, int]

    @property
    def shrunk(self) -> bool:
        return self.size != (self.lines[1] - self.lines[0], self.columns[1] - self.columns[0])


def best_grid(image_size: tuple[int, int], resolutions: Sequence[Sequence[int]], view: int) -> tuple[int, int]:
    """Rows and columns of crops: of the allowed resolutions the one that shows most pixels of the image and wastes fewest.

    Args:
        image_size: (height, width) in pixels.
        resolutions: (height, width) each, multiples of `view` (`image_grid_pinpoints`).
        view: pixels along a side of a view.
    """
    height, width = image_size

    def fit(size: Sequence[int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - size[0] * size[1]

    high, wide = max(resolutions, key=fit)
    return high // view, wide // view


def packing(grid: tuple[int, int], side: int, image_size: tuple[int, int], max_views: int | None = None) -> Packing:
    """Packing of one image.

    Args:
        grid: rows and columns of crops, (0, 0) if the image is one view.
        side: patches along a side of a view.
        image_size: (height, width) of the original image in pixels.
        max_views: LLaVA-OneVision's "anyres_max_N": the crops shrink if they hold over 1.1^2 times N views; `None` = never.
    """
    high, wide = grid[0] * side, grid[1] * side
    if not high or not wide:
        return Packing((0, 0), side, (0, 0), (0, 0), (0, 0))
    height, width = image_size
    lines, columns = (0, high), (0, wide)
    if width / height > wide / high:  # rounding as upstream: 7 decimals, then down
        edge = (high - int(round(height * (wide / width), 7))) // 2
        lines = (edge, high - edge)
    else:
        edge = (wide - int(round(width * (high / height), 7))) // 2
        columns = (edge, wide - edge)
    size = (lines[1] - lines[0], columns[1] - columns[0])
    if max_views is not None:
        ratio = math.sqrt(size[0] * size[1] / (max_views * side**2))
        if ratio > 1.1:
            size = (int(size[0] // ratio), int(size[1] // ratio))
    return Packing((grid[0], grid[1]), side, lines, columns, size)


def pack(x: Tensor, how: Packing, newline: Tensor) -> Tensor:
    """Joins what belongs to patches as the model joins features.

    Args:
        x: [1 + crops, n, C], the view of the whole page first.
        how: packing of the image.
        newline: [C], ends every line of crops.

    Returns:
        [L, C]: the first view, then line by line the crops.

    Raises:
        ConfigError: views or patches that do not fit the packing.
    """
    (rows, columns), side = how.grid, how.side
    if x.shape[:2] != (1 + rows * columns, side**2):
        raise ConfigError(
            f"{rows} x {columns} crops and the whole page, {side} x {side} patches each, make {1 + rows * columns} views of "
            f"{side**2} patches, got {list(x.shape[:2])}"
        )
    if not rows:
        return torch.cat([x[0], newline[None]])
    crops = x[1:].view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
    crops = crops[slice(*how.lines), slice(*how.columns)]
    if how.shrunk:
        crops = F.interpolate(crops.permute(2, 0, 1)[None], how.size, mode="bilinear")[0].permute(1, 2, 0)
    crops = torch.cat([crops, newline.expand(how.size[0], 1, -1)], 1)
    return torch.cat([x[0], crops.flatten(0, 1)])
