"""Random bits that are a function of a position: no generator, no state, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


def splitmix(position: Tensor, seed: int) -> Tensor:
    """64 random bits (as int64) for every position: the splitmix64 stream of `seed`, entry `position`."""

    def wrap(value: int) -> int:  # torch computes in int64: the same bits, signed
        value &= (1 << 64) - 1
        return value - (1 << 64) if value >> 63 else value

    def shifted(z: Tensor, by: int) -> Tensor:  # logical, not arithmetic
        return (z >> by) & ((1 << (64 - by)) - 1)

    position = position & (
        (1 << 62) - 1
    )  # changes nothing; inductor would fold `arange` into index arithmetic that cannot wrap
    z = (position + 1) * wrap(_GOLDEN_GAMMA) + wrap(seed * _MIX_2)
    z = (z ^ shifted(z, 30)) * wrap(_MIX_1)
    z = (z ^ shifted(z, 27)) * wrap(_MIX_2)
    return z ^ shifted(z, 31)


def uniforms(position: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """A number in (0, 1) for every position, never 0 or 1: odd multiples of 2^-24, so the same in fp32 and fp64."""
    bits = (splitmix(position, seed) >> 41) & ((1 << 23) - 1)
    return (2 * bits + 1).to(dtype) / (1 << 24)
