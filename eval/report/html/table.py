"""The tables of a section: the summary, which can be sorted by column, and speed against what the MACs imply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vtok.eval.report.rows import Row, Score
from vtok.eval.report.sections import Section, with_sign
from vtok.eval.report.tables import Column
from vtok.eval.report.values import Interval, at, figure, number, with_ends

_EXTRAS = ("top5", "acc5", "agreement", "image_retrieval_recall@1", "text_retrieval_recall@1")
# sign of a difference -> (kind of its cell, mark, tooltip)
_SIDES = {
    1: ("good", "▲", "the interval lies above zero"),
    -1: ("bad", "▼", "the interval lies below zero"),
    0: ("", "", "the interval holds zero"),
}


class Cell(NamedTuple):
    """One cell."""

    words: str  # as shown
    sort: float | str | None = None  # what the column is sorted by; `None` = always last
    title: str = ""  # tooltip, "" = none
    kind: str = ""  # "good", "bad" or ""
    mark: str = ""  # a sign that says the same as the colour


NOTHING = Cell("–")


class Shown(NamedTuple):
    """Columns that have something to show, and their cells row by row."""

    columns: list[Column]
    rows: list[tuple[Row, list[Cell]]]


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> Shown:
    cells = [[column.cell(row) for column in columns] for row in rows]
    shown = [i for i, column in enumerate(columns) if column.left or any(line[i].sort is not None for line in cells)]
    return Shown([columns[i] for i in shown], [(row, [line[i] for i in shown]) for row, line in zip(rows, cells)])


_SETTING = Column("setting", lambda row: Cell(row.label, row.label.lower()), left=True, title="what was patched in")


def summary(section: Section, front: set[int]) -> Shown:
    """Every setting of a section: cost, accuracy, differences, speed; `front` = numbers of the rows on the Pareto front of
    accuracy against GMACs."""
    place = {id(row): i for i, row in enumerate(section.rows)}
    score = next((row.score for row in section.rows if row.score is not None), None)
    name, unit = (score.label, score.unit) if score else ("score", "")

    def against_random(row: Row) -> Cell:
        rival = section.rivals.get(place[id(row)])
        if rival is None:
            return NOTHING
        paired = "paired sample by sample" if rival.paired else "not paired"
        return gap_cell(rival.gap, f"against {rival.row.label}, {rival.cost}, {paired}")

    def best(row: Row) -> Cell:
        here = place[id(row)] in front
        told = "no other setting has fewer GMACs, token reduction included, and more accuracy" if here else ""
        return Cell("●" if here else "", 1.0 if here else 0.0, told)

    columns = [
        _SETTING,
        *([Column("Pareto", best, title="on the front of accuracy against GMACs, token reduction included")] if front else []),
        Column(name, lambda r: _score(r.score), title="± standard error", unit=unit),
        Column("vs unpatched", _difference, title="paired difference in points, with its 95 % interval", unit="points [95 %]"),
        Column("vs random", against_random, title="difference in points to random at the same cost", unit="points [95 %]"),
        Column("tokens", lambda r: _plain(r.mean_tokens, 0), title="mean over the layers"),
        Column("GMACs", _macs, title="multiply-accumulates per sample, token reduction left out"),
        Column("implied", lambda r: _plain(r.implied, 2, "×"), title="unpatched over patched GMACs", unit="speed-up"),
        Column("measured", _measured, title="median of pairs with its 95 % interval", unit="speed-up [95 %]"),
        Column("achieved", _achieved, title="measured over implied"),
        *(_extra(extra) for extra in _EXTRAS if score is None or extra != score.name),
        Column("first token", _first_token, title="time until the first token of an answer", unit="ms"),
        Column("KV", _kv, title="keys and values of a prompt, 10^6 bytes", unit="MB"),
    ]
    return _table(columns, section.rows)


def all_scores(section: Section) -> Shown | None:
    """Every metric of every setting; `None` where the summary shows them all."""
    names = list(dict.fromkeys(name for row in section.rows for name in row.scores))
    return None if len(names) < 2 else _table([_SETTING, *(_any_score(name) for name in names)], section.rows)


class Speed(NamedTuple):
    """One setting's speed: numbers in percent of the width of the scale, words as they are shown, `kind` as of a verdict."""

    row: Row
    kind: str
    verdict: str
    low: float
    point: float
    high: float
    implied: float | None  # by MACs; `None` if unknown
    measured: str
    bound: str
    achieved: str


