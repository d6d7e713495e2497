"""`vtok eval vqa`: flags made from the task's options, and a table of what it measured."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vtok.eval.flags import SETTING_HELP, options_from, signature
from vtok.eval.runs import parse_setting
from vtok.eval.tasks.vqa import VQAOptions

Record = dict[str, Any]
HEADER = ("method", "visual tokens", "exact", "soft", "vs", "loyalty", "KV MB", "TTFT ms", "measured", "bound")


def evaluate_vqa(**flags: Any) -> None:
    """Answers of a vision-language model to questions about images, unpatched and patched on the same batches."""
    from vtok.eval.tasks.vqa import evaluate

    console = Console() if sys.stdout.isatty() else Console(width=132)
    model, data, methods = (flags.pop(name) for name in ("model", "data", "method"))
    settings = [None, *(parse_setting(text) for text in methods or ())]
    options = options_from(VQAOptions, flags)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("asking", total=None)
        records = evaluate(
            model, data, settings, options, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    print_records(records, console)
    if options.output:
        console.print(f"samples.jsonl, results.jsonl and the answers of every setting are in {options.output}")


def print_records(records: Sequence[Record], console: Console) -> None:
    """A table with one row a record, shares in percent, then the parts of the questions."""
    first = records[0]
    title = f"{first['model']} on {first['dataset']}: {first['n']} questions about {first['n_images']} images"
    table = Table(title=title, caption="%, ± standard error; vs: against unpatched, paired; visual tokens: mean over layers")
    for i, column in enumerate(
        ("method", "visual tokens", "exact", "soft", "vs", "loyalty", "KV MB", "TTFT ms", "measured", "bound")
    ):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for record in records:
        table.add_row(*row(record))
    console.print(table)
    for grouping, parts in first["groups"].items():
        for name, part in parts.items():
            shares = ", ".join(f"{record['title']} {share(record['groups'][grouping][name])}" for record in records)
            console.print(f"- {grouping} {name}, {part['n']} questions{_blind(part)}: {shares}", highlight=False)
    if first["blind"] is not None:
        console.print(
            f"- without the image, from the question alone, {100 * first['blind']:.1f} % are answered", highlight=False
        )


def row(record: Record) -> list[str]:
    """The cells of one setting."""
    m = record["metrics"]
    cells = [record["title"]]
    tokens = record.get("tokens")
    cells.append("-" if tokens is None else f"{sum(tokens['mean_per_layer']) / len(tokens['mean_per_layer']):.1f}")
    cells += [share(m), share(m, "soft_accuracy"), share(m, "exact_match_difference", "+"), share(m, "loyalty")]
    if tokens is None:
        return [*cells, "-", "-", "-", "-"]
    first, implied = record["ttft_ms"]["patched"], record.get("implied_speedup")
    cells += [f"{record['kv_bytes']['patched'] / 1e6:.3f}", f"{first:.0f}", measured(record)]
    return [*cells, "-" if implied is None else f"{implied:.2f}x"]


def share(metrics: Record, name: str = "exact_match", sign: str = "") -> str:
    """ "96.6 ± 0.8": a share in percent with its standard error, or "-" for one that does not exist.

    Args:
        metrics: of a record or of one of its groups.
        name: of the share.
        sign: "+" for a difference.
    """
    if metrics.get(name) is None:
        return "-"
    error = metrics.get(f"{name}_stderr")
    return f"{100 * metrics[name]:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def measured(record: Record) -> str:
    """ "2.10x [2.00, 2.20]": paired speed-up of the first token."""
    if "speedup" not in record:
        return "-"
    low, high = record["speedup_ci"]
    return f"{record['speedup']:.2f}x [{low:.2f}, {high:.2f}]"


def _blind(part: Record) -> str:
    return "" if part["blind"] is None else f" (without the image {100 * part['blind']:.1f})"


_LEADING: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[str, typer.Option("--model", "-m", help="Hugging Face name or folder, or reference-llava(-next)")],
        inspect.Parameter.empty,
    ),
    "data": (
        Annotated[str, typer.Option("--data", help="easy-vqa, easy-vqa-pages, a .jsonl file or a folder in VQAv2's format")],
        inspect.Parameter.empty,
    ),
    "method": (Annotated[list[str] | None, typer.Option("--method", "-M", help=SETTING_HELP)], None),
}
# typer reads a command's flags off its signature.
evaluate_vqa.__signature__ = signature(VQAOptions, _LEADING)  # type: ignore[attr-defined]
