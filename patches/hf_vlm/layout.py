"""What the visual tokens of an image are, for each family of Hugging Face vision-language models: grids, tiles, newline tokens.

Shapes: n visual tokens of an image, D width of the LLM. All functions have the signature of `hf_features.Views`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vtok.core.prompt import View

Kwargs = Mapping[str, Any]


def square(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """One square grid; one row where n is no square."""
    return (_grid(0, len(x)),)


def patches(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """LLaVA: one token a patch: a square grid, or under a tower of variable resolution (Pixtral) that of the image itself."""
    sizes, side = kwargs.get("image_sizes"), getattr(model.vision_tower, "patch_size", 0)
    if sizes is not None and side:
        rows, columns = (int(pixels) // side for pixels in sizes[number])
        return (View(0, rows, columns),) if rows * columns == len(x) else (View(0, 1, len(x)),)
    return (View(0, 1, len(x)),) if _varies(model) else (_grid(0, len(x)),)


def tiles(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Kwargs) -> tuple[View, ...]:
    """Idefics3 and SmolVLM: the tiles of all images of a row, one behind the other, each a square grid."""
    config, pixels = model.config, kwargs.get("pixel_values")
    built = config.vision_config.image_size
    image = kwargs.get("pixel_size", (built, built))[-1] if pixels is None else pixels.shape[-1]
    side = image // config.vision_config.patch_size
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
    """Qwen-VL: one grid for every frame of an image (one) or a video.

    generate() encodes images ahead and takes their sizes away: the grid is then read from the rotary positions of the columns,
    of the first frame alone, as text may stand between frames (time stamps) and move the positions of the next.
    """
    position, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
    sizes = kwargs.get(f"{modality}_grid_thw")
    if sizes is not None:
        merge = model.config.vision_config.spatial_merge_size
        rows, columns = (int(side) // merge for side in sizes[number][1:].tolist())
    elif ids is not None and isinstance(position, Tensor) and position.ndim == 3 and position.shape[1:] == ids.shape:
        here = ids == getattr(model.config, f"{modality}_token_id")
        rows, columns = _first_grid(*position[-2:, here][:, first : first + len(x)].tolist())
    else:
        return (View(0, 1, len(x)),)
    size = rows * columns
    if not size or len(x) % size:
        return (View(0, 1, len(x)),)
    return tuple(View(start, rows, columns) for start in range(0, len(x), size))


def _first_grid(height: list[int], width: list[int]) -> tuple[int, int]:
    """(rows, columns) of the grid that tokens in raster order begin with, from their positions in height and width."""
    y, x, n = height[0], width[0], len(height)
    columns = next((i for i in range(1, n) if (height[i], width[i]) != (y, x + i)), n)
    starts = range(columns, n - columns + 1, columns)
    rows = next((i for i, at in enumerate(starts, 1) if (height[at], width[at]) != (y + i, x)), len(starts) + 1)
    return rows, columns


def even_counts(model: Any, modality: str, images: Sequence[Tensor], total: int, kwargs: Kwargs) -> list[int] | None:
    """Views of the vision tower that every image is made of, where each of the `total` views gives as many tokens.

    Args:
        model: the one that encoded them.
        modality: "image" or "video".
        images: their features [n, D].
        total: views of all images.
        kwargs: of the call.

    Returns:
        One number an image; `None` where it cannot be told.
    """
    tokens = sum(len(x) for x in images)
    counts = [len(x) * total // tokens for x in images]
    return counts if all(count * tokens == len(x) * total for count, x in zip(counts, images)) else None


def crop_counts(model: Any, modality: str, images: Sequence[Tensor], total: int, kwargs: Kwargs) -> list[int] | None:
    """LLaVA-NeXT and LLaVA-OneVision: an overview and as many crops as the image's shape asks for, padding cut off later."""
    sizes = kwargs.get("image_sizes")
    if modality == "video" or sizes is None:
        return even_counts(model, modality, images, total, kwargs)
    count = sys.modules[type(model).__module__].image_size_to_num_patches
    config, numbers = model.config, kwargs.get("batch_num_images")
    alone = [True] * len(sizes) if numbers is None else [int(n) == 1 for n in numbers for _ in range(int(n))]
    side = config.vision_config.image_size
    counts = [count(size, config.image_grid_pinpoints, side) if one else 1 for size, one in zip(sizes, alone)]
    return counts if sum(counts) == total and len(counts) == len(images) else None


def tower_grid(model: Any) -> tuple[int, int] | None:
    """LLaVA-1.5, PaliGemma: the patches of the vision tower, one token each, whatever the image."""
    if _varies(model):
        return None
    return _side(model), _side(model)


def pooled_grid(model: Any) -> tuple[int, int] | None:
    """Gemma3: a fixed number of tokens, pooled from the tower's."""
    side = math.isqrt(model.config.mm_tokens_per_image)
    return side, side


def shuffled_grid(model: Any) -> tuple[int, int] | None:
    """InternVL: patches of a tile, folded by pixel shuffle."""
    config = model.config
    pairs = zip(config.vision_config.image_size, config.vision_config.patch_size)
    rows, columns = (int(size // patch * config.downsample_ratio) for size, patch in pairs)
    return rows, columns


def _grid(start: int, n: int) -> View:
    side = math.isqrt(n)
    return View(start, side, side) if side * side == n else View(start, 1, n)


def _varies(model: Any) -> bool:
    """Whether the vision tower takes images of any shape as they are."""
    return model.config.vision_config.model_type == "pixtral"


def _side(model: Any) -> int:
    vision = model.config.vision_config
    return vision.image_size // vision.patch_size


def _pooled(model: Any) -> int:
    return math.ceil(_side(model) / 2)
