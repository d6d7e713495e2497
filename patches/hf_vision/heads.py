"""What follows the blocks of a Hugging Face encoder: means and attention pools that must see sizes and padding.

Shapes: B batch, N tokens after the last block, N0 tokens before the first, P prefix tokens, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtok.core.tracker import TokenTracker
from vtok.errors import UnsupportedModelError
from vtok.patches.module_swap import Hook
from vtok.patches.pooling import weighted_mean


def mean_everywhere(x: Tensor, run: TokenTracker) -> Tensor:
    """Reduced tokens [B, N, C] -> [B, N0, C] whose patches are all the mean patch, each counted by its members.

    Whatever head takes a plain mean next, over however many rows and with whatever mask, gets the right one.
    """
    state = run.current.final
    if state is None or state.untouched:
        return x
    p = state.num_prefix
    plain = state.size is None and state.keep is None
    mean = x[:, p:].mean(1) if plain else weighted_mean(x, state, p)
    return torch.cat([x[:, :p], mean[:, None].expand(-1, state.length - p, -1)], 1)


class MeanInput(Hook):
    """Forward pre-hook of a module that averages the patches it is given (BEiT's pooler)."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (mean_everywhere(args[0], self.run), *args[1:])


class HeadStarts(Hook):
    """Forward pre-hook of a classifier that averages its tower's patches in its own forward."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.run.averaged = True


class HeadEnds(Hook):
    """Its forward hook, called after errors too."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.run.averaged = False


class MeanOutput(Hook):
    """Forward hook of that tower: its last hidden state is for the mean alone, if the classifier called it."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.run.averaged:
            output.last_hidden_state = mean_everywhere(output.last_hidden_state, self.run)
        return output


class NoPoolMask(Hook):
    """Forward pre-hook of SigLIP2's head, whose mask [B, N0] knows tokens that may be gone; `PoolBias` stands in for it."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        state = self.run.current.final
        if state is None or state.untouched:
            return None
        return args[:1], {"hidden_state": kwargs["hidden_state"]} if "hidden_state" in kwargs else {}


class WholeAttentions(Hook):
    """Forward pre-hook of a tower: refuses `output_attentions` where some blocks compute only part of their attention map."""

    def __init__(self, blocks: tuple[int, ...]):
        self.blocks = blocks

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise UnsupportedModelError(
                f"output_attentions=True has nothing to return for blocks {', '.join(map(str, self.blocks))}: they "
                "attend step by step (only the queries that stay, or with sizes that this attention cannot take). Unpatch first"
            )
