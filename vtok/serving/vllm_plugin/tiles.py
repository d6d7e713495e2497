"""InternVL and Gemma 3: an image is one tile or several of one size, and tokens are chosen within each, as in transformers.

Images alone: InternVL reads the frames of a video as tiles with text between, and is not served with videos beside the key.
Gemma 3 lets the tokens of a tile attend to each other both ways; vLLM finds those that stay by their placeholders.
"""

# Classes here are put in front of vLLM's, which have what mypy misses in them.
# mypy: disable-error-code="attr-defined, call-arg, misc"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.choice import TokenChoice
from vtok.serving.layouts import ImageLayout, grid_layout
from vtok.serving.vllm_plugin.processor import ImagesOnly, ServedProcessor
from vtok.serving.vllm_plugin.worker import PrunedModel, WithoutGraphs


def _tile(choice: TokenChoice) -> ImageLayout:
    assert choice.info.grid is not None
    return grid_layout(*choice.info.grid)


class TileProcessor(ServedProcessor):
    """Put in front of vLLM's processor."""

    def layout_of(self, modality: str, number: int, n: int, items: Any, made: Any) -> ImageLayout:
        assert self.choice is not None
        return _tile(self.choice)


class TileModel(PrunedModel):
    """Put in front of vLLM's model."""

    def _vtok_kept(self, images: Any, looked: bool) -> list[Tensor]:
        """Images [n, D] -> [k, D], all tiles of all of them at once.

        Args:
            images: their features.
            looked: whether the vision tower has encoded them just now.
        """
        assert self.vtok is not None
        tower = self.vtok_watch.take() if looked else {}
        layout = _tile(self.vtok)
        tiles = [len(x) // layout.length for x in images]
        kept = self.vtok.choose(torch.cat(list(images)).view(sum(tiles), layout.length, -1), layout, tower)
        return [part.flatten(0, 1) for part in kept.tokens.split(tiles)]


class VtokInternVLInfo(ImagesOnly, InternS1ProcessingInfo):
    """vLLM's info without videos."""


class VtokInternVLProcessor(TileProcessor, InternS1MultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "InternVLForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(VtokInternVLProcessor, info=VtokInternVLInfo, dummy_inputs=InternS1DummyInputsBuilder)
class VtokInternVL(TileModel, InternS1ForConditionalGeneration):
    """vLLM's class for InternVL as transformers has it, which hands the LLM the features that stay."""

    architecture = "InternVLForConditionalGeneration"

    def _vtok_layers(self) -> Any:
        return self.vision_tower.encoder.layer

    def _process_vision_input(self, image_input: Any) -> Any:
        features = super()._process_vision_input(image_input)
        return features if self.vtok is None else self._vtok_kept(features, image_input["type"] == "pixel_values")


class VtokGemma3Processor(TileProcessor, Gemma3MultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "Gemma3ForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(VtokGemma3Processor, info=Gemma3ProcessingInfo, dummy_inputs=Gemma3DummyInputsBuilder)
class VtokGemma3(WithoutGraphs, TileModel, Gemma3ForConditionalGeneration):
    """vLLM's Gemma 3, which hands the LLM the features that stay."""

    architecture = "Gemma3ForConditionalGeneration"

    def _process_image_input(self, image_input: Any) -> Any:
        features = super()._process_image_input(image_input)
        return features if self.vtok is None else self._vtok_kept(features, True)
