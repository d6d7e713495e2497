"""The reference LLaVA of scenes: the frozen DINOv2 of `reference-dinov2`, a trained connector and a small trained Llama.

What is bundled are connector and Llama; the encoder is read from the installed package (`vtok.eval.models.dinov2`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vtok.eval.models.dinov2 import load_hf_dinov2
from vtok.eval.models.dinov2.model import HEADS, MEAN, PATCH, SIZE, STD, WIDTH
from vtok.eval.models.reference_vlm import SPECIAL, answering, llava_parts, load_weights, processor_of
from vtok.eval.models.scenes.questions import WORDS

TRAINED = "scenes/trained.safetensors"  # connector and Llama
TOWER = "model.vision_tower."


@dataclass(frozen=True)
class ReferenceScenes:
    """Anatomy: Hugging Face's `LlavaForConditionalGeneration` with a Dinov2 tower and a Llama.

    Attributes:
        tower_depth: blocks of the encoder that are there, of 12: what the connector takes is the output of the last of them,
            which tells small things and their colours better than later ones do.
        text_width: of the language model.
        text_hidden: width of its MLPs.
        text_depth: its layers.
        text_heads: its heads.
    """

    tower_depth: int = 8
    text_width: int = 256
    text_hidden: int = 512
    text_depth: int = 6
    text_heads: int = 4

    @property
    def visual_tokens(self) -> int:
        """Tokens that a picture takes in the prompt."""
        return (SIZE // PATCH) ** 2

    def config(self) -> Any:
        """A `LlavaConfig`."""
        from transformers import Dinov2Config, LlavaConfig

        vision = Dinov2Config(
            patch_size=PATCH, image_size=SIZE, hidden_size=WIDTH, num_hidden_layers=self.tower_depth, num_attention_heads=HEADS
        )
        return LlavaConfig(**llava_parts(vision, self, len(SPECIAL) + len(WORDS)), image_seq_length=self.visual_tokens)

    def build(self) -> Any:
        """A freshly initialised model, its tower too, that stops at the end of its answer."""
        from transformers import LlavaForConditionalGeneration

        return answering(LlavaForConditionalGeneration(self.config()))


def load_tower(depth: int) -> Any:
    """transformers' `Dinov2Model` with the first `depth` blocks of the reference DINOv2, in eval mode, fp32.

    Raises:
        ConfigError: the package with the weights is not installed.
    """
    tower: Any = load_hf_dinov2()
    del tower.encoder.layer[depth:]
    tower.config.num_hidden_layers = depth
    return tower


def make_scenes_processor() -> Any:
    """A `LlavaProcessor` for scenes and prompts."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    return processor_of(LlavaProcessor, CLIPImageProcessor, SIZE, PATCH, MEAN, STD, WORDS)


def load_reference_scenes() -> Any:
    """The trained model in eval mode, fp32 (its weights are stored in fp16).

    Raises:
        ConfigError: the package with the encoder's weights is not installed.
        FileNotFoundError: the trained weights are missing.
    """
    anatomy = ReferenceScenes()
    model = anatomy.build()
    tower = load_tower(anatomy.tower_depth).state_dict()
    model.load_state_dict(load_weights(TRAINED) | {TOWER + name: value for name, value in tower.items()})
    return model.to(torch.float32).eval()
