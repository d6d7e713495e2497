"""`vtok eval vqa`: flags made from the task's options, and a table of what it measured."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.eval.cli.flags import SETTING_HELP, options_from, signature
from vtok.eval.common import terminal
from vtok.eval.options import VQAOptions
from vtok.eval.runs.names import check_methods
from vtok.eval.tasks import QUESTION_TASKS
from vtok.writing import apart, writable


def evaluate_vqa(**flags: Any) -> None:
    """Answers of a vision-language model to questions about images, unpatched and patched on the same batches."""
    check_methods(flags["method"])
    QUESTION_TASKS.check(flags["task"])
    from vtok.eval.report.printed import questions
    from vtok.eval.runs.loader import parse_setting
    from vtok.eval.tasks.vqa.evaluate import evaluate

    console = terminal.output(160)
    model, data, methods = (flags.pop(name) for name in ("model", "data", "method"))
    settings = [None, *(parse_setting(text) for text in methods or ())]
    options = options_from(VQAOptions, flags)
    if options.output:
        kept = [Path(options.output) / name for name in ("samples.jsonl", "results.jsonl")]
        apart(kept, [data, model, options.questions, options.annotations, options.ocr, options.results])
        for path in kept:
            writable(path)
    with terminal.bar("asking") as advance:
        records = evaluate(model, data, settings, options, advance)
    questions(records, console)
    if options.output:
        console.print(f"samples.jsonl, results.jsonl and the answers of every setting are in {options.output}")


_DATA = (
    "easy-vqa, easy-vqa-pages, scenes, print, a .jsonl file, a folder in VQAv2's format; with --task the folder of that data "
    "set, hub, hub:NAME or a folder of the datasets library"
)
_LEADING: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str,
            typer.Option(
                "--model", "-m", help="Hugging Face name or folder, reference-llava(-next), reference-scenes, reference-print"
            ),
        ],
        inspect.Parameter.empty,
    ),
    "data": (
        Annotated[str, typer.Option("--data", help=_DATA)],
        inspect.Parameter.empty,
    ),
    "method": (Annotated[list[str] | None, typer.Option("--method", "-M", help=SETTING_HELP)], None),
}
# typer reads a command's flags off its signature.
evaluate_vqa.__signature__ = signature(VQAOptions, _LEADING)  # type: ignore[attr-defined]
