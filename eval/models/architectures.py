"""Architectures of `configs/architectures.yaml` by name: checkpoints on the Hugging Face hub that papers quote, and models for
speed alone, with prompts of noise for them. `vtok.eval.models.by_name.load_model(..., meta=True)` builds the former without
weights and without asking the hub.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok.cost.prefill import Prompt
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.models.assets import library
from vtok.eval.runs import yaml_text
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.macs import stated_image
from vtok.targets import vlm_targets

Architecture = tuple[str, Mapping[str, Any]]  # class of transformers, what its configuration changes of the defaults
_TABLES: dict[str, dict[str, Architecture]] = {
    table: {name: (one["class"], one["config"]) for name, one in held.items()}
    for table, held in yaml_text.read(Path(str(files("vtok.configs") / "architectures.yaml"))).items()
    if table != "parts"
}
PUBLISHED, ARCHITECTURES = _TABLES["published"], _TABLES["random"]
_FRONT = 2  # words in front of the first image


def build_architecture(architecture: Architecture, device: str, **changes: Any) -> nn.Module:
    """A model in eval mode on a device, with random weights but on "meta"; `changes` replaces entries of its configuration.
    Raises `MissingExtraError` without transformers.
    """
    kind, config = architecture
    cls: Any = getattr(library("transformers"), kind)
    with torch.device(device):
        return cls(cls.config_class(**copy.deepcopy({**config, **changes}))).eval()


def build_published(name: str, device: str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of `PUBLISHED` in eval mode, with random weights but on "meta"; raises what `build_architecture` raises."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return build_architecture(PUBLISHED[name], device)
    finally:
        torch.set_default_dtype(before)


def build(name: str, seed: int = 0, meta: bool = False, **changes: Any) -> nn.Module:
    """A model of `ARCHITECTURES` in eval mode, on SDPA; `changes` replaces entries of its configuration."""
    torch.manual_seed(seed)
    return build_architecture(ARCHITECTURES[name], "meta" if meta else "cpu", **changes)


def sample_prompts(model: nn.Module, batch_size: int, prompt: Prompt | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A batch of prompts of noise: two words, the images with a word between them, the rest of the words.

    `model` is a LLaVA-1.5, LLaVA-NeXT or Qwen-VL; `prompt` says images, other tokens and size of the images of every row.

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
    plain = next(word for word in range(3, vocabulary) if word not in vlm.tokens.values())
    for special in vlm.tokens.values():
        words[words == special] = plain
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
