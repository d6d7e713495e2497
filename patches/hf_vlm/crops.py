"""How images were cut into views, for each family of Hugging Face vision-language models: which view shows the whole page, the
number of every other one, and how crops were joined.

Shapes: n visual tokens of an image, D width of the LLM, L columns of the prompt. All functions have the signature of
`hf_features.Cuts`, and return `None` for an image of which they cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.ops.crops import Cut, packed_layout
from vtok.ops.packing import best_grid, packing

Call = Mapping[str, Any]


def lone(model: Any, images: Sequence[Tensor], views: Sequence[int], numbers: Sequence[int], call: Call) -> list[Cut | None]:
    """Every image is one view, which shows all of it.

    Args:
        model: the one that encoded them.
        images: their features [n, D].
        views: views of the vision tower that each is made of.
        numbers: which of the images in `call` each is; generate() repeats images for beams.
        call: keywords of the model and of `get_image_features`.
    """
    return [Cut((True,), (0,), len(x)) if count == 1 else None for x, count in zip(images, views)]


def packed(model: Any, images: Sequence[Tensor], views: Sequence[int], numbers: Sequence[int], call: Call) -> list[Cut | None]:
    """LLaVA-NeXT and LLaVA-OneVision: an overview, then crops joined to one grid with a newline behind every line."""
    sizes, config = call.get("image_sizes"), model.config
    if sizes is None:
        return [None] * len(images)
    pixels = config.vision_config.image_size
    aspect = call.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None)
    most = None if aspect is None else int(aspect.rpartition("_")[2])  # "anyres_max_9"
    side = pixels // config.vision_config.patch_size
    found: list[Cut | None] = []
    for x, count, number in zip(images, views, numbers):
        height, width = (int(length) for length in sizes[number])
        grid = best_grid((height, width), config.image_grid_pinpoints, pixels) if count > 1 else (0, 0)
        how = packing(grid, side, (height, width), most)
        fits = count == 1 + grid[0] * grid[1] and packed_layout(how).length == len(x)
        found.append(Cut((True, *[False] * (count - 1)), tuple(range(count)), packing=how) if fits else None)
    return found


def tiles(model: Any, images: Sequence[Tensor], views: Sequence[int], numbers: Sequence[int], call: Call) -> list[Cut | None]:
    """InternVL: every tile is an image of its own; those whose placeholders are neighbours are a page, its thumbnail last."""
    ids = call.get("input_ids")
    found: list[Cut | None] = []
    if ids is not None and images:
        size = len(images[0])
        for row in ids:
            for _, length in _runs(row == model.config.image_token_id):
                count, rest = divmod(length, size)
                found += [None] * count if rest else [Cut((i == count - 1,), (i,), size) for i in range(count)]
    return found if len(found) == len(images) else [None] * len(images)


def rows(model: Any, images: Sequence[Tensor], views: Sequence[int], numbers: Sequence[int], call: Call) -> list[Cut | None]:
    """Idefics3 and SmolVLM: an image holds the tiles of all pages of a row; the whole page comes last of each.

    The prompt names every tile by a marker in front of it, crops by their row and column. The last tile of a row is a whole
    page, and so is every other one with the same marker.
    """
    ids = call.get("input_ids")
    if ids is None or len(ids) != len(images):
        return [None] * len(images)
    return [_marked(row, row == model.config.image_token_id, len(x), count) for row, x, count in zip(ids, images, views)]


def _marked(ids: Tensor, here: Tensor, tokens: int, views: int) -> Cut | None:
    """The tiles of one row of the prompt. ids, here [L]; `tokens` of all its tiles together."""
    size = tokens // max(views, 1)
    runs = list(_runs(here))
    if not size or sum(length for _, length in runs) != tokens or any(length % size for _, length in runs):
        return None
    starts = torch.tensor([first + i for first, length in runs for i in range(0, length, size)], device=ids.device)
    markers = ids[(starts - 1).clamp_min(0)].tolist()
    whole = [marker == markers[-1] for marker in markers]
    order: list[int] = []
    for i in range(views):
        order.append(0 if i == 0 or whole[i - 1] else order[-1] + 1)
    return Cut(tuple(whole), tuple(order), size)


def _runs(here: Tensor) -> Iterator[tuple[int, int]]:
    """(first column, length) of every stretch of True in [L]."""
    edges = torch.diff(here.int(), prepend=here.new_zeros(1).int(), append=here.new_zeros(1).int())
    yield from ((a, b - a) for a, b in zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()))
