"""Keywords of a decoder layer that fit the slots of its sequence: mask, positions, rotary tables.

Shapes: B rows, L columns of the prompt, M slots, Q queries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import UnsupportedModelError
from vtok.patches.decoder import masks
from vtok.patches.decoder.kv_cache import BUSY, WHOLE, PromptState, ShortCache, Stage, cache_in, cached_length, take
from vtok.patches.decoder.pass_state import PassState
from vtok.patches.decoder.prompts import packed

# Keywords of a layer that follow a reduction by rules of their own.
_TAKEN = frozenset({"hidden_states", "attention_mask", "position_embeddings", "position_ids"})


def of_prompt(
    layer: Any, index: int, x: Tensor, kwargs: dict[str, Any], running: PassState, state: PromptState, cache: Any
) -> dict[str, Any]:
    """A layer's keywords while the prompt is read: mask, positions and rotary tables of the slots that are left."""
    stage, window = state.at(index), masks.window_of(layer, index)
    recounted = running.slots_counted and window is not None  # the LLM measured its windows in slots
    if stage is None or (stage is state.before and not recounted):
        return kwargs
    mask, tables, position = (kwargs.get(name) for name in ("attention_mask", "position_embeddings", "position_ids"))
    if not hasattr(layer, "self_attn"):
        if state.sample is not None:
            raise UnsupportedModelError(
                f"rows hold several samples, and {type(layer).__name__} {index}, behind dropped tokens, carries a state "
                "from one token to the next; give every sample a row of its own, or use a method that acts before the LLM"
            )
        seen = (stage.column >= 0).long() if stage.padded or mask is not None else None  # padding on the left leaves no trace
        return {**kwargs, **_of_columns(kwargs, stage, running, state), "attention_mask": seen}
    stored, queries = masks.stored_in(layer, index), stage.column.shape[1]
    keys = masks.keys_of(cache, queries, stored)
    kind = layer.self_attn.config._attn_implementation
    if stored != index:
        shared = running.masks[stored]
    else:
        make: Any = functools.partial(masks.gather_mask, mask, stage, x, kind, keys)
        if recounted:
            make = functools.partial(masks.text_mask, stage.column, state.real, queries, x, kind, keys, 0, window, state.sample)
        shared = _once(running, ("mask", id(stage), id(mask), keys, window), mask, make)
    running.masks[index] = shared
    if stage is state.before:
        return {**kwargs, "attention_mask": shared}
    changed: dict[str, Any] = {"attention_mask": shared}
    if state.sample is not None and masks.is_flash(kind):
        slots = packed.of_columns(state.sample, stage.column)
        changed = {"attention_mask": None, **_once(running, ("lengths", id(stage)), stage, lambda: packed.lengths(slots))}
    slots = _once(running, ("anew", id(stage)), stage, lambda: packed.anew(state, stage)) if state.compact else stage.entry
    if tables is not None:
        changed["position_embeddings"] = _once(
            running, ("tables", id(stage), id(tables)), tables, lambda: tuple(take(t, slots, t.ndim - 2) for t in tables)
        )
    if position is not None:
        changed["position_ids"] = take(position, slots, position.ndim - 1)
    return {**kwargs, **_of_columns(kwargs, stage, running, state), **changed}


def _of_columns(kwargs: Mapping[str, Any], stage: Stage, running: PassState, state: PromptState) -> dict[str, Any]:
    """What else an LLM hands to every layer with one entry a column (kinds of tokens), for those that are left."""
    entered = state.length if state.before is None else state.before.entry.shape[1]
    found = {}
    for name, value in kwargs.items():
        if name not in _TAKEN and isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == entered > 1:
            found[name] = _once(running, (name, id(stage), id(value)), value, functools.partial(take, value, stage.entry, 1))
    return found


def of_later_text(
    layer: Any, index: int, x: Tensor, kwargs: dict[str, Any], running: PassState, state: PromptState, cache: Any
) -> dict[str, Any]:
    """A layer's keywords for later text: the mask by the columns of the slots that this layer's cache holds."""
    stage = state.at(index)
    window = masks.window_of(layer, index)
    sliding = window is not None
    if stage is None or (stage is state.before and not sliding) or not hasattr(layer, "self_attn"):
        return kwargs
    mask, kind = kwargs.get("attention_mask"), layer.self_attn.config._attn_implementation
    assert running.shape is not None
    batch, queries = running.shape
    if state.compact and stage is not state.before:
        kwargs = _moved_down(kwargs, x, stage, running, state)
    if mask is None and queries == 1 and not stage.padded and not sliding:
        return kwargs
    masks.check_implementation(kind, sliding)
    if (stored := masks.stored_in(layer, index)) != index:
        return {**kwargs, "attention_mask": running.masks[stored]}
    count = cached_length(cache, index)
    keys, offset = cache.get_mask_sizes(queries, index)

    def build() -> Tensor:
        column, total = running.slots(state, index, count, batch, queries, x.device)
        real = running.real_columns(state, total, batch, x.device)
        return masks.text_mask(column, real, queries, x, kind, int(keys), int(offset), window)

    key = ("text", id(stage), count, int(keys), int(offset), window)
    running.masks[index] = shared = _once(running, key, None, build)
    return {**kwargs, "attention_mask": shared}


