"""`vtok run` and `vtok sweep`."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import ConfigError
from vtok.eval.common import terminal
from vtok.eval.common.distributed import is_main
from vtok.eval.runs.names import find

Config = Annotated[str, typer.Argument(help="name of a bundled run (see `vtok configs`) or path of a YAML file")]
Data = Annotated[Path | None, typer.Option(help="the data, instead of what the file names")]
Change = Annotated[list[str] | None, typer.Option("--set", help="key=value, as method.ratio=0.95 or methods.0.r=8; repeatable")]
Pretrained = Annotated[bool, typer.Option(help="load pretrained weights")]
Workers = Annotated[int, typer.Option("--workers", "-j", min=0, help="processes that read images")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="folder of the results (default: what the file says)")]
Markdown = Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")]
Json = Annotated[Path | None, typer.Option("--json", help="file for the records of this run, besides")]

WRITTEN = ("results.jsonl", "sweep.csv", "sweep.png")  # into the folder of the results


def run(
    config: Config,
    data: Data = None,
    change: Change = None,
    pretrained: Pretrained = True,
    workers: Workers = 4,
    output: Output = None,
    into: Json = None,
    markdown: Markdown = False,
) -> None:
    """Runs a configuration and prints what is measured, beside what was published for it.

    Results go to results.jsonl in the output folder as soon as they are there; a second start goes on where the first stopped.
    """
    find(config)  # a name that is none is said before anything is imported
    from vtok.eval.runs import loader as runs

    _run(runs.load(config, change or ()), data, pretrained, workers, output, into, markdown)


def sweep(
    config: Config,
    data: Data = None,
    flops: Annotated[str | None, typer.Option(help="budgets as shares of the FLOPs, e.g. 0.8,0.6,0.4")] = None,
    change: Change = None,
    pretrained: Pretrained = True,
    workers: Workers = 4,
    output: Output = None,
    into: Json = None,
    markdown: Markdown = False,
) -> None:
    """Runs a grid of settings or a list of FLOPs budgets: a table, sweep.csv and sweep.png.

    Where random or downsample are among the settings, the table has paired differences to them at the same cost.

    Results go to results.jsonl in the output folder as soon as they are there; a second start goes on where the first stopped.
    """
    find(config)
    from vtok.eval.runs import loader as runs

    wanted = runs.load(config, [*(change or ()), *([f"sweep.flops=[{flops}]"] if flops is not None else [])])
    if not wanted.sweep:
        raise ConfigError(f"{wanted.path}: sweep is missing; give it a grid such as sweep: {{flops: [0.8, 0.6]}}, or --flops")
    _run(wanted, data, pretrained, workers, output, into, markdown)


def _run(
    wanted: Any,
    data: Path | None,
    pretrained: bool,
    workers: int,
    output: Path | None,
    into: Path | None,
    markdown: bool = False,
) -> None:
    from vtok.eval.runs import loader as runs
    from vtok.eval.runs import runner
    from vtok.writing import apart

    wanted, out = runner.with_data(wanted, data), output or wanted.folder
    runs.prepared(into, [*runs.texts(wanted.content), wanted.file, data, *(out / name for name in WRITTEN)])
    apart([out / name for name in WRITTEN], [*runs.texts(wanted.content), wanted.file, *([] if data is None else [data])])
    outcome = runner.run(wanted, out, pretrained, workers, terminal.errors(quiet=not is_main()))
    if is_main():
        _show(wanted, outcome, out, into, markdown)
    if set(outcome.left_out) - outcome.unmet:  # a budget that no setting meets is a finding
        raise typer.Exit(2)


def _show(wanted: Any, outcome: Any, out: Path, into: Path | None, markdown: bool) -> None:
    """Tables, and the files that derive from records."""
    from vtok.eval.published.report import beside, footnotes
    from vtok.eval.report.beside import choices
    from vtok.eval.report.frame import CSV, frame
    from vtok.eval.report.plots import plot
    from vtok.eval.report.sections import sections
    from vtok.eval.report.summary import gap_columns, table, told
    from vtok.eval.report.tables import write_csv
    from vtok.eval.runs import runner
    from vtok.writing import write

    console = terminal.output(160)
    if into is not None:
        write(into, json.dumps(outcome.records, indent=2, default=str))
    for section in sections(outcome.records):
        first = section.first
        if markdown:
            print(table(section, gap_columns(section), 1, attrgetter("label")).markdown())
        else:
            console.print(table(section, gap_columns(section)))
        for shown in choices(section):
            if markdown:
                print(shown.markdown())
            else:
                console.print(shown)
        for line in told(section, out / runner.RESULTS):
            console.print(f"- {line}", highlight=False)
        if wanted.published:
            for row in section.patched:
                pair = {str(first["task"]): {"base": first, "patched": row.record}}
                console.print(beside(f"{wanted.name}: {row.label}", [(wanted, pair)], digits=3))
            console.print(footnotes([wanted]), highlight=False)
    every = sections(runner.all_records(out))  # those of other starts on this folder, too
    write_csv(frame(every)[list(CSV)], out / "sweep.csv")
    plot(every, out / "sweep.png")
    console.print(f"{runner.RESULTS}, sweep.csv and sweep.png are in {out}")
    for name, why in outcome.left_out.items():
        console.print(f"- left out: {name}: {why}")
