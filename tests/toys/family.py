"""A toy family of vision-language models: a LLaVA whose projector is followed by 2 x 2 average pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel

from vtok.patches.hf_vlm import examples as tiny
from vtok.patches.hf_vlm.families import Family
from vtok.patches.hf_vlm.stated_images import VisionCosts


class ToyModel(LlavaModel):
    """Without its language head."""

    def get_image_features(
        self, pixel_values: Any, vision_feature_layer: Any = None, vision_feature_select_strategy: Any = None, **kwargs: Any
    ) -> Any:
        kwargs |= {"vision_feature_layer": vision_feature_layer}
        kwargs |= {"vision_feature_select_strategy": vision_feature_select_strategy}
        found = super().get_image_features(pixel_values=pixel_values, **kwargs)
        side = math.isqrt(found.pooler_output[0].shape[0])
        grids = [x.unflatten(0, (side, side)).permute(2, 0, 1)[None] for x in found.pooler_output]
        found.pooler_output = [F.avg_pool2d(grid, 2)[0].flatten(1).T for grid in grids]
        return found


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    """With it."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model = ToyModel(config)
        self.post_init()


def build() -> Any:
    """A tiny one: 64 patches, 16 visual tokens."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 32}
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120, "pad_token_id": 0}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny.IMAGE, vision_feature_layer=-1)
    return ToyForConditionalGeneration(config).eval()


def inputs(model: Any, generator: Any) -> dict[str, Any]:
    """Two prompts with two images and one."""
    return {**tiny.prompts(generator, [16] * 3), "pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}


NAME = f"{ToyModel.__module__}.{ToyModel.__qualname__}"
FAMILY = Family(
    "Toy",
    grid=lambda model: (4, 4),
    costs=VisionCosts(per_view=lambda model, patches: patches // 4),
    examples={"Toy": tiny.VLMExample(build, inputs)},
)
