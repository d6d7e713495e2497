"""What a search may vary of a method: dimensions, and points drawn from them.

A point fixes the shape of a schedule (which blocks, how the blocks share the work); how strong it is follows from a FLOPs
budget. Points are plain values, so that they can be written down and read back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

T = TypeVar("T")


class Dimension:
    """One thing that varies."""

    def draw(self, rng: random.Random) -> Any:
        """A plain value, drawn at random."""
        raise NotImplementedError


@dataclass(frozen=True)
class Real(Dimension):
    """A number in [low, high], all alike."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class Choice(Dimension):
    """One of several values, all alike."""

    options: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(self.options)


@dataclass(frozen=True)
class Blocks(Dimension):
    """Some of the blocks of a model, sorted: half of the time the usual ones, else any of them.

    Attributes:
        blocks: 0-based, sorted.
        least: how many at least (at most all).
        most: how many at most; `None` = all.
        usual: a choice that has proved itself; without one, half of the draws are all blocks from one on.
    """

    blocks: tuple[int, ...]
    least: int = 1
    most: int | None = None
    usual: tuple[int, ...] = ()

    def draw(self, rng: random.Random) -> list[int]:
        most = len(self.blocks) if self.most is None else min(self.most, len(self.blocks))
        count = rng.randint(min(self.least, most), most)
        if rng.random() < 0.5:
            return list(self.usual or self.blocks[-count:])
        return sorted(rng.sample(self.blocks, count))


# Standard deviations of a schedule's slope, bend and scatter, in the logarithm of a block's share of the work, at full spread.
_SLOPE, _BEND, _SCATTER = 1.2, 0.8, 0.5


@dataclass(frozen=True)
class Weights(Dimension):
    """How blocks share the work: positive numbers with mean 1.

    The logarithm is a line plus a bend plus a scatter, with random strength; a third of the time the first blocks rest (weight
    0), at most half of them. Independent numbers for every block would nearly always look alike: no trend over the depth.

    Attributes:
        size: how many numbers.
        rest: whether first blocks may rest.
        usual: shares that have proved themselves, which those numbers are multiplied with; `None` = all alike.
    """

    size: int
    rest: bool = True
    usual: tuple[float, ...] | None = None

    def draw(self, rng: random.Random) -> list[float]:
        spread = rng.random()
        slope, bend = spread * rng.gauss(0, _SLOPE), spread * rng.gauss(0, _BEND)
        resting = rng.randint(1, max(1, self.size // 2)) if self.rest and self.size > 1 and rng.random() < 1 / 3 else 0
        values = []
        for i in range(self.size):
            t = 2 * i / (self.size - 1) - 1 if self.size > 1 else 0.0  # -1 at the first block, 1 at the last
            values.append(math.exp(slope * t + bend * (1.5 * t * t - 0.5) + spread * rng.gauss(0, _SCATTER)))
        if self.usual is not None:
            values = [value * share for value, share in zip(values, self.usual)]
        values[:resting] = [0.0] * resting
        mean = sum(values) / self.size
        return [value / mean for value in values]


Space = Mapping[str, Dimension]
Point = Mapping[str, Any]


def draw(space: Space, rng: random.Random) -> dict[str, Any]:
    """A point: one value a dimension, always in the same order."""
    return {name: space[name].draw(rng) for name in sorted(space)}


class BudgetCandidates(Sequence[T]):
    """Settings from the mildest to the strongest, made when they are asked for.

    Args:
        at: strength, from 0 (a no-op) on -> setting.
        most: the strongest.
        steps: how many follow on the first.
    """

    def __init__(self, at: Callable[[float], T], most: float, steps: int = 4000):
        self._at, self._most, self._steps = at, most, steps

    def __len__(self) -> int:
        return self._steps + 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._at(self._most * (index % len(self)) / self._steps)
