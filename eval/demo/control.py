"""What a method's choice of tokens is worth: the same places and the same number of tokens, but the tokens drawn at random.

A method differs from random pruning at equal FLOPs in two things: where it reduces and which tokens it picks. This control
changes the second alone, so the difference to it is the value of the choice, and the rest is the schedule.

Shapes: B batch, N tokens, P prefix tokens, n patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.api import patched
from vtok.capabilities import encoder_reducer
from vtok.config import MethodConfig, ModelInfo, Reducer, require_cls
from vtok.core.reduction import Plan
from vtok.core.tokens import AttentionView, Place, Site, TokenState
from vtok.eval.common.statistics import mean_stderr, paired_difference, with_error
from vtok.eval.report.tables import FLOOR, Record, correctness, ordered
from vtok.ops.hashing import splitmix
from vtok.ops.rows import with_prefix
from vtok.registry import METHODS

if TYPE_CHECKING:
    from rich.table import Table

SUFFIX = ", tokens at random"


@dataclass(frozen=True)
class RandomChoice(MethodConfig):
    """A control, not a method: reduces where `method` does and to as many tokens, but keeps random ones and merges none.

    Attributes:
        method: the method whose choice is replaced.
        seed: of the draws, one per block (whole number; default 0).
    """

    method: MethodConfig
    seed: int = 0

    @property
    def name(self) -> str:
        return self.method.name + SUFFIX

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


@dataclass(frozen=True)
class Watch(MethodConfig):
    """Reduces nothing; `seen` receives what the class token attends to in every block: [B, n], heads averaged, sums to 1."""

    name: ClassVar[str] = "watch"
    seen: list[Tensor]

    def build(self, info: ModelInfo) -> WatchReducer:
        require_cls(info, self.name, "there is nothing to watch")
        return WatchReducer(self.seen, info.depth)


@dataclass(frozen=True)
class WatchReducer(Reducer):
    """Looks at every block."""

    seen: list[Tensor]
    depth: int
    needs: ClassVar[frozenset[str]] = frozenset("qk")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_MID, i) for i in range(self.depth))

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        attn = view.probs(first=1)[:, :, 0, state.num_prefix :].mean(1)
        self.seen.append(attn / attn.sum(-1, keepdim=True))
        return None

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return n


def attention_kept(model: nn.Module, images: Tensor, block: int) -> list[float]:
    """Share of the class token's attention, in every block, that falls on the half of the patches which it attends to most in
    one block: how well an early choice by class attention foresees later blocks (0.5 = chance).

    Args:
        model: with a class token; patched for the one pass, left as it was.
        images: [B, C, H, W].
        block: 0-based block that chooses the half.
    """
    seen: list[Tensor] = []
    with patched(model, Watch(seen)), torch.inference_mode():
        model(images)
    half = seen[block].argsort(dim=-1, descending=True)[:, : seen[block].shape[1] // 2]
    return [float(attn.gather(1, half).sum(1).mean()) for attn in seen]


def controls(records: Sequence[Record]) -> list[tuple[RandomChoice, float]]:
    """The control of every record of a method that chooses, with the record's budget."""
    chosen = [r for r in ordered(records) if r["method"] in METHODS.names() and r["method"] not in FLOOR]
    return [(RandomChoice(METHODS.get(r["method"]).from_dict(r["params"])), r["budget"]) for r in chosen]


def table(records: Sequence[Record]) -> Table:
    """Every method beside its control: top-1, and what the choice is worth in paired points."""
    from rich.table import Table

    by_name = {(r["method"], r["budget"]): r for r in records}
    result = Table(title="what the choice of tokens is worth", caption="± standard error, paired; same places and counts")
    for i, header in enumerate(("method", "budget", "top-1 %", "tokens at random", "the choice is worth")):
        result.add_column(header, justify="left" if i == 0 else "right")
    for record in ordered([r for r in records if (r["method"] + SUFFIX, r["budget"]) in by_name]):
        control = by_name[record["method"] + SUFFIX, record["budget"]]
        change = correctness(record).astype(float) - correctness(control)
        gain, error = mean_stderr(change)
        worth = {"gain": gain, "gain_stderr": error, "gain_ci": paired_difference(change).ends}
        result.add_row(
            record["method"],
            f"{record['budget']:g}",
            f"{record['metrics']['top1']:.2f}",
            f"{control['metrics']['top1']:.2f}",
            with_error(worth, "gain", 100, 2, "+"),
        )
    return result
