"""Idefics3 and SmolVLM: tiles of an image with their names in the prompt between them, whose tokens compete with one another.

How many tokens of each tile stay is known when the image has been encoded: names of tiles come with the features
(`vtok.serving.vllm_plugin.prompts`).
"""

# Classes here are put in front of vLLM's, which have what mypy misses in them.
# mypy: disable-error-code="attr-defined, call-arg, misc"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.idefics3 import (
    Idefics3DummyInputsBuilder,
    Idefics3ForConditionalGeneration,
    Idefics3MultiModalProcessor,
    Idefics3ProcessingInfo,
)
from vllm.model_executor.models.smolvlm import SmolVLMForConditionalGeneration, SmolVLMProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems

from vtok.serving.choice import TokenChoice
from vtok.serving.layouts import ImageLayout, tiles_layout
from vtok.serving.vllm_plugin.processor import ServedProcessor
from vtok.serving.vllm_plugin.prompts import between, joined, woven
from vtok.serving.vllm_plugin.worker import PrunedModel, WithoutGraphs

_BETWEEN = "vtok_between"  # of an image: all that stands in the prompt from its first placeholder to its last


def _layout(config: Any, n: int) -> ImageLayout:
    """Of an image of n tokens."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    return tiles_layout(n // side**2, side, side)


class MarkedProcessor(ServedProcessor):
    """Put in front of vLLM's processor."""

    def layout_of(self, modality: str, number: int, n: int, items: Any, made: Any) -> ImageLayout:
        return _layout(self.info.get_hf_config(), n)

    def placeholders(self, full: list[int], visual: list[bool], layout: ImageLayout, choice: TokenChoice) -> list[int]:
        return joined(full, visual, choice.count(layout))

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        made = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if self.choice is not None and mm_items.get_all_counts().get("image"):
            images = mm_items.get_items("image", ImageProcessorItems)
            made[_BETWEEN] = [self._between(images.get_image_size(i), hf_kwargs) for i in range(len(images))]
        return made

    def _between(self, size: Any, hf_kwargs: Any) -> Tensor:
        """[L] int64 of an image of so many pixels."""
        info: Any = self.info
        processor = info.get_hf_processor(**hf_kwargs)
        text = info.get_image_repl(image_width=size.width, image_height=size.height, processor=processor, mm_kwargs=hf_kwargs)
        ids = info.get_tokenizer().encode(text, add_special_tokens=False)
        return torch.tensor(between(ids, [token == processor.image_token_id for token in ids]))

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return fields if self.choice is None else {**fields, _BETWEEN: MultiModalFieldConfig.batched("image")}


class MarkedModel(WithoutGraphs, PrunedModel):
    """Put in front of vLLM's model."""

    def _vtok_layers(self) -> Any:
        return self.model.vision_model.encoder.layers

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Of every image what stays, and the words between."""
        texts = kwargs.pop(_BETWEEN, None)
        features = super().embed_multimodal(**kwargs)
        if self.vtok is None or texts is None:
            return features
        tower, first, kept = self.vtok_watch.take(), 0, []
        for x, ids in zip(features, texts):
            layout = _layout(self.config, len(x))
            views = range(first, first + layout.tower_views)
            seen = {name: block.only(views) for name, block in tower.items()}
            kept.append(self._vtok_kept(x, ids, layout, seen))
            first += layout.tower_views
        return kept

    def _vtok_kept(self, x: Tensor, ids: Tensor, layout: ImageLayout, tower: Any) -> Tensor:
        """[n, D] -> [L - n + k, D]."""
        assert self.vtok is not None
        ids = ids.flatten().to(x.device)
        found = self.vtok.choose(x[None], layout, tower)
        words = self.model.text_model.embed_input_ids(ids)
        return woven(words, ids == self.image_token_id, found.rows[0], found.tokens[0])


class VtokIdefics3Processor(MarkedProcessor, Idefics3MultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "Idefics3ForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    VtokIdefics3Processor, info=Idefics3ProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class VtokIdefics3(MarkedModel, Idefics3ForConditionalGeneration):
    """vLLM's Idefics3, which hands the LLM the features that stay."""

    architecture = "Idefics3ForConditionalGeneration"


class VtokSmolVLMProcessor(MarkedProcessor, Idefics3MultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "SmolVLMForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    VtokSmolVLMProcessor, info=SmolVLMProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class VtokSmolVLM(MarkedModel, SmolVLMForConditionalGeneration):
    """vLLM's SmolVLM, which hands the LLM the features that stay."""

    architecture = "SmolVLMForConditionalGeneration"
