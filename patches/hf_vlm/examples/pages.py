"""Prompts for the tiny vision-language models of families that cut an image into crops: pages, parts of which are blank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE, START, END, PAD = 119, 117, 116, 0
WHOLE_PAGE, FIRST_CROP = 115, 40  # markers in front of the tiles of Idefics3

Inputs = dict[str, Tensor]


def words(generator: torch.Generator, count: int) -> list[int]:
    """Text that holds no marker."""
    return torch.randint(50, 110, (count,), generator=generator).tolist()


def padded(rows: list[list[int]]) -> Inputs:
    """Prompts as a batch, short ones padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _views(generator: torch.Generator, count: int, side: int) -> Tensor:
    """[count, 3, side, side]: noise, of which a part of every view is blank."""
    pixels = torch.randn(count, 3, side, side, generator=generator)
    for i, view in enumerate(pixels):
        view[:, :, : side * (i % 4) // 4] = 0.3
    return pixels


def _rows(generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Text in front of the images, text behind them."""
    return words(generator, 3), words(generator, 6)


def any_resolution(model: Any, generator: torch.Generator) -> Inputs:
    """LLaVA-NeXT and LLaVA-OneVision: two pages of as many crops as their shapes and the model's resolutions ask for."""
    front, back = _rows(generator)
    sizes, side = torch.tensor([[14, 32], [30, 25]]), 16
    most = 1 + max(height * width // side**2 for height, width in model.config.image_grid_pinpoints)
    pixels = torch.stack([_views(generator, most, side) for _ in range(2)])
    with torch.no_grad():
        found = model.model.get_image_features(pixels, image_sizes=sizes, return_dict=True).pooler_output
    rows = [[*front, START, *[IMAGE] * len(x), END, *back[: 6 - 2 * i]] for i, x in enumerate(found)]
    return {**padded(rows), "pixel_values": pixels, "image_sizes": sizes}


def plain_tiles(model: Any, generator: torch.Generator) -> Inputs:
    """InternVL: a page of two crops and an image of one tile; a page of four crops."""
    front, back = _rows(generator)

    def page(tiles: int) -> list[int]:
        return [START, *[IMAGE] * 16 * tiles, END]

    rows = [[*front, *page(3), *words(generator, 2), *page(1), *back], [*front[:1], *page(5), *back[:4]]]
    return {**padded(rows), "pixel_values": _views(generator, 9, 32)}


def marked_tiles(model: Any, generator: torch.Generator) -> Inputs:
    """Idefics3 and SmolVLM: the same, every tile behind a marker; some tiles are padded."""
    front, back = _rows(generator)

    def page(crops: int) -> list[int]:
        markers = [*range(FIRST_CROP, FIRST_CROP + crops), WHOLE_PAGE]
        return [token for marker in markers for token in (START, marker, *[IMAGE] * 16)] + [START]

    rows = [[*front, *page(2), *words(generator, 2), *page(0), *back], [*front[:1], *page(4), *back[:4]]]
    pixels = torch.stack([_views(generator, 5, 32) for _ in range(2)])
    pixels[0, 4] = 0  # the first row has four tiles
    seen = torch.ones(2, 5, 32, 32, dtype=torch.long)
    seen[0, 0, 20:], seen[1, 2, :, 24:], seen[0, 4] = 0, 0, 0  # padding of tiles
    return {**padded(rows), "pixel_values": pixels, "pixel_attention_mask": seen}
