"""Random pruning: the baseline that every method must beat. Each block keeps a random share of its patches.

The same patches are kept for every image of a batch and on every device: ranks are a hash of seed, block and position, made
without a generator, so that nothing waits for the host and the graph compiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtok.core.tokens import Site, TokenState
from vtok.errors import ConfigError, shown
from vtok.methods.baselines.drop import DropConfig, DropReducer, lowest
from vtok.ops.hashing import splitmix
from vtok.ops.rows import constant, with_prefix


@dataclass(frozen=True)
class RandomDrop(DropConfig):
    """Config of random pruning.

    Attributes:
        keep: share of its patches that each block in `layers` keeps ((0, 1]; default 0.925), rounded to whole tokens, halves to
            the even number, at least one; 1.0 is an exact no-op. On a vision-language model: share of the visual tokens that
            enter the LLM, rounded for every view of an image by itself.
        layers: 0-based blocks that prune, between attention and MLP; default all. On a vision-language model: blocks of its
            vision tower, where it then acts.
        seed: of the permutations, one per block (whole number; default 0).
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, got {shown(self.seed)}")

    def reducer(self, layers: tuple[int, ...], num_patches: int, grid: tuple[int, int]) -> RandomReducer:
        return RandomReducer(self.keep, layers, self.seed)


@dataclass(frozen=True)
class RandomReducer(DropReducer):
    """Random pruning in some blocks."""

    seed: int

    def rank(self, n: int, state: TokenState, at: Site, device: torch.device) -> Tensor:
        return _ranks(n, self.seed, at.index, device)

    def kept(self, x: Tensor, m: int, state: TokenState, at: Site) -> Tensor:
        return constant(x, _kept, x.shape[1] - state.num_prefix, m, state.num_prefix, self.seed, at.index)


def _ranks(n: int, seed: int, number: int, device: torch.device) -> Tensor:
    """[1, n]: a permutation's keys, for one number (block or view) of one seed."""
    return splitmix(torch.arange(n, device=device), (seed << 12) + number)[None]


def _kept(n: int, m: int, num_prefix: int, seed: int, number: int, device: torch.device) -> Tensor:
    """`RandomReducer.kept`, which depends on no image: [1, P + M]."""
    return with_prefix(lowest(_ranks(n, seed, number, device), m), num_prefix)
