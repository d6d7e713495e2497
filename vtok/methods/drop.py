"""What the two baselines that look at no feature share: each block keeps a fixed share of its patches, in raster order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.config import MethodConfig, ModelInfo, Reducer, block_indices, block_numbers, fraction
from vtok.ops.rows import with_prefix
from vtok.reduction import Plan
from vtok.state import AttentionView, Place, Site, TokenState

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DropConfig(MethodConfig):
    """Fields of a baseline that drops patches unseen.

    Attributes:
        keep: share of its patches that each block in `layers` keeps ((0, 1]; default 0.925); 1.0 is an exact no-op.
        layers: 0-based blocks that prune, between attention and MLP; default all.
    """

    set_by_budget: ClassVar[tuple[str, ...]] = ("keep",)
    trial: ClassVar[Mapping[str, Any]] = {"keep": 0.8}

    keep: float = 0.925
    layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        fraction(self.keep, "keep")
        if self.layers is not None:
            object.__setattr__(self, "layers", block_numbers(self.layers))

    def knob(self) -> dict[str, Any]:
        return {"keep": self.keep}

    def ladder(self, info: ModelInfo) -> Sequence[Self]:
        return [self.replace(keep=1 - step / 1000) for step in range(1000)]

    def blocks(self, info: ModelInfo) -> tuple[int, ...]:
        return block_indices(self.layers, range(info.depth), info.depth)


def kept_count(patches: int, keep: float) -> int:
    """floor(patches keep), at least one."""
    return min(patches, max(1, math.floor(patches * keep)))


@dataclass(frozen=True)
class DropReducer(Reducer):
    """Keeps, in every chosen block, the patches of lowest rank."""

    keep: float
    layers: tuple[int, ...]

    def rank(self, n: int, state: TokenState, at: Site, device: torch.device) -> Tensor:
        """[B, n] sortable values for the n patches, or [1, n] if they are the same for every image; low = kept."""
        raise NotImplementedError

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_MID, i) for i in self.layers) if self.keep < 1 else ()

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        batch, n, _ = x.shape
        p = state.num_prefix
        m = kept_count(n - p, self.keep)
        if m == n - p:
            return None
        rows = self.rank(n - p, state, at, x.device).argsort(dim=-1, stable=True)[:, :m].sort(-1).values
        return Plan(with_prefix(rows.expand(batch, m), p))

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return num_prefix + kept_count(n - num_prefix, self.keep)