class Speeds(NamedTuple):
    """All timed settings on one scale, which begins at 0; 1x, unpatched, lies at `one`."""

    lines: list[Speed]
    one: float


def speeds(section: Section) -> Speeds | None:
    """Measured speed beside what the MACs imply; `None` if nothing was timed."""
    timed = [(row, row.speedup) for row in section.patched if row.speedup is not None]
    if not timed:
        return None
    tops = [value for row, s in timed for value in (s.point, s.high, row.implied) if value is not None]
    most = max(1.1, *tops) * 1.04

    def place(value: float) -> float:
        return round(100 * max(value, 0.0) / most, 2)

    lines = []
    for row, s in timed:
        achieved = None if row.achieved is None else row.achieved.scaled(100)
        low, high = s.ends or (s.point, s.point)
        lines.append(
            Speed(
                row,
                row.verdict[0],
                row.verdict[1],
                place(low),
                place(s.point),
                place(high),
                None if row.implied is None else place(row.implied),
                with_ends(s, 2, unit="×"),
                figure(row.implied, 2, unit="×"),
                with_ends(achieved, 0, unit=" %"),
            )
        )
    return Speeds(lines, place(1.0))


def _plain(value: float | None, digits: int, unit: str = "") -> Cell:
    return Cell(figure(value, digits, unit=unit), value)


def _score(score: Score | None) -> Cell:
    if score is None:
        return NOTHING
    title = "± standard error" if score.error is not None else "95 % interval" if score.own else "no standard error is known"
    return Cell(score.words, score.value, title)


def _difference(row: Row) -> Cell:
    known = row.score.difference if row.score else None
    return NOTHING if known is None else gap_cell(known, "paired with unpatched")


def gap_cell(gap: Interval, title: str) -> Cell:
    """A difference with its interval, coloured and marked where that lies on one side of zero."""
    kind, mark, told = _SIDES[gap.sign]
    told = told if gap.known else "no interval is known"
    return Cell(with_sign(gap), gap.point, f"{title}; {told}", kind, mark)


def _macs(row: Row) -> Cell:
    own = "" if not row.reduction else f"the reduction's own: {row.reduction:.3g}"
    return NOTHING if row.gmacs is None else Cell(figure(row.gmacs, 3 if row.gmacs < 10 else 1), row.gmacs, own)


def _measured(row: Row) -> Cell:
    if row.speedup is None:
        return NOTHING
    kind, mark = ("bad", "▼") if row.slower else ("", "")
    return Cell(with_ends(row.speedup, 2, unit="×"), row.speedup.point, row.verdict[1], kind, mark)


def _achieved(row: Row) -> Cell:
    if row.achieved is None:
        return NOTHING
    share = row.achieved.scaled(100)
    return Cell(figure(share.point, 0, unit=" %"), row.achieved.point, with_ends(share, 0, unit=" %"))


def _first_token(row: Row) -> Cell:
    value, base = (number(at(row.record, "ttft_ms", side)) for side in ("patched", "base"))
    return Cell(figure(value, 0), value, "" if base is None else f"unpatched: {figure(base, 0)}")


def _kv(row: Row) -> Cell:
    value = number(at(row.record, "kv_bytes", "patched"))
    return _plain(None if value is None else value / 1e6, 2)


def _extra(name: str) -> Column:
    about = f"{name}, ± standard error"
    return Column(Score(name, 0.0).label, lambda row: _score(row.scores.get(name)), title=about, unit="%")


def _any_score(name: str) -> Column:
    def cell(row: Row) -> Cell:
        score = row.scores.get(name)
        known = None if score is None else score.difference
        return _score(score)._replace(title="" if known is None else f"vs unpatched {with_sign(known)}")

    return Column(name.replace("_", " "), cell, title=name)
