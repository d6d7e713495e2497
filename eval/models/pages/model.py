"""The reference LLaVA-NeXT of pages: a small tower that was trained to read, a connector and a small Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vtok.eval.models.assets import load_weights
from vtok.eval.models.pages.compose import PATCH, SIZE
from vtok.eval.models.pages.questions import WORDS
from vtok.eval.models.reference_next import ReferenceLLaVANeXT
from vtok.eval.models.reference_vlm import make_processor

TRAINED = "pages/trained.safetensors"
MEAN, STD = 1.0, 0.5  # of pixels: white paper is zero
VIEW = SIZE // 2  # side of a view in pixels
SIDE = VIEW // PATCH  # and in patches


@dataclass(frozen=True)
class ReferencePrint(ReferenceLLaVANeXT):
    """Anatomy: Hugging Face's `LlavaNextForConditionalGeneration` with CLIP's tower and a Llama, see `ReferenceLLaVA`."""

    image_size: int = VIEW
    patch_size: int = PATCH
    width: int = 192
    depth: int = 4
    heads: int = 4
    hidden: int | None = 512
    text_width: int = 160
    text_depth: int = 5

    words: ClassVar = WORDS
    scale: ClassVar = ((MEAN,) * 3, (STD,) * 3)

    @property
    def visual_tokens(self) -> int:
        """Tokens that a page takes in the prompt: the whole at half its size, then lines of crops, each with its end."""
        return SIDE**2 + 2 * SIDE * (2 * SIDE + 1)

    def grids(self) -> dict[str, Any]:
        return {"image_grid_pinpoints": [[SIZE, SIZE]]}


def make_print_processor() -> Any:
    """A `LlavaNextProcessor` for pages and prompts."""
    return make_processor(ReferencePrint())


def load_reference_print() -> Any:
    """The trained model in eval mode, fp32 (its weights are stored in fp16). Raises `ConfigError` without the weights."""
    model = ReferencePrint().build()
    model.load_state_dict(load_weights(TRAINED))
    return model.to(torch.float32).eval()
