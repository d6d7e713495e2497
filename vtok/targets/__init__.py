"""What `patch` acts on: vision encoders and vision-language models, both as a `Target`."""

from __future__ import annotations

from torch import nn

from vtok.patches import find_vlms, why_no_prompt
from vtok.targets.base import Layers, Request, Target
from vtok.targets.encoder import EncoderTarget
from vtok.targets.resolve import Size, require_module, towers
from vtok.targets.vlm.target import VLMTarget

__all__ = ["Layers", "Request", "Target", "VLMTarget", "find_targets", "vlm_targets"]


def find_targets(model: nn.Module, input_size: Size | None = None) -> list[Target]:
    """What methods can act on inside a model: its vision-language models, or else its vision towers. The only place that knows
    kinds.

    Args:
        model: any module.
        input_size: (channels, height, width) that vision towers are described for; default: their own.

    Raises:
        UnsupportedModelError: there is nothing, or something that cannot be patched.
        ConfigError: `input_size` is none.
    """
    require_module(model)
    found = vlm_targets(model)
    if found:
        return [*found]
    why = why_no_prompt(model)
    return [EncoderTarget(adapter, tower, why) for adapter, tower in towers(model, input_size, why)]


def vlm_targets(model: nn.Module) -> list[VLMTarget]:
    """The vision-language models inside a model; empty if there is none.

    Raises:
        UnsupportedModelError: one is there but cannot be patched.
    """
    return [VLMTarget(model, vlm) for vlm in find_vlms(model)]
