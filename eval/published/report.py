"""The reproduction book as text: its runs by table, the points without a run, and published figures beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vtok.eval.common.statistics import with_error
from vtok.eval.published.schema import AVERAGE, Figure, figures
from vtok.eval.published.tables import TOLERANCE, Cost, Missing, slug
from vtok.eval.runs.loader import RunConfig

_SHORT = {
    "top1": "top-1",
    "acc1": "top-1",
    "text_retrieval_recall@1": "text R@1",
    "image_retrieval_recall@1": "image R@1",
    "recall_sum": "sum",
}


def label(figure: Figure, run: RunConfig) -> str:
    """What a figure is called: the metric, or the task of a run that has several."""
    name = _SHORT.get(figure.name, figure.name)
    return name if len(run.tasks) == 1 or figure.name == AVERAGE else figure.task


def listing(table: str, found: Sequence[RunConfig], costs: Mapping[str, Cost] | None = None) -> Table:
    """The runs of one table, with the figures of their source.

    Args:
        table: its name.
        found: its runs.
        costs: run -> what it costs here; `None` leaves the column out.
    """
    shown = Table(title=f"{table} (vtok book {slug(table)})", title_justify="left", title_style="bold", expand=False)
    shown.add_column("run", no_wrap=True)
    shown.add_column("model")
    shown.add_column("method")
    shown.add_column("published (unpatched)")
    shown.add_column("GFLOPs as published", justify="right")
    if costs is not None:
        shown.add_column("GMACs here", justify="right")
    for run in found:
        p = run.published
        own = [one for one in figures(run.tasks, p) if not one.source]
        text = ", ".join(f"{label(one, run)} {one.value}{_brackets(one)}" for one in own)
        flops = "-" if "gflops" not in p else f"{p['gflops']}" + (f" ({p['base_gflops']})" if "base_gflops" in p else "")
        row = [run.name, run.model.split("/")[-1], _methods(run), text, flops]
        shown.add_row(*row, *([] if costs is None else [_planned(costs[run.name])]))
    return shown


def _methods(run: RunConfig) -> str:
    names = (name for setting in run.settings for name in setting.name.split(" + "))
    return " + ".join(dict.fromkeys(names))


def _brackets(figure: Figure) -> str:
    return "" if figure.base is None or figure.name == AVERAGE else f" ({figure.base})"


def _planned(cost: Cost) -> str:
    deviations = [f"{100 * one:+.1f} %" for one in cost.deviations if one is not None]
    bound = "" if cost.exact else "at most "
    return f"{bound}{cost.gmacs:.3f} ({cost.base_gmacs:.3f})" + (f"; {', '.join(deviations)}" if deviations else "")


def reasons(found: Sequence[RunConfig]) -> Text:
    """Runs whose GMACs differ from the published GFLOPs by more than `TOLERANCE`, with the reason."""
    by_reason: dict[str, list[str]] = {}
    for run in found:
        if run.published.get("gflops_note"):
            by_reason.setdefault(run.published["gflops_note"], []).append(run.name)
    lines = [f"GMACs here and published GFLOPs differ by more than {100 * TOLERANCE:.0f} %:"]
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return Text("\n".join(lines) if by_reason else "")


def contents(tables: Mapping[str, Sequence[RunConfig]]) -> Table:
    """The tables of the book: what each is called, its models and tasks, and how many runs it has."""
    shown = Table()
    for column in ("table", "command", "models", "tasks"):
        shown.add_column(column)
    shown.add_column("runs", justify="right")
    for table, found in tables.items():
        models = ", ".join(dict.fromkeys(run.model.split("/")[-1] for run in found))
        tasks = ", ".join(dict.fromkeys(task for run in found for task in run.tasks))
        shown.add_row(table, f"vtok book {slug(table)}", models, tasks, str(len(found)))
    return shown


def footnotes(found: Sequence[RunConfig]) -> Text:
    """Sources and notes of runs, each said once."""
    by_text: dict[str, list[str]] = {}
    for run in found:
        for what, name in (("source", "source"), ("note", "note"), ("GFLOPs", "gflops_note")):
            if run.published.get(name):
                by_text.setdefault(f"{what}: {run.published[name]}", []).append(run.name)
    for run in found:
        for one in figures(run.tasks, run.published):
            if one.source:
                by_text.setdefault(f"* {label(one, run)} {one.value}: {one.source}", []).append(run.name)
    lines = [f"- {text}" + ("" if len(names) == len(found) else f" ({', '.join(names)})") for text, names in by_text.items()]
    return Text("\n".join(lines))


def missing_table(points: Sequence[Missing]) -> Table:
    """The operating points that no run repeats."""
    shown = Table(title="Operating points without a run", title_justify="left", title_style="bold", show_lines=True)
    for column in ("paper", "operating point", "published", "reason"):
        shown.add_column(column, overflow="fold")
    for point in points:
        shown.add_row(*point)
    return shown


def beside(title: str, rows: Sequence[tuple[RunConfig, Mapping[str, Mapping[str, Any]]]]) -> Table:
    """Published beside measured, one line a figure; figures in percent, of MME in points. A star marks those of another source
    than the run's, which `footnotes` names.

    Args:
        title: of the table.
        rows: (run, task -> {"base": record of the unpatched model, "patched": record}); tasks without records are left out.
    """
    shown = Table(title=title, title_justify="left", title_style="bold")
    shown.add_column("run", no_wrap=True)
    shown.add_column("figure")
    for column in ("published", "measured", "difference", "difference measured [95 %]", "GFLOPs", "GMACs"):
        shown.add_column(column, justify="right")
    for run, records in rows:
        first, said = True, list[tuple[str, str]]()
        for figure in dict.fromkeys(
            one._replace(source="*" if one.source else "") for one in figures(run.tasks, run.published)
        ):
            name, published, found, change, measured = _cells(run, figure, records)
            if (figure.task, figure.name) in said:
                found = measured = ""  # it stands above
            said.append((figure.task, figure.name))
            costs = _cost_cells(run, records) if first else ("", "")
            shown.add_row(run.name if first else "", name, published, found, change, measured, *costs)
            first = False
    return shown


def _cells(run: RunConfig, figure: Figure, records: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, str, str, str]:
    """(name, published, measured, published difference, measured difference) of one figure."""
    name = label(figure, run) + (" *" if figure.source else "")
    published = f"{figure.value}"
    if figure.name == AVERAGE:
        found = average(figure, records)
        return name, published, "-" if found is None else f"{found:.1f}", "", ""
    change = "-" if figure.base is None else f"{figure.value - figure.base:+.2f}"
    published += "" if figure.base is None else f" of {figure.base}"
    pair = records.get(figure.task)
    if pair is None:
        return name, published, "-", change, "-"
    base, patched = pair["base"], pair["patched"]
    value, before = scaled(patched, figure.name), scaled(base, figure.name)
    if value is None or before is None:
        return name, published, "-", change, "-"
    text = f"{with_error(patched['metrics'], figure.name, _factor(patched), 2)} of {before:.2f}"
    return name, published, text, change, f"{value - before:+.2f}{_interval(patched, figure.name)}"


def _interval(record: Mapping[str, Any], name: str) -> str:
    factor, metrics = _factor(record), record["metrics"]
    for key in (f"{name}_difference_ci", *(["difference_ci"] if name == record.get("primary") else [])):
        if metrics.get(key):
            low, high = (factor * one for one in metrics[key])
            return f" [{low:+.2f}, {high:+.2f}]"
    return ""


def _factor(record: Mapping[str, Any]) -> float:
    """From a record's metrics to percent: most tasks' are shares."""
    return 1.0 if record.get("percent") else 100.0


def scaled(record: Mapping[str, Any], name: str) -> float | None:
    """A number of a record's metrics in percent; `None` = it has none."""
    value = record["metrics"].get(name)
    return None if value is None else _factor(record) * value


def average(figure: Figure, records: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean over metrics of the share in percent of the unpatched figure that is left; `None` = a task was not measured."""
    shares = []
    for task, name in figure.parts:
        pair = records.get(task)
        before = None if pair is None else scaled(pair["base"], name)
        after = None if pair is None else scaled(pair["patched"], name)
        if not before or after is None:
            return None
        shares.append(100 * after / before)
    return sum(shares) / len(shares)


def _cost_cells(run: RunConfig, records: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    p = run.published
    published = "-" if "gflops" not in p else f"{p['gflops']}" + (f" of {p['base_gflops']}" if "base_gflops" in p else "")
    for pair in records.values():
        found, before = (pair[side].get("gmacs", {}).get("model") for side in ("patched", "base"))
        if found is not None:
            return published, f"{found:.3f}" + ("" if before is None else f" of {before:.3f}")
    return published, "-"
