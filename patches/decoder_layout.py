"""What the columns of a sequence inside the LLM are, for the methods that decide which of them go on.

Shapes: B rows, L columns of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.patches.decoder_pass import Pass
from vtok.patches.decoder_state import PromptState, Stage, take
from vtok.prompt import Layout


def in_order(x: Tensor) -> Tensor:
    """[B, L] int64: 0 .. L-1 in every row of a sequence [B, L, D]."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def layout_of(x: Tensor, running: Pass, state: PromptState, stage: Stage | None) -> Layout:
    """Of a sequence [B, L, D] at a stage."""
    assert running.visual is not None
    column = in_order(x) if stage is None else stage.column
    real = take(state.real, column, 1) & (column >= 0)
    visual = take(running.visual, column, 1) & real
    return Layout(visual, real, column, state.length, running.visual, entered=_entered(running, state))


def _entered(running: Pass, state: PromptState) -> Tensor | None:
    """[B, columns of the prompt] bool: visual tokens that entered the LLM; `None` = all. Made once a pass."""
    before, visual, key = state.before, running.visual, "entered"
    if before is None or visual is None:
        return None
    if key not in running.memo:
        there = torch.zeros(len(visual), state.length + 1, dtype=torch.bool, device=visual.device)
        there = there.scatter(1, before.column.where(before.column >= 0, state.length), True)
        running.memo[key] = there[:, : state.length] & visual
    return running.memo[key]  # type: ignore[no-any-return]
