"""Published results as text: its runs by table, the points without a run, and published figures beside measured ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.text import Text

from vtok.eval.common.records import difference
from vtok.eval.common.statistics import in_brackets, with_error
from vtok.eval.published.schema import Figure, figures
from vtok.eval.published.tables import TOLERANCE, Cost, Missing, slug
from vtok.eval.report.tables import Column, Table
from vtok.eval.runs.loader import RunConfig

_LOOK: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "expand": False}
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
    return name if len(run.tasks) == 1 or figure.parts else figure.task


def listing(table: str, found: Sequence[RunConfig], costs: Mapping[str, Cost] | None = None) -> Table:
    """The runs of one table, with the figures of their source, and with what they cost here if that is known."""

    def text(run: RunConfig) -> str:
        own = [one for one in figures(run.tasks, run.published) if not one.source]
        return ", ".join(f"{label(one, run)} {one.value}{_brackets(one)}" for one in own)

    columns = [
        Column("run", lambda run: run.name, left=True),
        Column("model", lambda run: run.model.split("/")[-1], left=True),
        Column("method", _methods, left=True),
        Column("published (unpatched)", text, left=True),
        Column("GFLOPs as published", lambda run: _gflops(run, " ({})")),
    ]
    if costs is not None:
        columns.append(Column("GMACs here", lambda run: _planned(costs[run.name])))
    return Table.of(found, columns, f"{table} (vtok published {slug(table)})", **_LOOK)


def _gflops(run: RunConfig, base: str) -> str:
    """Published GFLOPs, with the unpatched ones where they are known."""
    p = run.published
    return "-" if "gflops" not in p else f"{p['gflops']}" + (base.format(p["base_gflops"]) if "base_gflops" in p else "")


def _methods(run: RunConfig) -> str:
    names = (name for setting in run.settings for name in setting.name.split(" + "))
    return " + ".join(dict.fromkeys(names))


def _brackets(figure: Figure) -> str:
    return "" if figure.base is None or figure.parts else f" ({figure.base})"


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
    head = f"GMACs here and published GFLOPs differ by more than {100 * TOLERANCE:.0f} %:"
    lines = [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return Text("\n".join([head, *lines]) if lines else "")


def contents(tables: Mapping[str, Sequence[RunConfig]]) -> Table:
    """The tables of published results: what each is called, its models and tasks, and how many runs it has."""

    def of(table: str, part: Callable[[RunConfig], Sequence[str]]) -> str:
        return ", ".join(dict.fromkeys(name for run in tables[table] for name in part(run)))

    columns = [
        Column("table", str, left=True),
        Column("command", lambda table: f"vtok published {slug(table)}", left=True),
        Column("models", lambda table: of(table, lambda run: [run.model.split("/")[-1]]), left=True),
        Column("tasks", lambda table: of(table, lambda run: run.tasks), left=True),
        Column("runs", lambda table: str(len(tables[table]))),
    ]
    return Table.of(tables, columns)


def footnotes(found: Sequence[RunConfig]) -> Text:
    """Sources and notes of runs, each said once."""
    by_text: dict[str, list[str]] = {}
    for run in found:
        for what, name in (("source", "source"), ("samples", "images"), ("note", "note"), ("GFLOPs", "gflops_note")):
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
    header = ("paper", "operating point", "published", "reason")
    return Table.plain(header, points, 4, title="Operating points without a run", look={**_LOOK, "show_lines": True})


def beside(title: str, rows: Sequence[tuple[RunConfig, Mapping[str, Mapping[str, Any]]]], digits: int = 2) -> Table:
    """Published beside measured, one line a figure; figures in percent, of MME in points. A star marks those of another source
    than the run's, which `footnotes` names. `rows`: (run, task -> {"base": record of the unpatched model, "patched": record}).
    """
    header = ("run", "figure", "published", "measured", "difference", "difference measured [95 %]", "GFLOPs", "GMACs")
    lines = [line for run, records in rows for line in _lines(run, records, digits)]
    return Table.plain(header, lines, 2, title=title, look=_LOOK)


def _lines(run: RunConfig, records: Mapping[str, Mapping[str, Any]], digits: int) -> list[tuple[str, ...]]:
    """One a published figure; of a run for which nothing was published, one a headline that was measured."""
    found: list[tuple[str, ...]] = []
    said = set[tuple[str, str]]()
    own = [one._replace(source="*" if one.source else "") for one in figures(run.tasks, run.published)]
    for figure in dict.fromkeys(own or [Figure(task, pair["patched"]["primary"], math.nan) for task, pair in records.items()]):
        published, measured, change, changed = _cells(figure, records, digits)
        if (figure.task, figure.name) in said:
            measured = changed = ""  # it stands above
        said.add((figure.task, figure.name))
        name = label(figure, run) + (" *" if figure.source else "")
        costs = ("", "") if found else _cost_cells(run, records)
        found.append(("" if found else run.name, name, published, measured, change, changed, *costs))
    return found


def _cells(figure: Figure, records: Mapping[str, Mapping[str, Any]], digits: int) -> tuple[str, str, str, str]:
    """(published, measured, published difference, measured difference) of one figure."""
    published = "-" if math.isnan(figure.value) else f"{figure.value}"
    if figure.parts:
        found = average(figure, records)
        return published, "-" if found is None else f"{found:.1f}", "", ""
    change = "-" if figure.base is None else f"{figure.value - figure.base:+.{digits}f}"
    published += "" if figure.base is None else f" of {figure.base}"
    pair = records.get(figure.task, {})
    before, value = (scaled(pair[side], figure.name) if pair else None for side in ("base", "patched"))
    if value is None or before is None:
        return published, "-", change, "-"
    patched = pair["patched"]
    text = f"{with_error(patched['metrics'], figure.name, _factor(patched), digits)} of {before:.{digits}f}"
    return published, text, change, f"{value - before:+.{digits}f}{_interval(patched, figure.name, digits)}"


def _interval(record: Mapping[str, Any], name: str, digits: int) -> str:
    ends = record["metrics"].get(f"{name}_difference_ci") or (difference(record)[2] if name == record.get("primary") else None)
    return in_brackets([_factor(record) * end for end in ends] if ends else None, f"+.{digits}f")


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
    published = _gflops(run, " of {}")
    for pair in records.values():
        found, before = (pair[side].get("gmacs", {}).get("model") for side in ("patched", "base"))
        if found is not None:
            return published, f"{found:.3f}" + ("" if before is None else f" of {before:.3f}")
    return published, "-"
