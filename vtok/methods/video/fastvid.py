"""FastVID: Dynamic Density Pruning for Fast Video Large Language Models (Shen et al., NeurIPS 2025, arXiv:2503.11187). A video
is cut into segments of like frames. Every frame keeps its most attended tokens; in some frames of a segment anchors are chosen,
peaks of density among the others, and take in what is like them.

Written from a description of the authors' program (LunarShen/FastVID at a40a109) and arrays that it made.

Shapes: F frames of one video, m tokens of each, r of them not salient, D width, E width of what frames are compared by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.config import whole
from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.search_space import Choice, Dimension, Real
from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown
from vtok.methods.features.view_tokens import attention_macs, patch_attention, view_tokens
from vtok.methods.preset import Official
from vtok.methods.video.video_tokens import Frames, VideoConfig, VideoReducer, shape_of
from vtok.ops.matching import unit
from vtok.ops.rows import rows_where, take_rows
from vtok.ops.selection import top

SALIENCE = ("tower", "features")
_NEAREST = 4  # tokens whose distance makes the density


@dataclass(frozen=True)
class FastVID(Official, VideoConfig):
    """Config of FastVID. Images are left alone.

    The program ranks tokens by the attention of SigLIP's pooling head and compares frames by that head's output. Released
    models carry no such head in transformers; in its place stands `salience`, and frames are compared by the mean of their
    visual tokens. The program adds random numbers of 1e-6 to densities, against ties; here of equal ones the first wins.

    Attributes:
        keep: share of the visual tokens of a video that stay, at most (program: rho, retention; (0, 1]; default 0.1, for
            Qwen2.5-VL 0.27); rounded down frame by frame, at least one token of each. 1.0 changes nothing.
        keep_tokens: the same as a count for a video, parted evenly among frames.
        segments: least number of segments (program: c, 8; >= 1); as many as there are frames at most.
        threshold: a segment also ends where neighbouring frames are less alike than this (program: tau, 0.9; for Qwen2.5-VL
            0.84; [-1, 1]).
        context: share of a frame's tokens that is spent on anchors (program: d, 0.4; [0, 1)), rounded down.
        every: anchors stand in every so manieth frame of a segment, counted from its end (program: p, 4; >= 1).
        anchor_weight: least weight of an anchor in the mean with what it takes in (program: beta, 0.6; [0, 1]).
        salience: `"tower"`, the attention that a patch receives in the vision tower on average, or from its class token;
            `"features"`, the softmax of a token's similarity to the mean of its frame, over the frame. Default: the tower's
            where it can be read, else the features'.
        preset: `"official"` is refused: no model of transformers carries the head that the program looks at.
    """

    name: ClassVar[str] = "fastvid"
    searched: ClassVar[Mapping[str, Dimension]] = {
        "threshold": Real(0.5, 1.0),
        "context": Real(0.0, 0.8),
        "every": Choice((1, 2, 4, 8)),
        "anchor_weight": Real(0.3, 0.9),
    }
    default_keep: ClassVar[float | None] = 0.1

    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    every: int = 4
    anchor_weight: float = 0.6
    salience: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.segments, "segments", 1)
        whole(self.every, "every", 1)
        for name, low, high in (("threshold", -1, 1), ("context", 0, 1), ("anchor_weight", 0, 1)):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
            if not good or (name == "context" and value == 1):
                raise ConfigError(f"{name} lies in [{low}, {high}{')' if name == 'context' else ']'}, got {shown(value)}")
        if self.salience is not None and self.salience not in SALIENCE:
            raise unknown("salience", str(self.salience), SALIENCE)

    def frame_budget(self, frames: int, tokens: int) -> int:
        """b, of every frame."""
        if self.keep is None:
            return min(tokens, max(1, self.count(frames * tokens) // frames))
        return min(tokens, max(1, int(tokens * self.keep)))

    def build_vlm(self, info: VLMInfo) -> FastVIDReducer:
        self.check(info)
        if self.official:
            raise UnsupportedModelError(
                f"fastvid's program looks at the pooling head of a SigLIP tower, which {info.name} does not carry; leave the "
                "preset out: salience says what stands in its place"
            )
        if self.salience == "tower" and info.tower is None:
            raise UnsupportedModelError(
                f'salience="tower" looks at the attention of {info.name}\'s vision tower, which cannot be read: '
                f'{info.no_tower}; pass salience="features"'
            )
        looks = info.tower is not None and self.salience != "features"
        return FastVIDReducer(self, info, info.tower.feature_block if looks and info.tower is not None else None)


class Budget(NamedTuple):
    """What a frame may keep.

    Attributes:
        salient: tokens that stay for their attention.
        context: tokens that anchors may be, on average over the frames of a segment.
    """

    salient: int
    context: int

    @classmethod
    def of(cls, total: int, share: float) -> Budget:
        context = int(total * share)
        return cls(total - context, context)


def segment_lengths(frames: Tensor, least: int, threshold: float) -> list[int]:
    """Frames in every segment: cut at the least alike neighbours, and wherever they are less alike than the threshold.

    Costs one host synchronisation.

    Args:
        frames: [F, E], compared by cosine.
        least: segments, at least.
        threshold: cosine.
    """
    z = unit(frames)
    alike = (z[:-1] * z[1:]).sum(-1)
    cut = alike < threshold
    cut[top(-alike, min(least, len(frames)) - 1)] = True
    ends = [i + 1 for i, ends_here in enumerate(cut.tolist()) if ends_here]
    return [b - a for a, b in zip([0, *ends], [*ends, len(frames)])]


def anchor_counts(segments: list[int], context: int, every: int) -> list[int]:
    """Anchors of every frame, segment by segment."""
    counts: list[int] = []
    for length in segments:
        each = context * length // (-(-length // every))
        counts += [each if (length - 1 - i) % every == 0 else 0 for i in range(length)]
    return counts


def density_peaks(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """Density times distance to the next denser token: [F, r, D] -> [F, r]; `noise` [F, r] is added to the density in 1e-6."""
    x = x - x.mean(1, keepdim=True)  # what tokens have in common would cost digits in the products
    distance = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    distance.diagonal(dim1=1, dim2=2).zero_()
    near = distance.topk(min(_NEAREST, x.shape[1]), largest=False).values
    density = (-near.square().mean(-1)).exp()
    if noise is not None:
        density = density + noise.to(density.dtype) * 1e-6
    farthest = distance.amax((1, 2), keepdim=True)
    denser = density[:, None] > density[..., None]
    return torch.where(denser, distance, farthest).amin(-1) * density


class Merge(NamedTuple):
    """Anchors of a frame, and the tokens that they take in.

    Attributes:
        rows: [A] int64, the anchors, numbered over all frames.
        pool: [P] int64, the tokens.
        shares: [A, P], weight of every token in an anchor.
        own: [A, 1], weight of the anchor itself.
    """

    rows: Tensor
    pool: Tensor
    shares: Tensor
    own: Tensor


def merge_into(x: Tensor, rows: Tensor, pool: Tensor, weight: float) -> Merge:
    """Every token of a pool joins the anchor that it is most like; an anchor becomes the mean of itself and of theirs, with at
    least `weight` for itself. x [F m, D]; rows [A], pool [P]."""
    home = (unit(x[pool]) @ unit(x[rows]).T).argmax(-1)
    joins = (home == torch.arange(len(rows), device=home.device)[:, None]).to(x.dtype)
    count = joins.sum(-1, keepdim=True)
    own = (1 / (count + 1)).clamp_min(weight)
    return Merge(rows, pool, (1 - own) / count.clamp_min(1) * joins, own)


class Compressed(NamedTuple):
    """What is left of a video.

    Attributes:
        rows: [k] int64, rising, numbered over all frames.
        remake: tokens [F, m, D] -> [k, D].
    """

    rows: Tensor
    remake: Callable[[Tensor], Tensor]


def compress(
    x: Tensor,
    salience: Tensor,
    segments: list[int],
    budget: Budget,
    every: int = 4,
    weight: float = 0.6,
    noise: Tensor | None = None,
) -> Compressed:
    """Which tokens stay, and what the anchors become.

    Args:
        x: [F, m, D] in at least fp32.
        salience: [F, m].
        segments: frames of each.
        budget: of every frame.
        every, weight: see `FastVID`.
        noise: see `density_peaks`.
    """
    frames, m, _ = x.shape
    salient = top(salience, budget.salient)
    taken = torch.zeros(frames, m, dtype=torch.bool, device=x.device).scatter(1, salient, True)
    rest, _ = rows_where(~taken, m - budget.salient)
    counts = anchor_counts(segments, budget.context, every)
    first = torch.arange(0, frames * m, m, device=x.device)[:, None]
    kept, others, flat = (salient + first).flatten(), rest + first, x.flatten(0, 1)
    merges: list[Merge] = []
    if any(counts):
        peaks = density_peaks(take_rows(x, rest), noise)
        start = 0
        for length in segments:
            whole_segment = others[start : start + length].flatten()
            for t in range(start, start + length):
                if counts[t]:
                    pool = others[t] if counts[t] == budget.context else whole_segment
                    merges.append(merge_into(flat, others[t].gather(0, top(peaks[t], counts[t])), pool, weight))
            start += length
    rows = torch.cat([kept, *(merge.rows for merge in merges)])
    order = rows.argsort()

    def remake(tokens: Tensor) -> Tensor:
        y = at_least_fp32(tokens).flatten(0, 1)
        made = [merge.own * y[merge.rows] + merge.shares.to(y.dtype) @ y[merge.pool] for merge in merges]
        return torch.cat([y[kept], *made])[order]

    return Compressed(rows[order], remake)


@dataclass(frozen=True)
class FastVIDReducer(VideoReducer):
    """FastVID for one model; `block` of the vision tower says what is salient, or the features do."""

    block: int | None

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return () if self.block is None else (self.block,)

    def choose(self, frames: Frames, images: ImageFeatures) -> Plan:
        config, (count, m) = self.config, frames.rows.shape
        budget = Budget.of(config.frame_budget(count, m), config.context)
        x, mean = frames.tokens, frames.tokens.mean(2)
        salience = self._salience(frames, images)
        found = [
            compress(
                x[b],
                salience[b],
                segment_lengths(mean[b], config.segments, config.threshold),
                budget,
                config.every,
                config.anchor_weight,
            )
            for b in range(len(x))
        ]
        most = max(len(one.rows) for one in found)
        rows = torch.stack([torch.nn.functional.pad(one.rows, (0, most - len(one.rows))) for one in found])
        lengths = torch.tensor([len(one.rows) for one in found], device=rows.device)
        valid = torch.arange(most, device=rows.device) < lengths[:, None]
        plan = frames.plan(rows, valid if any(len(one.rows) < most for one in found) else None)

        def remake(tokens: Tensor) -> Tensor:
            parts = [
                torch.nn.functional.pad(one.remake(video), (0, 0, 0, most - len(one.rows)))
                for one, video in zip(found, tokens[:, frames.rows.flatten()].unflatten(1, frames.rows.shape))
            ]
            behind = take_rows(tokens, frames.behind.expand(len(tokens), -1))
            return torch.cat([torch.stack(parts).to(tokens.dtype), behind], 1)

        return plan._replace(remake=remake)

    def _salience(self, frames: Frames, images: ImageFeatures) -> Tensor:
        """[B, F, m]."""
        x = frames.tokens
        if self.block is None:
            return (unit(x) * unit(x.mean(2, keepdim=True))).sum(-1).softmax(-1)
        held = view_tokens(images, self.config.name)
        assert self.info.tower is not None
        attention = patch_attention(images.tower[self.block], self.info.tower.has_cls)
        return held.fit(attention[..., None])[..., 0].unflatten(0, x.shape[:2])

    def video_count(self, frames: int, tokens: int) -> int:
        return frames * self.config.frame_budget(frames, tokens)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        """Attention of the tower, and distances within frames; what anchors take in depends on the video and is left out."""
        if modality != "video":
            return 0
        frames, tokens, _ = shape_of(views)
        rest = tokens - Budget.of(self.config.frame_budget(frames, tokens), self.config.context).salient
        macs = frames * rest**2 * self.info.width
        if self.block is None or self.info.tower is None:
            return macs
        return macs + frames * attention_macs(self.info.tower, self.info.tower.has_cls)
