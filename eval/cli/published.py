"""`vtok configs` and `vtok published`: the runs that come with vtok by the table they repeat, and whole tables at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.eval.common import terminal

Data = Annotated[
    list[str] | None, typer.Option(help="folder of the data, or TASK=FOLDER, once a task; a file where a task reads one")
]


def list_configs(
    table: Annotated[str | None, typer.Argument(help="of published results; all, if it is left out")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="instead: published points that no run repeats, and why")] = False,
    costs: Annotated[
        bool, typer.Option("--costs", help="also: GMACs, planned on models without weights (half a minute for all)")
    ] = False,
) -> None:
    """Lists the runs that come with vtok by table, with their published figures and what differs from them by convention."""
    from vtok.eval.published import report
    from vtok.eval.published import tables as published
    from vtok.eval.runs.names import bundled

    out = terminal.output(160)
    if missing:
        out.print(report.missing_table(published.missing()))
        return
    shown = published.tables() if table is None else dict([published.table_of(table)])
    for name, found in shown.items():
        out.print(report.listing(name, found, _costs(found) if costs else None))
        out.print()
    every = {run.name: run for found in shown.values() for run in found}
    notes = report.reasons(list(every.values()))
    if notes:
        out.print(notes, highlight=False)
        out.print()
    if table is None:
        others = [name for name in bundled() if name not in every]
        if others:
            out.print(f"runs of no table: {', '.join(others)}", highlight=False)
        without = f"{len(published.missing())} published points have none (vtok configs --missing)"
        out.print(f"{len(every)} runs in {len(shown)} tables; {without}")


def _costs(found: Sequence[Any]) -> dict[str, Any]:
    """Name of a run -> what it costs."""
    from vtok.eval.published import tables as published

    planned: dict[str, Any] = {}
    for group in published.groups(found):
        model = published.meta_model(group[0])
        planned |= {run.name: published.cost(run, model) for run in group}
    return planned


def run_published(
    table: Annotated[
        str | None,
        typer.Argument(help="of published results, e.g. pitome_deit (see `vtok configs`), or a folder of run files"),
    ] = None,
    data: Data = None,
    weights: Annotated[Path | None, typer.Option(help="folder of checkpoints that runs name as files")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="key=value for every run, e.g. batch_size=256")] = None,
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights")] = True,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="processes that read images")] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder of the results (default: results/published/TABLE)")
    ] = None,
) -> None:
    """Runs a whole table of published results and prints what was published beside what is measured.

    Results go to results.jsonl in the output folder as soon as they are there; a second start goes on where the first stopped.
    Without a table it lists the tables.
    """
    from vtok.eval.published import report
    from vtok.eval.published import run as table_run
    from vtok.eval.published import tables as published

    out = terminal.output(160)
    if table is None:
        out.print(report.contents(published.tables()))
        return
    name, found = published.table_of(table, change or ())
    tasks = list(dict.fromkeys(task for run in found for task in run.tasks))
    folder = output or Path("results") / "published" / published.slug(name)
    if output is None and not folder.exists() and (earlier := Path("results") / "book" / folder.name).is_dir():
        folder = earlier  # begun by 0.1, which called the command so
    result = table_run.run_table(
        found, table_run.read_data(data or (), tasks), folder, pretrained, workers, weights, terminal.errors()
    )
    out.print(report.beside(name, result.rows))
    out.print(report.footnotes(found), highlight=False)
    out.print(f"results.jsonl is in {folder}", highlight=False)
    for what, why in result.left_out.items():
        out.print(f"- left out: {what}: {why}", highlight=False)
    if not any(records for _, records in result.rows):
        raise typer.Exit(2)
