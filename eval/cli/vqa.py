"""`vtok eval vqa`: flags made from the task's options, and a table of what it measured."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vtok.eval.cli.flags import SETTING_HELP, options_from, signature
from vtok.eval.common import terminal
from vtok.eval.common.rates import throughput_line
from vtok.eval.common.statistics import in_brackets, with_error
from vtok.eval.runs.loader import parse_setting
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.vqa.task import QuestionTask, VQAOptions
from vtok.writing import apart, writable

Record = dict[str, Any]
HEADER = ("method", "visual tokens", "vs", "loyalty", "KV MB", "TTFT ms", "measured", "bound")  # scores stand in between


def evaluate_vqa(**flags: Any) -> None:
    """Answers of a vision-language model to questions about images, unpatched and patched on the same batches."""
    from vtok.eval.tasks.vqa.evaluate import evaluate

    console = terminal.output()
    model, data, methods = (flags.pop(name) for name in ("model", "data", "method"))
    settings = [None, *(parse_setting(text) for text in methods or ())]
    options = options_from(VQAOptions, flags)
    if options.output:
        kept = [Path(options.output) / name for name in ("samples.jsonl", "results.jsonl")]
        apart(kept, [data, model, options.questions, options.annotations, options.ocr, options.results])
        for path in kept:
            writable(path)
    with terminal.progress(transient=True) as progress:
        bar = progress.add_task("asking", total=None)
        records = evaluate(
            model, data, settings, options, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    print_records(records, console)
    if options.output:
        console.print(f"samples.jsonl, results.jsonl and the answers of every setting are in {options.output}")


def print_records(records: Sequence[Record], console: Console) -> None:
    """A table with one row a record, in percent, then the other metrics, then the parts of the questions."""
    first = records[0]
    task: QuestionTask = QUESTION_TASKS.get(first["task"])
    title = f"{first['model']} on {first['dataset']}: {first['n']} questions about {first['n_images']} images"
    shown = dict(task.columns or {task.primary: task.primary})
    caption = f"%, ± standard error; vs: {task.primary} against unpatched, paired; visual tokens: mean over layers"
    table = Table(title=title, caption=caption)
    for i, column in enumerate((*HEADER[:2], *shown, *HEADER[2:])):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for record in records:
        table.add_row(*row(record, tuple(shown.values())))
    console.print(table)
    for record in records:
        if line := throughput_line(record["title"], record):
            console.print(f"- {line}", highlight=False)
    for name in (*task.scores, *task.totals):
        if name not in shown.values():
            _print_line(console, name, records, [share(r["metrics"], name, percent=task.percent) for r in records])
    for grouping, parts in first["groups"].items():
        for name, part in parts.items():
            heading = f"{grouping} {name}, {part['n']} questions{_blind(part)}"
            own = [record["groups"][grouping][name] for record in records]
            _print_line(console, heading, records, [share(one, task.primary, percent=task.percent) for one in own])
    if first["num_skipped"]:
        console.print(f"- {first['num_skipped']} pictures could not be read, and questions about them were left out:")
        for one in first["skipped"]:
            console.print(f"  {one['file']}: {one['reason']}")
    if first["blind"] is not None:
        console.print(
            f"- without the image, from the question alone, {100 * first['blind']:.1f} % are answered", highlight=False
        )


def _print_line(console: Console, heading: str, records: Sequence[Record], cells: Sequence[str]) -> None:
    shares = ", ".join(f"{record['title']} {cell}" for record, cell in zip(records, cells))
    console.print(f"- {heading}: {shares}", highlight=False)


def row(record: Record, shown: Sequence[str] = ("exact_match", "soft_accuracy")) -> list[str]:
    """The cells of one setting.

    Args:
        record: of the setting.
        shown: metrics with a column of their own.
    """
    m, percent = record["metrics"], record.get("percent", False)
    cells = [record["title"]]
    tokens = record.get("tokens")
    cells.append("-" if tokens is None else f"{sum(tokens['mean_per_layer']) / len(tokens['mean_per_layer']):.1f}")
    cells += [share(m, name, percent=percent) for name in shown]
    difference = f"{record.get('primary', shown[0])}_difference"
    cells += [share(m, difference, "+", percent), share(m, "loyalty", percent=percent)]
    if tokens is None:
        return [*cells, "-", "-", "-", "-"]
    first, implied = record["ttft_ms"]["patched"], record.get("implied_speedup")
    cells += [f"{record['kv_bytes']['patched'] / 1e6:.3f}", f"{first:.0f}", measured(record)]
    return [*cells, "-" if implied is None else f"{implied:.2f}x"]


def share(metrics: Record, name: str = "exact_match", sign: str = "", percent: bool = False) -> str:
    """ "96.6 ± 0.8": a share in percent with its standard error, or "-" for one that does not exist.

    Args:
        metrics: of a record or of one of its groups.
        name: of the share.
        sign: "+" for a difference.
        percent: whether it is in percent already.
    """
    return with_error(metrics, name, 1 if percent else 100, 1, sign)


def measured(record: Record) -> str:
    """ "2.10x [2.00, 2.20]": paired speed-up of the first token."""
    if "speedup" not in record:
        return "-"
    return f"{record['speedup']:.2f}x{in_brackets(record['speedup_ci'])}"


def _blind(part: Record) -> str:
    return "" if part["blind"] is None else f" (without the image {100 * part['blind']:.1f})"


_DATA = (
    "easy-vqa, easy-vqa-pages, a .jsonl file, a folder in VQAv2's format; with --task the folder of that data set, hub, "
    "hub:NAME or a folder of the datasets library"
)
_LEADING: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[str, typer.Option("--model", "-m", help="Hugging Face name or folder, or reference-llava(-next)")],
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
