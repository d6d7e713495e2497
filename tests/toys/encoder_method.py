"""A toy method for vision encoders: the first patches of the raster stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vtok.config import MethodConfig, ModelInfo, Reducer, fraction
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site
from vtok.ops.rows import with_prefix
from vtok.ops.selection import kept_tokens

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class TopRows(MethodConfig):
    """Config of the toy.

    Attributes:
        keep: share of its patches that every block keeps ((0, 1], default 0.8).
    """

    name: ClassVar[str] = "top_rows"
    set_by_budget: ClassVar[tuple[str, ...]] = ("keep",)

    keep: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self.keep, "keep")

    def build(self, info: ModelInfo) -> TopRowsReducer:
        return TopRowsReducer(self.keep, info.depth)

    def budget_candidates(self, info: ModelInfo) -> Sequence[Self]:
        return [self.replace(keep=1 - step / 100) for step in range(100)]


@dataclass(frozen=True)
class TopRowsReducer(Reducer):
    """The toy for one encoder."""

    keep: float
    depth: int

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_MID, i) for i in range(self.depth)) if self.keep < 1 else ()

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return num_prefix + kept_tokens(n - num_prefix, self.keep)

    def plan(self, x: torch.Tensor, state: Any, view: Any, at: Site) -> Plan:
        p = state.num_prefix
        rows = torch.arange(self.count(at, x.shape[1], p) - p, device=x.device)
        return Plan(with_prefix(rows.expand(len(x), -1), p))
