"""`vtok report RESULTS...`: one HTML page of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from vtok.eval.common import terminal


def write_page(
    results: Annotated[
        list[Path], typer.Argument(help="results.jsonl, JSON of vtok run, eval or bench, or folders that hold such files")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file of the page")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="of the page")] = "vtok report",
    gallery: Annotated[
        int, typer.Option(min=0, help="also draw so many images a section; bundled models are built anew for that")
    ] = 0,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="draw this one: a file, or the number of a bundled image or question; may be repeated"),
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="single questions shown a section")] = 12,
) -> None:
    """Writes results as one self-contained HTML page: tables, plots, what is significant, how to repeat it."""
    from vtok.eval.report.html import ReportOptions, write_report

    options = ReportOptions(title, gallery, tuple(image or ()), questions)
    with terminal.errors().status("reading") as status:
        report = write_report(results, output, options, lambda words: status.update(Text(words)))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for name, words in report.headlines:
        console.print(f"- {name}: {words}")
    for problem in report.problems:
        console.print(f"! {problem}")
    console.print(f"written: {report.path}")
