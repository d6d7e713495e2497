"""Uniform pruning: the second baseline. Each block keeps a regular subset of the patch grid, the same for every image.

Patches are ranked by an ordered dither (Bayer's matrix): the first quarter of the ranks is every second patch of every second
row, and so on, so that whatever number stays is spread evenly, and what a later block keeps is a subset of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.core.tokens import Site, TokenState
from vtok.methods.baselines.drop import DropConfig, DropReducer


@dataclass(frozen=True)
class UniformGrid(DropConfig):
    """Config of uniform pruning.

    Attributes:
        keep: share of its patches that each block in `layers` keeps ((0, 1]; default 0.925), rounded to whole tokens, halves to
            the even number, at least one; 1.0 is an exact no-op. On a vision-language model: share of the visual tokens that
            enter the LLM, rounded for every view of an image by itself.
        layers: 0-based blocks that prune, between attention and MLP; default all. On a vision-language model: blocks of its
            vision tower, where it then acts.
    """

    name: ClassVar[str] = "uniform"

    def reducer(self, layers: tuple[int, ...], num_patches: int, grid: tuple[int, int]) -> UniformReducer:
        return UniformReducer(self.keep, layers, num_patches, grid)


def grid_width(patches: int, known_patches: int, grid: tuple[int, int]) -> int:
    """Columns of the grid that `patches` fill, where nobody saw the image: the model's own, else a square, else one row."""
    if patches == known_patches == grid[0] * grid[1]:
        return grid[1]
    side = math.isqrt(patches)
    return side if side * side == patches else patches


def dither_rank(position: Tensor, width: int | Tensor, height: int) -> Tensor:
    """Values of Bayer's dither matrix: positions of small rank cover the grid evenly.

    Args:
        position: raster positions, int64, any shape.
        width: columns of the grid, or [B, 1] of them where images differ.
        height: rows of the grid; where images differ, no less than rows and columns of any.

    Returns:
        int64 of the same shape; distinct positions have distinct ranks.
    """
    y, x = position // width, position % width
    rank = torch.zeros_like(position)
    longest = height if isinstance(width, Tensor) else max(width, height)
    for bit in range(max(longest - 1, 1).bit_length()):  # the lowest bits of a coordinate decide first
        high, low = (x >> bit ^ y >> bit) & 1, y >> bit & 1
        rank = 4 * rank + 2 * high + low
    return rank


@dataclass(frozen=True)
class UniformReducer(DropReducer):
    """Uniform pruning in some blocks of a model whose grid is known."""

    num_patches: int
    grid: tuple[int, int]

    def rank(self, n: int, state: TokenState, at: Site, device: torch.device) -> Tensor:
        if state.index is None:
            position = torch.arange(n, device=device)[None]
        else:  # where the patches that are left lie on the original grid
            position = state.index[:, state.num_prefix :] - state.num_prefix
        return dither_rank(position, *self._grid(state, device))

    def _grid(self, state: TokenState, device: torch.device) -> tuple[int | Tensor, int]:
        """(columns, rows) of the call's own grid, as `dither_rank` takes them."""
        patches = state.length - state.num_prefix
        if isinstance(state.grid, Tensor):
            return state.grid[:, 1:].to(device), patches
        if state.grid is not None:
            return state.grid[1], state.grid[0]
        width = grid_width(patches, self.num_patches, self.grid)
        return width, -(-patches // width)
