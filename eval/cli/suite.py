"""`vtok bench-suite`: a list of benchmarks, one after the other, within a time limit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok.eval.common import terminal


def bench_suite(
    suite: Annotated[str, typer.Argument(help="a suite that comes with vtok (gpu), or a YAML file")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder of results.jsonl and table.md")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="after so many no further benchmark is begun")] = None,
    device: Annotated[str | None, typer.Option(help="default: the GPU, if there is one")] = None,
) -> None:
    """Runs a list of benchmarks; a second start goes on where the first stopped. Prints one table of all."""
    from vtok.eval.benchmarks import suite as suites

    console = terminal.output(160)
    benchmarks = suites.load(suite)
    folder = out or Path("results") / "bench" / Path(suite).stem
    records, left = suites.run(benchmarks, folder, device, minutes, lambda text: console.print(text, highlight=False))
    if records:
        console.print(suites.table(records))
    for line in left:
        console.print(f"not run: {line}", highlight=False, soft_wrap=True)
    console.print(f"results.jsonl and table.md are in {folder}", highlight=False)
    if not records or any("minutes were over" not in line for line in left):
        raise typer.Exit(2)
