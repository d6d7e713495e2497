"""What a shortened LLM returns, brought back to the columns that its caller passed.

Whoever reads hidden states or attention (embedding and reward models, pictures of attention) counts columns of the prompt;
layers behind a reduction hold fewer. Only what was asked for is made longer.

Shapes: B rows, L columns of the prompt, M slots, H heads, Q queries, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.kv_cache import PromptState, restore
from vtok.patches.decoder.masks import window_of


def whole(text: Any, output: Any, state: PromptState, prunes: bool, turn: PromptState | None = None) -> Any:
    """The output of an LLM with everything at the prompt's length that has one entry a column.

    Args:
        text: the LLM.
        output: of it, a mapping or a tuple.
        state: of the prompt.
        prunes: whether this pass read the prompt; in later ones keys of attention alone are short.
        turn: of the columns that this pass read alone, where they came with images in a later turn.

    Raises:
        UnsupportedModelError: attention of later text was asked for, in layers that look back over a window.
    """
    depth = len(text.layers)
    if state.at(depth - 1) is None:  # what a layer drops stays dropped
        return output
    named = not isinstance(output, tuple)
    read = state if turn is None else turn
    last = output.last_hidden_state if named else output[0]
    long = _restored(last, depth - 1, read) if prunes else last

    def part(value: Any, name: str = "") -> Any:
        if not isinstance(value, (tuple, list)) or not any(isinstance(x, Tensor) for x in value):
            return value
        hidden = name == "hidden_states" or next(x for x in value if isinstance(x, Tensor)).ndim == 3
        if hidden:  # what enters the first layer, and what leaves every one
            first = depth - len(value)
            entries = enumerate(value, first)
            return tuple(x if x is None else long if x is last else _restored(x, max(i, 0), read, prunes) for i, x in entries)
        if (not prunes or turn is not None) and any(window_of(layer, i) is not None for i, layer in enumerate(text.layers)):
            raise UnsupportedModelError(
                f"output_attentions: layers of {type(text).__name__} look back over a window of what is stored, whose columns "
                "vtok cannot tell for text behind a shortened prompt; leave output_attentions out, or call vtok.unpatch(model)"
            )
        found = (_attention(x, i, state, prunes and turn is None) for i, x in enumerate(value))
        if turn is None or turn.before is None:
            return tuple(found)
        return tuple(restore(x.transpose(1, 2), turn.before, turn.length).transpose(1, 2) for x in found)

    if not named:
        return (long, *(part(value) for value in output[1:]))
    output.last_hidden_state = long
    for name in ("hidden_states", "attentions"):
        value = getattr(output, name, None)
        if value:
            setattr(output, name, part(value, name))
    return output


def _restored(x: Tensor, layer: int, state: PromptState, prunes: bool = True) -> Tensor:
    """[B, L, ...]: hidden states [B, M, ...] of the slots of a layer at all columns; [n, B, M, D] where an LLM has several."""
    stage = state.at(layer)
    if stage is None or not prunes:
        return x
    if x.ndim == 4 and x.shape[1:3] == stage.column.shape and x.shape[:2] != stage.column.shape:
        return torch.stack([restore(one, stage, state.length, state.sample) for one in x])
    return restore(x, stage, state.length, state.sample)


def _attention(x: Tensor, layer: int, state: PromptState, prunes: bool) -> Tensor:
    """Attention [B, H, Q, K] of a layer with dropped columns among the keys, which get 0, and among the prompt's queries."""
    stage = state.at(layer)
    if stage is None:
        return x
    column = state.now(stage.column, len(x)).to(x.device)
    width, keys = column.shape[1], x.shape[-1]
    behind = torch.arange(state.length, state.length + keys - width, device=x.device).expand(len(x), -1)
    total = state.length + keys - width
    place = torch.cat([column.where(column >= 0, total), behind], 1)[:, None, None].expand_as(x)  # padding: a column of its own
    full = x.new_zeros(*x.shape[:-1], total + 1).scatter(-1, place, x)[..., :total]
    if not prunes:
        return full
    return restore(full.transpose(1, 2), stage, state.length, state.sample).transpose(1, 2)
