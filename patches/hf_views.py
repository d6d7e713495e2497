"""What the visual tokens of an image are, for each family of Hugging Face vision-language models: grids, tiles, newline tokens.

Shapes: n visual tokens of an image, D width of the LLM. All functions have the signature of `hf_features.Views`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
        high, wide = position[-2:, here][:, first : first + len(x)]
        columns = _run(wide)
        rows = _run(high[::columns]) if columns else 0  # of the first frame: text may stand in front of every one
    else:
        return (View(0, 1, len(x)),)
    size = rows * columns
    if not size or len(x) % size:
        return (View(0, 1, len(x)),)
    return tuple(View(start, rows, columns) for start in range(0, len(x), size))


def _run(position: Tensor) -> int:
    """How many of the first positions [n] rise by one each."""
    step = torch.arange(len(position), device=position.device)
    return int((position == position[:1] + step).cumprod(0).sum())


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
    kind = model.config.vision_config.model_type
    full = getattr(model.config, "vision_feature_select_strategy", "default") == "full"
    if kind == "pixtral" or (kind == "clip_vision_model" and full):  # variable resolution; a class token among the visual ones
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


def _side(model: Any) -> int:
    vision = model.config.vision_config
    return vision.image_size // vision.patch_size


def _pooled(model: Any) -> int:
    return math.ceil(_side(model) / 2)
