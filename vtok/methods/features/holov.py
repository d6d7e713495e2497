"""HoloV: Don't Just Chase "Highlighted Tokens" in MLLMs, Revisiting Visual Holistic Context Retention (Zou et al., NeurIPS
2025, arXiv:2510.02912). The tokens of an image are cut into runs; every run gets a share of the budget by its attention, and
spends it on its tokens of highest attention.

Written from a description of the authors' program (obananas/HoloV at 1d2e65e) and arrays that it made.

Shapes: B images, n visual tokens, R runs of at most m tokens each, k tokens that stay, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.config import whole
from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.search_space import Choice, Dimension
from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, shown, unknown
from vtok.methods.features.view_tokens import KeepConfig, ViewReducer, ViewTokens, looked_at, view_sizes, view_tokens
from vtok.methods.preset import Official
from vtok.ops.rows import take_rows
from vtok.ops.selection import distinct, top

VARIANTS = ("code", "paper")
_EPS = 1e-6


@dataclass(frozen=True)
class HoloV(Official, KeepConfig):
    """Config of HoloV.

    In the authors' program the variance of similarities, which the paper adds to attention, has no effect: it is scaled to a
    fixed share of the mean attention of its own run, so that all runs are scaled alike, and no token is chosen by it. The
    default does what that comes to, and leaves the products out. `variant="paper"` is our interpretation of the
    paper's equations.

    Towers without a class token (SigLIP) rank a patch by the attention that it receives on average. Newline tokens between rows
    are dropped, as in the program. An image in crops has one budget, whole view and crops together.

    What differs from the program unless `preset="official"`: a run that gets more than it has hands the surplus on to the runs
    of next higher weight, where the program appends zero vectors; tokens keep the order of the image.

    Attributes:
        keep: share of the visual tokens of an image that stay ((0, 1]; default 1/9, 64 of 576). 1.0 changes nothing.
        keep_tokens: the same as a count for an image, all views together (program: k, 64; the paper has 192, 128, 64, and 320
            for LLaVA-NeXT).
        runs: number of runs (program: "crops", 16; >= 1); at most as many as there are tokens. Under `variant="paper"` every
            view is cut into floor(sqrt(runs)) x floor(sqrt(runs)) windows.
        variant: `"code"`: runs of consecutive tokens; weights and choice by attention alone. `"paper"`: windows; both by
            attention plus the variance of a token's similarities within its window, scaled to `alpha` times the mean attention
            of the image.
        alpha: see `variant` (program: 0.09; >= 0).
        layer: 0-based block of the vision tower whose attention counts, negative from the end; default: the one that the model
            takes its features from, as in the program.
        preset: `"official"`: the program's weights, its order (by attention within a run, unless the run stays whole) at the
            places of those that stay, and its zero vectors; positions are numbered anew unless `positions` is given.
    """

    name: ClassVar[str] = "holov"
    searched: ClassVar[Mapping[str, Dimension]] = {"runs": Choice((1, 4, 9, 16, 25, 36))}
    searched_layer: ClassVar[str] = "layer"

    runs: int = 16
    variant: str = "code"
    alpha: float = 0.09
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.runs, "runs", 1)
        if self.variant not in VARIANTS:
            raise unknown("variant", str(self.variant), VARIANTS)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < math.inf:
            raise ConfigError(f"alpha is a number >= 0, got {shown(self.alpha)}")
        if self.layer is not None:
            whole(self.layer, "layer")
        if self.official and self.variant != "code":
            raise ConfigError("preset='official' is the program; leave variant='paper' out")

    def build_vlm(self, info: VLMInfo) -> HoloVReducer:
        return HoloVReducer(self, info, (looked_at(self, info, self.layer)[1],))


# Runs.
@functools.lru_cache(maxsize=64)
def consecutive(n: int, runs: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """n tokens cut into so many runs, the first n mod R one longer; no run is empty.

    Returns:
        (members [R, m] int64, 0 where a run is shorter; valid [R, m] bool).
    """
    runs = min(runs, n)
    sizes = torch.full((runs,), n // runs).add_(torch.arange(runs) < n % runs)
    place = torch.arange(int(sizes.max()))
    valid = place < sizes[:, None]
    return ((sizes.cumsum(0) - sizes)[:, None] + place).where(valid, 0).to(device), valid.to(device)


@functools.lru_cache(maxsize=64)
def windows(grids: Sequence[tuple[int, int]], side: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The same for grids (rows, columns) of tokens, one behind the other, each cut into side x side windows at most."""
    found, first = [], 0
    for rows, columns in grids:
        token = first + torch.arange(rows * columns).view(rows, columns)
        for line in token.tensor_split(min(side, rows), 0):
            found += [window.flatten() for window in line.tensor_split(min(side, columns), 1)]
        first += rows * columns
    valid = torch.arange(max(map(len, found))) < torch.tensor([len(window) for window in found])[:, None]
    members = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
    return members.to(device), valid.to(device)


