"""The reference LLaVA of scenes: the frozen DINOv2 of `reference-dinov2`, a trained connector and a small trained Llama.

What is bundled are connector and Llama; the encoder is read from the installed package (`vtok.eval.models.dinov2`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vtok.eval.models.assets import load_weights
from vtok.eval.models.dinov2 import load_hf_dinov2
from vtok.eval.models.dinov2.model import HEADS, MEAN, PATCH, SIZE, STD, WIDTH
from vtok.eval.models.reference_vlm import ReferenceLLaVA, make_processor
from vtok.eval.models.scenes.questions import WORDS

TRAINED = "scenes/trained.safetensors"  # connector and Llama
TOWER = "model.vision_tower."


@dataclass(frozen=True)
class ReferenceScenes(ReferenceLLaVA):
    """Anatomy: Hugging Face's `LlavaForConditionalGeneration` with a Dinov2 tower and a Llama, see `ReferenceLLaVA`."""

    image_size: int = SIZE
    patch_size: int = PATCH
    width: int = WIDTH
    # blocks of the encoder that are there, of 12: what the connector takes is the output of the last of them, which tells small
    # things and their colours better than later ones do
    depth: int = 8
    heads: int = HEADS
    text_width: int = 256
    text_hidden: int = 512
    text_depth: int = 6

    words: ClassVar = WORDS
    scale: ClassVar = (MEAN, STD)

    def vision(self) -> Any:
        from transformers import Dinov2Config

        return Dinov2Config(
            patch_size=self.patch_size,
            image_size=self.image_size,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
        )


def load_tower(depth: int) -> Any:
    """transformers' `Dinov2Model` with the first `depth` blocks of the reference DINOv2, in eval mode, fp32. Errors are those
    of `load_hf_dinov2`.
    """
    tower: Any = load_hf_dinov2()
    del tower.encoder.layer[depth:]
    tower.config.num_hidden_layers = depth
    return tower


def make_scenes_processor() -> Any:
    """A `LlavaProcessor` for scenes and prompts."""
    return make_processor(ReferenceScenes())


def load_reference_scenes() -> Any:
    """The trained model in eval mode, fp32 (its weights are stored in fp16). Raises `ConfigError` without the trained weights
    or the package with the encoder's.
    """
    anatomy = ReferenceScenes()
    model = anatomy.build()
    tower = load_tower(anatomy.depth).state_dict()
    model.load_state_dict(load_weights(TRAINED) | {TOWER + name: value for name, value in tower.items()})
    return model.to(torch.float32).eval()
