"""ToMe: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023). Between attention and MLP of every block the r most
redundant token pairs are merged; a merged token weighs as many patches as it stands for.

Shapes: B batch, N tokens, P prefix tokens, C width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vtok.capabilities import Info
from vtok.config import MethodConfig, ModelInfo, Reducer, Schedule, flag
from vtok.core.reduction import Plan
from vtok.core.search_space import BudgetCandidates, Point, Space, Weights
from vtok.core.tokens import AttentionView, Place, Site, TokenState
from vtok.errors import ConfigError
from vtok.ops.matching import bipartite_pairs, bipartite_sides, bipartite_soft_matching

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ToMe(MethodConfig):
    """Config of ToMe.

    Attributes:
        r: tokens removed in every block (paper: r; whole number >= 0). An int; a list with one number a block (blocks beyond
            it remove none); or `(r, inflect)`, a line that falls from 2r to 0 at inflect = -1 (the paper's "decreasing"
            schedule) and rises at +1. Deep blocks remove at most half of the patches they still have. Usual: 13 to 16 for
            ViT-S and -B at 224 px, 7 to 8 for ViT-L. Default: the constant r that leaves about 0.6 of what the blocks cost.
        prop_attn: proportional attention, log(size) added to the logits (paper: part of the method). Switch it off for MAE
            models used without fine-tuning, as the authors do.
    """

    name: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
    default_flops: ClassVar[float | None] = 0.6
    set_by_budget: ClassVar[tuple[str, ...]] = ("r",)

    r: Any = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            object.__setattr__(self, "r", Schedule.of(self.r, "r", integer=True))
            if self.r.kind != "linear" and any(value < 0 for value in self.r.values):
                raise ConfigError(f"r counts tokens to remove and cannot be negative, got {self.r}")
        flag(self.prop_attn, "prop_attn")

    def needs_budget(self) -> bool:
        return self.r is None

    @classmethod
    def alternatives(cls, info: Info) -> Sequence[Mapping[str, Any]]:
        return ({"prop_attn": False},)

    def budget_candidates(self, info: ModelInfo) -> Sequence[Self]:
        return [self.replace(r=r) for r in range(info.num_patches // 2 + 1)]

    def search_space(self, info: ModelInfo) -> Space:
        return {"weights": Weights(info.depth)}

    def candidates_at(self, info: ModelInfo, point: Point) -> Sequence[Self]:
        weights, most = point["weights"], info.num_patches // 2
        reach = list(itertools.accumulate(weights, initial=0.0))

        def counts(mean: float) -> list[int]:
            gone = [round(mean * share) for share in reach]  # rounding sums: one candidate further removes one token more
            return [min(after - before, most) for before, after in itertools.pairwise(gone)]

        end = most / min(weight for weight in weights if weight)  # every block that does not rest merges all it can
        return BudgetCandidates(lambda mean: self.replace(r=counts(mean)), end, round(16 * end))

    def build(self, info: ModelInfo) -> ToMeReducer:
        per_block = tuple(int(r) for r in self.r.resolve(info.depth, "r", pad=0))
        check_merge_count(per_block, info)
        return ToMeReducer(per_block, info.head_dim, self.prop_attn)


def check_merge_count(per_block: Sequence[int], info: ModelInfo) -> None:
    """Raises if some block is asked to merge more tokens than half of the patches of an untouched image."""
    most = info.num_patches // 2
    for i, r in enumerate(per_block):
        if r > most and not info.varies:
            raise ConfigError(
                f"r={r} in block {i}: {info.name} has {info.num_patches} patches, of which one block can merge at most {most}"
            )


@dataclass(frozen=True)
class ToMeReducer(Reducer):
    """ToMe with a number of tokens to remove for every block."""

    r: tuple[int, ...]
    metric_width: int
    prop_attn: bool = True
    needs: ClassVar[frozenset[str]] = frozenset("k")
    sizes: ClassVar[bool] = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_MID, i) for i, r in enumerate(self.r) if r > 0)

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        match = bipartite_soft_matching(view.key_metric(), self.r[at.index], state.num_prefix)
        return None if match is None else Plan(*match)

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return n - bipartite_pairs(n, self.r[at.index], num_prefix)

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        if bipartite_pairs(n, self.r[at.index], num_prefix) == 0:
            return 0
        a, b = bipartite_sides(n, num_prefix)
        return a * b * self.metric_width
