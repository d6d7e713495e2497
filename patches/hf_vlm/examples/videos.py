"""Prompts with videos for the tiny vision-language models that read them: two frames or more, which differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok.patches.hf_vlm.examples.pages import END, START, Inputs, padded, words

VIDEO = 118


def _prompts(generator: torch.Generator, videos: list[list[int]]) -> Inputs:
    """Two prompts with one video each, given as placeholders of its pieces; text stands between the pieces."""
    rows = [words(generator, 5), words(generator, 3)]
    for row, pieces in zip(rows, videos):
        for count in pieces:
            row += [*words(generator, 1), START, *[VIDEO] * count, END]
    return padded([rows[0] + words(generator, 4), rows[1] + words(generator, 2)])


def _qwen(generator: torch.Generator, parted: bool) -> Inputs:
    """Three and four temporal steps of a grid each; `parted`: with text in front of every step, as Qwen3-VL writes times."""
    sizes = torch.tensor([[4, 4, 8], [3, 4, 4]])
    counts = [[rows * columns // 4] * frames for frames, rows, columns in sizes.tolist()]
    inputs = _prompts(generator, counts if parted else [[sum(count)] for count in counts])
    pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    kinds: Tensor = 2 * (inputs["input_ids"] == VIDEO).int()
    return {**inputs, "pixel_values_videos": pixels, "video_grid_thw": sizes, "mm_token_type_ids": kinds}


def whole(model: Any, generator: torch.Generator) -> Inputs:
    """Qwen2-VL, Qwen2.5-VL: the steps of a video one behind the other."""
    return _qwen(generator, False)


def timed(model: Any, generator: torch.Generator) -> Inputs:
    """Qwen3-VL: text between the steps of a video."""
    return _qwen(generator, True)


def framed(model: Any, generator: torch.Generator) -> Inputs:
    """LLaVA-OneVision: four frames and a newline token."""
    pixels = torch.randn(2, 4, 3, 16, 16, generator=generator)
    with torch.no_grad():
        count = len(model.model.get_video_features(pixels, return_dict=True).pooler_output[0])
    return {**_prompts(generator, [[count]] * 2), "pixel_values_videos": pixels}
