"""What `vtok run`, `sweep` and `demo` print of a section: one line a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from vtok.eval.common.statistics import in_brackets, with_error
from vtok.eval.report.frame import front_of, total_gmacs
from vtok.eval.report.rows import Row, Score
from vtok.eval.report.sections import Section, findings, rivals, with_sign
from vtok.eval.report.tables import Column, Table

CAPTION = (
    "± standard error; vs unpatched: paired; tokens: mean over layers; measured: median of pairs; * on the Pareto front of "
    "accuracy against GMACs + reduction"
)
RIVALS = ("random", "downsample")  # that a method should beat at the same cost
_WITHOUT = ("agreement",)  # are differences themselves
_SKIPPED = 10  # files that are named one by one


def table(section: Section, extra: Sequence[Column] = (), digits: int = 2, brief: Callable[[Row], str] | None = None) -> Table:
    """A line a setting, a rule between budgets.

    Args:
        section: settings that may be compared.
        extra: further columns, whose functions take a row.
        digits: of the headline metric, in percent.
        brief: what a setting is called in a table of fewer columns, which leaves room for others: without the reduction's own
            MACs and the achieved share, with the standard error of the difference instead of its interval.
    """
    front = front_of(section.rows, total_gmacs, True)
    best = {id(row) for i, row in enumerate(section.rows) if i in front}
    named = brief or attrgetter("label")
    setting = Column("setting", lambda row: named(row) + (" *" if id(row) in best else ""), left=True)
    tokens = Column("tokens", lambda row: _number(row.mean_tokens, 1 if brief is None else 0))
    macs = Column("GMACs", lambda row: _number(row.gmacs, 3))
    score = Column(f"{section.rows[0].primary} %", partial(_metric, digits=digits))
    implied, measured = Column("implied", lambda row: _number(row.implied, 2, "x")), Column("measured [95 %]", _measured)
    if brief is None:
        reduction = Column("+ reduction", lambda row: "-" if row.gmacs is None else f"{row.reduction or 0:.4f}")
        change = Column("vs unpatched [95 %]", partial(_difference, digits=digits))
        achieved = Column("achieved", lambda row: "-" if row.achieved is None else f"{100 * row.achieved.point:.0f} %")
        columns = [setting, tokens, macs, reduction, score, change, implied, measured, achieved]
    else:
        columns = [setting, tokens, macs, implied, measured, score, Column("vs unpatched", _change)]
    record = section.first
    title = f"{section.title}, {record.get('n')} samples, {record.get('dtype')} on {record.get('device')}"
    return Table.of(
        section.rows,
        [*columns, *extra],
        title,
        CAPTION,
        style=lambda row: "dim" if row.baseline else None,
        part=lambda row: row.budget,
    )


def told(section: Section, records: Path | None = None, most: int = _SKIPPED) -> list[str]:
    """What stands below the table of a section: what its numbers support, throughput of several processes, notes, and files
    that were left out, `most` of them one by one; the file of `records` names all."""
    first = section.first
    speeds = [line for row in section.rows if (line := throughput_line(row.label, row.record))]
    notes = [f"note: {note}" for note in first.get("notes", ())]
    left = [f"{one['file']} was skipped: {one['reason']}" for one in first.get("skipped", ())]
    if len(left) > most:
        where = "" if records is None else f", see {records}"
        left[most:] = [f"and {len(left) - most} other files were skipped{where}"]
    return [*(finding.words for finding in findings(section)), *speeds, *notes, *left]


def throughput_line(title: str, record: Mapping[str, Any]) -> str | None:
    """ "tome(r=8): 80.1 samples/s in 2 processes (41.0, 40.2)", or `None` for a record of one process."""
    found = record.get("throughput")
    if found is None or found["processes"] == 1 or found["total"] is None:
        return None
    each = ", ".join("-" if rate is None else f"{rate:.1f}" for rate in found["per_process"])
    return f"{title}: {found['total']:.1f} samples/s in {found['processes']} processes ({each})"


def gap_columns(section: Section, methods: Sequence[str] = RIVALS) -> list[Column]:
    """Paired differences of the headline metric to methods of the same cost, of those that are among the settings."""
    found = []
    for method in methods:
        gaps = {id(section.rows[i]): with_sign(rival.gap) for i, rival in rivals(section, method).items()}
        if gaps:
            found.append(Column(f"vs {method} [95 %]", partial(_held, gaps)))
    return found


def _held(cells: Mapping[int, str], row: Row) -> str:
    return cells.get(id(row), "-")


def metric_columns(names: Sequence[str], digits: int = 1) -> list[Column]:
    """Further metrics in percent, each beside its difference to unpatched where records have one."""
    found = []
    for name in names:
        label = Score(name, 0.0).label
        found.append(Column(f"{label} %", partial(_metric, name=name, digits=digits)))
        if name not in _WITHOUT:
            found.append(Column("vs", partial(_metric, name=f"{name}_difference", digits=digits, sign="+")))
    return found


def part_columns(section: Section, grouping: str) -> list[Column]:
    """The headline metric of parts of the samples: of every group of one grouping."""

    def cell(row: Row, name: str) -> str:
        held = row.record["groups"].get(grouping, {}).get(name, {})
        return with_error(held, row.primary or "", row.factor)

    return [Column(f"{name} %", partial(cell, name=name)) for name in section.first["groups"].get(grouping, {})]


def blind_cells(section: Section, header: Sequence[str]) -> list[str]:
    """A line with what the best answers without the image would give."""
    first, cells = section.first, dict.fromkeys(header, "-")
    cells |= {header[0]: "blind", f"{section.rows[0].primary} %": f"{100 * first['blind']:.1f}"}
    for parts in first["groups"].values():
        cells |= {f"{name} %": f"{100 * part['blind']:.1f}" for name, part in parts.items() if f"{name} %" in cells}
    return list(cells.values())


def _metric(row: Row, name: str = "", sign: str = "", digits: int = 1) -> str:
    return with_error(row.record["metrics"], name or row.primary or "", row.factor, digits, sign)


def _change(row: Row) -> str:
    """The paired difference with its standard error."""
    name = f"{row.primary}_difference"
    return _metric(row, name if name in row.record["metrics"] else "difference", "+")


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _difference(row: Row, digits: int) -> str:
    gap = None if row.score is None else row.score.difference
    return "-" if gap is None else f"{gap.point:+.{digits}f}" + in_brackets(gap.ends, f"+.{digits}f")


def _measured(row: Row) -> str:
    return "-" if row.speedup is None else f"{row.speedup.point:.2f}x" + in_brackets(row.speedup.ends)