# Scores and quotas.
def similarity_variance(features: Tensor, members: Tensor, valid: Tensor) -> Tensor:
    """Variance of every token's cosines to the others of its run, its own counted as 0, divided by their number: [B, R, m].

    Args:
        features: [B, n, D].
        members, valid: of the runs.
    """
    runs, size = members.shape
    x = take_rows(at_least_fp32(features), members.flatten().expand(len(features), -1)).unflatten(1, (runs, size))
    z = x / (x.norm(dim=-1, keepdim=True) + _EPS) * valid[..., None]
    alike = z @ z.transpose(-1, -2)
    alike.diagonal(dim1=-2, dim2=-1).zero_()
    others = (valid.sum(-1, keepdim=True) - 1).clamp_min(1)  # [R, 1]
    mean = alike.sum(-1) / others
    return ((alike - mean[..., None]).square() * valid[:, None]).sum(-1) / others


def program_weights(attention: Tensor, features: Tensor, members: Tensor, valid: Tensor, alpha: float = 0.09) -> Tensor:
    """[B, R]: weights of the runs as the program computes them, runs of one token on a scale of their own."""
    held, sizes = attention[:, members] * valid, valid.sum(-1)
    variance = similarity_variance(features, members, valid) * valid
    scaled = held * 1e3
    gamma = (scaled.sum(-1) / sizes) / (variance.abs().sum(-1) / sizes + _EPS)
    score = (scaled + alpha * gamma[..., None] * variance).sum(-1) / sizes
    score = torch.where(sizes == 1, held.sum(-1), score)
    return score / (score.sum(-1, keepdim=True) + _EPS)


def run_weights(score: Tensor, members: Tensor, valid: Tensor) -> Tensor:
    """[B, R]: the mean score [B, n] of every run, scaled to a sum of 1."""
    mean = (score[:, members] * valid).sum(-1) / valid.sum(-1)
    return mean / mean.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)


def run_quotas(weight: Tensor, sizes: Tensor, k: int, hand_on: bool = True) -> Tensor:
    """How many tokens every run keeps: floor(weight k), what is left one each to the runs of largest weight.

    Args:
        weight: [B, R], sum at most 1.
        sizes: [R] int64, tokens of each.
        k: of all; at most the sum of `sizes` where surplus is handed on.
        hand_on: a run keeps no more than it has, the surplus goes to the next runs by weight.

    Returns:
        [B, R] int64.
    """
    runs = weight.shape[1]
    order = top(weight, runs)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(runs, device=order.device).expand_as(order))
    quota = (weight * k).floor().long()
    quota = quota + (rank < k - quota.sum(-1, keepdim=True))
    if not hand_on:
        return quota
    quota = torch.minimum(quota, sizes)
    room = (sizes - quota).gather(1, order)
    more = (k - quota.sum(-1, keepdim=True) - (room.cumsum(-1) - room)).clamp_min(0)
    return quota.scatter_add(1, order, torch.minimum(room, more))


