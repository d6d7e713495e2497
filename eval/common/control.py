"""A method with its choice of tokens taken away: the same places and the same number of tokens, but the tokens drawn at random.

A method differs from random pruning at equal FLOPs in two things: where it reduces and which tokens it picks. This control
changes the second alone, so the difference to it is the value of the choice, and the rest is the schedule.

Shapes: B batch, N tokens, P prefix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtok.capabilities import encoder_reducer
from vtok.config import MethodConfig, ModelInfo, Reducer
from vtok.core.reduction import Plan
from vtok.core.tokens import AttentionView, Site, TokenState
from vtok.eval.common.records import AT_RANDOM
from vtok.methods.tome import ToMe
from vtok.ops.hashing import splitmix
from vtok.ops.rows import with_prefix


@dataclass(frozen=True)
class RandomChoice(MethodConfig):
    """A control, not a method: reduces where `method` does and to as many tokens, but keeps random ones and merges none.

    Attributes:
        method: the method whose choice is replaced (default ToMe at its own default).
        seed: of the draws, one per block (whole number; default 0).
    """

    method: MethodConfig = field(default_factory=ToMe)
    seed: int = 0

    @property
    def name(self) -> str:
        return self.method.name + AT_RANDOM

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "of": self.method.to_dict(), "seed": self.seed}

    def build(self, info: ModelInfo) -> RandomChoiceReducer:
        return RandomChoiceReducer(encoder_reducer(self.method, info), self.seed)


@dataclass(frozen=True)
class RandomChoiceReducer(Reducer):
    """Asks a reducer how many tokens it would keep of each image, and keeps as many random ones."""

    inner: Reducer
    seed: int

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def ragged(self) -> bool:
        return self.inner.ragged

    @property
    def exact(self) -> bool:
        return self.inner.exact

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.inner.sites

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        found = self.inner.plan(x, state, view, at)
        if found is None:
            return None
        p, (batch, m) = state.num_prefix, found.keep.shape
        position = torch.arange(x.shape[1], device=x.device).expand(batch, -1) if state.index is None else state.index
        # Half of the hash's range is left for padding, which must come last: `found.valid` counts on it.
        rank = splitmix(position[:, p:], (self.seed << 12) + at.index) >> 1
        if state.keep is not None:
            rank = rank.masked_fill(~state.keep[:, p:], torch.iinfo(rank.dtype).max)
        return Plan(with_prefix(rank.argsort(dim=-1, stable=True)[:, : m - p], p), valid=found.valid)

    def attention(self, state: TokenState, view: AttentionView, rows: Tensor | None) -> Tensor | None:
        return self.inner.attention(state, view, rows)

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return self.inner.count(at, n, num_prefix)

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        return self.inner.macs(at, n, num_prefix)
