"""Records that may be compared stand in one section; what the numbers of a section support is said in sentences.

A method is worth something if it beats tokens drawn at random at the same cost. Intervals are 95 %, of single comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from vtok.eval.common.records import difference
from vtok.eval.common.statistics import FEWEST, Z95, clustered_mean_stderr, paired_difference
from vtok.eval.report.rows import Row, row_of
from vtok.eval.report.values import Interval, count, figure, joined, mapping, number, numbers, text, with_ends

_NEAR = 0.1  # relative distance of costs that count as the same
# what decides a number: field of a record -> how a title says it
_SAME = {
    "model": "{}", "weights": "weights {}", "pretrained": "pretrained {}", "task": "{}", "dataset": "{}", "split": "split {}",
    "prompt": "prompt {}", "dtype": "{}", "device": "{}", "img_size": "{} px", "limit": "limit {}", "n": "{} samples",
    "seed": "seed {}", "batch_size": "batch {}",
}  # fmt: skip


@dataclass(frozen=True)
class Rival:
    """A setting beside a baseline with the same cost."""

    row: Row  # the baseline, random unless another is asked for
    gap: Interval  # of the headline metric, with its interval
    paired: bool  # whether it was taken sample by sample
    cost: str  # what is the same, in words


@dataclass
class Section:
    """Settings of one model on one task, or of one benchmark."""

    title: str  # of the section
    rows: list[Row]  # unpatched first, then by falling cost
    bench: bool  # whether only speed was measured
    rivals: dict[int, Rival] = field(default_factory=dict)  # number of a row -> the random setting beside it

    @property
    def base(self) -> Row | None:
        return next((row for row in self.rows if row.unpatched), None)

    @property
    def first(self) -> dict[str, Any]:
        return self.rows[0].record

    @property
    def patched(self) -> list[Row]:
        return [row for row in self.rows if not row.unpatched]


def sections(records: Sequence[dict[str, Any]]) -> list[Section]:
    """Groups records by model, task, data and what else decides a number, in the order in which they were found."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for record in records:
        grouped.setdefault(_identity(record), []).append(row_of(record))
    found = []
    ordered = sorted(grouped.values(), key=lambda rows: "metrics" not in rows[0].record)  # speed alone comes last
    for rows, title in zip(ordered, _titles([rows[0].record for rows in ordered])):
        rows = _ordered(rows)
        section = Section(title, rows, "metrics" not in rows[0].record)
        if (base := section.base) is not None:
            section.rows = [_told(row, base) for row in rows]
        section.rivals = {i: rival for i, rival in rivals(section).items() if not rows[i].baseline}
        found.append(section)
    return found


def rivals(section: Section, method: str = "random") -> dict[int, Rival]:
    """Number of a row -> the setting of a method beside it that costs as much, where there is one; of all others' rows."""
    rows = section.rows
    return {i: rival for i, row in enumerate(rows) if (rival := _rival(row, rows, method)) is not None}


def _told(row: Row, base: Row) -> Row:
    """A row whose difference to unpatched has its interval, where the record lacks it but says which samples were right."""
    a, b, score = row.correct, base.correct, row.score
    if score is None or score.difference is None or score.difference.known or a is None or b is None or len(a) != len(b):
        return row
    found = paired_difference(a.astype(float) - b.astype(float)).scaled(100)
    if not _counts(row, a) or abs(found.point - score.difference.point) > 0.01:
        return row
    told = copy(row)
    told.scores = {**row.scores, score.name: replace(score, difference=found)}
    return told


def _identity(record: dict[str, Any]) -> tuple[str, ...]:
    speed = () if "metrics" in record else ("bench", text(record.get("threads")))
    return (*(text(record.get(name)) for name in _SAME), *speed)


def _titles(records: Sequence[dict[str, Any]]) -> list[str]:
    """One a section, from its first record: titles that would be the same say in what the sections differ."""
    plain, whole = [_title(record) for record in records], list[str]()
    for title, record in zip(plain, records):
        alike = [other for other, name in zip(records, plain) if name == title]
        differ = [name for name in _SAME if len({text(other.get(name)) for other in alike}) > 1]
        words = [_SAME[name].format(text(record.get(name), 40)) for name in differ if text(record.get(name))]
        whole.append(f"{title} ({', '.join(words)})" if words else title)
    return [one + (f" ({whole[:i].count(one) + 1})" if one in whole[:i] else "") for i, one in enumerate(whole)]


