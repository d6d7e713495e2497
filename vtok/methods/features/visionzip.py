"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (Yang et al., CVPR 2025, arXiv:2412.04467). Of every
view (image, crop, tile, frame) the tokens that the class token attends to most stay; of the others, some that are evenly spread
take in those that are most like them.

Written from a description of the authors' program (dvlab-research/VisionZip at 3151f6d) and arrays that it made.

Shapes: V views, n tokens of each, k dominant, c contextual ones, r = n - k others, d width of the metric, C width of a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.config import flag, whole
from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, shown
from vtok.methods.features.view_tokens import Group, KeepConfig, ViewReducer, ViewTokens, looked_at, view_sizes
from vtok.methods.preset import Official
from vtok.ops.matching import unit
from vtok.ops.rows import rows_where, take_rows
from vtok.ops.selection import top

_CONTEXTUAL = 5 / 32  # of the tokens: 10 of 64, 20 of 128, 30 of 192, as published points split them


@dataclass(frozen=True)
class VisionZip(Official, KeepConfig):
    """Config of VisionZip.

    The program merges in front of the connector. So does vtok where that connector works token by token (LLaVA-1.5, LLaVA-NeXT,
    LLaVA-OneVision without shrunk crops); elsewhere (InternVL, Idefics3, SmolVLM, Gemma3, PaliGemma, pooled frames) tokens are
    merged behind it, by keys and attention averaged over the patches that a token is made of. Towers without a class
    token (SigLIP) rank a patch by the attention that it receives on average. Newline tokens between rows are dropped, as the
    program has none.

    What differs from the program unless `preset="official"`: a contextual token stands where its target stood, the class token
    at the first free place of its view.

    Attributes:
        keep: share of the tokens of every view that stay, all kinds together ((0, 1]; default 1/9: 64 of 576). Of them floor of
            5/32 are contextual: the split of the published points. 1.0 changes nothing.
        keep_tokens: the same as a count for every view.
        dominant: number of dominant tokens of every view, the class token among them (paper: 54, 108 or 162; the program's
            default is 191). Give it with `contextual`, instead of keep.
        contextual: number of contextual tokens (paper: 10, 20 or 30; >= 0).
        class_token: whether the class token enters the LLM as one of the dominant tokens, as in the program. Default: where the
            tower has one, the connector can take it, and two dominant tokens are left.
        layer: 0-based block of the vision tower whose attention and keys count, negative from the end; default: the one that
            the model takes its features from.
        preset: `"official"`: in the prompt the class token, then dominant tokens, then contextual ones, at the places of those
            that stay, numbered anew unless `positions` is given: the program's sequence.
    """

    name: ClassVar[str] = "visionzip"
    searched_layer: ClassVar[str] = "layer"
    set_by_budget: ClassVar[tuple[str, ...]] = ("keep", "keep_tokens", "dominant", "contextual")

    dominant: int | None = None
    contextual: int | None = None
    class_token: bool | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        self.check_preset()
        counts = (self.dominant, self.contextual)
        if counts != (None, None):
            if None in counts or self.keep is not None or self.keep_tokens is not None:
                raise ConfigError(
                    "dominant and contextual are given together, and instead of keep or keep_tokens; got "
                    f"dominant={shown(self.dominant)}, contextual={shown(self.contextual)}, keep={shown(self.keep)}, "
                    f"keep_tokens={shown(self.keep_tokens)}"
                )
            whole(self.dominant, "dominant", 1)
            whole(self.contextual, "contextual", 0)
        else:
            super().__post_init__()
        if self.class_token is not None:
            flag(self.class_token, "class_token")
        if self.layer is not None:
            whole(self.layer, "layer")

    def replace(self, **changes: Any) -> VisionZip:
        if changes.get("keep") is not None:
            changes = {"dominant": None, "contextual": None, **changes}
        return super().replace(**changes)

    def count(self, n: int) -> int:
        if self.dominant is not None and self.contextual is not None:
            return min(n, self.dominant + self.contextual)
        return super().count(n)

    def split(self, n: int) -> tuple[int, int]:
        """(dominant tokens, the class token among them, contextual ones) of a view of n."""
        total = self.count(n)
        if self.contextual is not None:
            return total - min(total - 1, self.contextual), min(total - 1, self.contextual)
        contextual = int(total * _CONTEXTUAL)
        return total - contextual, contextual

    def build_vlm(self, info: VLMInfo) -> VisionZipReducer:
        tower, block = looked_at(self, info, self.layer)
        return VisionZipReducer(self, info, tuple(dict.fromkeys((block, tower.feature_block))))


class Zipped(NamedTuple):
    """Which tokens of V views become what.

    Attributes:
        dominant: [V, k] int64, rising.
        rest: [V, r] int64, all others, rising.
        target: places in `rest` of the targets, c of them, the same in every view.
        other: places in `rest` of those that are merged.
        home: [V, r - c] int64, the target (0 .. c - 1) that each of them joins.
    """

    dominant: Tensor
    rest: Tensor
    target: Tensor
    other: Tensor
    home: Tensor

    @property
    def free(self) -> Tensor:
        """[V, 1]: the first token that is lost."""
        return self.rest[:, self.other[:1]]

    @property
    def targets(self) -> Tensor:
        """[V, c]: token numbers of the targets."""
        return self.rest[:, self.target]


