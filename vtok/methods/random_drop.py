"""Random pruning: the floor that every method must beat. Each block keeps a random share of its patches.

The same patches are kept for every image of a batch and on every device: ranks are a hash of seed, block and position, made
without a generator, so that nothing waits for the host and the graph compiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtok.config import ModelInfo
from vtok.errors import ConfigError
from vtok.methods.drop import DropConfig, DropReducer
from vtok.state import Site, TokenState


@dataclass(frozen=True)
class RandomDrop(DropConfig):
    """Config of random pruning.

    Attributes:
        keep: share of its patches that each block in `layers` keeps ((0, 1]; default 0.925); 1.0 is an exact no-op.
        layers: 0-based blocks that prune, between attention and MLP; default all.
        seed: of the permutations, one per block (whole number; default 0).
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, got {self.seed!r}")

    def build(self, info: ModelInfo) -> RandomReducer:
        return RandomReducer(self.keep, self.blocks(info), self.seed)


_GOLDEN_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


def splitmix(position: Tensor, seed: int) -> Tensor:
    """64 random bits (as int64) for every position: the splitmix64 stream of `seed`, entry `position`."""

    def wrap(value: int) -> int:  # torch computes in int64: the same bits, signed
        value &= (1 << 64) - 1
        return value - (1 << 64) if value >> 63 else value

    def shifted(z: Tensor, by: int) -> Tensor:  # logical, not arithmetic
        return (z >> by) & ((1 << (64 - by)) - 1)

    z = (position + 1) * wrap(_GOLDEN_GAMMA) + wrap(seed * _MIX_2)
    z = (z ^ shifted(z, 30)) * wrap(_MIX_1)
    z = (z ^ shifted(z, 27)) * wrap(_MIX_2)
    return z ^ shifted(z, 31)


@dataclass(frozen=True)
class RandomReducer(DropReducer):
    """Random pruning in some blocks."""

    seed: int

    def rank(self, position: Tensor, state: TokenState, at: Site) -> Tensor:
        return splitmix(position, (self.seed << 12) + at.index)
