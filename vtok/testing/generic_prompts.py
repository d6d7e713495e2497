"""Prompts with images for the tiny models of `generic_models`: what their processors would make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtok.patches.hf_vlm.generic.outputs import feature_list
from vtok.testing.generic_models import TOKENS

Values = dict[str, Any]
# Sparse attention of these chooses among padding as well, so that the rows of a batch are not what they are alone.
ALONE = ("dots3_note", "minimax_m3_vl")


def sizes_of(vision: Any) -> tuple[int, int]:
    """(pixels of a patch, pixels of an image) on a side."""
    patch, side = (v if isinstance(v := getattr(vision, key, None) or 8, int) else v[0] for key in ("patch_size", "image_size"))
    return patch, side


def patch_width(vision: Any) -> int:
    """Values of one patch, as processors flatten it."""
    channels = next((c for key in ("in_channels", "in_chans", "num_channels") if (c := getattr(vision, key, None))), 3)
    patch, times = sizes_of(vision)[0], ("temporal_patch_size", "patch_temporal")
    return channels * next((f for key in times if (f := getattr(vision, key, 0))), 1) * patch * patch


def _packed(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Patches of all images in one sequence, and how many there are in time, height and width."""
    grid = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])
    return {"pixel_values": draw(int(grid.prod(1).sum()), patch_width(config.vision_config)), "image_grid_thw": grid}