def zip_tokens(attention: Tensor, metric: Tensor, dominant: int, contextual: int) -> Zipped:
    """Which tokens stay, and which of the others join which target.

    Targets are spread evenly over what is not dominant, in raster order; every other token goes to the one that its metric is
    most similar to (of equals the first). Of equal attention the first token is dominant.

    Args:
        attention: [V, n], from the class token, summed or averaged over heads.
        metric: [V, n, d], keys averaged over heads, compared by cosine.
        dominant: k.
        contextual: c; at most n - k are made.
    """
    n = attention.shape[1]
    kept = top(attention, dominant).sort(1).values
    stays = torch.zeros(attention.shape, dtype=torch.bool, device=attention.device).scatter(1, kept, True)
    rest, _ = rows_where(~stays, n - dominant)
    target, other = _targets(n - dominant, contextual, kept.device)
    if not contextual:
        return Zipped(kept, rest, target, other, torch.zeros_like(rest))  # nobody joins anybody
    z = take_rows(unit(metric), rest)
    return Zipped(kept, rest, target, other, (z[:, other] @ z[:, target].transpose(1, 2)).argmax(-1))


@functools.lru_cache(maxsize=256)
def _targets(left: int, contextual: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places among so many tokens of the targets, at an even step from the first, and of the others."""
    places = range(0, left, max(1, left // max(contextual, 1)))[:contextual]
    others = sorted(set(range(left)) - set(places))
    target, other = (torch.tensor(one, dtype=torch.int64, device=device) for one in (list(places), others))
    return target, other


def contextual_tokens(x: Tensor, zipped: Zipped) -> Tensor:
    """[V, c, C]: every target plus the mean of the tokens that join it, a sum of two means, in at least fp32. x [V, n, C]."""
    rest = at_least_fp32(take_rows(x, zipped.rest))
    joins = zipped.home[:, None] == torch.arange(len(zipped.target), device=x.device)[:, None]  # [V, c, r - c]
    joins = joins.to(rest.dtype)
    return rest[:, zipped.target] + (joins @ rest[:, zipped.other]) / joins.sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class VisionZipReducer(ViewReducer):
    """VisionZip for one model; the first of `blocks` is looked at, what leaves the last is merged."""

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        config: VisionZip = self.config
        seen, left = images.tower[self.blocks[0]], images.tower[self.blocks[-1]]
        attention, keys = self.scores(images, held), seen.view.k
        assert keys is not None
        metric = held.fit(at_least_fp32(keys[:, :, seen.num_prefix :]).mean(1))
        hidden = None if images.connector is None else held.hidden(left)
        connector = None if hidden is None else images.connector
        rows: list[Tensor] = []
        makers: list[Callable[[Tensor], Tensor]] = []
        for group in held.groups:
            dominant, contextual = config.split(group.size)
            if dominant + contextual == group.size:
                everything = torch.arange(group.size, device=attention.device)
                rows.append(held.rows(group, everything.expand(held.images * len(group.views), -1)))
                makers.append(functools.partial(held.tokens, group=group))
                continue
            first = connector is not None and self._class_token(dominant)
            zipped = zip_tokens(held.of(attention, group), held.of(metric, group), dominant - first, contextual)
            places = torch.cat([*([zipped.free] if first else []), zipped.dominant, zipped.targets], 1)
            rows.append(held.rows(group, places.sort(1).values if config.official else places))
            front = held.of(left.output[:, :1], group) if first else None
            inside = None if hidden is None else held.of(hidden, group)
            makers.append(functools.partial(_make, held, group, zipped, connector, inside, front))
        stays = held.stays.expand(held.images, -1)

        def remake(x: Tensor) -> Tensor:
            parts = [make(x).reshape(held.images, -1, x.shape[-1]) for make in makers]
            return torch.cat([*parts, take_rows(x, stays)], 1)

        return Plan(torch.cat([*rows, stays], 1), remake=remake)

    def _class_token(self, dominant: int) -> bool:
        """Whether the class token is one of so many dominant tokens, where the connector can take it."""
        return self.has_cls and self.config.class_token is not False and dominant > 1

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        tower = self.info.tower
        assert tower is not None
        macs = super().feature_macs(n, views, modality) // len(self.blocks)
        connector = self.info.connector_macs
        for size in view_sizes(views):
            dominant, contextual = self.config.split(size)
            if dominant + contextual == size:
                continue
            first = bool(connector) and self._class_token(dominant)
            others = size - dominant + first - contextual
            width = tower.width if connector else self.info.width
            macs += others * contextual * (tower.head_dim + width) + (contextual + first) * connector
        return macs


def _make(
    held: ViewTokens,
    group: Group,
    zipped: Zipped,
    connector: Callable[[Tensor], Tensor] | None,
    hidden: Tensor | None,
    front: Tensor | None,
    x: Tensor,
) -> Tensor:
    """Features [B, n, D] -> what becomes of a group [B G, k + c, D]: class token, dominant, contextual tokens."""
    tokens = held.tokens(x, group)
    kept = take_rows(tokens, zipped.dominant)
    if connector is None or hidden is None:
        return torch.cat([kept, contextual_tokens(tokens, zipped).to(x.dtype)], 1)
    new = contextual_tokens(hidden, zipped)
    if front is not None:
        new = torch.cat([front.to(new.dtype), new], 1)
    new = connector(new).to(x.dtype)
    first = 0 if front is None else 1
    return torch.cat([new[:, :first], kept, new[:, first:]], 1)
