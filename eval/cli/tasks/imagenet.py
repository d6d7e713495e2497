"""`vtok eval imagenet`: the flags of timm's validate.py, made from the fields of `Options`, plus `--method`."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.eval.cli.flags import METHOD_HELP, options_from, signature
from vtok.eval.common import terminal
from vtok.eval.common.distributed import is_main
from vtok.eval.options import Options
from vtok.eval.runs.names import check_methods
from vtok.writing import write_beside


def evaluate_imagenet(**flags: Any) -> None:
    """Accuracy on an ImageNet-style folder with timm's own pipeline, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    from vtok.eval.report.printed import scores
    from vtok.eval.report.tables import Column
    from vtok.eval.runs.loader import parse_method, prepared
    from vtok.eval.tasks.imagenet import evaluate

    console = terminal.output(160)
    model, data, methods, output = (flags.pop(name) for name in ("model", "data", "method", "results_file"))
    settings = [None, *(parse_method(text) for text in methods or ())]
    options = options_from(Options, flags)
    files = (options.class_map, options.valid_labels, options.real_labels, options.checkpoint)
    prepared(output, [data, model, *(methods or ()), *files])
    with terminal.bar(model) as advance:
        records = evaluate(model, data, settings, options, advance)
    if output is not None and is_main():
        print(write_beside(output, json.dumps(records, indent=2)), file=sys.stderr)
    scores(records, console, extra=[Column("GFLOPs", lambda row: f"{row.record['gflops']['model']:.3f}")], digits=3)


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
