"""Visual tokens view by view (crop, tile, frame): what methods share that choose among the output of a vision tower, by its
attention, before the LLM.

Views of one image that have as many tokens each form a group, which methods treat as one dense batch: crops that lost rows or
columns as padding are a group of their own. Newline tokens belong to no view: behind the rows of an image they leave, the one
behind a whole video stays.

Shapes: B images, V views of each, G views of a group, m tokens of each, P patches that the tower saw of a view, n visual tokens
of an image, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.capabilities import no_schedule
from vtok.config import MethodConfig
from vtok.core.prompt import ImageFeatures, TowerBlock, TowerFacts, View, VLMInfo, VLMReducer
from vtok.core.search_space import Choice, Dimension, Point, Space
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, StateError, UnsupportedModelError
from vtok.methods.correlation.views import to_features
from vtok.methods.kept_share import KeptShare
from vtok.ops.attention import received_attention
from vtok.ops.crops import packed_layout, square_groups
from vtok.ops.packing import Packing

if TYPE_CHECKING:
    from typing_extensions import Self

    from vtok.core.reduction import Plan

DEFAULT_KEEP = 1 / 9  # 64 of the 576 tokens of LLaVA-1.5


# Which token is whose.
class Group(NamedTuple):
    """Views of an image that have m tokens each.

    Attributes:
        views: their numbers, in the order of the prompt.
        rows: [G, m] int64, place of every token among the n of its image.
        index: [G] int64, `views` on the device of `rows`.
    """

    views: tuple[int, ...]
    rows: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index on purpose

    @classmethod
    def of(cls, views: Sequence[int], rows: Tensor) -> Group:
        return cls(tuple(views), rows, torch.tensor(views, dtype=torch.int64, device=rows.device))

    @property
    def size(self) -> int:
        """m."""
        return self.rows.shape[1]


class ViewTokens(NamedTuple):
    """The tokens of B images that are laid out alike.

    Attributes:
        images: B.
        views: V.
        length: n.
        groups: all views that have tokens.
        stays: [r] int64, rows of no view that stay: the newline behind a video.
        fit: what belongs to patches [B V, P, C] -> to tokens [B V, >= m, C]: the mean of the patches that a connector merges.
        patches: of a view of which no part was cut away, if every token is one patch; 0 where crops shrank.
    """

    images: int
    views: int
    length: int
    groups: tuple[Group, ...]
    stays: Tensor
    fit: Callable[[Tensor], Tensor]
    patches: int

    def of(self, x: Tensor, group: Group) -> Tensor:
        """What belongs to tokens of all views (from `fit`), for a group: [B V, M, C] -> [B G, m, C]."""
        x = x.unflatten(0, (self.images, self.views))
        if len(group.views) < self.views:
            x = x.index_select(1, group.index)
        return x[:, :, : group.size].flatten(0, 1)

    def hidden(self, block: TowerBlock) -> Tensor | None:
        """What left a block, for tokens of all views [B V, M, C] (see `of`), where every token is one patch; else `None`."""
        if block.leaves is None or block.output.shape[1] - block.num_prefix != self.patches:
            return None
        return self.fit(block.output[:, block.num_prefix :])

    def tokens(self, x: Tensor, group: Group) -> Tensor:
        """[B, n, D] -> [B G, m, D]."""
        return x[:, group.rows.flatten()].view(-1, group.size, x.shape[-1])

    def rows(self, group: Group, chosen: Tensor) -> Tensor:
        """Token numbers within views [B G, k] -> places in the image [B, G k]."""
        return group.rows.repeat(self.images, 1).gather(1, chosen).view(self.images, -1)

    @property
    def pool(self) -> Tensor:
        """[n'] int64, rising: rows of the tokens of all views."""
        return torch.cat([group.rows.flatten() for group in self.groups]).sort().values

    def by_row(self, x: Tensor) -> Tensor:
        """Numbers of tokens of all views (from `fit`) [B V, M] -> of the rows of an image [B, n]; 0 at rows of no view."""
        out = x.new_zeros(self.images, self.length)
        for group in self.groups:
            out = out.index_copy(1, group.rows.flatten(), self.of(x, group).reshape(self.images, -1))
        return out

    def kept(self, parts: Sequence[Tensor]) -> Tensor:
        """[B, K], rising: all rows that stay, from those of every group."""
        return torch.cat([*parts, self.stays.expand(self.images, -1)], 1).sort(1).values


def view_tokens(images: ImageFeatures, method: str) -> ViewTokens:
    """Which visual tokens belong to which view.

    Raises:
        StateError: it cannot be told, or views of the tower and visual tokens do not correspond.
    """
    batch, n, _ = images.tokens.shape
    device = images.tokens.device
    source = images.source
    if source is not None:
        how = source.layout.packing
        if how is not None:
            layout = source.layout
            groups = _packed_groups(how, device)
            patches = 0 if how.shrunk else how.side**2
            return ViewTokens(batch, source.views, n, groups, _none(device), lambda x: to_features(layout, x), patches)
        size = source.layout.rows.shape[1]
        group = _plain_group(source.views, size, device)
        fit = functools.partial(_regroup, tokens=size, method=method)
        return ViewTokens(batch, source.views, n, (group,), _none(device), fit, size)
    shown = [view for view in images.views if not view.newline]
    joint = [view for view in images.views if view.newline and view.columns > 1]
    sizes = {view.rows * view.columns for view in shown}
    looked = bool(images.tower)
    if not shown or joint or (looked and (len(sizes) != 1 or len(shown) != images.views_per_image)):
        raise StateError(
            f"{method} must know which of the {n} visual tokens of this {images.modality} belong to which view of the vision "
            "tower, and the inputs do not say: pass them as the processor returns them, image_sizes and input_ids included"
        )
    groups, stays = _raster_groups(images.views, images.modality == "video", device)
    size = max(sizes)
    fit = functools.partial(_regroup, tokens=size, method=method)
    return ViewTokens(batch, len(shown), n, groups, stays, fit, size)


@functools.lru_cache(maxsize=16)
def _none(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=64)
def _plain_group(views: int, size: int, device: torch.device) -> Group:
    return Group.of(range(views), torch.arange(views * size, device=device).view(views, size))


@functools.lru_cache(maxsize=64)
def _packed_groups(how: Packing, device: torch.device) -> tuple[Group, ...]:
    layout = packed_layout(how)
    counts = layout.valid.sum(-1).tolist()
    sizes = dict.fromkeys(count for count in counts if count)
    alike = [(size, [i for i, count in enumerate(counts) if count == size]) for size in sizes]
    return tuple(Group.of(views, layout.rows[views, :size].to(device)) for size, views in alike)


@functools.lru_cache(maxsize=64)
def _raster_groups(views: tuple[View, ...], video: bool, device: torch.device) -> tuple[tuple[Group, ...], Tensor]:
    shown = [view for view in views if not view.newline]
    sizes = dict.fromkeys(view.stop - view.start for view in shown)
    groups = []
    for size in sizes:
        numbers = [i for i, view in enumerate(shown) if view.stop - view.start == size]
        starts = torch.tensor([shown[i].start for i in numbers], device=device)
        groups.append(Group.of(numbers, starts[:, None] + torch.arange(size, device=device)))
    behind = [row for view in views if view.newline for row in range(view.start, view.stop)] if video else []
    return tuple(groups), torch.tensor(behind, dtype=torch.int64, device=device)


def _regroup(x: Tensor, tokens: int, method: str) -> Tensor:
    """What belongs to patches [V, P, C], for the tokens of a view, where squares of patches became one token."""
    count = x.shape[1]
    if count == tokens:
        return x
    try:
        groups = square_groups(count, tokens)
    except ConfigError as error:
        wide, side = math.isqrt(count), math.isqrt(tokens)
        if wide**2 == count and side**2 == tokens and side == math.ceil(wide / 2):  # LLaVA-OneVision's frames, shrunk alike
            grid = x.transpose(1, 2).unflatten(2, (wide, wide))
            return F.interpolate(grid, (side, side), mode="bilinear").flatten(2).transpose(1, 2)
        raise StateError(
            f"{method} must know which patches a visual token is made of, but {error}; is the class token among the features?"
        ) from None
    assert groups is not None
    return x[:, groups.to(x.device, non_blocking=True)].mean(2)


# What the tower attends to.
def looked_at(config: MethodConfig, info: VLMInfo, layer: int | None, name: str = "layer") -> tuple[TowerFacts, int]:
    """The vision tower, and the block whose attention counts: 0-based, from the end if negative, by default the one that the
    model takes its features from.

    Raises:
        UnsupportedModelError: the tower cannot be looked into.
        ConfigError: no such block.
    """
    tower = info.tower
    if tower is None:
        raise UnsupportedModelError(
            f"{config.name} looks at the attention of {info.name}'s vision tower, which cannot be read: {info.no_tower}"
        )
    if tower.prefix_kept:
        raise UnsupportedModelError(
            f"{config.name} scores patches, and {info.name} has the class token of its vision tower among the features, as "
            "vision_feature_select_strategy='full' says"
        )
    if layer is None:
        return tower, tower.feature_block
    if not -tower.depth <= layer < tower.depth:
        raise ConfigError(f"{name}={layer} names no block of the vision tower of {info.name}, which has {tower.depth}")
    return tower, layer % tower.depth


def head_attention(block: TowerBlock) -> Tensor:
    """[V, H, P]: attention of the class token to the patches, the softmax taken over all tokens, in at least fp32."""
    return block.view.probs(1)[:, :, 0, block.num_prefix :]


def patch_attention(block: TowerBlock, has_cls: bool) -> Tensor:
    """[V, P]: attention of the class token, averaged over heads; without one, what a patch receives on average from all."""
    if has_cls:
        return head_attention(block).mean(1)
    view, prefix = block.view, block.num_prefix
    assert view.q is not None and view.k_rot is not None
    valid = None if block.valid is None else block.valid[:, prefix:]
    return received_attention(view.q, view.k_rot, prefix, view.scale, valid)


def attention_macs(tower: TowerFacts, has_cls: bool = True) -> int:
    """Of `patch_attention` for one view: queries, keys and values of its tokens, and the products that are asked for."""
    tokens = tower.num_patches + tower.num_prefix
    asked = 1 if has_cls else tokens
    return tokens * (3 * tower.width + asked) * tower.num_heads * tower.head_dim


# Configs and reducers.
@dataclass(frozen=True)
class KeepConfig(KeptShare):
    """A method that keeps a share, or a number, of visual tokens of every view.

    Attributes:
        keep: share of the visual tokens that stay ((0, 1]; default 1/9, 64 of 576), rounded, at least one.
        keep_tokens: the same as a count (whole number >= 1).
    """

    default_keep: ClassVar[float | None] = DEFAULT_KEEP
    searched: ClassVar[Mapping[str, Dimension]] = {}  # what a search may vary beside `keep`, if it is left at its default
    searched_layer: ClassVar[str] = ""  # the parameter that names a block of the vision tower; "" = there is none

    def search_space(self, info: VLMInfo) -> Space:
        given = self.given()
        space = {name: dimension for name, dimension in self.searched.items() if name not in given}
        if self.searched_layer and info.tower is not None and getattr(self, self.searched_layer) is None:
            space[self.searched_layer] = Choice(tuple(range(info.tower.depth)))
        if not self.searched and not self.searched_layer:
            raise no_schedule(self, info)
        return space

    def candidates_at(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        return self.replace(**{k: round(v, 3) if isinstance(v, float) else v for k, v in point.items()}).budget_candidates(info)


@dataclass(frozen=True)
class ViewReducer(VLMReducer):
    """Chooses among image features, view by view; subclasses say how.

    Attributes:
        config: of the method.
        info: of the model.
        blocks: of the vision tower that are looked at.
    """

    config: Any
    info: VLMInfo
    blocks: tuple[int, ...] = ()

    @property
    def exact(self) -> bool:
        """Of a crop that lost rows as padding a plan knows the number of tokens approximately."""
        return self.info.grid is not None or not self.info.crops

    @property
    def fixed_counts(self) -> bool:
        return True

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.config.keep == 1 else (Site(Place.IMAGE_FEATURES, 0),)

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return self.blocks

    @property
    def has_cls(self) -> bool:
        return self.info.tower is not None and self.info.tower.has_cls

    def features(self, images: ImageFeatures) -> Plan | None:
        held = view_tokens(images, self.config.name)
        if all(self.config.count(group.size) == group.size for group in held.groups):
            return None
        return self.choose(images, held)

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        """Some tokens of some view leave."""
        raise NotImplementedError

    def scores(self, images: ImageFeatures, held: ViewTokens, block: int | None = None) -> Tensor:
        """[B V, M]: attention of the visual tokens, from `ViewTokens.fit`."""
        seen = images.tower[self.blocks[0] if block is None else block]
        return held.fit(patch_attention(seen, self.has_cls)[..., None])[..., 0]

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        behind = sum(view.stop - view.start for view in views if view.newline) if modality == "video" else 0
        sizes = view_sizes(views)
        counts = [self.config.count(size) for size in sizes]
        return n if counts == sizes else min(n, sum(counts) + behind)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        if self.info.tower is None or not self.blocks:
            return 0
        seen = len(view_sizes(views))
        return seen * attention_macs(self.info.tower, self.has_cls) * len(self.blocks)


def view_sizes(views: Sequence[View]) -> list[int]:
    """Tokens of every view of the tower behind these rectangles; of joined crops as far as the rectangle tells."""
    sizes: list[int] = []
    overview = next((view for view in views if view.overview), None)
    for view in views:
        if not view.newline:
            sizes.append(view.stop - view.start)
        elif view.columns > 1 and overview is not None:
            high, wide = _parts(view.rows, overview.rows), _parts(view.columns - 1, overview.columns)
            sizes += [a * b for a in high for b in wide]
    return sizes


def _parts(length: int, side: int) -> list[int]:
    """How many rows (or columns) each crop of a line has, where padding was cut off both ends alike."""
    count = -(-length // side)
    if count < 2:
        return [length]
    outer = length - (count - 2) * side
    return [outer // 2, *[side] * (count - 2), outer - outer // 2]


def chosen_rows(held: ViewTokens, choose: Callable[[Group], Tensor]) -> Tensor:
    """[B, K]: rows that stay, where `choose` gives token numbers [B G, k] of a group."""
    return held.kept([held.rows(group, choose(group)) for group in held.groups])