def _title(record: dict[str, Any]) -> str:
    model, data = text(record.get("model"), 80) or "unnamed model", text(record.get("dataset"), 80)
    if "metrics" not in record:
        return f"Speed of {model}"
    return f"{model} on {data}" if data else f"{model}, {text(record.get('task'), 40) or 'unnamed task'}"


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Unpatched, then by falling budget, or else beside the random setting that has about as many tokens; baselines last."""
    levels = [row.mean_tokens for row in rows if row.method == "random" and row.budget is None and row.mean_tokens]

    def place(row: Row) -> tuple[Any, ...]:
        tokens = row.mean_tokens or 0.0
        if row.budget is not None:
            return not row.unpatched, 0, -row.budget, row.baseline, -tokens, row.label
        near = min(levels, key=lambda level: abs(level - tokens), default=0.0)
        return not row.unpatched, 1, -near, row.baseline, row.method, -tokens, row.label

    return sorted(rows, key=place)


def _rival(row: Row, rows: Sequence[Row], method: str) -> Rival | None:
    """The setting of a method that costs as much, if there is one."""
    if row.unpatched or row.method == method or row.score is None:
        return None
    others = [r for r in rows if r.method == method and r.score is not None]
    same = [r for r in others if row.budget is not None and r.budget == row.budget]
    if same:
        return _beside(row, same[0], f"at {100 * (row.budget or 0):g} % of the FLOPs")
    tokens = row.mean_tokens
    near = [r for r in others if tokens and r.mean_tokens and abs(r.mean_tokens - tokens) <= _NEAR * tokens]
    if not near:
        return None
    found = min(near, key=lambda r: abs((r.mean_tokens or 0) - (tokens or 0)))
    return _beside(row, found, f"with {figure(found.mean_tokens, 0)} tokens")


def paired(row: Row, other: Row, metric: str) -> Interval | None:
    """What a row has more of a metric than another, sample by sample, where both records say it; shares in percent."""
    a, b = (numbers(mapping(one.record.get("per_image")).get(metric)) for one in (row, other))
    whole = numbers(row.record.get("cluster"))
    if a and len(a) == len(b) == len(whole):
        cluster = np.unique(whole, return_inverse=True)[1]
        gap, error = clustered_mean_stderr(np.subtract(a, b), cluster)
        known = cluster.max() + 1 >= FEWEST and error > 0
        return Interval(gap, gap - Z95 * error, gap + Z95 * error) if known else Interval(gap)
    c, d = row.correct, other.correct
    if metric != row.primary or c is None or d is None or not len(c) == len(d) > 1:
        return None
    if not _counts(row, c) or not _counts(other, d):  # the headline metric counts something else
        return None
    return paired_difference(c.astype(float) - d.astype(float)).scaled(100)


def _beside(row: Row, other: Row, cost: str) -> Rival | None:
    """Paired where both say sample by sample what the headline metric counts."""
    assert row.score is not None and other.score is not None
    found = paired(row, other, row.score.name)
    if found is not None:
        own = row.score.name in mapping(row.record.get("per_image"))
        return Rival(other, found.scaled(row.factor) if own else found, True, cost)
    gap, errors = row.score.value - other.score.value, [_error(one) for one in (row, other)]
    if None in errors or not any(errors):  # errors of nothing are not known
        return Rival(other, Interval(gap), False, cost)
    half = Z95 * sum(e**2 for e in errors if e is not None) ** 0.5
    return Rival(other, Interval(gap, gap - half, gap + half), False, cost)


def _counts(row: Row, correct: np.ndarray) -> bool:
    return row.score is not None and abs(100 * correct.mean() - row.score.value) < 0.01


def _error(row: Row) -> float | None:
    """Standard error of the difference to unpatched, else of the score."""
    assert row.score is not None
    ends = row.score.difference.ends if row.score.difference is not None else None
    return row.score.error if ends is None else (ends[1] - ends[0]) / (2 * Z95)


class Finding(NamedTuple):
    """One sentence."""

    kind: str  # "good", "bad" or "plain"
    words: str


def headline_of(section: Section) -> str:
    """The section in one sentence: who beats random, who loses nothing measurable, who is slower."""
    parts = []
    if section.rivals:
        beats, _, below = _by_sign(section)
        parts.append(
            f"{len(beats)} of {count(len(section.rivals), 'setting')} beat random at the same cost beyond the 95 % interval"
            + (f" ({joined(beats)})" if beats else "")
            + (f", {len(below)} fall below it ({joined(below)})" if below else "")
        )
    slower = [row.label for row in section.patched if row.slower]
    timed = [row for row in section.patched if row.speedup is not None]
    told = [row for row in timed if not row.untold]
    if told:
        words = f"{len(slower)} slower than unpatched ({joined(slower)})" if slower else "none slower than unpatched"
        parts.append(f"of {len(told)} timed, {words}")
    if len(told) < len(timed):
        parts.append(f"{len(timed) - len(told)} timed in too few pairs to tell")
    if not parts:
        parts.append("nothing to compare: neither random at the same cost nor measured speed is among the records")
    return "; ".join(parts) + "."


def findings(section: Section) -> list[Finding]:
    """What the numbers of a section support, and what they do not."""
    scores = [] if section.bench else [*_unpatched(section), *_against_random(section), *_losses(section)]
    return [*scores, *_speed(section)]


def _by_sign(section: Section, gaps: bool = False) -> tuple[list[str], list[str], list[str]]:
    """Settings better than random at the same cost, not clearly apart, worse; with their `gaps`."""
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for i, rival in section.rivals.items():
        found[rival.gap.sign].append(section.rows[i].label + (f" ({with_sign(rival.gap)})" if gaps else ""))
    return found[1], found[0], found[-1]


def _unpatched(section: Section) -> Iterator[Finding]:
    if section.base is None:
        yield Finding("bad", "No record of the unpatched model: differences are those that the records state themselves.")
    blind = next((b for row in section.rows if (b := number(row.record.get("blind"))) is not None), None)
    if blind is not None:
        yield Finding("plain", f"{figure(100 * blind)} % are answered from the question alone, without the image.")


def _against_random(section: Section) -> Iterator[Finding]:
    if section.patched and not section.rivals:
        told = "No random setting of the same cost is among the records: what a choice of tokens is worth cannot be said."
        yield Finding("bad", told)
    if not section.rivals:
        return
    kinds = (("good", "Better than random"), ("plain", "Not clearly apart from random"), ("bad", "Worse than random"))
    for (kind, words), settings in zip(kinds, _by_sign(section, gaps=True)):
        if settings:
            yield Finding(kind, f"{words} at the same cost, in points [95 %]: {joined(settings, 12)}.")
    if not all(rival.paired for rival in section.rivals.values()):
        yield Finding("plain", "Some of these gaps are not paired sample by sample: their intervals are wider than need be.")
    yield from _ranks(section)


def _ranks(section: Section) -> Iterator[Finding]:
    """Whether the task can rank methods at all: what random loses where it is cheapest."""
    random = [row for row in section.patched if row.method == "random" and row.score and row.score.difference]
    if not random:
        return
    row = random[-1]
    assert row.score is not None and row.score.difference is not None
    loss, errors = -row.score.difference.point, _errors(row)
    if loss <= 0:
        yield Finding("plain", f"{row.label} loses nothing to unpatched: too little to rank methods.")
        return
    enough = "enough" if errors is not None and errors >= 3 else "too little"
    told = "" if errors is None else f", {errors:.1f} standard errors"
    yield Finding("plain", f"{row.label} loses {loss:.2f} points to unpatched{told}: {enough} to rank methods.")


def _errors(row: Row) -> float | None:
    """What a setting loses to the unpatched model, in standard errors of the difference."""
    gap, error, _ = difference(row.record | {"primary": row.primary})
    gap, error = number(gap), number(error)
    return None if gap is None or not error else -gap / error


def with_sign(gap: Interval) -> str:
    """ "+1.1 [+0.2, +2.0]"; with two decimals where one would hide on which side of zero an end lies."""
    digits = 2 if any(end is not None and 0 < abs(end) < 0.05 for end in gap[1:]) else 1
    return with_ends(gap, digits, True)


def _losses(section: Section) -> Iterator[Finding]:
    chosen = [(row, row.score.difference) for row in section.patched if not row.baseline and row.score]
    known = [(row.label, gap) for row, gap in chosen if gap is not None and gap.known]
    same = [label for label, gap in known if gap.sign == 0]
    if same:
        n = section.first.get("n")  # few samples cannot tell models apart: no praise
        held = f", {n:,} samples" if isinstance(n, int) else ""
        yield Finding("plain", f"Not apart from unpatched (the 95 % interval holds zero{held}): {joined(same, 12)}.")
    elif known:
        yield Finding("bad", "Every setting with an interval is measurably apart from unpatched.")


def _speed(section: Section) -> Iterator[Finding]:
    told = (
        ("bad", "Slower than unpatched", lambda row: row.slower),
        ("plain", "Timed in too few pairs to tell how fast they are", lambda row: row.untold),
        ("plain", "Not clearly faster than unpatched", lambda row: row.not_faster and not row.slower),
    )
    for kind, words, holds in told:
        if settings := [row.label for row in section.patched if holds(row)]:
            yield Finding(kind, f"{words}: {joined(settings, 12)}.")
