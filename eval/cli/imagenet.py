"""`vtok eval imagenet`: the flags of timm's validate.py, made from the fields of `Options`, plus `--method`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vtok.eval.cli.flags import METHOD_HELP, options_from, signature
from vtok.eval.common import terminal
from vtok.eval.common.distributed import is_main
from vtok.eval.common.rates import throughput_line
from vtok.eval.common.statistics import with_error
from vtok.eval.runs.loader import parse_method, prepared
from vtok.eval.tasks.timm_pipeline import Options
from vtok.writing import write


def evaluate_imagenet(**flags: Any) -> None:
    """Accuracy on an ImageNet-style folder with timm's own pipeline, unpatched and patched on the same batches."""
    from vtok.eval.tasks.imagenet import evaluate

    console = terminal.output()
    model, data, methods, output = (flags.pop(name) for name in ("model", "data", "method", "results_file"))
    settings = [None, *(parse_method(text) for text in methods or ())]
    options = options_from(Options, flags)
    files = (options.class_map, options.valid_labels, options.real_labels, options.checkpoint)
    prepared(output, [data, model, *(methods or ()), *files])
    with terminal.progress(transient=True) as progress:
        bar = progress.add_task(model, total=None)
        records = evaluate(
            model, data, settings, options, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if output is not None and is_main():
        write(output, json.dumps(records, indent=2))
    print_records(records, console)


def print_records(records: list[dict[str, Any]], console: Console) -> None:
    """A table of accuracies, and what was skipped."""
    first = records[0]
    table = Table(
        title=f"{first['model']}, {first['n']} images, {first['img_size']} px",
        caption="± standard error, or [95 %] where no image differs; paired",
    )
    for i, column in enumerate(
        ("method", "top-1 %", "top-5 %", "vs unpatched", "agreement", "tokens out", "GMACs", "GFLOPs", "implied")
    ):
        table.add_column(column, justify="left" if i == 0 else "right")
    for record in records:
        m = record["metrics"]
        table.add_row(
            record["setting"],
            with_error(m, "top1", digits=3),
            f"{m['top5']:.3f}",
            with_error(m, "difference", digits=3, sign="+"),
            f"{m['agreement']:.1f} %" if "agreement" in m else "-",
            f"{record['tokens']['out']:.1f}",
            f"{record['gmacs']['model']:.3f}",
            f"{record['gflops']['model']:.3f}",
            f"{record['implied_speedup']:.2f}x",
        )
    console.print(table)
    for record in records:
        if line := throughput_line(record["setting"], record):
            console.print(f"- {line}", highlight=False)
    for note in first["notes"]:
        console.print(f"- {note}")
    if first["num_skipped"]:
        console.print(f"- {first['num_skipped']} files were skipped:")
        for one in first["skipped"]:
            console.print(f"  {one['file']}: {one['reason']}")


# typer reads a command's flags off its signature.
evaluate_imagenet.__signature__ = signature(  # type: ignore[attr-defined]
    Options,
    {
        "model": (Annotated[str, typer.Option("--model", "-m", help="timm model name")], inspect.Parameter.empty),
        "data": (Annotated[Path, typer.Option("--data", "--data-dir", help="image folder")], inspect.Parameter.empty),
        "method": (Annotated[list[str] | None, typer.Option("--method", "-M", help=METHOD_HELP)], None),
        "results_file": (Annotated[Path | None, typer.Option("--results-file", help="JSON file for the records")], None),
    },
)
