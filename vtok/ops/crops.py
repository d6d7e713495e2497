"""Views of cropped images and the feature rows that belong to them: DocOwl-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Idefics3
and SmolVLM, as their code in transformers orders them.

Shapes: V views of one image, n patches of each, m feature rows of each at most, L feature rows of the image; B images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import ConfigError, unknown
from vtok.ops.packing import Packing
from vtok.ops.rows import rows_where

# Where the view of the whole page stands among an image's views; a lone view is the whole page.
GLOBAL_VIEW = {
    "docowl": "first",
    "idefics3": "last",
    "internvl": "last",
    "llava_next": "first",
    "llava_onevision": "first",
    "smolvlm": "last",
}
H_REDUCER = (1, 4)  # patches that one token of DocOwl-1.5's connector covers, rows x columns


def global_views(family: str, views: Sequence[int]) -> Tensor:
    """Views of whole pages: [sum of `views`] bool, for images of so many views each. The others follow row by row.

    Raises:
        UnknownNameError: no such family in `GLOBAL_VIEW`.
        ConfigError: an image without views.
    """
    if family not in GLOBAL_VIEW:
        raise unknown("family of cropping models", family, GLOBAL_VIEW)
    if any(count < 1 for count in views):
        raise ConfigError(f"every image has at least one view, got {list(views)}")
    place = {"first": 0, "last": -1}[GLOBAL_VIEW[family]]
    whole = torch.zeros(sum(views), dtype=torch.bool)
    for image in whole.split(list(views)):
        image[place] = True
    return whole


def group_map(grid: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Patches that a connector merges into one token: pixel shuffle (block s x s), the H-Reducer (1 x 4).

    Args:
        grid: rows and columns of patches.
        block: rows and columns of patches that a token covers.

    Returns:
        [G, s] int64: tokens row by row, the patches of each row by row, which is the order of their channels.

    Raises:
        ConfigError: the block does not divide the grid.
    """
    (rows, columns), (high, wide) = grid, block
    if rows % high or columns % wide:
        raise ConfigError(f"blocks of {high} x {wide} patches do not divide a grid of {rows} x {columns}")
    ids = torch.arange(rows * columns).view(rows // high, high, columns // wide, wide)
    return ids.transpose(1, 2).reshape(-1, high * wide)


class Layout(NamedTuple):
    """Feature rows of one image, seen view by view.

    Attributes:
        rows: [V, m] int64, row of every token of a view, in raster order; 0 where there is none.
        valid: [V, m] bool, False = a view with fewer than m rows.
        is_global: [V] bool, views of the whole page, which are not compressed.
        length: L.
        patches: [V, n] bool, patches that hold image; padding is compared with nothing. `None` = all.
        packing: how crops were joined; `None` = rows are the tokens of one view after the other.
    """

    rows: Tensor
    valid: Tensor
    is_global: Tensor
    length: int
    patches: Tensor | None = None
    packing: Packing | None = None

    def to(self, device: torch.device) -> Layout:
        patches = None if self.patches is None else self.patches.to(device)
        rows, valid, whole = (t.to(device) for t in self[:3])
        return self._replace(rows=rows, valid=valid, is_global=whole, patches=patches)


def plain_layout(family: str, views: int, tokens: int, patches: Tensor | None = None) -> Layout:
    """Views one after the other, as many rows each: InternVL, Idefics3 and SmolVLM, and DocOwl-1.5 before its H-Reducer.

    Args:
        family: see `GLOBAL_VIEW`.
        views: of the image, all-zero padding views left out.
        tokens: feature rows of a view, after merging.
        patches: [V, n] bool, the model's patch attention mask; `None` = all real.
    """
    rows = torch.arange(views * tokens).view(views, tokens)
    return Layout(rows, torch.ones_like(rows, dtype=torch.bool), global_views(family, [views]), rows.numel(), patches)


def packed_layout(how: Packing) -> Layout:
    """Features of LLaVA-NeXT or LLaVA-OneVision: the first view, then joined crops with newlines."""
    side, (rows, columns) = how.side, how.grid
    inside = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    inside[slice(*how.lines), slice(*how.columns)] = True
    inside = inside.view(rows, side, columns, side).transpose(1, 2).reshape(-1, side**2)
    inside = torch.cat([inside.new_ones(1, side**2), inside])
    line, column = (  # the patch that the middle of each row's share of the joined grid lies in
        (2 * torch.arange(new) + 1) * (end - first) // (2 * max(new, 1)) + first
        for new, (first, end) in zip(how.size, (how.lines, how.columns))
    )
    view = 1 + (line // side)[:, None] * columns + column // side
    crops = F.pad(view, (0, 1), value=-1).flatten() if rows else view.new_full((1,), -1)  # -1: newlines
    owner = torch.cat([view.new_zeros(side**2), crops])
    mine = owner == torch.arange(len(inside))[:, None]
    found, valid = rows_where(mine, int(mine.sum(-1).max()))
    return Layout(found, valid, global_views("llava_next", [len(inside)]), len(owner), inside, how)


@dataclass(frozen=True)
class Cut:
    """How one image was cut into views, or what a model returns as one image: a single tile, all tiles of several pages.

    Attributes:
        whole: [V], whether a view shows a whole page.
        number: [V], number of every view within its page.
        tokens: feature rows of a view, where views stand one after the other.
        packing: how LLaVA joined crops; `tokens` means nothing then.
    """

    whole: tuple[bool, ...]
    number: tuple[int, ...]
    tokens: int = 0
    packing: Packing | None = None

    @property
    def shape(self) -> tuple[int, int, Packing | None]:
        """What images that are treated together have in common."""
        return len(self.whole), self.tokens, self.packing


class ViewMap(NamedTuple):
    """How the patches of B images, cut in one way, became feature rows.

    Attributes:
        layout: of one image; its `is_global` says nothing, as images may differ there.
        whole: [B V] bool, views that show a whole page, image by image.
        number: [B V] int64, number of every view within its page.
        cropped: whether any view shows a part of a page.
    """

    layout: Layout
    whole: Tensor
    number: Tensor
    cropped: bool

    @property
    def views(self) -> int:
        """V."""
        return len(self.layout.rows)


def view_map(cuts: Sequence[Cut], device: torch.device | None = None) -> ViewMap:
    """The map of images whose cuts have one shape."""
    whole = torch.tensor([cut.whole for cut in cuts], device=device).flatten()
    number = torch.tensor([cut.number for cut in cuts], device=device).flatten()
    return ViewMap(_layout(*cuts[0].shape, whole.device), whole, number, not all(all(cut.whole) for cut in cuts))


@functools.lru_cache(maxsize=64)
def _layout(views: int, tokens: int, how: Packing | None, device: torch.device) -> Layout:
    if how is not None:
        return packed_layout(how).to(device)
    rows = torch.arange(views * tokens, device=device).view(views, tokens)
    return Layout(rows, torch.ones_like(rows, dtype=torch.bool), rows.new_zeros(views, dtype=torch.bool), rows.numel())


def square_groups(patches: int, tokens: int) -> Tensor | None:
    """Patches of every token, where a square of patches became a smaller square of tokens: pixel shuffle, pooling.

    Args:
        patches: of a view, n.
        tokens: of a view, m.

    Returns:
        [m, n / m] int64; `None` if every patch became a token.

    Raises:
        ConfigError: n is no multiple of m by a square, or they are no squares.
    """
    if patches == tokens:
        return None
    wide, side = math.isqrt(patches), math.isqrt(tokens)
    if wide**2 != patches or side**2 != tokens or not side or wide % side:
        raise ConfigError(f"{patches} patches of a view became {tokens} tokens, which is no merging of squares of patches")
    return group_map((wide, wide), (wide // side, wide // side))
