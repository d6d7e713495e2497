"""LLaVA-1.5: one square grid of visual tokens an image, whatever its size; the prompt simply is shorter."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.layouts import ImageLayout, square_layout
from vtok.serving.vllm_plugin.processor import ServedProcessor
from vtok.serving.vllm_plugin.worker import PrunedModel

_NAME = "LlavaForConditionalGeneration"


class VtokLlavaProcessor(ServedProcessor, LlavaMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = _NAME

    def layout_of(self, modality: str, number: int, n: int, items: Any, made: Any) -> ImageLayout:
        return square_layout(n)


@MULTIMODAL_REGISTRY.register_processor(VtokLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class VtokLlava(PrunedModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA, which hands the LLM the features that stay."""

    architecture = _NAME

    def _process_image_input(self, image_input: Any) -> Any:
        features = super()._process_image_input(image_input)
        if self.vtok is None:
            return features
        tower = self.vtok_watch.take() if image_input["type"] == "pixel_values" else {}
        if not isinstance(features, torch.Tensor):  # features that a client sent, of any length
            return [self.vtok.choose(x[None], square_layout(len(x))).tokens[0] for x in features]
        return list(self.vtok.choose(features, square_layout(features.shape[1]), tower, self.multi_modal_projector).tokens)
