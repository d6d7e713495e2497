"""`vtok configs` and `vtok book`: the runs that come with vtok by table of the reproduction book, and whole tables at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtok.eval.common import terminal
from vtok.eval.published import report as book_report
from vtok.eval.published import tables as book
from vtok.eval.runs import loader as runs
from vtok.eval.runs.loader import RunConfig

Data = Annotated[
    list[str] | None, typer.Option(help="folder of the data, or TASK=FOLDER, once a task; a file where a task reads one")
]


def console() -> Console:
    """To the terminal; tables that go into a file or a log keep their columns."""
    return terminal.output(160)


def list_configs(
    table: Annotated[str | None, typer.Argument(help="of the reproduction book; all, if it is left out")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="instead: published points that no run repeats, and why")] = False,
    costs: Annotated[
        bool, typer.Option("--costs", help="also: GMACs, planned on models without weights (half a minute for all)")
    ] = False,
) -> None:
    """Lists the runs that come with vtok by table, with their published figures and what differs from them by convention."""
    out = console()
    if missing:
        out.print(book_report.missing_table(book.missing()))
        return
    shown = book.tables() if table is None else dict([book.table_of(table)])
    for name, found in shown.items():
        planned = {run.name: cost for run, cost in _costs(found)} if costs else None
        out.print(book_report.listing(name, found, planned))
        out.print()
    every = {run.name: run for found in shown.values() for run in found}
    notes = book_report.reasons(list(every.values()))
    if notes:
        out.print(notes, highlight=False)
        out.print()
    if table is None:
        others = [name for name in runs.bundled() if name not in every]
        if others:
            out.print(f"runs of no table: {', '.join(others)}", highlight=False)
        without = f"{len(book.missing())} published points have none (vtok configs --missing)"
        out.print(f"{len(every)} runs in {len(shown)} tables; {without}")


def _costs(found: list[RunConfig]) -> list[tuple[RunConfig, book.Cost]]:
    planned = []
    for group in book.groups(found):
        model = book.meta_model(group[0])
        planned += [(run, book.cost(run, model)) for run in group]
    return planned


def run_book(
    table: Annotated[
        str | None,
        typer.Argument(help="of the reproduction book, e.g. pitome_deit (see `vtok configs`), or a folder of run files"),
    ] = None,
    data: Data = None,
    weights: Annotated[Path | None, typer.Option(help="folder of checkpoints that runs name as files")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="key=value for every run, e.g. batch_size=256")] = None,
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights")] = True,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="processes that read images")] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder of the results (default: results/book/TABLE)")
    ] = None,
) -> None:
    """Runs a whole table of the reproduction book and prints what was published beside what is measured.

    Results go to results.jsonl in the output folder as soon as they are there; a second start goes on where the first stopped.
    Without a table it lists the tables.
    """
    from vtok.eval.published import run as book_run

    out = console()
    if table is None:
        out.print(book_report.contents(book.tables()))
        return
    name, found = book.table_of(table, change or ())
    tasks = list(dict.fromkeys(task for run in found for task in run.tasks))
    folder = output or Path("results") / "book" / book.slug(name)
    result = book_run.run_table(
        found, book_run.read_data(data or (), tasks), folder, pretrained, workers, weights, terminal.errors()
    )
    out.print(book_report.beside(name, result.rows))
    out.print(book_report.footnotes(found), highlight=False)
    out.print(f"results.jsonl is in {folder}", highlight=False)
    for what, why in result.left_out.items():
        out.print(f"- left out: {what}: {why}", highlight=False)
    if not any(records for _, records in result.rows):
        raise typer.Exit(2)
