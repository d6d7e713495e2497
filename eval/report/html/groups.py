"""Differences by class, kind of question or whatever else records are grouped by, against the unpatched model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vtok.eval.common.statistics import paired_difference
from vtok.eval.models.data import FASHION_CLASSES
from vtok.eval.report.html.table import NOTHING, Cell, gap_cell
from vtok.eval.report.rows import Row, scores_of
from vtok.eval.report.sections import Section
from vtok.eval.report.values import Interval, figure, mapping, number, text
from vtok.eval.tasks.fashion import fashion_labels, is_fashion, rows_of

MOST = 12  # groups in a table


@dataclass(frozen=True)
class GroupTable:
    """One grouping."""

    name: str  # what was grouped by
    groups: list[tuple[str, str, str]]  # (name, samples, headline metric of the unpatched model in words)
    rows: list[tuple[Row, list[Cell]]]  # (setting, one cell a group)
    note: str = ""  # what was left out


def group_tables(section: Section) -> list[GroupTable]:
    """Every grouping that the records hold, and classes of bundled images."""
    names = dict.fromkeys(name for row in section.rows for name in mapping(row.record.get("groups")))
    tables = [_of_records(section, name) for name in names]
    if not names:
        tables.append(_of_labels(section))
    return [table for table in tables if table is not None]


def _of_records(section: Section, grouping: str) -> GroupTable | None:
    """From the metrics that records hold of every group."""
    parts = [mapping(mapping(row.record.get("groups")).get(grouping)) for row in section.rows]
    names = list(dict.fromkeys(name for found in parts for name in found))
    gaps: dict[tuple[int, str], Interval] = {}
    base: dict[str, tuple[str, str]] = {}
    for row, found in zip(section.rows, parts):
        for name in names:
            held = mapping(found.get(name))
            n = number(held.get("n"))
            score = scores_of(held, row.factor, row.primary, n).get(row.primary or "")
            if score is None:
                continue
            if row.unpatched or name not in base:
                words = figure(score.value, 1, unit=score.unit and f" {score.unit}") if row.unpatched else ""
                base[name] = ("" if n is None else f"{n:,.0f}", words)
            if score.difference is not None and not row.unpatched:
                gaps[id(row), name] = score.difference
    return _table(section, grouping, names, base, gaps)


def _of_labels(section: Section) -> GroupTable | None:
    """From what was right image by image, where the labels come with vtok."""
    base, shown = section.base, images_of(section)
    if shown is None or base is None or base.correct is None:
        return None
    labels = fashion_labels()[shown]
    told: dict[str, tuple[str, str]] = {}
    gaps: dict[tuple[int, str], Interval] = {}
    for i, name in enumerate(FASHION_CLASSES):
        here = labels == i
        right = figure(100 * float(base.correct[here].mean()), 1, unit=" %") if here.any() else ""
        told[name] = (f"{int(here.sum()):,}", right)
        for row in section.patched:
            if row.correct is not None and len(row.correct) == len(labels) and here.sum() >= 2:
                gap = row.correct[here].astype(float) - base.correct[here].astype(float)
                gaps[id(row), name] = paired_difference(gap).scaled(100)
    return _table(section, "class", list(told), told, gaps)


def images_of(section: Section) -> list[int] | None:
    """Numbers of the bundled images that the samples of a section are, in their order; `None` for other data."""
    data, n = text(section.first.get("dataset")), section.first.get("n")
    if not is_fashion(data) or isinstance(n, bool) or not isinstance(n, int) or section.first.get("num_skipped"):
        return None
    return rows_of(data, n) if 1 <= n <= len(fashion_labels()) else None


def labels_of(section: Section, image: int) -> str:
    """Class of a bundled image, "" if it is not known."""
    if not is_fashion(text(section.first.get("dataset"))):
        return ""
    labels = fashion_labels()
    return str(FASHION_CLASSES[int(labels[image])]) if image < len(labels) else ""


def _table(
    section: Section, grouping: str, names: list[str], base: dict[str, tuple[str, str]], gaps: dict[Any, Interval]
) -> GroupTable | None:
    if not gaps:
        return None
    note = ""
    if len(names) > MOST:
        lost = {name: float(np.mean([g.point for (_, own), g in gaps.items() if own == name] or [0.0])) for name in names}
        kept = sorted(names, key=lambda name: (-abs(lost[name]), name))[:MOST]
        note = f"the {MOST} of {len(names)} groups that change most on average"
        names = [name for name in names if name in kept]
    cells = [(row, [_cell(gaps.get((id(row), name))) for name in names]) for row in section.patched]
    rows = [(row, own) for row, own in cells if any(cell.sort is not None for cell in own)]
    return GroupTable(text(grouping, 40), [(text(name, 60), *base.get(name, ("", ""))) for name in names], rows, note)


def _cell(gap: Interval | None) -> Cell:
    return NOTHING if gap is None else gap_cell(gap, "points to unpatched")._replace(words=figure(gap.point, 1, True))
