"""Attention masks of a shortened sequence, in the form that the model's attention takes.

While the prompt is read, masks are gathered from the model's own: prefix masks, bidirectional image blocks and windows stay
what they were. Later passes only append text, whose mask follows from the columns of the slots.

Shapes: B rows, L columns of the prompt, E columns that enter the LLM, M slots, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import ConfigError, UnsupportedModelError
from vtok.patches.decoder.kv_cache import Stage, take

Mask = Tensor | Mapping[str, Any] | None


def is_flash(implementation: str) -> bool:
    """Whether an attention implementation takes 2-D masks or none."""
    return "flash" in implementation


def check_implementation(implementation: str, window: bool) -> None:
    """Raises if masks of a shortened sequence cannot be expressed for an attention implementation."""
    if implementation not in ("eager", "sdpa") and not is_flash(implementation):
        raise UnsupportedModelError(
            f"vtok cannot shorten a prompt under attn_implementation={implementation!r}; use 'sdpa', 'eager' or flash attention"
        )
    if is_flash(implementation) and window:
        raise UnsupportedModelError(
            f"attn_implementation={implementation!r} measures sliding windows in stored tokens, not in tokens of the prompt, "
            "so that dropped tokens would widen them; use attn_implementation='sdpa', or vtok.prune_inputs, which shortens the "
            "prompt itself"
        )


def window_of(layer: Any, index: int) -> int | None:
    """Columns that a decoder layer looks back, or `None` = all."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    if config is None:  # no attention that could look back, such as a recurrent layer
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def shares(layer: Any) -> bool:
    """Whether a decoder layer attends to keys and values that an earlier one has stored."""
    return bool(getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False))


def stored_in(layer: Any, index: int) -> int:
    """The decoder layer whose keys and values a layer attends to: its own, or, where later layers share those of earlier ones,
    the last of the same kind that stores any.
    """
    if not shares(layer):
        return index
    config = layer.self_attn.config
    kinds = config.layer_types
    return max(i for i, mode in enumerate(config.kv_sharing_modes) if mode == "store" and kinds[i] == kinds[index])


def check_text(text: Any) -> None:
    """Raises if masks of a shortened sequence cannot be expressed for an LLM."""
    window = any(window_of(layer, i) is not None for i, layer in enumerate(text.layers))
    check_implementation(text.config._attn_implementation, window)


def check_kinds(mask: Mapping[str, Any]) -> None:
    """Raises if masks that were made for a long prompt do not fit a short one: chunks begin every so many columns."""
    if mask.get("chunked_attention") is not None:
        raise UnsupportedModelError(
            "the masks of this prompt were made for all of it, as a static cache asks for, and attention within chunks has "
            "their borders in other places once tokens are dropped; leave cache_implementation out, or use vtok.prune_inputs"
        )


def real_columns(mask: Mask, batch: int, length: int, device: torch.device, later: bool = False) -> Tensor:
    """[B, L] bool: False = padding, as far as the mask of a whole prompt says (2-D, 4-D, a mapping of these, or `None`).

    later: whether the prompt is a later turn, whose columns are the last keys of the mask.
    """
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim not in (2, 4):
        raise ConfigError(f"attention_mask must be [rows, columns] or [rows, 1, queries, keys], got shape {list(mask.shape)}")
    if mask.ndim == 2:
        return mask[:, -length:].bool().to(device).expand(batch, length)
    if mask.shape[-1] < length:
        raise ConfigError(
            f"attention_mask has {mask.shape[-1]} keys for a prompt of {length} columns; a static cache needs room for the "
            "prompt as it is before vtok shortens it, because generate() makes masks for all of it: raise max_cache_len, or "
            "shorten the prompt first with vtok.prune_inputs"
        )
    first = mask.shape[-1] - length if later else 0
    diagonal = mask[:, 0].diagonal(first, dim1=-2, dim2=-1)[:, :length]
    return (diagonal if diagonal.dtype == torch.bool else diagonal == 0).to(device).expand(batch, length)


