"""The reference LLaVA-NeXT of pages: a small tower that was trained to read, a connector and a small Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vtok.eval.models.pages.compose import PATCH, SIZE
from vtok.eval.models.pages.questions import WORDS
from vtok.eval.models.reference_vlm import SPECIAL, answering, llava_parts, load_weights, processor_of

TRAINED = "pages/trained.safetensors"
MEAN, STD = 1.0, 0.5  # of pixels: white paper is zero
VIEW = SIZE // 2  # side of a view in pixels
SIDE = VIEW // PATCH  # and in patches


@dataclass(frozen=True)
class ReferencePrint:
    """Anatomy: Hugging Face's `LlavaNextForConditionalGeneration` with CLIP's tower and a Llama.

    The language model takes the tower's last layer without the class token, so that no layer is computed in vain.

    Attributes:
        width: of the tower.
        hidden: width of its MLPs.
        depth: its blocks.
        heads: its heads.
        text_width: of the language model.
        text_hidden: width of its MLPs.
        text_depth: its layers.
        text_heads: its heads.
    """

    width: int = 192
    hidden: int = 512
    depth: int = 4
    heads: int = 4
    text_width: int = 160
    text_hidden: int = 320
    text_depth: int = 5
    text_heads: int = 4

    @property
    def visual_tokens(self) -> int:
        """Tokens that a page takes in the prompt: the whole at half its size, then lines of crops, each with its end."""
        return SIDE**2 + 2 * SIDE * (2 * SIDE + 1)

    def config(self) -> Any:
        """A `LlavaNextConfig`."""
        from transformers import CLIPVisionConfig, LlavaNextConfig

        vision = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            image_size=VIEW,
            patch_size=PATCH,
        )
        parts = llava_parts(vision, self, len(SPECIAL) + len(WORDS))
        return LlavaNextConfig(**parts, image_seq_length=SIDE**2, image_grid_pinpoints=[[SIZE, SIZE]])

    def build(self) -> Any:
        """A freshly initialised model that stops at the end of its answer."""
        from transformers import LlavaNextForConditionalGeneration

        return answering(LlavaNextForConditionalGeneration(self.config()))


def make_print_processor() -> Any:
    """A `LlavaNextProcessor` for pages and prompts."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    colours, grids = ([MEAN] * 3, [STD] * 3), [[SIZE, SIZE]]
    return processor_of(LlavaNextProcessor, LlavaNextImageProcessor, VIEW, PATCH, *colours, WORDS, image_grid_pinpoints=grids)


def load_reference_print() -> Any:
    """The trained model in eval mode, fp32 (its weights are stored in fp16).

    Raises:
        ConfigError: the trained weights are missing.
    """
    model = ReferencePrint().build()
    model.load_state_dict(load_weights(TRAINED))
    return model.to(torch.float32).eval()
