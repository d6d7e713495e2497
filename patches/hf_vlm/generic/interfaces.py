"""Whether a module is a vision-language model of transformers, by its interfaces, and where its LLM is."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

CHILDREN = ("language_model", "text_model", "model")  # as vision-language models call the LLM inside them


def encodes(module: nn.Module) -> bool:
    """Whether a module is a vision-language model of transformers, or wraps one: it encodes images, takes them encoded, and
    knows their places by the id of a placeholder.
    """
    if not type(module).__module__.startswith("transformers.models."):
        return False
    config, forward = getattr(module, "config", None), inspect.signature(module.forward).parameters
    return (
        callable(getattr(module, "get_image_features", None))
        and isinstance(getattr(config, "image_token_id", None), int)
        and {"mm_encoder_outputs", "inputs_embeds", "input_ids"} <= set(forward)
    )


def text_path(module: nn.Module) -> str | None:
    """Path of the LLM of a vision-language model: the child that has a list of layers, or has one that has; `None` = there is
    none.
    """
    for name in CHILDREN:
        child = getattr(module, name, None)
        for path, found in ((name, child), (f"{name}.model", getattr(child, "model", None))):
            if isinstance(getattr(found, "layers", None), nn.ModuleList):
                return path
    return None


def position_axes(text: Any) -> int:
    """Axes of the positions of an LLM whose visual tokens have several: as many as its rotary table has sections, or three."""
    rope = getattr(text.config, "rope_parameters", None)
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    return len(sections) if sections else 3


def vision_arguments(module: Any) -> set[str]:
    """Names of what the vision side of a model takes, tensors and settings alike."""
    functions = (getattr(module, f"get_{modality}_features", None) for modality in ("image", "video"))
    found = {name for f in functions if f is not None for name in inspect.signature(f).parameters}
    return found - {"kwargs", "input_ids", "attention_mask", "position_ids"}
