"""Prompts given as embeddings, into which a caller has put image features that the patched vision tower left gaps in.

Shapes: B rows, L columns of the prompt, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.errors import StateError, UnsupportedModelError
from vtok.patches.decoder import masks
from vtok.patches.decoder.kv_cache import PromptState, cache_in, cached_length
from vtok.patches.decoder.pass_state import PassState, Pruner, Recorded
from vtok.patches.hf_vlm.tower import bridge as vlm_tower


def holes_in(kwargs: Mapping[str, Any]) -> Tensor | None:
    """[B, L] bool: columns of such a prompt that the vision tower left empty; `None` = there are none."""
    x = kwargs.get("inputs_embeds")
    if x is None or kwargs.get("input_ids") is not None or x.shape[1] == 1:
        return None
    found = vlm_tower.holes(x.detach())
    return found if bool(found.any()) else None


def read(module: Any, pruner: Pruner, running: PassState, kwargs: Mapping[str, Any], holes: Tensor) -> None:
    """Has the holes leave in front of the LLM. Which other columns are visual is not known, so that nothing is counted.

    Args:
        module: the model without language head.
        pruner: of the model.
        running: its pass.
        kwargs: of the call.
        holes: [B, L] bool.

    Raises:
        UnsupportedModelError: something else would have to know which columns are visual, or the prompt is read in pieces.
    """
    (batch, length), cache = holes.shape, cache_in(kwargs)
    if cached_length(cache) > 0 or pruner.features is not None or pruner.layers:
        why = "the cache holds text already" if cached_length(cache) > 0 else "methods on the prompt must know which are visual"
        raise UnsupportedModelError(
            f"{type(module).__name__} got inputs_embeds with image features in which columns are missing that vtok dropped in "
            f"the vision tower, but {why}; pass input_ids and pixels, or mm_encoder_outputs"
        )
    real = masks.real_columns(kwargs.get("attention_mask"), batch, length, holes.device)
    running.prunes, running.embedded, running.visual, running.features = True, True, holes & real, ~holes
    running.state = PromptState(length, real)
    running.state.compact = pruner.compact
    running.plan = Recorded(pruner.configs, kwargs["inputs_embeds"].detach(), {}, {})


def check_alone(text: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises if an LLM that is called on its own gets such a prompt."""
    if holes_in(kwargs) is not None:
        raise StateError(
            f"{type(text).__name__} was called on its own with image features in which columns are missing that vtok dropped "
            "in the vision tower; call the vision-language model"
        )
