"""Vision-language models by name with random weights, and prompts of noise for them: what speed needs, without any download."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vtok.cost.prefill import Prompt
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.models.architectures import ARCHITECTURES, build_architecture
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.macs import stated_image
from vtok.targets import vlm_targets

_FRONT = 2  # words in front of the first image


def build(name: str, seed: int = 0, meta: bool = False, **changes: Any) -> nn.Module:
    """A model of `ARCHITECTURES` in eval mode, on SDPA; `changes` replaces entries of its configuration."""
    torch.manual_seed(seed)
    return build_architecture(ARCHITECTURES[name], "meta" if meta else "cpu", **changes)


def sample_prompts(model: nn.Module, batch_size: int, prompt: Prompt | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A batch of prompts of noise: two words, the images with a word between them, the rest of the words.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT or Qwen-VL.
        batch_size: rows.
        prompt: images, other tokens and size of the images of every row.
        seed: of pixels and words.

    Raises:
        ConfigError: there are too few words for so many images.
        UnsupportedModelError: another model, whose inputs only its processor can make.
    """
    prompt, found = prompt or Prompt(), vlm_targets(model)
    kind = type(found[0].vlm.module).__name__ if found else type(model).__name__
    if kind not in _PIXELS:
        raise UnsupportedModelError(
            f"prompts of noise are made for {', '.join(_PIXELS)}, got {kind}; make inputs with its processor and call "
            "vtok.eval.benchmarks.prefill.measure_prompts(model, inputs, settings)"
        )
    if prompt.text_tokens < _FRONT + prompt.images:
        raise ConfigError(
            f"a prompt of {prompt.images} images needs words in front of, between and behind them: text_tokens must be "
            f"{_FRONT + prompt.images} or more, got {prompt.text_tokens}"
        )
    vlm: VLM = found[0].vlm
    generator = torch.Generator().manual_seed(seed)
    token, vocabulary = vlm.tokens["image"], vlm.text.config.vocab_size
    image = stated_image(vlm, prompt.input_size)
    words = torch.randint(3, vocabulary, (batch_size, prompt.text_tokens), generator=generator)
    for special in vlm.tokens.values():
        words[words == special] = 3
    each = torch.full((batch_size, image.tokens), token)
    parts, at = [words[:, :_FRONT], each], _FRONT
    for _ in range(prompt.images - 1):  # a word between images, as templates have it
        parts += [words[:, at : at + 1], each]
        at += 1
    ids = torch.cat([*parts, words[:, at:]], 1)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**values, **_PIXELS[kind](vlm, image, batch_size * prompt.images, generator, ids == token)}


def _plain(vlm: VLM, image: Any, count: int, generator: torch.Generator, visual: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, *image.size, generator=generator)}


def _crops(vlm: VLM, image: Any, count: int, generator: torch.Generator, visual: Tensor) -> dict[str, Tensor]:
    side = vlm.module.config.vision_config.image_size
    pixels = torch.randn(count, image.views, image.size[0], side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([image.size[1:]] * count)}


def _packed(vlm: VLM, image: Any, count: int, generator: torch.Generator, visual: Tensor) -> dict[str, Tensor]:
    vision = vlm.module.config.vision_config
    values = image.size[0] * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(count * math.prod(image.grid), values, generator=generator),
        "image_grid_thw": torch.tensor([image.grid] * count),
        "mm_token_type_ids": visual.int(),
    }


_PIXELS = {
    "LlavaModel": _plain,
    "LlavaNextModel": _crops,
    "Qwen2VLModel": _packed,
    "Qwen2_5_VLModel": _packed,
    "Qwen3VLModel": _packed,
}
