"""What the two baselines that look at no feature share: each block keeps a fixed share of its patches, in raster order.

On a vision-language model they act once, on the image features before the LLM: `keep` is the share of visual tokens there.
With `layers` they act in these blocks of its vision tower instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtok.capabilities import Info, no_schedule
from vtok.config import MethodConfig, ModelInfo, Reducer, block_indices, block_numbers, fraction
from vtok.core.prompt import ImageFeatures, View, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.search_space import Blocks, Point, Space
from vtok.core.tokens import AttentionView, Place, Site, TokenState
from vtok.errors import ConfigError
from vtok.ops.rows import with_prefix
from vtok.ops.selection import kept_of_parts, kept_tokens

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DropConfig(MethodConfig):
    """Fields of a baseline that drops patches unseen.

    Attributes:
        keep: share of its patches that each block in `layers` keeps ((0, 1]; default 0.925), rounded to whole tokens, halves to
            the even number, at least one; 1.0 is an exact no-op. On a vision-language model: share of the visual tokens that
            enter the LLM, rounded for every view of an image by itself.
        layers: 0-based blocks that prune, between attention and MLP; default all. On a vision-language model: blocks of its
            vision tower, where it then acts.
    """

    set_by_budget: ClassVar[tuple[str, ...]] = ("keep",)

    keep: float = 0.925
    layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self.keep, "keep")
        if self.layers is not None:
            object.__setattr__(self, "layers", block_numbers(self.layers))

    @property
    def in_tower(self) -> bool:
        return self.layers is not None

    def budget_candidates(self, info: Info) -> Sequence[Self]:
        return [self.replace(keep=1 - step / 1000) for step in range(1000)]

    def search_space(self, info: Info) -> Space:
        if not isinstance(info, ModelInfo):
            raise no_schedule(self, info)
        return {} if self.layers is not None else {"layers": Blocks(tuple(range(info.depth)))}

    def candidates_at(self, info: ModelInfo, point: Point) -> Sequence[Self]:
        return self.replace(layers=point["layers"]).budget_candidates(info)

    def blocks(self, info: ModelInfo) -> tuple[int, ...]:
        return block_indices(self.layers, range(info.depth), info.depth)

    def reducer(self, layers: tuple[int, ...], num_patches: int, grid: tuple[int, int]) -> DropReducer:
        """The baseline for one grid of patches."""
        raise NotImplementedError

    def build(self, info: ModelInfo) -> DropReducer:
        return self.reducer(self.blocks(info), info.num_patches, info.grid)

    def build_vlm(self, info: VLMInfo) -> ViewDrop:
        if self.layers is not None:
            raise ConfigError(
                f"layers={list(self.layers)} names blocks of a vision encoder, but on the prompt of {info.name} {self.name} "
                "acts once, before the LLM: leave layers out"
            )
        return ViewDrop(self)


def lowest(rank: Tensor, m: int) -> Tensor:
    """[.., m]: places of the m lowest of rank [.., n], rising."""
    return rank.argsort(dim=-1, stable=True)[..., :m].sort(-1).values


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
        m = kept_tokens(n - p, self.keep)
        if m == n - p:
            return None
        return Plan(self.kept(x, m, state, at).expand(batch, p + m))

    def kept(self, x: Tensor, m: int, state: TokenState, at: Site) -> Tensor:
        """[B or 1, P + M]: rows of x [B, N, C] that stay, the prefix first, then m patches in raster order."""
        p = state.num_prefix
        return with_prefix(lowest(self.rank(x.shape[1] - p, state, at, x.device), m), p)

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return num_prefix + kept_tokens(n - num_prefix, self.keep)


@dataclass(frozen=True)
class ViewDrop(VLMReducer):
    """Keeps the same share of every view of an image, before the LLM, and of every image exactly what `keep` says."""

    exact: ClassVar[bool] = True
    fixed_rows: ClassVar[bool] = True

    config: DropConfig

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(Place.IMAGE_FEATURES, 0),) if self.config.keep < 1 else ()

    def features(self, images: ImageFeatures) -> Plan | None:
        batch = len(images.tokens)
        counts = kept_of_parts([view.stop - view.start for view in images.views], self.config.keep)
        kept = [self._rows(i, view, m, images.tokens.device) for i, (view, m) in enumerate(zip(images.views, counts))]
        return Plan(torch.cat(kept).expand(batch, -1))

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        return kept_tokens(n, self.config.keep)

    def _rows(self, number: int, view: View, count: int, device: torch.device) -> Tensor:
        n = view.stop - view.start
        ranks = self.config.reducer((number,), n, (view.rows, view.columns)).rank(
            n, TokenState(0, n, grid=(view.rows, view.columns)), Site(Place.IMAGE_FEATURES, number), device
        )
        return view.start + lowest(ranks[0], count)
