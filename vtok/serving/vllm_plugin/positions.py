"""Positions in time, height and width of visual tokens that stay, as extra columns of their features. No engine is needed here.

An engine numbers a prompt before its images are encoded: text gets its final positions then, an image takes as many as its grid
is long, whatever stays of it. Which tokens stay is known when the image has been encoded, and where they lie travels with them
to where the prompt is put together, which may be in another step, or after a preemption.

Shapes: n visual tokens of an image, k that stay, D width of features, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_DIGIT = 128  # bf16 holds whole numbers up to 256
COLUMNS = 6  # two digits each for time, height and width


class Grid(NamedTuple):
    """Where an image stands in a prompt, and its grid of visual tokens.

    Attributes:
        offset: its first placeholder.
        length: placeholders, as many as tokens stay.
        frames, rows, columns: of the unpruned grid.
        pace: positions in time from one frame to the next.
        kept: [k] int64, tokens that stay, where they are known already; `None` = not before the image is encoded.
    """

    offset: int
    length: int
    frames: int
    rows: int
    columns: int
    pace: float = 1.0
    kept: Tensor | None = None

    @property
    def span(self) -> int:
        """Positions that the image takes."""
        return max(int((self.frames - 1) * self.pace) + 1, self.rows, self.columns)

    def coordinates(self, rows: Tensor) -> Tensor:
        """[k, 3] int64: time, height and width of tokens [k], counted from where the image starts."""
        size = self.rows * self.columns
        time = ((rows // size).double() * self.pace).long()
        return torch.stack([time, rows % size // self.columns, rows % self.columns], 1)


def prompt_positions(length: int, grids: Iterable[Grid]) -> tuple[Tensor, int]:
    """Positions of a prompt, its images not yet encoded.

    Args:
        length: L.
        grids: of its images, by rising offset.

    Returns:
        ([3, L] int64, final for text; at placeholders where the image starts, or final where `kept` is given; what to add to
        the number of a token behind the prompt to get its position).
    """
    positions = torch.empty(3, length, dtype=torch.int64)
    done, following = 0, 0
    for grid in grids:
        text = grid.offset - done
        positions[:, done : grid.offset] = torch.arange(following, following + text)
        following, done = following + text, grid.offset + grid.length
        positions[:, grid.offset : done] = following
        if grid.kept is not None:
            positions[:, grid.offset : done] += grid.coordinates(grid.kept).T
        following += grid.span
    positions[:, done:] = torch.arange(following, following + length - done)
    return positions, following - done


def with_columns(features: Tensor, at: Tensor) -> Tensor:
    """[k, D + 6]: features [k, D] and coordinates [k, 3] side by side."""
    return torch.cat([features, (at // _DIGIT).to(features.dtype), (at % _DIGIT).to(features.dtype)], 1)


def without_columns(features: Tensor) -> tuple[Tensor, Tensor]:
    """(features [k, D], coordinates [k, 3] int64) of [k, D + 6]."""
    high, low = features[:, -COLUMNS:].long().chunk(2, 1)
    return features[:, :-COLUMNS], high * _DIGIT + low


def placed(positions: Tensor, media: Tensor, at: Sequence[Tensor], computed: int) -> Tensor:
    """Positions with those of some placeholders made final. Nothing is carried over from earlier steps.

    Args:
        positions: [3, L], final for text.
        media: [L'] bool, L' <= L, placeholders of the prompt.
        at: coordinates [k, 3] of what was encoded, those of the placeholders from `computed` on.
        computed: tokens of the prompt that earlier steps, or a cache, have dealt with.

    Returns:
        [3, L].
    """
    number = torch.arange(len(media), device=media.device)
    before = F.pad(media, (1, 0))[:-1]
    start = torch.where(media & ~before, number, 0).cummax(0).values  # where the image of a placeholder starts
    shifts = torch.cat(list(at)).T.to(positions.device)  # [3, k]
    here = (media & (number >= computed)).nonzero()[: shifts.shape[1], 0]
    first = start[here]
    base = torch.where(first > 0, positions[0, (first - 1).clamp_min(0)] + 1, 0)
    positions = positions.clone()
    positions[:, here] = (shifts + base).to(positions.dtype)
    return positions
