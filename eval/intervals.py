"""Points and intervals: what a handful of noisy numbers supports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    point: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(self.point * factor, self.low * factor, self.high * factor)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Median of the ratios of pairs that were measured one right after the other, with a percentile bootstrap over the pairs.

    A machine that slows down for a while slows both halves of a pair: pairing removes what the ratio of two medians keeps.

    Args:
        numerators: one a pair.
        denominators: as many, > 0.
        level: of the interval.
        seed: of the resampling.

    Returns:
        The median ratio and its interval, which always contains it.

    Raises:
        ValueError: nothing to compare, or numbers without a partner.
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"pairs are needed: got {a.shape} and {b.shape} numbers")
    ratios = a / b
    rows = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = 100 * (1 - level) / 2
    point = float(np.median(ratios))
    low, high = np.percentile(np.median(ratios[rows], axis=1), [tail, 100 - tail])
    return Interval(point, min(float(low), point), max(float(high), point))


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median."""
    low, middle, high = np.percentile(np.asarray(values, float), [25, 50, 75])
    return float((high - low) / middle)


def mean_stderr(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, from the sample's own variance; the error of fewer than two values is not a number."""
    data = np.asarray(values, float)
    if len(data) < 2:
        return (float(data.mean()) if len(data) else float("nan")), float("nan")
    return float(data.mean()), float(data.std(ddof=1) / np.sqrt(len(data)))
