"""LLaVA-NeXT and LLaVA-OneVision: a view of the whole image, and crops joined to one grid with a newline behind every row.

A video of LLaVA-OneVision is a small grid of tokens for every frame, and one newline behind them all.
"""

# Classes here are put in front of vLLM's, which have what mypy misses in them.
# mypy: disable-error-code="attr-defined, call-arg, misc"

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems

from vtok.errors import ConfigError
from vtok.serving.layouts import ImageLayout, frames_layout, packed_crops_layout
from vtok.serving.vllm_plugin.processor import ServedProcessor
from vtok.serving.vllm_plugin.worker import PrunedModel


def crops_of(config: Any, height: int, width: int) -> ImageLayout:
    """How an image of so many pixels is laid out."""
    vision = config.vision_config
    aspect = getattr(config, "vision_aspect_ratio", None)  # "anyres_max_9": only LLaVA-OneVision shrinks crops
    most = None if aspect is None else int(aspect.rpartition("_")[2])
    return packed_crops_layout((height, width), config.image_grid_pinpoints, vision.image_size, vision.patch_size, most)


def frames_of(config: Any, n: int) -> ImageLayout:
    """How a video of n tokens is laid out."""
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    return frames_layout((n - 1) // side**2, side, side, "video", newline=True)


class CropProcessor(ServedProcessor):
    """Put in front of vLLM's processor of a LLaVA that cuts images into crops."""

    def layout_of(self, modality: str, number: int, n: int, items: Any, made: Any) -> ImageLayout:
        if modality == "video":
            return frames_of(self.info.get_hf_config(), n)
        images = items.get_items(modality, (ImageEmbeddingItems, ImageProcessorItems))
        if isinstance(images, ImageEmbeddingItems):
            raise ConfigError("features of an image do not say how its crops were joined, which vtok must know: send pixels")
        size = images.get_image_size(number)
        return crops_of(self.info.get_hf_config(), size.height, size.width)


class CropModel(PrunedModel):
    """Put in front of vLLM's model."""

    def _process_image_input(self, image_input: Any) -> Any:
        features = super()._process_image_input(image_input)
        if self.vtok is None:
            return features
        config, tower = self.config, self.vtok_watch.take()
        layers = config.vision_feature_layer
        alone = isinstance(layers, int) or len(set(layers)) == 1  # the connector takes the tokens of one tower layer
        connector = self.multi_modal_projector if alone else None
        first, kept = 0, []
        sizes = image_input["image_sizes"].tolist()
        for x, pixels, (height, width) in zip(features, image_input["pixel_values"], sizes):
            layout = crops_of(config, int(height), int(width))
            views = range(first, first + layout.tower_views)  # views behind these fill up images of fewer crops
            seen = {name: block.only(views) for name, block in tower.items()}
            kept.append(self._vtok_kept(x, layout, seen, connector))
            first += len(pixels)
        return kept

    def _vtok_kept(self, x: Tensor, layout: ImageLayout, tower: Any, connector: Any) -> Tensor:
        """[n, D] -> [k, D]."""
        assert self.vtok is not None
        return self.vtok.choose(x[None], layout, tower, connector).tokens[0]


class VtokLlavaNextProcessor(CropProcessor, LlavaNextMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "LlavaNextForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    VtokLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VtokLlavaNext(CropModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, which hands the LLM the features that stay."""

    architecture = "LlavaNextForConditionalGeneration"


class VtokOnevisionProcessor(CropProcessor, LlavaOnevisionMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "LlavaOnevisionForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    VtokOnevisionProcessor, info=LlavaOnevisionProcessingInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class VtokOnevision(CropModel, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision, which hands the LLM the features that stay."""

    architecture = "LlavaOnevisionForConditionalGeneration"

    def _process_video_pixels(self, inputs: Any) -> Any:
        features = super()._process_video_pixels(inputs)
        if self.vtok is None:
            return features
        tower, first, kept = self.vtok_watch.take(), 0, []
        for x in features:
            x = x.flatten(0, -2)
            layout = frames_of(self.config, len(x))
            views = range(first, first + layout.tower_views)
            kept.append(self._vtok_kept(x, layout, {name: block.only(views) for name, block in tower.items()}, None))
            first += layout.tower_views
        return kept
