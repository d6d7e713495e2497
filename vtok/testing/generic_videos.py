"""Prompts with videos for the tiny models of `generic_models` that read them: what their processors would make."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtok.patches.hf_vlm.generic.outputs import feature_list
from vtok.patches.hf_vlm.generic.videos import encoder_of, placeholders_of
from vtok.testing.generic_models import TOKENS
from vtok.testing.generic_prompts import ALONE, Values, patch_width, sizes_of

FRAMES, SHAPES = (4, 2, 4), ((4, 4), (8, 4), (4, 8))  # of three videos: frames, and patches of each in height and width
# Classes whose processors write all placeholders of a video in one run, without text between frames.
UNBROKEN = (
    "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "hy_v4_vl", "hyperclovax_vision_v2", "llava_next_video", "perception_lm",
    "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "video_llava",
)  # fmt: skip
VIDEO_CLASSES = (
    "cohere_compass", "cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "exaone4_5", "gemma4", "gemma4_unified", "glm46v",
    "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga", "hy_v4_vl", "kimi_k25", "lfm3_vl", "llava_next_video", "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni", "perception_lm",
    "qwen2_5_omni_thinker", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp", "video_llama_3",
    "video_llava", "dots3_note", "hyperclovax_vision_v2",
)  # fmt: skip
Draw = Callable[..., Tensor]


def _packed(config: Any, draw: Draw) -> Values:
    """Patches of all videos in one sequence."""
    grid = torch.tensor([[frames, *shape] for frames, shape in zip(FRAMES, SHAPES)])
    return {"pixel_values_videos": draw(int(grid.prod(1).sum()), patch_width(config.vision_config)), "video_grid_thw": grid}


def _patches(config: Any, draw: Draw) -> Values:
    """The same, each patch a small picture."""
    values, patch = _packed(config, draw), sizes_of(config.vision_config)[0]
    return {**values, "pixel_values_videos": draw(len(values["pixel_values_videos"]), 3, patch, patch)}


def _pictures(config: Any, draw: Draw) -> Values:
    """Four frames of every video as square pictures."""
    side = sizes_of(config.vision_config)[1]
    return {"pixel_values_videos": draw(3, 4, 3, side, side)}


def _gemma4(config: Any, draw: Draw) -> Values:
    """Patches of every frame with their place in it, (-1, -1) = padding."""
    vision = config.vision_config
    place = torch.full((sum(FRAMES), 16, 2), -1)
    small = hasattr(vision, "mm_embed_dim")  # every patch is a token
    sides = ((2, 2), (1, 2), (2, 1)) if small else ((4, 4), (2, 4), (4, 2))
    shapes = [shape for frames, shape in zip(FRAMES, sides) for _ in range(frames)]
    for i, (rows, columns) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place[i, : rows * columns] = torch.stack([x, y], -1).flatten(0, 1)
    patch = vision.model_patch_size if small else vision.patch_size
    pixels = draw(sum(FRAMES), 16, 3 * patch * patch)
    return {"pixel_values_videos": pixels, "video_position_ids": place, "num_frames_per_video": torch.tensor(FRAMES)}


def _minicpm(config: Any, draw: Draw) -> Values:
    """Patches of all frames side by side, and how many there are in height and width."""
    sizes = torch.tensor([shape for frames, shape in zip(FRAMES, SHAPES) for _ in range(frames)], dtype=torch.int32)
    patch = sizes_of(config.vision_config)[0]
    pixels = draw(1, 3, patch, patch * int(sizes.prod(1).sum()))
    return {"pixel_values_videos": pixels, "target_sizes_videos": sizes}


def _molmo(config: Any, draw: Draw) -> Values:
    """Four patches of a frame pooled to a token."""
    patch = sizes_of(config.vision_config)[0]
    pool = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values_videos": draw(sum(FRAMES), 16, 3 * patch * patch),
        "video_token_pooling": torch.cat([pool + 16 * i for i in range(sum(FRAMES))]),
        "video_grids": torch.tensor([[frames, 2, 2] for frames in FRAMES]),
    }


def _radio(config: Any, draw: Draw) -> Values:
    """Pairs of frames stacked."""
    side = 4 * config.vision_config.patch_size
    return {"pixel_values_videos": draw(3, 4, config.video_temporal_patch_size * 3, side, side)}


def _timed(config: Any, draw: Draw) -> Values:
    """With the seconds of every pair of frames."""
    return {**_packed(config, draw), "video_second_per_grid": torch.tensor([1.0, 2.0, 1.0])}


def _merged(config: Any, draw: Draw) -> Values:
    """How many patches become one is said of every video."""
    return {**_packed(config, draw), "video_merge_sizes": torch.tensor([2, 2, 1])}


# Class -> what its vision side takes, where that is neither of the first two.
PIXELS: dict[str, Callable[[Any, Draw], Values]] = {
    **dict.fromkeys(("gemma4", "gemma4_unified"), _gemma4),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _minicpm),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _timed),
    "kimi_k25": _patches,
    "molmo2": _molmo,
    "nemotron_h_omni": _radio,
    "perception_lm": lambda config, draw: {"pixel_values_videos": draw(3, 4, 3, 64, 64)},
    "video_llama_3": _merged,
}


def video_inputs(model: Any) -> dict[str, Tensor]:
    """Two prompts with two videos and one, the second padded on the left; or one with three."""
    config, base, generator = model.config, model.base_model, torch.Generator().manual_seed(0)
    named = inspect.signature(base.forward).parameters
    make = PIXELS.get(config.model_type) or (_packed if "video_grid_thw" in named else _pictures)
    values = make(config, lambda *shape: torch.randn(*shape, generator=generator))
    encode = encoder_of(base, "video")
    assert encode is not None
    with torch.no_grad():
        features = [len(x) for x in feature_list(encode(**values, return_dict=True))]
    per = len(features) // 3 if len(features) % 3 == 0 else 0
    counts = [sum(features[i : i + per]) for i in range(0, len(features), per)] if per else _of_frames(features)
    token = placeholders_of(base)["video"]
    start = next((t for key in TOKENS if "start" in key and (t := getattr(config, key, None)) is not None), 50)
    shown = _unbroken if config.model_type in UNBROKEN else _parted
    videos = [shown(count, frames, start, token) for count, frames in zip(counts, _frames(values))]
    opens, closes = (getattr(config, f"video_{side}_token_id", None) for side in ("start", "end"))
    if opens is not None and closes is not None:
        videos = [[opens, *video, closes] for video in videos]
    rows = [[5, 6, *videos[0], *videos[1], 8, 9], [10, 11, 12, *videos[2], 13, 14, 15]]
    rows = [[*rows[0], *rows[1]]] if config.model_type in ALONE else rows
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    values |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for name, kind in (("mm_token_type_ids", 2), ("moe_mm_token_type_ids", 1), ("token_type_ids", 1)):
        if name in named:
            values[name] = kind * (ids == token).int()
    return values


def _of_frames(features: list[int]) -> list[int]:
    """Tokens of every video, of which the model hands over the frames."""
    ends = [0, FRAMES[0], sum(FRAMES[:2]), sum(FRAMES)]
    return [sum(features[a:b]) for a, b in itertools.pairwise(ends)]


def _frames(values: Values) -> tuple[int, ...]:
    pixels = values["pixel_values_videos"]
    return (pixels.shape[1],) * 3 if pixels.ndim == 5 else FRAMES


def _unbroken(count: int, frames: int, start: int, token: int) -> list[int]:
    """The placeholders of a video."""
    return [start, *[token] * count, 51, 7]


def _parted(count: int, frames: int, start: int, token: int) -> list[int]:
    """The placeholders of a video, a time in front of every frame."""
    return [t for f in range(frames) for t in (20 + f, start, *[token] * (count // frames), 51)]