def seen_columns(mask: Mask) -> Tensor | None:
    """[B, columns so far] bool: what the newest token may see, by the mask that a caller passes; `None` if it says nothing."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    row = mask if mask.ndim == 2 else mask[:, 0, -1]
    return row == 0 if row.is_floating_point() and mask.ndim == 4 else row.bool()


def gather_mask(mask: Mask, stage: Stage, like: Tensor, implementation: str, keys: int) -> Mask:
    """The mask of a shortened prompt from the one that the model made for the E columns that enter the LLM.

    Args:
        mask: 4-D, 2-D (flash attention), `None`, or a mapping of these.
        stage: of the M slots.
        like: hidden states, for device and dtype.
        implementation: of attention.
        keys: K that attention will see: M, or all slots of a static cache.
    """
    if isinstance(mask, Mapping):
        return {name: gather_mask(m, stage, like, implementation, keys) for name, m in mask.items()}
    rows, width, mask = stage.entry, stage.entry.shape[1], None if mask is None else mask.to(like.device)
    if mask is None:
        if not stage.padded and keys == width:
            return None
        order = torch.arange(width, device=like.device)
        real = (rows >= 0)[:, None, None]
        allowed = (real | (order[:, None] == order)) & (order[:, None] >= order)
        return formed(allowed, like, implementation, keys, real[:, 0, 0])
    if mask.ndim == 2:
        return take(mask, rows, 1).bool() & (rows >= 0)
    mask = take(mask.expand(len(rows), *mask.shape[1:]).transpose(1, 2), rows, 1).transpose(1, 2)  # query rows
    mask = mask.gather(3, rows.clamp_min(0)[:, None, None].expand(-1, mask.shape[1], width, -1))
    order = torch.arange(width, device=mask.device)
    mask = _hidden(mask, (rows < 0)[:, None, None])
    if stage.padded:  # padding attends to itself: a row that attends to nothing is NaN in some kernels
        mask = mask.masked_fill((rows < 0)[:, None, :, None] & (order[:, None] == order), _on(mask.dtype))
    if keys > width:
        rest = mask.new_full((*mask.shape[:3], keys - width), _off(mask.dtype))
        mask = torch.cat([mask, rest], 3)
    return mask


def text_mask(
    column: Tensor,
    real: Tensor,
    queries: int,
    like: Tensor,
    implementation: str,
    keys: int,
    offset: int,
    window: int | None,
    sample: Tensor | None = None,
) -> Tensor:
    """The causal mask of slots by the columns they hold: for text that follows a shortened prompt, and for windows.

    Args:
        column: [B, S] int64, column of every slot that the layer has stored or gets now, the Q queries last, -1 = padding.
        real: [B, columns of prompt and text] bool, False = padding.
        queries: Q.
        like: hidden states, for device and dtype.
        implementation: of attention.
        keys: K slots that attention will see, those of a static cache that are still empty included.
        offset: slots that a sliding cache has let go.
        window: columns that a query may look back, itself included, or `None`.
        sample: [B, columns of the prompt] int64, while a prompt is read whose rows hold several samples.
    """
    known = (column >= 0) & real.gather(1, column.clamp_min(0))
    if is_flash(implementation):
        return known
    column, asks = column[:, offset : offset + keys], column[:, -queries:]
    known = known[:, offset : offset + keys]
    distance = asks[:, :, None] - column[:, None]
    allowed = known[:, None] & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    if sample is not None:
        of_key, of_query = (sample.to(column.device).gather(1, c.clamp_min(0)) for c in (column, asks))
        allowed = allowed & (of_query[:, :, None] == of_key[:, None])
    return formed(allowed[:, None], like, implementation, keys, None)


def by_slots(mask: Tensor, column: Tensor) -> Tensor:
    """The mask [B, 1, Q, columns] of later text with one key a slot: [B, 1, Q, slots].

    Args:
        mask: bool or additive, of prompt and text; what is not there yet is hidden.
        column: [B, slots] int64, -1 = padding.
    """
    there = (column >= 0) & (column < mask.shape[-1])
    index = column.clamp(0, mask.shape[-1] - 1)[:, None, None].expand(-1, *mask.shape[1:3], -1)
    return _hidden(mask.gather(3, index), ~there[:, None, None])


def formed(allowed: Tensor, like: Tensor, implementation: str, keys: int, real: Tensor | None) -> Tensor:
    """A bool mask [B, 1, Q, <= K] in the form that attention takes; keys that are not there yet are hidden."""
    if is_flash(implementation):
        assert real is not None
        return real
    if allowed.shape[-1] < keys:
        allowed = torch.nn.functional.pad(allowed, (0, keys - allowed.shape[-1]))
    if implementation != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, _off(like.dtype))


def keys_of(cache: Any, queries: int, layer: int) -> int:
    """Key columns that attention sees when a prompt of so many tokens enters a layer."""
    return queries if cache is None else int(cache.get_mask_sizes(queries, layer)[0])


def first_of(cache: Any, kind: str) -> int:
    """The first layer of a kind, as the keys of a mapping of masks name it."""
    sliding = [] if cache is None else list(cache.is_sliding)
    wanted = kind == "sliding_attention"
    return sliding.index(wanted) if wanted in sliding else 0


def _off(dtype: torch.dtype) -> float | bool:
    return False if dtype == torch.bool else torch.finfo(dtype).min


def _on(dtype: torch.dtype) -> float | bool:
    return True if dtype == torch.bool else 0.0


def _hidden(mask: Tensor, where: Tensor) -> Tensor:
    return mask & ~where if mask.dtype == torch.bool else mask.masked_fill(where, _off(mask.dtype))
