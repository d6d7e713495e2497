"""What rides along with a prompt into an LLM, beside embeddings, mask and positions: it is shortened with it.

That is, whatever has one entry a column (kinds of tokens, embeddings for every layer), and features of deeper tower layers,
which have one entry a visual token and are added to these inside the LLM (DeepStack).

Shapes: B rows, L columns of the prompt, M slots, V visual tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.kv_cache import take

# Features of deeper tower layers -> the mask [B, L] or [B, L, 1] of the columns to which they are added.
DEEP = {"deepstack_visual_embeds": "visual_pos_masks", "deepstack_features": "vision_mask"}


def shortened(text: Any, kwargs: Mapping[str, Any], x: Tensor, rows: Tensor, stays: Tensor, visual: int) -> dict[str, Any]:
    """Keywords of an LLM that have to follow a reduction, shortened.

    Args:
        text: the LLM.
        kwargs: of its call, without what is shortened elsewhere.
        x: [B, L, D], embeddings of the prompt.
        rows: [B, M] int64, column of each slot, -1 = padding.
        stays: [B, L] bool, real columns that stay.
        visual: V, if several, else 0.

    Raises:
        UnsupportedModelError: something has one entry a visual token, and nothing is known of it.
    """
    changed: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] in (1, len(x)) and value.shape[1] == x.shape[1]:
            short = take(value, rows, 1)
            if value.dtype == torch.bool:  # a slot of padding is nothing special
                short = short & (rows >= 0).to(short.device).view(*rows.shape, *[1] * (short.ndim - 2))
            changed[name] = short
    for name, mask in DEEP.items():
        planes, places = kwargs.get(name), kwargs.get(mask)
        if planes is not None and places is not None:
            places = (places if places.ndim == 2 else places[..., 0]).to(x.device)
            changed[name] = _shorter(planes, stays[places])
    for name, value in kwargs.items():
        if name not in changed and visual > 1 and any(len(t) == visual for t in _tensors(value) if t.ndim):
            raise UnsupportedModelError(
                f"{type(text).__name__} is given {name!r} with one entry a visual token, of which vtok does not know to which "
                "columns they belong, so that its prompt cannot be shortened; this family needs a row in "
                "vtok/patches/hf_vlm/families.py"
            )
    return changed


def whole_pass(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An LLM that would compute its last layers for the last columns alone counts slots there, its caller columns."""
    return {"logits_to_keep": 0} if "logits_to_keep" in kwargs else {}


def _shorter(planes: Any, left: Tensor) -> Any:
    """Features [V, D] of every layer, those of the tokens that are left: [V] bool."""
    if isinstance(planes, Mapping):
        return {layer: deep[left.to(deep.device)] for layer, deep in planes.items()}
    return [deep[left.to(deep.device)] for deep in planes]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for t in value.values() if isinstance(t, Tensor))
    elif isinstance(value, (list, tuple)):
        yield from (t for t in value if isinstance(t, Tensor))
