"""`vtok eval imagenet`, `zeroshot`, `retrieval` and `vqa`: flags made from the tasks' options, a table, files of records."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.eval.cli.flags import METHOD_HELP, SETTING_HELP, options_from, signature
from vtok.eval.common import terminal
from vtok.eval.common.distributed import is_main
from vtok.eval.options import CAPTIONED, PICTURES, Options, RetrievalOptions, VQAOptions, ZeroshotOptions
from vtok.eval.runs.names import check_methods
from vtok.eval.tasks import QUESTION_TASKS
from vtok.writing import apart, writable, write_beside


def evaluate_imagenet(**flags: Any) -> None:
    """Accuracy on an ImageNet-style folder with timm's own pipeline, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    from vtok.eval.report.printed import scores
    from vtok.eval.report.tables import Column
    from vtok.eval.runs.loader import parse_method, prepared
    from vtok.eval.tasks.imagenet import evaluate

    methods, output = flags["method"] or (), flags.pop("results_file")
    model, data, settings, options = _read(Options, flags, parse_method)
    files = (options.class_map, options.valid_labels, options.real_labels, options.checkpoint)
    prepared(output, [data, model, *methods, *files])
    with terminal.bar(model) as advance:
        records = evaluate(model, data, settings, options, advance)
    if output is not None and is_main():
        print(write_beside(output, json.dumps(records, indent=2)), file=sys.stderr)
    gflops = Column("GFLOPs", lambda row: f"{row.record['gflops']['model']:.3f}")
    scores(records, terminal.output(160), extra=[gflops], digits=3)


def evaluate_zeroshot(**flags: Any) -> None:
    """Zero-shot accuracy of a CLIP-like model on an image folder, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    from vtok.eval.tasks.clip.zeroshot import evaluate

    _evaluate_clip(evaluate, ZeroshotOptions, flags)


def evaluate_retrieval(**flags: Any) -> None:
    """Image and text recall of a CLIP-like model on captioned images, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    from vtok.eval.tasks.clip.retrieval import evaluate

    _evaluate_clip(evaluate, RetrievalOptions, flags)


def _evaluate_clip(task: Any, kind: type, flags: dict[str, Any]) -> None:
    from vtok.eval.report.printed import scores
    from vtok.eval.runs.loader import parse_method

    output = flags.pop("output")
    model, data, settings, options = _read(kind, flags, parse_method)
    if output is not None:
        writable(output / "record.json")
    with terminal.bar(model) as advance:
        records = task(model, data, settings, options, advance)
    if output is not None and is_main():
        for path in write_records(records, output, [data, model]):
            print(path, file=sys.stderr)
    scores(records, terminal.output(160))


def evaluate_vqa(**flags: Any) -> None:
    """Answers of a vision-language model to questions about images, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    QUESTION_TASKS.check(flags["task"])
    from vtok.eval.report.printed import questions
    from vtok.eval.runs.loader import parse_setting
    from vtok.eval.tasks.vqa.evaluate import evaluate

    model, data, settings, options = _read(VQAOptions, flags, parse_setting)
    if options.output:
        kept = [Path(options.output) / name for name in ("samples.jsonl", "results.jsonl")]
        apart(kept, [data, model, options.questions, options.annotations, options.ocr, options.results])
        for path in kept:
            writable(path)
    with terminal.bar("asking") as advance:
        records = evaluate(model, data, settings, options, advance)
    console = terminal.output(160)
    questions(records, console)
    if options.output:
        console.print(f"samples.jsonl, results.jsonl and the answers of every setting are in {options.output}")


def _read(kind: type, flags: dict[str, Any], parse: Callable[[str], Any]) -> tuple[Any, Any, list[Any], Any]:
    """(model, data, the unpatched model and every method, options of the task) from a command's flags."""
    model, data, methods = (flags.pop(name) for name in ("model", "data", "method"))
    return model, data, [None, *(parse(text) for text in methods or ())], options_from(kind, flags)


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


def _signature(kind: type, model: str, data: Any, method: str = METHOD_HELP, **output: Any) -> inspect.Signature:
    """The flags beside those of the options; typer reads a command's flags off its signature."""
    leading = {
        "model": (Annotated[str, typer.Option("--model", "-m", help=model)], inspect.Parameter.empty),
        "data": (data, inspect.Parameter.empty),
        "method": (Annotated[list[str] | None, typer.Option("--method", "-M", help=method)], None),
        **{name: (annotation, None) for name, annotation in output.items()},
    }
    return signature(kind, leading)


evaluate_imagenet.__signature__ = _signature(  # type: ignore[attr-defined]  # a function has one if it is set: typer reads it
    Options,
    "timm model name",
    Annotated[Path, typer.Option("--data", "--data-dir", help="image folder")],
    results_file=Annotated[Path | None, typer.Option("--results-file", help="JSON file for the records")],
)
for _command, _kind, _data in (
    (evaluate_zeroshot, ZeroshotOptions, f"folder with one sub-folder a class, what --dataset reads, or {PICTURES}"),
    (evaluate_retrieval, RetrievalOptions, f"Karpathy's JSON file or its folder, or {CAPTIONED}"),
):
    _command.__signature__ = _signature(  # type: ignore[attr-defined]  # a function has one if it is set: typer reads it
        _kind,
        "open_clip or Hugging Face name or folder, or reference-clip",
        Annotated[str, typer.Option("--data", help=_data)],
        output=Annotated[Path | None, typer.Option("--output", help="folder for one JSON file a record")],
    )
_ASKED = (
    "easy-vqa, easy-vqa-pages, scenes, print, a .jsonl file, a folder in VQAv2's format; with --task the folder of that data "
    "set, hub, hub:NAME or a folder of the datasets library"
)
evaluate_vqa.__signature__ = _signature(  # type: ignore[attr-defined]  # a function has one if it is set: typer reads it
    VQAOptions,
    "Hugging Face name or folder, reference-llava(-next), reference-scenes, reference-print",
    Annotated[str, typer.Option("--data", help=_ASKED)],
    SETTING_HELP,
)
