"""What `vtok eval` prints of the records of its tasks: a table with one line a setting, and what is to be known beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from vtok.eval.common.rates import throughput_line
from vtok.eval.common.records import Record
from vtok.eval.common.statistics import in_brackets, with_error
from vtok.eval.report.tables import Column, Table
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.vqa.task import QuestionTask

_CAPTION = "± standard error, or [95 %] where no image differs"


def classification(records: Sequence[Record], console: Console) -> None:
    """Accuracies of a classifier."""
    first = records[0]
    columns = [
        Column("method", lambda r: r["setting"], left=True),
        Column("top-1 %", lambda r: with_error(r["metrics"], "top1", digits=3)),
        Column("top-5 %", lambda r: f"{r['metrics']['top5']:.3f}"),
        Column("vs unpatched", lambda r: with_error(r["metrics"], "difference", digits=3, sign="+")),
        Column("agreement", lambda r: f"{r['metrics']['agreement']:.1f} %" if "agreement" in r["metrics"] else "-"),
        Column("tokens out", lambda r: f"{r['tokens']['out']:.1f}"),
        Column("GMACs", lambda r: f"{r['gmacs']['model']:.3f}"),
        Column("GFLOPs", lambda r: f"{r['gflops']['model']:.3f}"),
        Column("implied", lambda r: f"{r['implied_speedup']:.2f}x"),
    ]
    title = f"{first['model']}, {first['n']} images, {first['img_size']} px"
    console.print(Table.of(records, columns, title, f"{_CAPTION}; paired"))
    _told(records, console)


def dual_encoders(records: Sequence[Record], console: Console) -> None:
    """Zero-shot accuracies or recalls of a dual encoder, in percent."""
    first = records[0]
    helpers = ("_stderr", "_ci", "difference", "agreement")
    names = [name for name in first["metrics"] if not name.endswith(helpers)]
    columns = [
        Column("method", lambda r: r["setting"], left=True),
        *(Column(_label(name), partial(_share, name=name, digits=2)) for name in names),
        Column("tokens out", lambda r: f"{r['tokens']['out']:.1f}" if "tokens" in r else "-"),
        Column("implied", lambda r: f"{r['implied_speedup']:.2f}x" if "tokens" in r else "-"),
    ]
    title = f"{first['model']} {first['pretrained']}".rstrip() + f" on {first['dataset']}, {first['n']} images"
    console.print(Table.of(records, columns, title, f"%, {_CAPTION}"))
    for record in records[1:]:
        changes = [name for name in record["metrics"] if name.endswith("difference")]
        named = [(_label(name.removesuffix("difference").rstrip("_")) or "top-1", name) for name in changes]
        if named:
            words = ", ".join(f"{label} {_share(record, name, 2, '+')}" for label, name in named)
            console.print(f"- {record['setting']} against unpatched, paired: {words}")
    _told(records, console)


def questions(records: Sequence[Record], console: Console) -> None:
    """Scores of answers, in percent, then the other metrics, then the parts of the questions."""
    first = records[0]
    task: QuestionTask = QUESTION_TASKS.get(first["task"])
    shown = dict(task.columns or {task.primary: task.primary})
    columns = [
        Column("method", lambda r: r["title"], left=True),
        Column("visual tokens", lambda r: _mean_tokens(r)),
        *(Column(label, partial(_share, name=name)) for label, name in shown.items()),
        Column("vs", partial(_share, name=f"{task.primary}_difference", sign="+")),
        Column("agreement", partial(_share, name="agreement")),
        Column("KV MB", lambda r: f"{r['kv_bytes']['patched'] / 1e6:.3f}" if "tokens" in r else "-"),
        Column("TTFT ms", lambda r: f"{r['ttft_ms']['patched']:.0f}" if "tokens" in r else "-"),
        Column("measured", lambda r: f"{r['speedup']:.2f}x{in_brackets(r['speedup_ci'])}" if "speedup" in r else "-"),
        Column("bound", lambda r: f"{r['implied_speedup']:.2f}x" if "implied_speedup" in r else "-"),
    ]
    title = f"{first['model']} on {first['dataset']}: {first['n']} questions about {first['n_images']} images"
    caption = f"%, ± standard error; vs: {task.primary} against unpatched, paired; visual tokens: mean over layers"
    console.print(Table.of(records, columns, title, caption))

    def line(heading: str, parts: Sequence[Record], name: str) -> None:
        scores = [with_error(part, name, 1 if task.percent else 100) for part in parts]
        told = ", ".join(f"{record['title']} {score}" for record, score in zip(records, scores))
        console.print(f"- {heading}: {told}", highlight=False)

    for name in (*task.scores, *task.totals):
        if name not in shown.values():
            line(name, [record["metrics"] for record in records], name)
    for grouping, parts in first["groups"].items():
        for name, part in parts.items():
            blind = "" if part["blind"] is None else f" (without the image {100 * part['blind']:.1f})"
            own = [record["groups"][grouping][name] for record in records]
            line(f"{grouping} {name}, {part['n']} questions{blind}", own, task.primary)
    _told(records, console, "pictures could not be read, and questions about them were left out")
    if first["blind"] is not None:
        console.print(
            f"- without the image, from the question alone, {100 * first['blind']:.1f} % are answered", highlight=False
        )


def _told(records: Sequence[Record], console: Console, what: str = "files were skipped") -> None:
    """Throughput of several processes, notes, files that were left out."""
    first = records[0]
    for record in records:
        if line := throughput_line(record.get("setting") or record["title"], record):
            console.print(f"- {line}", highlight=False)
    for note in first.get("notes", ()):
        console.print(f"- {note}", highlight=False)
    if first["num_skipped"]:
        console.print(f"- {first['num_skipped']} {what}:")
        for one in first["skipped"]:
            console.print(f"  {one['file']}: {one['reason']}")


def _label(name: str) -> str:
    return name.replace("_retrieval_recall@", " R@").replace("_", " ")


def _share(record: Record, name: str, digits: int = 1, sign: str = "") -> str:
    return with_error(record["metrics"], name, 1 if record.get("percent") else 100, digits, sign)


def _mean_tokens(record: Record) -> str:
    layers: Any = record.get("tokens", {}).get("mean_per_layer")
    return f"{sum(layers) / len(layers):.1f}" if layers else "-"
