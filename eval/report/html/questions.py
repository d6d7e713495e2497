"""Single questions to vision-language models: what every setting answers where settings do not agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section
from vtok.eval.report.values import figure, number, numbers, text

MOST = 12


class Said(NamedTuple):
    """What one setting answered."""

    row: Row
    answer: str
    score: str  # "right", "wrong", or the score in between
    tokens: str  # visual tokens, mean over the layers, in words; "" if unknown
    changed: bool  # whether the unpatched model said something else


class Asked(NamedTuple):
    """One question."""

    doc_id: Any
    question: str
    target: str  # what is right
    said: list[Said]  # one entry a setting


class Questions(NamedTuple):
    """The questions that are shown."""

    shown: list[Asked]  # those on which most settings say something else than unpatched
    total: int  # questions that were asked
    disputed: int  # how many of them get different answers


def questions(section: Section, samples: Mapping[str, Sequence[dict[str, Any]]], most: int = MOST) -> Questions | None:
    """Where settings disagree with the unpatched model; `None` if no answers are stored (key of a record -> answers)."""
    asked: dict[str, Asked] = {}
    for row in section.rows:
        for line in answers_of(row, samples):
            one = Asked(line.get("doc_id"), text(line.get("question")), text(line.get("target")), [])
            asked.setdefault(str(one.doc_id), one).said.append(_said(row, line))
    if not asked:
        return None
    changed = [(one, sum(said.changed for said in one.said)) for one in asked.values()]
    disputed = sorted(((one, times) for one, times in changed if times), key=lambda pair: -pair[1])
    return Questions([one for one, _ in disputed[:most]], len(asked), len(disputed))


def answers_of(row: Row, samples: Mapping[str, Sequence[dict[str, Any]]]) -> Sequence[dict[str, Any]]:
    """Stored answers of a setting: those under its key, else those of its title, as many as samples, in its folder."""
    own = samples.get(str(row.record.get("key")))
    if own:
        return own
    folder = Path(text(row.record.get("path"))).parent
    titles = [title for title in (row.record.get("title"), row.record.get("setting")) if title is not None]
    for lines in samples.values():
        near = folder in Path(str(lines[0].get("path"))).parents
        if near and lines[0].get("method") in titles and len(lines) == row.record.get("n"):
            return lines
    return ()


def _said(row: Row, line: dict[str, Any]) -> Said:
    score = number(line.get("score"))
    word = "" if score is None else "right" if score >= 1 else "wrong" if score <= 0 else figure(score, 2)
    kept = numbers(line.get("kept_tokens"))
    before = line.get("baseline_prediction")
    changed = not row.unpatched and before is not None and before != line.get("prediction")
    return Said(row, text(line.get("prediction"), 120), word, figure(sum(kept) / len(kept), 0) if kept else "", changed)
