"""Single questions to vision-language models: what every setting answers where settings do not agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section
from vtok.eval.report.values import figure, number, numbers, text

MOST = 12


@dataclass(frozen=True)
class Said:
    """What one setting answered.

    Attributes:
        row: the setting.
        answer: its words.
        score: "right", "wrong", or the score in between.
        tokens: visual tokens, mean over the layers, in words; "" if unknown.
        changed: whether the unpatched model said something else.
    """

    row: Row
    answer: str
    score: str
    tokens: str
    changed: bool


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        doc_id: its number.
        question, target: what was asked and what is right.
        said: one entry a setting.
    """

    doc_id: Any
    question: str
    target: str
    said: list[Said]


@dataclass(frozen=True)
class Questions:
    """The questions that are shown.

    Attributes:
        shown: those on which most settings say something else than unpatched.
        total: questions that were asked.
        disputed: how many of them get different answers.
    """

    shown: list[Asked]
    total: int
    disputed: int


def questions(section: Section, samples: Mapping[str, Sequence[dict[str, Any]]], most: int = MOST) -> Questions | None:
    """Where settings disagree with the unpatched model; `None` if no answers are stored.

    Args:
        section: its rows name the answers by their `key`.
        samples: key of a record -> answers.
        most: questions shown.
    """
    by_doc: dict[Any, list[Said]] = {}
    asked: dict[Any, dict[str, Any]] = {}
    for row in section.rows:
        for line in answers_of(row, samples):
            doc = str(line.get("doc_id"))
            asked.setdefault(doc, line)
            by_doc.setdefault(doc, []).append(_said(row, line))
    if not by_doc:
        return None
    changed = {doc: sum(one.changed for one in said) for doc, said in by_doc.items()}
    disputed = sorted((doc for doc, number_ in changed.items() if number_), key=lambda doc: -changed[doc])
    shown = [
        Asked(asked[doc].get("doc_id"), text(asked[doc].get("question")), text(asked[doc].get("target")), by_doc[doc])
        for doc in disputed[:most]
    ]
    return Questions(shown, len(by_doc), len(disputed))


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
