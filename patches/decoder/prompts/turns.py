"""Images in a later turn: a prompt that is shortened while a cache holds text already, shortened or not.

A turn is a prompt of its own to methods. Once it is read, what the cache remembers is that of one prompt, all of the
conversation so far: whatever comes behind needs to know of no turns.

Shapes: B rows, P columns that the cache stands for, L columns of the turn, S slots that a layer holds, M slots of the turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import UnsupportedModelError
from vtok.patches.decoder import masks
from vtok.patches.decoder.kv_cache import PromptState, Stage, attach_state, cache_in, cached_length, state_of
from vtok.patches.decoder.pass_state import PassState, Pruner
from vtok.patches.decoder.prompts import packed

_COUNTS = {
    "full_attention",
    "sliding_attention",
    "mlp",
    "moe",
}  # kinds of layers that see padding for what it is, cached or not


def check(pruner: Pruner, kwargs: Mapping[str, Any]) -> None:
    """Raises if images come in a later turn and the cache or the methods cannot take them.

    Args:
        pruner: of the model.
        kwargs: of a call that brings images and a cache that holds text.
    """
    cache = cache_in(kwargs)
    old = state_of(cache)
    why = None
    if any(pruner.layers) or (old is not None and old.between):
        why = "methods that drop tokens between decoder layers decide once, for a prompt that is read from an empty cache"
    elif pruner.family.prefix:
        why = "transformers lets the columns of a prompt see each other only where it is read from an empty cache"
    elif getattr(cache, "is_compileable", False):
        why = "the masks of a static cache are made for all its slots ahead, whatever the turns before left in them"
    elif packed.has_lengths(kwargs) or (old is not None and old.sample is not None):
        why = "rows hold several samples, whose lengths say nothing of what the cache holds"
    elif old is not None and old.compact != pruner.compact:
        why = "the turns before were shortened with another value of positions"
    if why is not None:
        raise UnsupportedModelError(
            f"images were passed with a cache that holds text already, which is not supported here: {why}; read the whole "
            "conversation from an empty cache, or shorten it with vtok.prune_inputs"
        )


def held(cache: Any) -> int:
    """P: columns that a cache stands for, dropped ones included."""
    old = state_of(cache)
    return cached_length(cache) + (0 if old is None else old.missing(0))


def joined(running: PassState, turn: PromptState, cache: Any) -> PromptState:
    """What the cache remembers from this turn on: one prompt of P + L columns, with the S + M slots that a layer holds of it.

    Args:
        running: the pass, with what the cache remembers of the turns before, if anything is missing from them.
        turn: of the L columns alone, shortened.
        cache: that holds the turns before.
    """
    assert turn.before is not None
    old, stage, real = running.earlier, turn.before, turn.real
    batch, device = len(real), real.device
    past = held(cache)
    if old is None or old.before is None:
        column = torch.arange(past, device=device).expand(batch, -1)
        known = running.real
        if known is not None and known.shape[1] >= past:
            known = known[:, :past].to(device).expand(batch, -1)
        else:
            known = torch.ones(batch, past, dtype=torch.bool, device=device)
    else:
        column, _ = running.slots(old, 0, cached_length(cache), batch, 0, device)
        known = running.real_columns(old, past, batch, device)
    state = PromptState(past + turn.length, torch.cat([known, real], 1))
    column = torch.cat([column, (stage.column + past).masked_fill(stage.column < 0, -1)], 1)
    state.before = Stage(column, column, bool((column < 0).any()))
    state.compact, state.inside = turn.compact, True
    return state


def placed(text: Any, kwargs: Mapping[str, Any], x: Tensor, running: PassState, turn: PromptState) -> tuple[Tensor, Any]:
    """Makes the state of the pass that of the conversation, and puts it onto the cache.

    Args:
        text: the LLM.
        kwargs: of its call.
        x: [B, L, D], embeddings of the turn.
        running: the pass.
        turn: of the turn alone, shortened.

    Returns:
        (positions [..., L] of the turn, without what was dropped before it where tokens are numbered anew; the mask of its M
        slots over all slots that the layers hold by then).

    Raises:
        UnsupportedModelError: positions are not those of the turn, or layers of the LLM would take padding for tokens.
    """
    cache, stage, mask, kind = cache_in(kwargs), turn.before, kwargs.get("attention_mask"), text.config._attn_implementation
    assert stage is not None
    past, position = held(cache), kwargs.get("position_ids")
    position = torch.arange(past, past + x.shape[1])[None] if position is None else position
    if position.shape[-1] != x.shape[1]:
        raise UnsupportedModelError(
            f"{type(text).__name__} got {position.shape[-1]} positions for a turn of {x.shape[1]} columns: this model does not "
            "work out by itself where images behind a cache stand; pass position_ids of the new columns"
        )
    if isinstance(mask, Mapping):
        masks.check_kinds(mask)
    position, old = position.to(x.device), running.earlier
    if turn.compact and old is not None and old.before is not None:
        position = position - old.now(old.dropped, len(x)).to(x.device)
    state = joined(running, turn, cache)
    kinds = set(getattr(text.config, "layer_types", None) or ()) - _COUNTS
    if kinds and (state.before is None or state.before.padded or not bool(state.real.all())):
        raise UnsupportedModelError(
            f"rows of this conversation differ in length, and layers of {type(text).__name__} ({', '.join(sorted(kinds))}) may "
            "take padding behind a cache for tokens; pass one prompt at a time"
        )
    running.state, running.turn, running.shape = state, turn, (len(x), stage.column.shape[1])
    attach_state(cache, state)
    if isinstance(mask, Mapping):
        return position, {
            name: _gathered(m, state, stage, x, kind, cache, masks.first_of(cache, name)) for name, m in mask.items()
        }
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return position, _gathered(mask, state, stage, x, kind, cache, 0)
    running.slots_counted = True
    assert state.before is not None
    column = state.before.column
    return position, ((column >= 0) & state.real.gather(1, column.clamp_min(0))).long()


def _gathered(
    mask: Tensor | None, state: PromptState, turn: Stage, x: Tensor, kind: str, cache: Any, layer: int
) -> Tensor | None:
    """A mask that the model made for columns, for the slots of a turn and all keys of a layer.

    Args:
        mask: [B or 1, 1 or H, L, <= P + L], the last key being the last column.
        state: of the conversation.
        turn: stage of the turn.
        x: like hidden states.
        kind: of attention.
        cache: that holds the turns before.
        layer: whose keys they are.
    """
    assert state.before is not None
    columns, rows = state.before.column, turn.entry
    queries = rows.shape[1]
    keys, offset = cache.get_mask_sizes(queries, layer)
    if mask is None:
        return masks.text_mask(columns, state.real, queries, x, kind, int(keys), int(offset), None)
    off: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    on: Any = True if mask.dtype == torch.bool else 0.0
    if mask.shape[-1] < state.length:  # a sliding cache has let go of columns that no query sees any more
        mask = torch.nn.functional.pad(mask, (state.length - mask.shape[-1], 0), value=off)
    mask = mask.to(x.device).expand(len(x), -1, -1, -1)
    heads = mask.shape[1]
    mask = mask.gather(2, rows.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    mask = mask.gather(3, columns.clamp_min(0)[:, None, None].expand(-1, heads, queries, -1))
    mask = mask.masked_fill((columns < 0)[:, None, None], off)
    own = (
        torch.arange(columns.shape[1], device=x.device)
        == torch.arange(-queries, 0, device=x.device)[:, None] + columns.shape[1]
    )
    mask = mask.masked_fill((rows < 0)[:, None, :, None] & own, on)  # a row that attends to nothing is NaN in some kernels
    return mask[..., int(offset) : int(offset) + int(keys)]
