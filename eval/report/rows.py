"""A record as the page shows it: every figure read with care, in percent where it is a share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtok.eval.common.records import AT_RANDOM, BASELINES, UNPATCHED, correctness
from vtok.eval.common.statistics import FEWEST, Z95
from vtok.eval.report.values import Interval, at, figure, interval, mapping, number, numbers, text

LABELS = {
    "top1": "top-1",
    "top5": "top-5",
    "acc1": "top-1",
    "acc5": "top-5",
    "exact_match": "exact match",
    "anls": "ANLS",
    "mean_per_class_recall": "mean class recall",
    "recall_sum": "sum of recalls",
}
_HEADLINES = ("top1", "acc1", "exact_match", "soft_accuracy", "image_retrieval_recall@1")
_HELPER = re.compile(r"(^|_)(stderr|difference|ci)$")
_FOLDERS = re.compile(r"=[^=,()]*/([^/,()]+)")


@dataclass(frozen=True)
class Score:
    """One metric of one setting, in percent where it is a share."""

    name: str  # of the metric, as records have it
    value: float
    error: float | None = None  # standard error, if known
    difference: Interval | None = None  # to unpatched with its 95 % interval, paired, if known
    unit: str = "%"  # or ""
    own: Interval | None = None  # the 95 % interval of the value itself, if known

    @property
    def words(self) -> str:
        """ "88.2 ± 0.8"; where no sample differs, and no standard error can be told, the interval."""
        ends = "" if self.own is None else f" [{figure(self.own.low, 1)}, {figure(self.own.high, 1)}]"
        return figure(self.value, 1) + (ends if self.error is None else f" ± {figure(self.error, 1)}")

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name.replace("_retrieval", "").replace("recall@", "R@").replace("_", " "))


class Row:
    """One setting on one task, whatever its record holds; what that does not say is `None` or empty."""

    def __init__(self, record: dict[str, Any]):
        metrics, implied = mapping(record.get("metrics")), number(record.get("implied_speedup"))
        self.record = record
        self.method = text(record.get("method")) or UNPATCHED
        self.unpatched = self.method == UNPATCHED
        self.drawn = self.method.endswith(AT_RANDOM)  # the control of a method: its places and counts, its tokens drawn
        self.baseline = self.method in BASELINES or self.drawn  # chooses tokens blindly: what others are compared with
        self.budget = number(record.get("budget"))
        self.label = label_of(record, self.method, self.budget)
        self.primary = headline(record)
        self.factor = scale(record)  # from metrics to percent
        self.scores = scores_of(metrics, self.factor, self.primary, number(record.get("n")))
        self.per_layer = numbers(at(record, "tokens", "mean_per_layer")) or numbers(at(record, "visual_tokens", "per_layer"))
        self.mean_tokens = sum(self.per_layer) / len(self.per_layer) if self.per_layer else None
        self.tokens_in = number(at(record, "tokens", "in")) or number(at(record, "visual_tokens", "in"))
        self.gmacs = number(at(record, "gmacs", "model"))  # of the model, `reduction` left out
        self.reduction = number(at(record, "gmacs", "pruner")) or number(at(record, "gmacs", "selection"))
        self.total_gmacs = None if self.gmacs is None else self.gmacs + (self.reduction or 0.0)
        self.implied = None if self.unpatched else implied  # speed-up by MACs
        ends = speed_ends(record)
        self.speedup = interval(record.get("speedup"), ends)
        self.measured = 1.0 if self.unpatched else None if self.speedup is None else self.speedup.point
        # Measured over implied; where only the speed-up has an interval, its ends are divided too.
        self.achieved = interval(record.get("achieved"), record.get("achieved_ci") if ends else None)
        if self.achieved is not None and not self.achieved.known and ends and implied and len(ends) == 2:
            self.achieved = Interval(self.achieved.point, ends[0] / implied, ends[1] / implied)
        self.correct = _correct(record)

    @property
    def score(self) -> Score | None:
        """The headline metric."""
        return self.scores.get(self.primary) if self.primary else None

    @property
    def slower(self) -> bool:
        """Whether the whole interval of the speed-up lies below 1."""
        s = self.speedup
        return s is not None and s.high is not None and s.high < 1

    @property
    def not_faster(self) -> bool:
        """Whether there is an interval and it does not lie above 1."""
        s = self.speedup
        return s is not None and s.low is not None and s.low <= 1

    @property
    def untold(self) -> bool:
        """Whether it was timed, but not in pairs enough for an interval: nothing can be said about its speed."""
        return self.speedup is not None and not self.speedup.known

    @property
    def verdict(self) -> tuple[str, str]:
        """("good", "bad" or "plain"; what the interval of its speed-up supports), of a setting that was timed."""
        if self.slower:
            return "bad", "slower than unpatched"
        if self.not_faster:
            return "plain", "not clearly faster"
        return ("plain", "too few pairs to tell") if self.untold else ("good", "faster than unpatched")


def row_of(record: dict[str, Any]) -> Row:
    """Reads one record; never fails, whatever it holds."""
    return Row(record)


def scale(record: dict[str, Any]) -> float:
    """What metrics are multiplied with to be in percent."""
    said = record.get("percent")
    if isinstance(said, bool):
        return 1.0 if said else 100.0
    metrics = mapping(record.get("metrics"))
    if "top1" in metrics:  # timm's and ours are in percent
        return 1.0
    values = [number(v) for name, v in metrics.items() if name != "recall_sum" and not _HELPER.search(name)]
    return 100.0 if all(v is None or abs(v) <= 1 for v in values) else 1.0


def headline(record: dict[str, Any]) -> str | None:
    """Name of the metric that stands for a record."""
    metrics = mapping(record.get("metrics"))
    said = record.get("primary")
    names = [said] if isinstance(said, str) else []
    known = [name for name in metrics if not _HELPER.search(name)]
    return next((name for name in (*names, *_HEADLINES, *known) if number(metrics.get(name)) is not None), None)


def speed_ends(record: dict[str, Any]) -> Any:
    """The interval of a speed-up as a record has it; `None` where it is from too few pairs, or is a point."""
    pairs, ends = number(record.get("pairs")), numbers(record.get("speedup_ci"))
    return None if (pairs is not None and pairs < FEWEST) or len(set(ends)) < 2 else ends


def scores_of(metrics: dict[str, Any], factor: float, primary: str | None, n: float | None = None) -> dict[str, Score]:
    """Every metric of a record, or of a group of it, in percent by `factor`; from too few of `n` samples without errors."""
    few = n is not None and n < FEWEST
    metrics = {name.replace("loyalty", "agreement"): value for name, value in metrics.items()}  # as records of 0.1 name it
    found = {}
    for name, value in metrics.items():
        point = number(value)
        if point is None or _HELPER.search(name):
            continue
        error = None if few else number(metrics.get(f"{name}_stderr"))
        own = None if few else interval(value, metrics.get(f"{name}_ci"))
        found[name] = Score(
            name,
            point * factor,
            error * factor if error else None,
            _difference(metrics, name, name == primary, factor, few),
            "%" if abs(point * factor) <= 100.5 else "",
            own.scaled(factor) if own is not None and own.known else None,
        )
    return found


def _difference(metrics: dict[str, Any], name: str, primary: bool, factor: float, few: bool) -> Interval | None:
    """Under `NAME_difference`, or for the headline metric under `difference` alone; without ends where they say nothing.

    Records of older releases have the interval [0, 0] where no sample changed: a point is no interval.
    """
    for prefix in (f"{name}_", "") if primary and name in ("top1", "acc1") else (f"{name}_",):
        known = interval(metrics.get(f"{prefix}difference"), metrics.get(f"{prefix}difference_ci"))
        if known is None:
            continue
        error = number(metrics.get(f"{prefix}difference_stderr"))
        if not known.known and error and f"{prefix}difference_ci" not in metrics:
            known = Interval(known.point, known.point - Z95 * error, known.point + Z95 * error)
        if few or (known.known and known.low == known.high):
            known = Interval(known.point)
        return known.scaled(factor)
    return None


def label_of(record: dict[str, Any], method: str, budget: float | None) -> str:
    """What was asked for: "tome(r=13)", or "tome at 60 % of the FLOPs"; without folders of files and unset shares."""
    title = text(record.get("title")) or text(record.get("setting"))
    if title:
        return _FOLDERS.sub(r"=\1", title).replace("(keep=None, keep_tokens=", "(keep_tokens=")
    if budget is not None and method != UNPATCHED:
        return f"{method} at {100 * budget:g}\u00a0%"
    return method


def _correct(record: dict[str, Any]) -> np.ndarray | None:
    """[n] bool, which samples were right; `None` unless the field is whole."""
    n = record.get("n")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        return None
    try:
        return correctness(record) if len(record["correct"]) == 2 * ((n + 7) // 8) else None
    except (KeyError, TypeError, ValueError):  # no field, no text, no hexadecimal
        return None
