"""What the parts of the demo share: a run file that goes through the runner of `vtok run`, and what is printed of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vtok.eval.common.records import Record
from vtok.eval.report.frame import CSV, frame
from vtok.eval.report.sections import Section, findings, sections
from vtok.eval.report.summary import table
from vtok.eval.report.tables import Column, Table, write_csv
from vtok.eval.runs import loader, runner
from vtok.registry import encoder_methods

Columns = Callable[[Section], Sequence[Column]]


def measured(name: str, out: Path, console: Console, **changes: Any) -> Section:
    """The settings of one of the demo's run files, in `configs/demo`; what has a record already is not measured again.

    Args:
        name: of the run file.
        out: folder of results.
        console: for progress, and for what could not be measured.
        changes: keys of the file and what they are instead; `None` leaves a key out.
    """
    found = loader.load(name)
    content = {key: value for key, value in {**found.content, **changes}.items() if value is not None}
    outcome = runner.run(loader.checked(found.path, name, content), out, console=console)
    for title, why in outcome.left_out.items():
        console.print(f"- left out: {title}: {why}", highlight=False)
    (section,) = sections(outcome.records)
    return section


def of_encoders(methods: Sequence[str] | None, budgets: Sequence[float]) -> dict[str, Any]:
    """The keys of a run file for methods (default: every one for encoders) at budgets."""
    names = sorted(methods or encoder_methods(budget=True))
    return {"methods": [{"name": name} for name in names], "sweep": {"flops": list(budgets)}}


def show(section: Section, console: Console, shown: Table | None = None) -> list[Record]:
    """Prints the table of a section and what its numbers support; returns its records, unpatched first."""
    console.print(table(section) if shown is None else shown)
    for finding in findings(section):
        console.print(f"- {finding.words}", highlight=False)
    return [row.record for row in section.rows]


def write_frame(out: Path) -> None:
    """`sweep.csv` of everything that the folder holds."""
    write_csv(frame(sections(runner.all_records(out)))[list(CSV)], out / "sweep.csv")
