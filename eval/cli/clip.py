"""`vtok eval zeroshot` and `retrieval`: flags made from the tasks' options, tables, files as clip_benchmark writes them."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Sequence
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
from vtok.eval.runs.loader import parse_method
from vtok.eval.tasks.captions import PAGES
from vtok.eval.tasks.retrieval import RetrievalOptions
from vtok.eval.tasks.zeroshot import PICTURES, ZeroshotOptions
from vtok.writing import apart, writable, write_beside


def evaluate_zeroshot(**flags: Any) -> None:
    """Zero-shot accuracy of a CLIP-like model on an image folder, unpatched and patched on the same batches."""
    from vtok.eval.tasks.zeroshot import evaluate

    _evaluate(evaluate, ZeroshotOptions, flags)


def evaluate_retrieval(**flags: Any) -> None:
    """Image and text recall of a CLIP-like model on captioned images, unpatched and patched on the same batches."""
    from vtok.eval.tasks.retrieval import evaluate

    _evaluate(evaluate, RetrievalOptions, flags)


def _evaluate(task: Any, kind: type, flags: dict[str, Any]) -> None:
    console = terminal.output()
    model, data, methods, output = (flags.pop(name) for name in ("model", "data", "method", "output"))
    settings = [None, *(parse_method(text) for text in methods or ())]
    options = options_from(kind, flags)
    if output is not None:
        writable(output / "record.json")
    with terminal.progress(transient=True) as progress:
        bar = progress.add_task(model, total=None)
        records = task(
            model,
            data,
            settings,
            options,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if output is not None and is_main():
        for path in write_records(records, output, [data, model]):
            print(path, file=sys.stderr)
    print_records(records, console)


def write_records(records: Sequence[dict[str, Any]], folder: Path, inputs: Sequence[str] = ()) -> list[Path]:
    """One JSON file a record, so that `clip_benchmark build FOLDER` makes one table of them; returns the files.

    Files of earlier runs stay.

    Raises:
        ConfigError: one of them cannot be written, or is one of the inputs.
    """
    paths = []
    for number, record in enumerate(records):
        parts = [record["dataset"], record["model"], record["pretrained"], record["task"], f"{number}-{record['method']}"]
        name = "_".join(re.sub(r"[^\w.@-]+", "-", part) for part in parts if part)
        apart([folder / f"{name}.json"], inputs)
        paths.append(write_beside(folder / f"{name}.json", json.dumps(record, allow_nan=False)))
    return paths


def shown(record: dict[str, Any]) -> list[str]:
    """Metrics of a record that a table has room for: those that are neither errors nor differences."""
    ends = ("_stderr", "_ci", "difference", "agreement")
    return [name for name in record["metrics"] if not name.endswith(ends)]


def print_records(records: Sequence[dict[str, Any]], console: Console) -> None:
    """A table with one row a record, in percent, and what was skipped."""
    first = records[0]
    names = shown(first)
    title = f"{first['model']} {first['pretrained']}".rstrip()
    table = Table(
        title=f"{title} on {first['dataset']}, {first['n']} images",
        caption="%, ± standard error, or [95 %] where no image differs",
    )
    table.add_column("method")
    for name in names:
        table.add_column(name.replace("_retrieval_recall@", " R@").replace("_", " "), justify="right")
    for column in ("tokens out", "implied"):
        table.add_column(column, justify="right")
    for record in records:
        cost = [f"{record['tokens']['out']:.1f}", f"{record['implied_speedup']:.2f}x"] if "tokens" in record else ["-", "-"]
        table.add_row(record["setting"], *(with_error(record["metrics"], name, 100, 2) for name in names), *cost)
    console.print(table)
    for record in records:
        if line := throughput_line(record["setting"], record):
            console.print(f"- {line}", highlight=False)
    for record in records[1:]:
        changes = {name: value for name, value in record["metrics"].items() if name.endswith("difference")}
        text = ", ".join(f"{_label(name)} {with_error(record['metrics'], name, 100, 2, '+')}" for name in changes)
        if text:
            console.print(f"- {record['setting']} against unpatched, paired: {text}")
    for note in first.get("notes", ()):
        console.print(f"- {note}", highlight=False)
    if first["num_skipped"]:
        console.print(f"- {first['num_skipped']} files were skipped:")
        for one in first["skipped"]:
            console.print(f"  {one['file']}: {one['reason']}")


def _label(name: str) -> str:
    short = name.removesuffix("difference").rstrip("_").replace("_retrieval_recall@", " R@")
    return short or "top-1"


def _leading(data: str) -> dict[str, tuple[Any, Any]]:
    """The flags beside those of the options; `data` is what the task reads."""
    model = "open_clip or Hugging Face name or folder, or reference-clip"
    return {
        "model": (Annotated[str, typer.Option("--model", "-m", help=model)], inspect.Parameter.empty),
        "data": (Annotated[str, typer.Option("--data", help=data)], inspect.Parameter.empty),
        "method": (Annotated[list[str] | None, typer.Option("--method", "-M", help=METHOD_HELP)], None),
        "output": (Annotated[Path | None, typer.Option("--output", help="folder for one JSON file a record")], None),
    }


# typer reads a command's flags off its signature.
evaluate_zeroshot.__signature__ = signature(  # type: ignore[attr-defined]
    ZeroshotOptions, _leading(f"folder with one sub-folder a class, what --dataset reads, or {PICTURES}")
)
evaluate_retrieval.__signature__ = signature(  # type: ignore[attr-defined]
    RetrievalOptions, _leading(f"Karpathy's JSON file or its folder, or {PAGES}")
)
