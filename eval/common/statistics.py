"""Points and intervals: what a handful of noisy numbers supports.

Intervals of shares, and of differences between shares of the same samples, are score intervals: they keep their width where no
sample, or every one, differs, and where a normal interval would shrink to a point. Below `FEWEST` pairs there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000
FEWEST = 5  # pairs, samples or clusters from which on an interval says something
Z95 = 1.959964  # two-sided 95 % of a normal distribution


class Interval(NamedTuple):
    """A value with the ends of its confidence interval, `None` where too little is known for one."""

    point: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None

    @property
    def ends(self) -> list[float] | None:
        """As records hold them."""
        return None if self.low is None or self.high is None else [self.low, self.high]

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies above or below zero, else 0."""
        if self.low is not None and self.low > 0:
            return 1
        return -1 if self.high is not None and self.high < 0 else 0

    def scaled(self, factor: float) -> Interval:
        return Interval(self.point * factor, *(None if end is None else end * factor for end in self[1:]))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """Median of the ratios of pairs that were measured one right after the other, with a percentile bootstrap over the pairs.

    A machine that slows down for a while slows both halves of a pair: pairing removes what the ratio of two medians keeps.

    Args:
        numerators, denominators: one a pair, > 0.
        level: of the interval, which always contains the median; there is none from fewer than `FEWEST` pairs.
        seed: of the resampling.

    Raises:
        ValueError: nothing to compare, or numbers without a partner.
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"pairs are needed: got {a.shape} and {b.shape} numbers")
    ratios = a / b
    point = float(np.median(ratios))
    if len(ratios) < FEWEST:
        return Interval(point)
    from scipy import stats  # half a second, which programs that print their help need not wait

    found = stats.bootstrap(
        (ratios,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(point, min(float(found.low), point), max(float(found.high), point))


def share(values: Sequence[float] | np.ndarray, cluster: np.ndarray | None = None) -> Interval:
    """Mean of values in [0, 1] with its 95 % score interval (Wilson 1927).

    Values of one cluster go together, and values between 0 and 1 vary less than shares do: both enter as the number of
    independent yes/no samples that would vary as much (Kish's effective size), at most as many as there are.

    Args:
        values: [n].
        cluster: [n] int, which values go together; `None` = none do.
    """
    data = np.asarray(values, float)
    if not len(data):
        return Interval(float("nan"))
    mean = float(data.mean())
    size = _effective(data, cluster, mean * (1 - mean))
    if size is None:
        return Interval(mean)
    middle, room = (mean + Z95**2 / (2 * size)) / (1 + Z95**2 / size), 1 + Z95**2 / size
    half = Z95 * math.sqrt(mean * (1 - mean) / size + Z95**2 / (4 * size**2)) / room
    return Interval(mean, min(max(middle - half, 0.0), mean), max(min(middle + half, 1.0), mean))


def paired_difference(values: Sequence[float] | np.ndarray, cluster: np.ndarray | None = None) -> Interval:
    """Mean of the differences of paired scores in [0, 1], with its 95 % score interval (Tango, Statistics in Medicine 1998).

    Where no sample changed, the interval is that of a share of which none was seen, to both sides: +-0.49 for 4 samples were
    they enough, +-0.0038 for 1,000. Clusters and scores between 0 and 1 enter as in `share`.

    Args:
        values: [n] in [-1, 1], one difference a sample.
        cluster: [n] int, which samples go together; `None` = none do.
    """
    data = np.asarray(values, float)
    if not len(data):
        return Interval(float("nan"))
    mean = float(data.mean())
    up, down = float(np.clip(data, 0, None).mean()), float(np.clip(-data, 0, None).mean())
    size = _effective(data, cluster, up + down - mean**2)
    if size is None:
        return Interval(mean)
    reach = Z95**2 * size

    def outside(delta: float) -> float:
        """How far the score at a difference lies beyond the 95 % of it, squared and times the variance: its sign counts."""
        b = -size * (up + down) + (2 * size - size * (up - down)) * delta
        c = -size * down * delta * (1 - delta)
        other = (math.sqrt(max(b * b - 8 * size * c, 0.0)) - b) / (4 * size)
        return (size * (mean - delta)) ** 2 - reach * max(2 * other + delta * (1 - delta), 0.0)

    return Interval(mean, _root(outside, mean, -1.0), _root(outside, mean, 1.0))


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean with a normal 95 % interval, for what is no share; none where nothing varies or where there are too few values."""
    mean, error = mean_stderr(values)
    if len(values) < FEWEST or not error > 0:
        return Interval(mean)
    return Interval(mean, mean - Z95 * error, mean + Z95 * error)


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


def clustered_mean_stderr(values: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error where values [n] of one cluster [n] go together, as the captions of one image do.

    The error of a ratio of sums over clusters (linearised); with one value a cluster, that of the plain mean; not a number for
    fewer than two clusters. Clusters are numbered from 0.
    """
    count = np.bincount(cluster)
    total = np.bincount(cluster, weights=values)[count > 0]
    count = count[count > 0]
    mean = float(total.sum() / count.sum())
    if len(count) < 2:
        return mean, float("nan")
    rest = total - mean * count
    return mean, float(np.sqrt((rest**2).sum() * len(count) / (len(count) - 1)) / count.sum())


def with_error(metrics: Mapping[str, Any], name: str, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """A metric of a record in words, times `scale`: "96.6 ± 0.8", with its standard error; `sign` "+" for a difference.

    Where no sample differs from another the standard error would be 0, and the 95 % interval stands in its place,
    "100.0 [83.9, 100.0]"; from too few samples the value stands alone. "-" for one that does not exist.
    """
    value, error, ends = (metrics.get(f"{name}{end}") for end in ("", "_stderr", "_ci"))
    if value is None or math.isnan(value):
        return "-"
    words = f"{scale * value:{sign}.{digits}f}"
    if f"{name}_ci" in metrics and ends is None:
        return words
    if error is not None and error > 0:
        return f"{words} ± {scale * error:.{digits}f}"
    return words + in_brackets(None if ends is None else [scale * end for end in ends], f"{sign}.{digits}f")


def in_brackets(ends: Sequence[float] | None, form: str = ".2f") -> str:
    """ " [1.48, 1.55]", or "" where no interval is known."""
    return "" if ends is None else f" [{ends[0]:{form}}, {ends[1]:{form}}]"


def _effective(values: np.ndarray, cluster: np.ndarray | None, variance: float) -> float | None:
    """So many independent samples of this variance have a mean that varies as much; `None` for too few samples or clusters."""
    cluster = np.arange(len(values)) if cluster is None else np.unique(cluster, return_inverse=True)[1].reshape(-1)
    clusters = int(cluster.max()) + 1
    if clusters < FEWEST:
        return None
    error = clustered_mean_stderr(values, cluster)[1]
    if not error**2 > 1e-18 or variance <= 0:  # nothing varies: so many as can be told apart
        return float(clusters)
    return min(variance / (error**2 * (clusters - 1) / clusters), float(len(values)))


def _root(outside: Callable[[float], float], inside: float, limit: float) -> float:
    """Where a function that is negative inside and positive at the limit changes its sign, by bisection."""
    if outside(limit) <= 0:
        return limit
    near, far = inside, limit
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if outside(middle) <= 0 else (near, middle)
    return near
