"""ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance (Li et al., arXiv:2505.18757v2, 2025). Stage 1
keeps visual tokens that are unlike each other, before the language model; stage 2 drops the rest of them late in the language
model, prompt by prompt, once the text has stopped looking at them.

No code of the authors could be found: everything here was written from the paper's equations, and where they are silent the
reading is ours and said to be. The maths stands in `todre_select` (stage 1), `todre_pivot` (where it starts) and
`todre_relevance` (stage 2); here is what the method does to a model.

Every image chooses its own tokens, every prompt makes its own decision: nothing depends on the batch. The tokens of one image
are one pool, thumbnail and crops of a high-resolution image together; so are the frames of a video, one after the other, and
the tiles of all images of a prompt where the model itself hands them over as one (Idefics3, SmolVLM). Newline tokens between
rows compete like all others.

Shapes: B images or prompts, n visual tokens, D width, L columns in front of a decoder layer, V views of the vision tower, N
tokens of a view, P prefix tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.config import MethodConfig, flag, fraction
from vtok.core.prompt import ImageFeatures, LayerAttention, Layout, TowerBlock, TowerFacts, View, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.search_space import Choice, Dimension, Point, Real, Space
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, StateError, UnsupportedModelError, shown, unknown
from vtok.methods.todre.pivot import PIVOTS, choose_pivot, cls_attention
from vtok.methods.todre.selection import SELECTORS, k_center_select, max_sum_select
from vtok.methods.todre.text_relevance import (
    CRITERIA,
    DEFAULT_PROBE,
    DEFAULT_TAU,
    check_probe,
    drops_visual,
    layer_relevance,
    probe_layers,
    relevance,
)
from vtok.ops.selection import kept_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ToDRE", "k_center_select", "max_sum_select", "relevance"]

_TAUS = (0.05, 1.0)  # that a search draws from
DEFAULT_KEEP = 0.1  # 288 of the 2880 tokens of LLaVA-NeXT


@dataclass(frozen=True)
class ToDRE(MethodConfig):
    """Config of ToDRE.

    Attributes:
        keep: share of the visual tokens of an image that enter the LLM ((0, 1]; default 0.1, the paper's 288 of 2880; it also
            reports 0.25). Rounded to whole tokens, halves to the even number (our interpretation: the paper states counts); at
            least one of every image stays. 1.0 leaves stage 1 out.
        keep_tokens: the same as a count for every image, thumbnail and crops together (paper: k, 288 or 720); a whole
            number >= 1. An image with fewer tokens keeps them all. Give one of the two.
        selector: `"max_sum"` (the paper's second version, eqs. 4 to 7) or `"k_center"` (which its first version's abstract
            names).
        pivot: token that stage 1 starts from: `"cls"`, the one that the vision tower's class token attends to most (of an
            image in crops: among the thumbnail's; of a video: over all frames); `"center"` or `"farthest"` from the mean
            feature; `"random"`, by `seed`; or a token number. Default: `"cls"` where the tower has a class token and its
            patches can be told among the visual tokens, else `"center"`, because it repeats (the paper takes a random one).
        seed: for `"random"`.
        cls_layer: 0-based block of the vision tower whose class attention counts, negative ones from the end. Default: the
            block that the model takes its features from (the paper's "last layer" may mean this one or the tower's last).
        single_head: read eq. 3 by the letter, as one head over all channels; default: the mean over heads.
        probe: where stage 2 looks, as shares of the LLM's depth (floats) or 0-based decoder layers (ints), one or several; of
            several the first that passes drops. Default 7/8: what is judged in layer floor(7L/8) - 1 is gone from layer
            floor(7L/8) on. Behind the last layer nothing is left to drop. `None` leaves stage 2 out. The depth is what protects
            accuracy, not `tau`: in the paper's ablation half depth costs GQA 25 points at the default tau.
        tau: stage 2 drops all visual tokens of a prompt if the ratios are below it (paper: tau; [0, 1], default 0.1; 0 never
            drops).
        criterion: `"both"` ratios of eq. 8, or `"text_to_visual"` alone: they differ only where text precedes an image, or
            where the LLM lets an image see the text behind it.

    With `keep=1.0, probe=None` the method is an exact no-op.
    """

    name: ClassVar[str] = "todre"
    set_by_budget: ClassVar[tuple[str, ...]] = ("keep", "keep_tokens")
    image_only: ClassVar[Mapping[str, Any]] = {"probe": None}

    keep: float | None = None
    keep_tokens: int | None = None
    selector: str = "max_sum"
    pivot: str | int | None = None
    seed: int = 0
    cls_layer: int | None = None
    single_head: bool = False
    probe: float | Sequence[float] | None = DEFAULT_PROBE
    tau: float = DEFAULT_TAU
    criterion: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep_tokens is not None:
            raise ConfigError(f"give keep or keep_tokens, not both (got {self.keep} and {self.keep_tokens})")
        if self.keep is None and self.keep_tokens is None:
            object.__setattr__(self, "keep", DEFAULT_KEEP)
        if self.keep is not None:
            fraction(self.keep, "keep")
        elif not _whole(self.keep_tokens) or self.keep_tokens < 1:  # type: ignore[operator]
            raise ConfigError(f"keep_tokens must be a whole number >= 1, got {shown(self.keep_tokens)}")
        for name, allowed in (("selector", SELECTORS), ("criterion", CRITERIA)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise unknown(name, shown(getattr(self, name)), allowed)
        if isinstance(self.pivot, str) and self.pivot not in PIVOTS:
            raise unknown("pivot", self.pivot, PIVOTS)
        if self.pivot is not None and not isinstance(self.pivot, str) and (not _whole(self.pivot) or self.pivot < 0):
            raise ConfigError(f"pivot is one of {', '.join(PIVOTS)}, or a token number; got {shown(self.pivot)}")
        for name in ("seed", "cls_layer"):
            if getattr(self, name) is not None and not _whole(getattr(self, name)):
                raise ConfigError(f"{name} is a whole number, got {shown(getattr(self, name))}")
        flag(self.single_head, "single_head")
        if isinstance(self.probe, Sequence) and not isinstance(self.probe, str):
            object.__setattr__(self, "probe", tuple(self.probe))
        if self.probe is not None:
            check_probe(self.probe)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 <= self.tau <= 1:
            raise ConfigError(f"tau is a share of attention in [0, 1], got {shown(self.tau)}")

    @classmethod
    def alternatives(cls, info: VLMInfo) -> Sequence[Mapping[str, Any]]:
        """Stage 2 where it may be, where a model lets no token go behind 7/8 of its depth."""
        usual, layers = [layer + 1 for layer in probe_layers(DEFAULT_PROBE, info.depth)], info.judged_layers()
        return () if set(usual) <= set(layers) or not layers else ({"probe": layers[-1] - 1},)

    def budget_candidates(self, info: VLMInfo) -> Sequence[Self]:
        return [self.replace(keep=(1000 - step) / 1000, keep_tokens=None) for step in range(1000)]

    def search_space(self, info: VLMInfo) -> Space:
        """Where stage 2 looks, if anywhere, and what it asks for; the last layer is left out, behind which nothing is left."""
        space: dict[str, Dimension] = {}
        if self.probe == DEFAULT_PROBE:
            space["probe"] = Choice((None, *(layer - 1 for layer in info.judged_layers())))
        if self.tau == DEFAULT_TAU and self.probe is not None:
            space["tau"] = Real(*_TAUS)
        return space

    def candidates_at(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        probe, tau = point.get("probe", self.probe), round(point.get("tau", self.tau), 3)
        return self.replace(probe=probe, tau=self.tau if probe is None else tau).budget_candidates(info)

    def build_vlm(self, info: VLMInfo) -> ToDREReducer:
        probes = probe_layers(self.probe, info.depth)
        layers = tuple(layer + 1 for layer in probes if layer + 1 < info.depth) if self.tau > 0 else ()
        block = self._cls_block(info) if self.keep != 1 else None
        return (ToDREReducer if layers else FirstStage)(self, info, layers, block)

    def _cls_block(self, info: VLMInfo) -> int | None:
        """The block of the vision tower whose class attention chooses the pivot, if one does."""
        tower = info.tower
        if self.pivot not in (None, "cls"):
            return None
        if tower is None or not tower.has_cls:
            if self.pivot is None:
                return None
            why = info.no_tower if tower is None else "it has no class token"
            raise UnsupportedModelError(
                f'pivot="cls" needs the attention of a class token in the vision tower of {info.name}: {why}; '
                'pass pivot="center"'
            )
        if self.cls_layer is None:
            return tower.feature_block
        if not -tower.depth <= self.cls_layer < tower.depth:
            raise ConfigError(
                f"cls_layer={self.cls_layer} names no block of the vision tower of {info.name}, which has {tower.depth}"
            )
        return self.cls_layer % tower.depth


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class ToDREReducer(VLMReducer):
    """ToDRE for one model.

    Attributes:
        config: of the method.
        info: of the model.
        layers: decoder layers in front of which stage 2 drops.
        block: of the vision tower, whose class attention chooses pivots; `None` = it does not.
    """

    reads_reduced: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    config: ToDRE
    info: VLMInfo
    layers: tuple[int, ...]
    block: int | None

    @property
    def sites(self) -> tuple[Site, ...]:
        first = () if self.config.keep == 1 else (Site(Place.IMAGE_FEATURES, 0),)
        return (*first, *(Site(Place.DECODER_IN, layer) for layer in self.layers))

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return () if self.block is None else (self.block,)

    def probe(self, at: Site) -> int:
        return at.index - 1

    def features(self, images: ImageFeatures) -> Plan | None:
        config, (_, n, _) = self.config, images.tokens.shape
        count = kept_tokens(n, config.keep, config.keep_tokens)
        if count == n:
            return None
        pivot = self._pivot(images)
        order = SELECTORS[config.selector](images.tokens, count, pivot)
        return Plan(order.sort(1).values)  # columns keep their order, and with it their positions

    def _pivot(self, images: ImageFeatures) -> Tensor:
        """[B] int64: where each image starts."""
        config, found = self.config, None
        if self.block is not None:
            found = class_scores(images, self.block, config.single_head)
            if found is None and config.pivot == "cls":
                raise StateError(
                    f'pivot="cls": the patches that {self.info.name}\'s vision tower saw cannot be told among the '
                    f'{images.tokens.shape[1]} visual tokens of this {images.modality}; pass pivot="center"'
                )
        scores, start = (None, 0) if found is None else found
        return choose_pivot(config.pivot, images.tokens, None, scores, start, config.seed)

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor | None:
        assert attention is not None
        forth, back = layer_relevance(attention, layout.visual & layout.real, layout.after_image)
        dropped = drops_visual(forth, back, layout, self.config.tau, self.config.criterion)
        return (~dropped)[:, None].expand_as(layout.visual)

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        return kept_tokens(n, self.config.keep, self.config.keep_tokens)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        count = self.feature_count(n, views, modality)
        if count == n:
            return 0
        facts = self.info.tower if self.block is not None else None
        looked = 0 if facts is None else _class_macs(facts) * len(_candidates(views))
        return (count - 1) * n * self.info.width + looked

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        """Of a prompt whose text stands behind one image; where images see text, their rows are asked as well."""
        summed = text * self.info.num_heads * (visual + text)  # over the visual keys
        return self.info.probe_macs(text, visual + text) + summed


class FirstStage(ToDREReducer):
    """ToDRE without its second stage: how many tokens stay depends on their number alone."""

    needs: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True


# Which visual tokens the class token of the vision tower looks at.
def _candidates(views: Sequence[View]) -> list[View]:
    """The views whose tokens may be pivots: the one that shows the whole image, if there is one beside others."""
    shown = [view for view in views if not (view.newline and view.columns == 1)]
    return [view for view in shown if view.overview] or shown


def class_scores(images: ImageFeatures, block: int, single_head: bool = False) -> tuple[Tensor, int] | None:
    """Class attention of the visual tokens that may be pivots (eq. 3): the overview's, or those of every frame or tile.

    Where a visual token stands for a rectangle of patches, as behind a pixel shuffle, it gets the sum of theirs.

    Args:
        images: laid out alike.
        block: of the vision tower.
        single_head: see `cls_attention`.

    Returns:
        (scores [B, t] of t consecutive tokens, number of the first); `None` where patches cannot be told among the tokens.
    """
    count, views = images.views_per_image, _candidates(images.views)
    if any(view.newline for view in views) or not views:
        return None
    if len(views) == 1:  # the tower sees the whole image first, then its crops
        places = [0]
    elif len(views) == count and all(a.stop == b.start for a, b in itertools.pairwise(views)):
        places = list(range(count))
    else:
        return None
    alike = len({view.rows * view.columns for view in views}) == 1
    if (len(views) == 1 and count > 1 and not views[0].overview) or not alike:
        return None
    batch = len(images.tokens)
    seen = images.tower[block].only([b * count + place for b in range(batch) for place in places])
    scores = _on_grid(cls_attention(seen.view, seen.num_prefix, single_head), seen)
    if images.patches is not None:  # tokens that are left of one view, each at its patch
        whole = _per_token(scores, View(0, 1, images.unreduced), seen.num_prefix)
        return None if whole is None else (whole.gather(1, images.patches), 0)
    parts = _per_token(scores, views[0], seen.num_prefix)
    return None if parts is None else (parts.view(batch, -1), views[0].start)


def _on_grid(scores: Tensor, seen: TowerBlock) -> Tensor:
    """[V, patches]: scores of the tokens of a block [V, N - P], each at its patch; 0 where a patch has none left."""
    if seen.index is None:
        return scores
    p = seen.num_prefix
    if seen.valid is not None:
        scores = scores * seen.valid[:, p:]
    return scores.new_zeros(len(scores), seen.length - p).scatter_add(1, seen.index[:, p:] - p, scores)


def _per_token(scores: Tensor, view: View, num_prefix: int) -> Tensor | None:
    """Scores of patches [V, N - P] -> of the tokens of a view [V, t], if it is known which patches are which token."""
    patches, tokens = scores.shape[1], view.rows * view.columns
    if patches == tokens:
        return scores
    if patches + num_prefix == tokens:  # the model keeps the prefix among its features; no pivot is chosen there
        return torch.cat([scores.new_full((len(scores), num_prefix), -1.0), scores], 1)
    side = math.isqrt(patches)
    if side * side != patches or side % view.rows or side % view.columns:
        return None
    grid = scores.view(len(scores), view.rows, side // view.rows, view.columns, side // view.columns)
    return grid.sum((2, 4)).flatten(1)


def _class_macs(tower: TowerFacts) -> int:
    """MACs of a view's queries, keys and values in the block, and of the class token's products with the keys. Tokens that were
    merged or dropped in front of the block are counted as if they were there."""
    return (tower.num_patches + tower.num_prefix) * (3 * tower.width + 1) * tower.num_heads * tower.head_dim
