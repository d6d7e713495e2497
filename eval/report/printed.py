"""What `vtok eval` prints of the records of its tasks: the table of `vtok run`, more metrics, what is to be known beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from vtok.eval.common.records import Record
from vtok.eval.common.statistics import with_error
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import sections
from vtok.eval.report.summary import gap_columns, metric_columns, table, told
from vtok.eval.report.tables import Column
from vtok.eval.report.values import at, number
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.vqa.task import QuestionTask

_HELPERS = ("_stderr", "_ci", "difference", "agreement", "loyalty")


def scores(
    records: Sequence[Record],
    console: Console,
    metrics: Sequence[str] | None = None,
    extra: Sequence[Column] = (),
    digits: int = 2,
) -> None:
    """A table with one line a setting, and below it what its numbers support, notes and files that were left out. `metrics`
    stand beside the headline, `None` = all."""
    (section,) = sections(records)
    first, primary = section.first, section.rows[0].primary
    names = [name for name in first["metrics"] if not name.endswith(_HELPERS)] if metrics is None else metrics
    columns = metric_columns([*(name for name in names if name != primary), "agreement"], digits)
    shown = table(section, [*columns, *gap_columns(section), *extra], digits)
    if "img_size" in first:
        shown.title = f"{shown.title}, {first['img_size']} px"
    if "n_images" in first:
        shown.title = f"{shown.title}, {first['n']} questions about {first['n_images']} images"
    console.print(shown)
    for line in told(section, most=first["num_skipped"]):
        console.print(f"- {line}", highlight=False)


def questions(records: Sequence[Record], console: Console) -> None:
    """Scores of answers with memory and time, then the other metrics, then the parts of the questions."""
    first = records[0]
    task: QuestionTask = QUESTION_TASKS.get(first["task"])
    shown = [name for name in task.columns.values() if name != task.primary]
    extra = [
        Column("KV MB", lambda row: _held(row, "kv_bytes", 1e-6, 3)),
        Column("TTFT ms", lambda row: _held(row, "ttft_ms", 1.0, 0)),
    ]
    scores(records, console, shown, extra, digits=1)

    def line(heading: str, parts: Sequence[Record], name: str) -> None:
        said = [with_error(part, name, 1 if task.percent else 100) for part in parts]
        words = ", ".join(f"{record['title']} {one}" for record, one in zip(records, said))
        console.print(f"- {heading}: {words}", highlight=False)

    for name in (*task.scores, *task.totals):
        if name not in (task.primary, *shown):
            line(name, [record["metrics"] for record in records], name)
    for grouping, parts in first["groups"].items():
        for name, part in parts.items():
            blind = "" if part["blind"] is None else f" (without the image {100 * part['blind']:.1f})"
            own = [record["groups"][grouping][name] for record in records]
            line(f"{grouping} {name}, {part['n']} questions{blind}", own, task.primary)


def _held(row: Row, name: str, factor: float, digits: int) -> str:
    """A figure that records hold of the patched model."""
    value = number(at(row.record, name, "patched"))
    return "-" if value is None else f"{factor * value:.{digits}f}"
