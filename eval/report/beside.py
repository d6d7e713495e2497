"""Every setting of a method beside blind ones: its own places and counts with the tokens drawn at random (which tells what its
choice is worth), random and uniform at the same budget, and the method's default. Differences are paired, intervals 95 %."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vtok.eval.common.records import BASELINES
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section, paired
from vtok.eval.report.tables import Column, Table
from vtok.eval.report.values import mapping

_CAPTION = "paired differences [95 %]; its places: as many tokens in the same blocks, drawn at random; * beyond the interval"


def choices(section: Section) -> list[Table]:
    """One table a metric that is known sample by sample; none without a setting whose tokens were drawn, too."""
    if not any(row.drawn for row in section.rows):
        return []
    names = list(mapping(section.first.get("per_image"))) or [section.rows[0].primary or ""]
    return [_table(section, name) for name in names]


def _table(section: Section, metric: str) -> Table:
    rows = [row for row in section.patched if not row.drawn]
    share = "per_image" not in section.first
    digits = 1 if share else 3

    def value(row: Row) -> str:
        return f"{row.record['metrics'][metric]:.{digits}f}"

    def against(find: Callable[[Row], Row | None], row: Row) -> str:
        other = find(row)
        gap = None if other is None or other is row else paired(row, other, metric)
        if gap is None:
            return "-"
        ends = "" if gap.ends is None else f" [{gap.ends[0]:+.{digits}f}, {gap.ends[1]:+.{digits}f}]"
        return f"{gap.point:+.{digits}f}{ends}" + ("*" if gap.sign else "")

    finds: dict[str, Callable[[Row], Row | None]] = {
        "its places": lambda row: next((r for r in section.rows if r.drawn and _asked(r) == _asked(row)), None),
        **{name: partial(_of, section.rows, name) for name in BASELINES},
        "its default": lambda row: _of(section.rows, row.method, row),
    }
    columns = [
        Column("setting", lambda row: row.label, left=True),
        Column("GMACs", lambda row: "-" if row.total_gmacs is None else f"{row.total_gmacs:.2f}"),
        Column(metric.replace("_", " ") + (" %" if share else ""), value),
        *(Column(f"- {name}", partial(against, find)) for name, find in finds.items()),
    ]
    unused = [i for i in range(3, len(columns)) if all(columns[i].cell(row) == "-" for row in rows)]
    shown = [column for i, column in enumerate(columns) if i not in unused]
    base = section.base
    whole = "" if base is None or not share else f"; unpatched {value(base)}"
    title = f"{section.title}: {metric.replace('_', ' ')}, {section.first.get('n')} samples{whole}"
    return Table.of(rows, shown, title, _CAPTION, lambda row: "dim" if row.baseline else None, lambda row: row.budget)


def _asked(row: Row) -> Any:
    """The setting without whether its tokens are drawn: equal for a method and its control."""
    spec = row.record.get("config", {}).get("method")
    return (
        {key: value for key, value in spec.items() if key != "at_random"} if isinstance(spec, dict) else row.record["setting"]
    )


def _of(rows: Sequence[Row], method: str, row: Row) -> Row | None:
    """The setting of a method at a row's budget that says nothing but the budget."""
    plain = [r for r in rows if r.method == method and r.budget == row.budget and set(_asked(r)) <= {"name", "flops"}]
    return plain[0] if plain else None