def is_traced_step(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is being compiled that reads text behind a prompt in a static cache, of which all is known beforehand.

    Nothing of this thread is looked at then, and no value of a tensor. What a pass that is under way reads is none, nor is a
    step whose mask the LLM has yet to make: inside, it counts what is stored, and layers could not tell the two apart.
    """
    if not torch.compiler.is_compiling():
        return False
    cache = cache_in(kwargs)
    if not getattr(cache, "is_compileable", False) or BUSY in cache.__dict__:
        return False
    if not isinstance(cache, ShortCache):
        return WHOLE in cache.__dict__
    return cache.known.tables is not None and _is_made(kwargs.get("attention_mask"))


def _is_made(mask: Any) -> bool:
    """Whether a mask is 4-D, or a mapping of some that are."""
    made = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    return all(isinstance(m, Tensor) and m.ndim == 4 for m in made)


def can_trace(text: Any, cache: Any, state: PromptState) -> bool:
    """Whether later text behind a shortened prompt can be read without counting what a static cache holds.

    Windows, whose static caches let slots go, recurrent states, which have none, packed rows, and positions that layers
    renumber are counted step by step.
    """
    if not getattr(cache, "is_compileable", False) or state.sample is not None or any(getattr(cache, "is_sliding", ())):
        return False
    if not all(hasattr(layer, "keys") for layer in cache.layers):
        return False
    renumbers = state.compact and bool(state.between)
    return not renumbers and not masks.is_flash(text.config._attn_implementation)


def slot_tables(state: PromptState, cache: Any) -> dict[int, Tensor]:
    """For every layer of a static cache that misses columns, which column of prompt and text each of its slots holds or will
    hold: [B, slots] int64, -1 = padding. A compiled step then has nothing to count.
    """
    tables: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        stage = state.at(i)
        if stage is None:
            continue
        if id(stage) not in made:
            text = torch.arange(layer.keys.shape[2] - stage.column.shape[1], device=stage.column.device) + state.length
            made[id(stage)] = torch.cat([stage.column, text.expand(len(stage.column), -1)], 1)
        tables[i] = made[id(stage)].to(layer.keys.device)
    return tables


def of_traced_step(layer: Any, index: int, kwargs: dict[str, Any], state: PromptState) -> dict[str, Any]:
    """A layer's keywords for text in a compiled step: the caller's mask, which has a key a column, with a key a slot."""
    assert state.tables is not None
    column, mask = state.tables.get(masks.stored_in(layer, index)), kwargs.get("attention_mask")
    if column is None:
        return kwargs
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedModelError(
            f"a compiled step of text behind a shortened prompt needs the 4-D mask that generate() makes for static caches, "
            f"and decoder layer {index} was given {type(mask).__name__}; leave compilation out, or use vtok.prune_inputs"
        )
    return {**kwargs, "attention_mask": masks.by_slots(mask, state.now(column, len(mask)))}


def of_turn(
    layer: Any, index: int, x: Tensor, kwargs: dict[str, Any], running: PassState, state: PromptState, cache: Any
) -> dict[str, Any]:
    """A layer's keywords while images are read in a later turn, all of which left in front of the first layer."""
    return of_later_text(layer, index, x, kwargs, running, state, cache) if running.slots_counted else kwargs


def _moved_down(kwargs: dict[str, Any], x: Tensor, stage: Stage, running: PassState, state: PromptState) -> dict[str, Any]:
    """Positions and rotary tables of later text behind a prompt of which a layer has renumbered what is left."""
    position = kwargs["position_ids"]

    def build() -> tuple[Tensor, Any]:
        gone = state.now(state.anew(stage)[1], x.shape[0]).to(position.device)
        lower = position - gone[:, None]
        return lower, running.rotary(x, lower.to(x.device))

    lower, tables = _once(running, ("lower", id(stage), id(position)), position, build)
    return {**kwargs, "position_ids": lower, "position_embeddings": tables}


_once = PassState.once  # what several layers share
