"""Token-level correlation-guided compression (Zhang et al., arXiv 2407.14439), for models that cut a page into crops: each
keeps a number of visual tokens of its own. Patch-patch similarity at a low block of the vision tower says how many (information
density), the class token's attention there says which, and its outliers at a deep block are added. The view of the whole page
is left alone.

The authors published no code and the paper's text was not at hand: `Correlation` lists what of this is our interpretation. The
maths: `correlation_scores` (how many, which), `correlation_views` (from patches to visual tokens), `correlation_merge` (what
becomes of dropped tokens), `correlation_calibrate` (alpha).

Shapes: B images, V views of each, n patches and m visual tokens of a view, L visual tokens of an image, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.capabilities import Info
from vtok.config import MethodConfig, flag
from vtok.core.prompt import ImageFeatures, TowerBlock, TowerFacts, View, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, StateError, UnsupportedModelError, shown, unknown
from vtok.methods.correlation.calibrate import DEFAULT_TARGET, calibrate_alpha, crop_scores
from vtok.methods.correlation.merge import AGGREGATIONS, compression
from vtok.methods.correlation.scores import SAMPLINGS, TokenScores, check_alpha, check_beta, redundant_tokens, select_tokens
from vtok.methods.correlation.views import feature_metric, feature_scores
from vtok.ops.attention import cls_attention, received_attention
from vtok.ops.crops import ViewMap, square_groups

__all__ = ["Correlation", "CorrelationReducer", "redundant_tokens"]

LOW = 2 / 24  # the low block, as a share of the tower's depth


@dataclass(frozen=True)
class Correlation(MethodConfig):
    """Correlation-guided compression of the crops of a page, before the LLM.

    The paper's numbers are not public, its text was not at hand and there is no code of the authors. Our interpretation, from
    its figure, its abstract and reviews: keys compared with all heads side by side; a token does not count itself; `>` in both
    thresholds; attention averaged over heads after the softmax (`joint`: the alternative); 1.5 interquartile ranges, linear
    percentiles; local tokens drawn without replacement; a weighted mean with the most similar kept token (`aggregation`: the
    alternatives); every default below. Ours alone, where the paper has nothing: `topk`; calibration; connectors that merge
    patches, whose tokens are redundant if all their patches are; LLaVA-OneVision's shrunken crops, whose scores shrink
    likewise; the newline behind a line of crops, which stays if its line keeps a token; and towers without a class token
    (SigLIP), where the attention that a patch receives, averaged over heads and queries, takes the place of the class token's.

    A view of a whole page is returned bit for bit, and so are an image that was not cropped and the frames of a video: on a
    model that never crops nothing would happen, which is refused unless `overview=True`.

    Alpha has no default. Either pass it, or let `vtok.patch(model, "correlation", calibration=[inputs, ...])` find it on a few
    pages of your own, once: what is kept of an image then depends on that image alone, and `save_config` writes the number.

    Attributes:
        alpha: threshold on the cosine of two patches (paper: alpha; [-1, 1]; value not published). Larger keeps more.
        target_keep: share of the crops' tokens that calibration aims at ((0, 1]; `None` = 0.66, our interpretation of
            published summaries: about two thirds are kept on average). Not beside `alpha`.
        beta: how many similar patches are fine (paper: beta; not published): a number of patches, or, between 0 and 1, a share
            of the view's (default 0.03: 31 of 1024).
        low_layer: 0-based block of the tower for similarity and sampling (paper: "low layer"; negative counts from the end;
            `None` = 2 of 24, scaled to the depth).
        deep_layer: block for outliers (paper: "deep layer"; `None` = the one whose output the model uses).
        sampling: `"multinomial"` (paper) or `"topk"`, which takes the most attended tokens instead of drawing.
        seed: of the draw, which depends on the seed, the number of the view within its page and its scores alone.
        aggregation: `"nearest"`, `"none"` (dropped tokens are lost) or `"knn"` (LLaVA-PruMerge's rule: every kept token takes
            in its `k` nearest neighbours, undivided).
        k: neighbours under `"knn"` (>= 1; LLaVA-PruMerge: 32).
        iqr_factor: interquartile ranges above the third quartile at which an outlier begins (>= 0; default 1.5).
        min_tokens: a crop keeps at least so many (>= 1); the most attended ones are added.
        joint: one softmax over the keys of all heads side by side, for class-token attention, as LLaVA-PruMerge takes it.
        overview: compress views of whole pages, too. Not in the paper.
    """

    name: ClassVar[str] = "correlation"

    alpha: float | None = None
    target_keep: float | None = None
    beta: float = 0.03
    low_layer: int | None = None
    deep_layer: int | None = None
    sampling: str = "multinomial"
    seed: int = 0
    aggregation: str = "nearest"
    k: int = 32
    iqr_factor: float = 1.5
    min_tokens: int = 1
    joint: bool = False
    overview: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            check_alpha(self.alpha)
            if self.target_keep is not None:
                raise ConfigError(
                    f"alpha={self.alpha} and target_keep={self.target_keep} contradict each other: calibration would choose "
                    "alpha; pass one of them"
                )
        if self.target_keep is not None and not (_number(self.target_keep) and 0 < self.target_keep <= 1):
            raise ConfigError(f"target_keep is a share of tokens in (0, 1], got {shown(self.target_keep)}")
        check_beta(self.beta)
        for name, value, options in (("sampling", self.sampling, SAMPLINGS), ("aggregation", self.aggregation, AGGREGATIONS)):
            if value not in options:
                raise unknown(name, str(value), options)
        for name, least in (("k", 1), ("min_tokens", 1), ("seed", None), ("low_layer", None), ("deep_layer", None)):
            value = getattr(self, name)
            if value is None and name.endswith("layer"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
                raise ConfigError(f"{name} is a whole number{'' if least is None else f' >= {least}'}, got {shown(value)}")
        if not _number(self.iqr_factor) or not 0 <= self.iqr_factor < math.inf:
            raise ConfigError(f"iqr_factor is a number >= 0, got {shown(self.iqr_factor)}")
        flag(self.joint, "joint")
        flag(self.overview, "overview")

    @classmethod
    def alternatives(cls, info: Info) -> Sequence[Mapping[str, Any]]:
        return ({"alpha": 0.5}, {"alpha": 0.5, "overview": True})

    def build_vlm(self, info: VLMInfo) -> CorrelationReducer:
        reducer = self._reducer(info)
        if self.alpha is None:
            raise ConfigError(
                "correlation has no default threshold, as the paper's is not published: pass alpha=..., or "
                "calibration=[inputs, ...], a few pages of your own as the processor returns them, of whose crops "
                f"target_keep={DEFAULT_TARGET if self.target_keep is None else self.target_keep} of the tokens are to stay"
            )
        return reducer

    def _reducer(self, info: VLMInfo) -> CorrelationReducer:
        """The same without alpha, which calibration has yet to find."""
        tower = info.tower
        if tower is None:
            raise UnsupportedModelError(
                f"correlation looks at the attention of {info.name}'s vision tower, which cannot be read: {info.no_tower}"
            )
        if not info.crops and not self.overview:
            raise UnsupportedModelError(
                f"correlation compresses the crops of a page and leaves the view of the whole page alone; {info.name} never "
                "crops, so nothing would change. overview=True compresses its only view, which is not in the paper"
            )
        low = round(tower.depth * LOW) if self.low_layer is None else _block("low_layer", self.low_layer, tower.depth)
        deep = tower.feature_block if self.deep_layer is None else _block("deep_layer", self.deep_layer, tower.depth)
        return CorrelationReducer(self, min(low, deep) if self.low_layer is None else low, deep, tower.has_cls, tower)

    @property
    def calibrates(self) -> bool:
        return self.alpha is None

    def calibrated(self, info: VLMInfo, observe: Callable[[Sequence[int]], Iterable[ImageFeatures]]) -> Correlation:
        reducer = self._reducer(info)
        pages, numbers = [], []
        for images in observe(reducer.tower_blocks):
            if images.modality == "image":
                pages.append((reducer.scores(images).scores, _source(images).whole & (not self.overview)))
                numbers.append(_source(images).number)
        if all(bool(whole.all()) for _, whole in pages):
            raise ConfigError(
                "calibration needs pages that are cut into crops, and none of the inputs was: pass larger images, or alpha"
            )
        scores, number = crop_scores(pages, numbers)
        target = DEFAULT_TARGET if self.target_keep is None else self.target_keep
        found = calibrate_alpha(scores, target, self.sampling, self.seed, number, self.min_tokens)
        return self.replace(alpha=found.alpha, target_keep=None)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _block(name: str, layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise ConfigError(f"{name}={layer} is no block of the vision tower, which has blocks 0 to {depth - 1}")
    return layer % depth


class _Scored(NamedTuple):
    """What is known of the views of B images.

    Attributes:
        scores: [B V, m] each.
        keys: [B V, H, n, D].
        groups: [m, s] patches of every token, `None` = every patch is one.
        patches: [B V, n] bool, patches that hold image; `None` = all.
    """

    scores: TokenScores
    keys: Tensor
    groups: Tensor | None
    patches: Tensor | None


@dataclass(frozen=True)
class CorrelationReducer(VLMReducer):
    """Acts on image features, view by view; an image of a model that does not say how it was cut stays as it is."""

    config: Correlation
    low: int
    deep: int
    has_cls: bool
    tower: TowerFacts | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(Place.IMAGE_FEATURES, 0),)

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return tuple(sorted({self.low, self.deep}))

    def features(self, images: ImageFeatures) -> Plan | None:
        config = self.config
        if images.modality == "video":
            return None
        source = _source(images)
        if not source.cropped and not config.overview:
            return None
        assert config.alpha is not None
        whole = source.whole & (not config.overview)
        scores, keys, groups, patches = self.scores(images)
        kept = select_tokens(scores, config.alpha, config.sampling, config.seed, source.number, config.min_tokens)
        metric = keys if config.aggregation == "none" else feature_metric(keys, source.layout, groups, patches)
        return compression(source.layout, kept, metric, scores.low, config.aggregation, config.k, scores.valid, whole)

    def scores(self, images: ImageFeatures) -> _Scored:
        """Scores of every visual token.

        Raises:
            StateError: tokens of the tower and visual tokens do not correspond.
        """
        source, low, deep = _source(images), images.tower[self.low], images.tower[self.deep]
        keys = _keys(low)
        groups = _groups(source, keys.shape[2], keys.device)
        patches = None if low.valid is None else low.valid[:, low.num_prefix :]
        if source.layout.patches is not None:
            inside = source.layout.patches.repeat(len(keys) // source.views, 1)
            patches = inside if patches is None else patches & inside
        scores = feature_scores(
            keys,
            self._attention(low),
            self._attention(deep),
            self.config.beta,
            source.layout,
            groups,
            self.config.iqr_factor,
            patches,
        )
        return _Scored(scores, keys, groups, patches)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        """Queries, keys and values of both blocks, attention read there, cosines of patches and, if tokens join others, of
        tokens. Crops whose rows or columns were all removed as padding are not in `views`, and not counted; nor are tiles
        that a model returns as images of their own (InternVL), which look like pages that were not cropped."""
        shown = [view for view in views if not (view.newline and view.columns == 1)]
        if self.tower is None or modality == "video" or (len(shown) == 1 and not self.config.overview):
            return 0
        overview = next((view for view in shown if view.overview), shown[0])
        patches, width, tokens = self.tower.num_patches, self.tower.width, overview.rows * overview.columns
        columns = patches + self.tower.num_prefix
        asked = columns if not self.has_cls else 1
        macs = len(self.tower_blocks) * 3 * columns * width**2 + 2 * asked * columns * width + patches**2 * width
        if self.config.aggregation != "none":
            macs += tokens**2 * width
        return macs * sum(_crops(view, overview) for view in shown)

    def _attention(self, block: TowerBlock) -> Tensor:
        """[B V, n]: attention that patches get from the class token, or else from everywhere."""
        view, prefix = block.view, block.num_prefix
        assert view.q is not None and view.k_rot is not None
        if not self.has_cls:
            valid = None if block.valid is None else block.valid[:, prefix:]
            return received_attention(view.q, view.k_rot, prefix, view.scale, valid)
        if self.config.joint:
            return cls_attention(view.q[:, :, 0], view.k_rot, prefix, joint=True)
        return view.probs(1)[:, :, 0, prefix:].mean(1)


def _crops(view: View, overview: View) -> int:
    """Views of the tower behind a rectangle of tokens."""
    if not view.newline:
        return 1
    return -(-view.rows // overview.rows) * -(-(view.columns - 1) // overview.columns)


def _keys(block: TowerBlock) -> Tensor:
    """[B V, H, n, D], of patches."""
    keys = block.view.k
    assert keys is not None
    return keys[:, :, block.num_prefix :]


def _source(images: ImageFeatures) -> ViewMap:
    if images.source is None:
        raise StateError(
            f"correlation must know how an image of {images.tokens.shape[1]} visual tokens was cut into "
            f"{images.views_per_image} views, and the inputs do not say: pass them as the processor returns them, image_sizes "
            "and input_ids included"
        )
    return images.source


def _groups(source: ViewMap, patches: int, device: torch.device) -> Tensor | None:
    """Patches of every token [m, s], where they were merged."""
    how = source.layout.packing
    tokens = source.layout.rows.shape[1] if how is None else how.side**2
    try:
        if how is not None and patches != tokens:
            raise ConfigError(f"{patches} patches of a view became {tokens} tokens before crops were joined")
        groups = square_groups(patches, tokens)
    except ConfigError as error:
        raise StateError(
            f"correlation must know which patches a visual token is made of, but {error}; does something merge or drop tokens "
            "inside the vision tower, or is the class token among the features?"
        ) from None
    return None if groups is None else groups.to(device)