def _pictures(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Three square images."""
    side = sizes_of(config.vision_config)[1]
    return {"pixel_values": draw(3, 3, side, side), "image_sizes": torch.tensor([[side, side]] * 3)}


def _any_resolution(config: Any, draw: Callable[..., Tensor]) -> Values:
    """An overview and crops of each image."""
    side = sizes_of(config.vision_config)[1]
    sizes = torch.tensor([[side, 2 * side], [2 * side, side], [side, 2 * side]])
    return {"pixel_values": draw(3, 3, 3, side, side), "image_sizes": sizes}


def _gemma4(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Patches with their place in the image, (-1, -1) = padding."""
    vision = config.vision_config
    unified = hasattr(vision, "mm_embed_dim")
    patch = vision.model_patch_size if unified else vision.patch_size
    grids = [(4, 4), (2, 4), (4, 2)]
    place = torch.full((3, 16, 2), -1)
    for i, (rows, columns) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place[i, : rows * columns] = torch.stack([x, y], -1).flatten(0, 1)
    return {"pixel_values": draw(3, 16, 3 * patch * patch), "image_position_ids": place}


def _patches(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Patches of images of different shapes, each a small picture."""
    patch = sizes_of(config.vision_config)[0]
    grid = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])
    return {"pixel_values": draw(int(grid.prod(1).sum()), 3, patch, patch), "image_grid_thw": grid}


def _minicpm(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Patches of images side by side, and how many there are in height and width."""
    patch, sizes = sizes_of(config.vision_config)[0], torch.tensor([[4, 4], [8, 4], [4, 8]], dtype=torch.int32)
    return {"pixel_values": draw(1, 3, patch, patch * int(sizes.prod(1).sum())), "target_sizes": sizes}


def _lfm2(config: Any, draw: Callable[..., Tensor]) -> Values:
    patch, sizes = sizes_of(config.vision_config)[0], torch.tensor([[4, 4], [2, 4], [4, 2]])
    mask = torch.arange(16) < sizes.prod(1, keepdim=True)
    return {"pixel_values": draw(3, 16, 3 * patch * patch), "spatial_shapes": sizes, "pixel_attention_mask": mask.long()}


def _molmo(config: Any, draw: Callable[..., Tensor]) -> Values:
    """One crop an image, four patches pooled to a token."""
    patch = sizes_of(config.vision_config)[0]
    pool = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    crops = [pool + 16 * i for i in range(3)]
    return {
        "pixel_values": draw(3, 16, 3 * patch * patch),
        "image_token_pooling": torch.cat(crops),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 3),
    }


def _tiles(config: Any, draw: Callable[..., Tensor]) -> Values:
    """One tile an image."""
    side = 64 if config.model_type == "perception_lm" else sizes_of(config.vision_config)[1]
    return {"pixel_values": draw(3, 1, 3, side, side)}


def _granite_docling(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Tiles of a prompt's images, in as many places as the most have."""
    side = config.vision_config.image_size
    return {"pixel_values": draw(2, 2, 3, side, side), "pixel_attention_mask": torch.tensor([[True, True], [True, False]])}


def _idefics2(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Images of a prompt, in as many places as the most have; images of zeros are padding."""
    side = config.vision_config.image_size
    pixels = draw(2, 2, 3, side, side)
    pixels[1, 1] = 0
    return {"pixel_values": pixels}


def _two_towers(config: Any, draw: Callable[..., Tensor]) -> Values:
    high = config.high_res_vision_config.image_size
    return {"pixel_values": _pictures(config, draw)["pixel_values"], "high_res_pixel_values": draw(3, 3, high, high)}


def _radio(config: Any, draw: Callable[..., Tensor]) -> Values:
    grid = torch.tensor([[4, 4], [8, 4], [4, 8]])
    return {"pixel_values": draw(int(grid.prod(1).sum()), config.vision_config.patch_dim), "image_grid_hw": grid}


def _fuyu(config: Any, draw: Callable[..., Tensor]) -> Values:
    return {"pixel_values": draw(3, 4, 3 * config.patch_size**2)}


def _codes(config: Any, draw: Callable[..., Tensor]) -> Values:
    """Pictures that become words of the vocabulary."""
    return {"pixel_values": draw(3, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 3)}


def _squares(config: Any, draw: Callable[..., Tensor]) -> Values:
    """A small picture for every visual token."""
    grid, vision = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 4]]), config.vision_config
    side = vision.spatial_merge_size * vision.patch_size
    return {"pixel_values": draw(int(grid.prod(1).sum()), side, side, 3), "image_grid_thw": grid}


# Class -> what its vision side takes, where that is neither of the first two.
PIXELS: dict[str, Callable[[Any, Callable[..., Tensor]], Values]] = {
    **dict.fromkeys(("gemma4", "gemma4_unified"), _gemma4),
    **dict.fromkeys(("granite4_vision", "llava_next_video"), _any_resolution),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), _patches),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _minicpm),
    **dict.fromkeys(("apertus1p5", "emu3"), _codes),
    **dict.fromkeys(("inkling2", "inkling2_loop"), _squares),
    "fuyu": _fuyu,
    "deepseek_vl_hybrid": _two_towers,
    "granite_docling": _granite_docling,
    "idefics2": _idefics2,
    "lfm2_vl": _lfm2,
    "molmo2": _molmo,
    "nemotron_h_omni": _radio,
    "perception_lm": _tiles,
    "video_llama_3": lambda config, draw: {**_packed(config, draw), "image_merge_sizes": torch.tensor([1, 2, 2])},
}


def _vision(model: Any) -> Values:
    generator = torch.Generator().manual_seed(0)
    named = inspect.signature(model.base_model.get_image_features).parameters
    make = PIXELS.get(model.config.model_type) or (_packed if "image_grid_thw" in named else _pictures)
    values = make(model.config, lambda *shape: torch.randn(*shape, generator=generator))
    return {key: value for key, value in values.items() if key in named or key != "image_sizes"}


def inputs(model: Any) -> dict[str, Tensor]:
    """Two prompts with two images and one, the second padded on the left; or one with three."""
    config, base = model.config, model.base_model
    values = _vision(model)
    with torch.no_grad():
        *first, last = (len(x) for x in feature_list(base.get_image_features(**values, return_dict=True)))
    token = config.image_token_id
    start = next((t for key in TOKENS if "start" in key and (t := getattr(config, key, None)) is not None), 50)
    images = [[start, *[token] * count, 51, 7] for count in first]  # where a model returns all of a prompt's as one: one
    rows = [[5, 6, *(token for image in images for token in image), 8, 9], [10, 11, 12, start, *[token] * last, 51, 13, 14, 15]]
    rows = [[*rows[0], *rows[1]]] if config.model_type in ALONE else rows
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    values |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in inspect.signature(base.forward).parameters:
            values[name] = (ids == token).int()
    return values