def run_tokens(score: Tensor, members: Tensor, valid: Tensor, quota: Tensor, k: int) -> Tensor:
    """The tokens of highest score of every run, run by run, by falling score; a run that stays whole in its own order.

    Args:
        score: [B, n].
        members, valid: of the runs, [R, m].
        quota: [B, R].
        k: columns of the result.

    Returns:
        [B, k] int64, -1 where the quotas of all runs came to fewer tokens.
    """
    lowest = torch.finfo(score.dtype).min
    held = score[:, members].masked_fill(~valid, lowest)
    place = torch.arange(members.shape[1], device=score.device).expand_as(held)
    rank = torch.empty_like(place).scatter_(2, top(held, members.shape[1]), place)
    whole_run = (quota >= valid.sum(-1))[..., None]
    rank = torch.where(whole_run, place, rank)
    stays = (rank < quota[..., None]) & valid
    key = torch.arange(len(members), device=score.device)[:, None] * members.shape[1] + rank
    key = key.masked_fill(~stays, len(members) * members.shape[1]).flatten(1)
    order = key.argsort(dim=1, stable=True)[:, :k]
    found = members.flatten()[order].masked_fill(~stays.flatten(1).gather(1, order), -1)
    return torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-1)


@dataclass(frozen=True)
class HoloVReducer(ViewReducer):
    """HoloV for one model."""

    exact: ClassVar[bool] = True

    def features(self, images: ImageFeatures) -> Plan | None:
        held = view_tokens(images, self.config.name)
        pool = held.pool
        if self.config.count(len(pool)) == len(pool):
            return None
        return self.choose(images, held)

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        config, pool = self.config, held.pool
        k, device = config.count(len(pool)), pool.device
        attention = held.by_row(self.scores(images, held))[:, pool]
        tokens, batch = images.tokens, held.images
        if config.variant == "paper":
            members, valid = windows(_grids(images.views), math.isqrt(config.runs), device)
            variance = torch.zeros_like(attention)
            spread = similarity_variance(tokens[:, pool], members, valid).to(attention.dtype) * valid
            variance = variance.scatter_add(1, members.flatten().expand(batch, -1), spread.flatten(1))
            mean = variance.mean(1, keepdim=True).clamp_min(torch.finfo(variance.dtype).tiny)
            attention = attention + config.alpha * attention.mean(1, keepdim=True) / mean * variance
        else:
            members, valid = consecutive(len(pool), config.runs, device)
        official = config.official
        if official:
            weight = program_weights(attention, tokens[:, pool], members, valid, config.alpha)
        else:
            weight = run_weights(attention, members, valid)
        quota = run_quotas(weight, valid.sum(-1), k, hand_on=not official)
        chosen = run_tokens(attention, members, valid, quota, k)
        if not official:
            return Plan(held.kept([pool[chosen]]))
        first = torch.where(chosen >= 0, chosen, chosen[:, :1])  # a run's quota is never empty throughout
        rows = pool[distinct(first, len(pool))]  # where those stand that stay, and others, for zero vectors
        stays = held.stays.expand(batch, -1)

        def remake(x: Tensor) -> Tensor:
            made = take_rows(x, pool[chosen.clamp_min(0)]).masked_fill((chosen < 0)[..., None], 0)
            return torch.cat([made, take_rows(x, stays)], 1)

        return Plan(torch.cat([rows, stays], 1), remake=remake)

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        pool = sum(view_sizes(views))
        count = self.config.count(pool)
        behind = sum(view.stop - view.start for view in views if view.newline) if modality == "video" else 0
        return n if count == pool else count + behind

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        macs, config = super().feature_macs(n, views, modality), self.config
        pool = sum(view_sizes(views))
        if config.count(pool) == pool or (config.variant == "code" and config.preset is None):
            return macs
        runs = consecutive(pool, config.runs) if config.variant == "code" else windows(_grids(views), math.isqrt(config.runs))
        return macs + runs[0].shape[0] * runs[0].shape[1] ** 2 * self.info.width


def _grids(views: Sequence[View]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of all grids, without newlines."""
    sizes = ((view.rows, view.columns - view.newline) for view in views)
    return tuple((rows, columns) for rows, columns in sizes if columns)
