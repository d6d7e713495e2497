"""Metrics of a whole set of questions that are no means over questions, such as F1, with a bootstrap over images.

Such a metric is a function of sums: every question adds a row of K numbers (a true positive, a pair that is right, ...).
That is enough to compute it on any part of the questions and on any resample of the images.

Shapes: n questions, C images, R resamples, K numbers a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from vtok.eval.common.statistics import FEWEST
from vtok.eval.tasks.vqa.data import Question

RESAMPLES = 1000
LEVEL = 0.95


class Total(NamedTuple):
    """A metric that is a function of sums over questions.

    Attributes:
        parts: (answers, questions), n each -> [n, K] what every question adds.
        combine: [..., K] sums -> [...] the metric; not a number where the questions say nothing about it.
        strata: grouping whose groups are all in every resample, as many images of each as there are: what is a sum over
            categories must not lack one by chance. "" = images are drawn from all.
    """

    parts: Callable[[Sequence[str], Sequence[Question]], np.ndarray]
    combine: Callable[[np.ndarray], np.ndarray]
    strata: str = ""

    def strata_of(self, questions: Sequence[Question]) -> np.ndarray:
        """[n] int: which group each question belongs to."""
        return np.unique([q.groups.get(self.strata, "") for q in questions], return_inverse=True)[1]


def ratio(above: np.ndarray, below: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """[...] above / below, and `empty` where below is 0."""
    below = np.asarray(below, float)
    return np.where(below == 0, empty, np.asarray(above, float) / np.where(below == 0, 1.0, below))


@lru_cache(maxsize=4)
def _draws(strata: tuple[int, ...], seed: int) -> np.ndarray:
    """[R, C] how often each image is in each resample; `strata` has the group of each."""
    rng, groups = np.random.default_rng(seed), np.array(strata)
    found = np.empty((RESAMPLES, len(groups)), np.float32)
    for group in np.unique(groups):
        columns = np.flatnonzero(groups == group)
        found[:, columns] = rng.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), RESAMPLES)
    return found


def total_fields(
    name: str,
    total: Total,
    parts: np.ndarray,
    base: np.ndarray | None,
    cluster: np.ndarray,
    strata: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:
    """A metric of a record: its value, `_stderr`, `_ci` and, against the unpatched model, `_difference` with both.

    Images are drawn with replacement, all their questions at once, and the same images for both models. `None` stands instead
    of a number where the questions say nothing about it, of errors for fewer than two images, and of intervals for fewer than
    five, or where no resample differs.

    Args:
        name: of the metric.
        total: what it is.
        parts: [n, K] of the setting.
        base: [n, K] of the unpatched model to the same questions, or `None`.
        cluster: [n] int, the image of each question.
        strata: [n] int, see `Total.strata_of`.
        seed: of the bootstrap.
    """
    found: dict[str, Any] = {name: _number(total.combine(parts.sum(0)))}
    if base is not None:
        before = _number(total.combine(base.sum(0)))
        found[f"{name}_difference"] = None if found[name] is None or before is None else found[name] - before
    first, rows = np.unique(cluster, return_index=True, return_inverse=True)[1:]
    groups = tuple(strata[first].tolist())  # [C]
    own = _resampled(total, parts, rows, groups, seed)
    found |= _spread(name, own, len(groups))
    if base is not None:
        other = _resampled(total, base, rows, groups, seed)
        found |= _spread(f"{name}_difference", None if own is None or other is None else own - other, len(groups))
    return found


def _resampled(total: Total, parts: np.ndarray, rows: np.ndarray, groups: tuple[int, ...], seed: int) -> np.ndarray | None:
    count = len(groups)
    if count < 2:
        return None
    sums = np.stack([np.bincount(rows, weights=column, minlength=count) for column in parts.T], axis=1)  # [C, K]
    return total.combine(_draws(groups, seed) @ sums)


def _spread(name: str, values: np.ndarray | None, clusters: int) -> dict[str, Any]:
    """Standard error and interval of a metric from its resamples of so many images; those that say nothing are left out."""
    known = np.empty(0) if values is None else values[~np.isnan(values)]
    if len(known) < 2:
        return {f"{name}_stderr": None, f"{name}_ci": None}
    tail = 100 * (1 - LEVEL) / 2
    told = clusters >= FEWEST and known.max() > known.min()  # where no resample differs nothing is known about the spread
    ends = [float(v) for v in np.percentile(known, [tail, 100 - tail])] if told else None
    return {f"{name}_stderr": float(known.std(ddof=1)), f"{name}_ci": ends}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
