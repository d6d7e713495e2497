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

from vtok.eval.cli.flags import METHOD_HELP, options_from, signature
from vtok.eval.common import terminal
from vtok.eval.common.distributed import is_main
from vtok.eval.options import CAPTIONED, PICTURES, RetrievalOptions, ZeroshotOptions
from vtok.eval.runs.names import check_methods
from vtok.writing import apart, writable, write_beside


def evaluate_zeroshot(**flags: Any) -> None:
    """Zero-shot accuracy of a CLIP-like model on an image folder, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    from vtok.eval.tasks.clip.zeroshot import evaluate

    _evaluate(evaluate, ZeroshotOptions, flags)


def evaluate_retrieval(**flags: Any) -> None:
    """Image and text recall of a CLIP-like model on captioned images, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    from vtok.eval.tasks.clip.retrieval import evaluate

    _evaluate(evaluate, RetrievalOptions, flags)


def _evaluate(task: Any, kind: type, flags: dict[str, Any]) -> None:
    from vtok.eval.report.printed import scores
    from vtok.eval.runs.loader import parse_method

    console = terminal.output(160)
    model, data, methods, output = (flags.pop(name) for name in ("model", "data", "method", "output"))
    settings = [None, *(parse_method(text) for text in methods or ())]
    options = options_from(kind, flags)
    if output is not None:
        writable(output / "record.json")
    with terminal.bar(model) as advance:
        records = task(model, data, settings, options, advance)
    if output is not None and is_main():
        for path in write_records(records, output, [data, model]):
            print(path, file=sys.stderr)
    scores(records, console)


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
    RetrievalOptions, _leading(f"Karpathy's JSON file or its folder, or {CAPTIONED}")
)
