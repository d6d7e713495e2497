"""What the parts of the demo share: a run file that goes through the runner of `vtok run`, and what is printed of it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vtok.eval.common.records import Record
from vtok.eval.common.settings import Setting, weight_sharing_copy
from vtok.eval.common.statistics import with_error
from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.report.frame import CSV, frame
from vtok.eval.report.plots import plot
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section, findings, headline_of, sections
from vtok.eval.report.summary import gap_columns, table
from vtok.eval.report.tables import Column, Table, write_csv
from vtok.eval.runs import loader, runner
from vtok.eval.runs.again import configs_of
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.viz.prompt_overlay import by_cell, crops_grid, survivors
from vtok.registry import encoder_methods


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


def short_table(section: Section) -> Table:
    """A table that 100 columns hold: what a setting costs and gets, beside random at the same cost."""
    named = Counter(row.method for row in section.rows)

    def name(row: Row) -> str:
        """The method alone where its settings differ in the budget alone, which the rules part."""
        alone = named[row.method] == 1 or (row.budget is not None and not row.drawn)
        return row.method if alone else row.label

    columns = [
        Column("setting", lambda row: "\n".join(textwrap.wrap(name(row), 26))),
        Column("tokens", lambda row: "-" if row.mean_tokens is None else f"{row.mean_tokens:.0f}"),
        Column("GMACs", lambda row: "-" if row.total_gmacs is None else f"{row.total_gmacs:.2f}"),
        Column("right %", lambda row: with_error(row.record["metrics"], row.primary or "", row.factor, 1)),
        *gap_columns(section, ("random",)),
        Column("speed", lambda row: "-" if row.speedup is None else f"{row.speedup.point:.2f}x"),
    ]
    columns[0] = columns[0]._replace(left=True)
    title = f"{section.title}, {section.first.get('n')} samples"
    caption = "± standard error; vs random: at the same cost, paired; tokens: mean over layers; speed: median of pairs"
    return Table.of(
        section.rows, columns, title, caption, style=lambda row: "dim" if row.baseline else None, part=lambda row: row.budget
    )


def setting_of(row: Row) -> Setting:
    """What a row was measured with, every number resolved."""
    return Setting(configs_of(row.record))


def settings_near(section: Section, methods: Sequence[str], tokens: int, distance: float) -> list[tuple[str, Setting]]:
    """(name, setting) of methods, each with about so many tokens (mean over the layers; `distance` from them, as a share, still
    counts), as far as there are some."""
    near = [row for row in section.patched if row.mean_tokens and abs(row.mean_tokens - tokens) < distance * tokens]
    first = {row.method: row for row in reversed(near)}
    return [(name, setting_of(first[name])) for name in methods if name in first]


def overview_tokens(model: VisionLanguageModel) -> int:
    """Tokens of the view of a whole page."""
    vision = model.net.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def kept_by_crop(
    model: VisionLanguageModel, data: VQAData, questions: Sequence[Question], blank: np.ndarray, rows: Sequence[Row]
) -> dict[str, tuple[float, float]]:
    """Setting -> tokens that a (blank, filled) crop has in the last layer on average, of a model that reads pages.

    Args:
        questions: one a page.
        blank: [pages, 4] bool, which quarters hold nothing.
        rows: the settings.
    """
    found = {}
    for row in rows:
        left = survivors(model, setting_of(row).apply(weight_sharing_copy(model.net)), data, questions, new_tokens=1).left
        cells = by_cell(crops_grid(left, overview_tokens(model)))
        found[row.label] = float(cells[blank].mean()), float(cells[~blank].mean())
    return found


def show(section: Section, console: Console, shown: Table | None = None) -> list[Record]:
    """Prints the finding in a sentence, the table of a section and what its numbers support; returns its records, unpatched
    first."""
    console.print(f"{section.title}: {headline_of(section)}", style="bold", highlight=False)
    console.print(table(section) if shown is None else shown)
    for finding in findings(section):
        console.print(f"- {finding.words}", highlight=False)
    return [row.record for row in section.rows]


def write_files(out: Path, picture: str = "", *shown: Section) -> None:
    """`sweep.csv` of everything that the folder holds, and a picture of what is shown."""
    write_csv(frame(sections(runner.all_records(out)))[list(CSV)], out / "sweep.csv")
    if shown:
        plot(shown, out / picture)
