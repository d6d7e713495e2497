"""What the visual tokens of an image are, for each family of Hugging Face vision-language models: grids, tiles, newline tokens.

Shapes: n visual tokens of an image, D width of the LLM. All functions have the signature of `hf_features.Views`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.prompt import View

Kwargs = Mapping[str, Any]


def square(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """One square grid; one row where n is no square."""
    return (_grid(0, len(x)),)


def tiles(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """Idefics3 and SmolVLM: the tiles of all images of a row, one behind the other, each a square grid."""
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    size = side * side // config.scale_factor**2
    if len(x) % size:
        return (View(0, 1, len(x)),)
    return tuple(_grid(start, size) for start in range(0, len(x), size))


def any_resolution(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """LLaVA-NeXT and LLaVA-OneVision: an overview, then the crops as one grid with a newline token behind each row.

    Where the rows end is read from the newline tokens themselves: they are copies of one parameter.
    """
    newline = getattr(model, "image_newline", None)
    whole = (View(0, 1, len(x)),)
    if newline is None:
        return whole
    ends = (x == newline.detach().to(x)).all(-1).nonzero()[:, 0].tolist()
    if modality == "video":  # frames, then one newline token
        frames = (len(x) - 1) // (size := _pooled(model) ** 2)
        if ends != [len(x) - 1] or frames * size != len(x) - 1:
            return whole
        return (*(_grid(f * size, size) for f in range(frames)), View(len(x) - 1, 1, 1, newline=True))
    if not ends:
        return whole
    columns = ends[1] - ends[0] if len(ends) > 1 else None
    if columns is None:  # no crops: the image and one newline token, or a single row of crops
        overview = _side(model) ** 2
        columns = len(x) - overview if ends[0] == len(x) - 1 and len(x) > overview else 0
    start = ends[0] + 1 - columns
    if columns <= 0 or start <= 0 or ends != list(range(ends[0], len(x), columns)):
        return whole
    only = columns == 1
    return (_grid(0, start)._replace(overview=not only), View(start, len(ends), columns, newline=True))


def frames(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """Qwen-VL: one grid for every frame of an image (one) or a video, read from the rotary positions of its columns."""
    position, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
    sizes = kwargs.get(f"{modality}_grid_thw")
    if sizes is not None:
        merge = model.config.vision_config.spatial_merge_size
        rows, columns = (int(side) // merge for side in sizes[number][1:].tolist())
    elif ids is not None and isinstance(position, Tensor) and position.ndim == 3 and position.shape[1:] == ids.shape:
        here = ids == getattr(model.config, f"{modality}_token_id")
        spans = position[-2:, here][:, first : first + len(x)]
        rows, columns = (spans.amax(1) - spans.amin(1) + 1).tolist()
    else:
        return (View(0, 1, len(x)),)
    size = rows * columns
    if not size or len(x) % size:
        return (View(0, 1, len(x)),)
    return tuple(View(start, rows, columns) for start in range(0, len(x), size))


def _grid(start: int, n: int) -> View:
    side = math.isqrt(n)
    return View(start, side, side) if side * side == n else View(start, 1, n)


def _side(model: Any) -> int:
    vision = model.config.vision_config
    return vision.image_size // vision.patch_size


def _pooled(model: Any) -> int:
    return math.ceil(_side(model) / 2)
