"""What the columns of a sequence inside the LLM are, and what methods decide about them in front of a layer.

Shapes: B rows, L columns of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.core.prompt import Layout, VLMReducer
from vtok.core.reduction import Fold
from vtok.core.tokens import Site
from vtok.patches.decoder.attention_probe import attention_on
from vtok.patches.decoder.kv_cache import PromptState, Stage, take, to_columns
from vtok.patches.decoder.pass_state import PassState
from vtok.patches.decoder.prompts import packed
from vtok.patches.precision import full_precision


def in_order(x: Tensor) -> Tensor:
    """[B, L] int64: 0 .. L-1 in every row of a sequence [B, L, D]."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def layout_of(x: Tensor, running: PassState, state: PromptState, stage: Stage | None) -> Layout:
    """Of a sequence [B, L, D] at a stage."""
    assert running.visual is not None
    column = in_order(x) if stage is None else stage.column
    real = take(state.real, column, 1) & (column >= 0)
    visual = take(running.visual, column, 1) & real
    return Layout(visual, real, column, state.length, running.visual, entered=_entered(running, state))


def decided(
    x: Tensor, layout: Layout, site: Site, reducer: VLMReducer, running: PassState, sample: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What a method, or the record of an earlier pass, says in front of a decoder layer; a new decision is recorded.

    Args:
        x: [B, L, D], what enters the layer.
        layout: of its columns.
        site: in front of the layer.
        reducer: of the method.
        running: the pass.
        sample: [B, columns of the prompt] of rows that hold several prompts, see `decoder_packed`.

    Returns:
        (keep [B, L] bool or `None` = all stay; into [B, L] as in `Fold`, or `None`).
    """
    plan, layer = running.plan, site.index
    assert plan is not None
    if running.replays:
        return plan.at(layer, layout.column), plan.folds(layer, layout.column)
    probe = running.probes.get(reducer.probe(site)) if "attention" in reducer.needs else None
    attention = attention_on(probe, x.device)
    with torch.no_grad(), full_precision(x.device.type):
        found = packed.keep_of(reducer, x.detach(), layout, attention, site, sample)
    keep, into = found if isinstance(found, Fold) else (found, None)
    if keep is not None:
        length, column = layout.length, layout.column
        whole = torch.ones(len(x), length + 1, dtype=torch.bool, device=x.device)
        stays = keep | ~layout.visual
        plan.keep[layer] = whole.scatter(1, column.where(column >= 0, length), stays)[:, :length]
    if into is not None:
        plan.into[layer] = to_columns(into, layout.column, layout.length)
    return keep, into


def _entered(running: PassState, state: PromptState) -> Tensor | None:
    """[B, columns of the prompt] bool: visual tokens that entered the LLM; `None` = all. Made once a pass."""
    before, visual, key = state.before, running.visual, "entered"
    if before is None or visual is None:
        return None
    if key not in running.memo:
        there = torch.zeros(len(visual), state.length + 1, dtype=torch.bool, device=visual.device)
        there = there.scatter(1, before.column.where(before.column >= 0, state.length), True)
        running.memo[key] = there[:, : state.length] & visual
    return running.memo[key]
