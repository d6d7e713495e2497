"""Pixel-level deduplication: of patches that show the same, the first enters the vision tower and the others do not.

The idea is PixelPrune's (Wang et al., Pixel-Level Adaptive Visual Token Reduction via Predictive Coding, arXiv:2604.00886,
2026): pages and screens are full of patches that are, pixel by pixel, their neighbour's, and what leaves before the tower makes
tower and LLM cheaper. ShowUI (Lin et al., CVPR 2025) groups like patches of screenshots too, by connected components, but drops
them inside the model. Written from descriptions alone (the abstract, and an open pull request of vLLM, in which a threshold of
0 is equality and a larger one the largest difference of a pixel value). Ours are: which neighbours a unit is compared with
(the one to the left, then the one above), that near duplicates are compared with the unit that stays for them, so that
differences do not add up along a gradient, and `compare="image"`.

What leaves or stays is a unit: the square of patches (2 x 2) that the model's merger makes one visual token of.

Shapes: B images or frames of one size, R rows and C columns of units, P values of a unit (all pixels of its patches).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo, VLMReducer
from vtok.core.tokens import Place, Site, at_least_fp32
from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown
from vtok.ops.hashing import splitmix

COMPARE = ("neighbours", "image")
_UNITS_AT_ONCE = 256  # whose pixels are hashed together


@dataclass(frozen=True)
class PixelDedup(MethodConfig):
    """Config of pixel-level deduplication. It takes as many tokens from an image as that has duplicates, and none of its first.

    Attributes:
        threshold: largest difference of a pixel value between units that count as the same (paper: tau; >= 0; default 0:
            identical), in the units that the processor hands over: one of 255 grey levels is about 0.015 for Qwen2-VL and
            Qwen2.5-VL, 0.008 for Qwen3-VL and Qwen3.5.
        compare: `"neighbours"` (default), with what the unit to the left stands for, then with what the one above does;
            `"image"`, with all units in front of it in raster order (of a video: in its frame). There, with a threshold above
            0, values are rounded to its multiples and what is then equal is the same: near duplicates on two sides of a
            border stay.
    """

    name: ClassVar[str] = "pixel_dedup"
    no_budget: ClassVar[str] = "takes as many tokens from an image as that has duplicates, which no FLOPs budget can set"

    threshold: float = 0.0
    compare: str = "neighbours"

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.threshold
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not good:
            raise ConfigError(f"threshold is a difference of pixel values, 0 or more, got {shown(value)}")
        if self.compare not in COMPARE:
            raise unknown("compare", str(self.compare), COMPARE)

    def build_vlm(self, info: VLMInfo) -> PixelDedupReducer:
        if info.no_patches is not None:
            raise UnsupportedModelError(
                f"{self.name} drops patches in front of the vision tower, which the one of {info.name} cannot do without: "
                f"{info.no_patches}; choose a method that drops visual tokens behind it, such as downsample"
            )
        return PixelDedupReducer(self)


def equal_to_neighbours(x: Tensor) -> Tensor:
    """[B, R, C] bool: units that are identical to the one to the left or the one above. x [B, R, C, P]."""
    same = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
    same[:, :, 1:] |= (x[:, :, 1:] == x[:, :, :-1]).all(-1)
    same[:, 1:] |= (x[:, 1:] == x[:, :-1]).all(-1)
    return same


def like_neighbours(x: Tensor, threshold: float) -> Tensor:
    """[B, R, C] bool: units of which no value differs by more than `threshold` from the unit that stays for the one to the
    left, or else for the one above. x [B, R, C, P].

    Units on one diagonal are decided together, R + C steps in all.
    """
    batch, rows, columns, _ = x.shape
    flat, device = at_least_fp32(x).flatten(1, 2), x.device
    stands = torch.arange(rows * columns, device=device).repeat(batch, 1)  # the unit that stays for each, by number
    images = torch.arange(batch, device=device)[:, None]
    for diagonal in range(1, rows + columns - 1):
        row = torch.arange(max(0, diagonal - columns + 1), min(diagonal, rows - 1) + 1, device=device)
        column = diagonal - row
        own = row * columns + column
        left, above = (own - 1).where(column > 0, own), (own - columns).where(row > 0, own)
        here, found = flat[:, own], own.expand(batch, -1)
        for near, there in ((above, row > 0), (left, column > 0)):  # the left one last: it is asked first
            kept = stands[:, near]
            like = ((here - flat[images, kept]).abs().amax(-1) <= threshold) & there
            found = kept.where(like, found)
        stands[:, own] = found
    return (stands != torch.arange(rows * columns, device=device)).unflatten(1, (rows, columns))


def seen_before(codes: Tensor) -> Tensor:
    """[B, n] bool: rows of codes [B, n, P] (whole numbers) that equal one in front of them.

    Rows are sorted by a hash of 64 bits and compared with the first of the same hash, value by value: n log n, never n x n; of
    rows that differ under one hash all stay.
    """
    batch, n, values = codes.shape
    factors = splitmix(torch.arange(values, device=codes.device), 0) | 1
    parts = codes.flatten(0, 1).split(_UNITS_AT_ONCE)
    hashes = torch.cat([(part.long() * factors).sum(-1) for part in parts]).unflatten(0, (batch, n))
    order = hashes.argsort(dim=1, stable=True)
    ranked = hashes.gather(1, order)
    starts = torch.ones_like(ranked, dtype=torch.bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    places = torch.arange(n, device=codes.device).expand(batch, n)
    head = order.gather(1, places.where(starts, 0).cummax(1).values)  # the first of the same hash
    first = torch.empty_like(head).scatter_(1, order, head)
    same = (codes == codes.gather(1, first[..., None].expand_as(codes))).all(-1)
    return same & (first != places)


def codes_of(x: Tensor, threshold: float) -> Tensor:
    """Whole numbers that are equal where values count as the same: their bits, or the nearest multiple of a threshold."""
    if threshold > 0:
        return (at_least_fp32(x) / threshold).round().clamp(-(2.0**30), 2.0**30).int()
    return (x.float() + 0.0).view(torch.int32) if x.dtype != torch.float64 else (x + 0.0).view(torch.int64)  # -0.0 is 0.0


@dataclass(frozen=True)
class PixelDedupReducer(VLMReducer):
    """Pixel-level deduplication for one model. How much leaves is known once an image is there: plans say the most."""

    exact: ClassVar[bool] = False

    config: PixelDedup

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(Place.PATCHES, 0),)

    def patches(self, units: Tensor) -> Tensor:
        threshold = self.config.threshold
        if self.config.compare == COMPARE[1]:
            gone = seen_before(codes_of(units.flatten(1, 2), threshold)).view(units.shape[:3])
        else:
            gone = like_neighbours(units, threshold) if threshold > 0 else equal_to_neighbours(units)
        return ~gone
