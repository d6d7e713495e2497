"""What was published beside what a run measured."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vtok.eval.common.statistics import with_error
from vtok.eval.runs.loader import FIGURES, RunConfig


def published_beside_measured(config: RunConfig, records: list[dict[str, Any]]) -> Table:
    """A table with one row a figure, in percent. Published GFLOPs count a multiply-accumulate once, as we do here.

    Args:
        config: the run.
        records: of the unpatched model and of the patched one, of one of its tasks.
    """
    base, patched = records
    p, task = config.published, patched["task"]
    own = p if len(config.tasks) == 1 else p.get(task) or {}
    table = Table(title=f"{config.name}: {config.model}, {patched['setting']}, {task}", caption=_caption(config, patched))
    table.add_column("")
    table.add_column("published", justify="right")
    table.add_column("measured", justify="right")
    rows: list[tuple[str, Any, str]] = []
    for name in (name for name in FIGURES.get(task, ()) if name in base["metrics"]):
        label = {"top1": "top-1", "acc1": "top-1"}.get(name, name.replace("_", " "))
        rows += [
            (f"{label} unpatched %", own.get(f"base_{name}"), _measured(base, name)),
            (f"{label} patched %", own.get(name), _measured(patched, name)),
            ("difference", _difference(own, name), _measured_difference(base, patched, name)),
        ]
    if "gmacs" in base:
        rows += [
            ("GMACs unpatched", p.get("base_gflops"), f"{base['gmacs']['model']:.3f}"),
            ("GMACs patched", p.get("gflops"), f"{patched['gmacs']['model']:.3f}"),
        ]
    rows.append(("images", p.get("images"), str(patched["n"])))
    for name, published, measured in rows:
        table.add_row(name, "-" if published is None else str(published), measured)
    return table


def _percent(record: dict[str, Any]) -> float:
    """Factor from a task's metrics to percent."""
    return 1.0 if record["percent"] else 100.0


def _measured(record: dict[str, Any], name: str) -> str:
    return with_error(record["metrics"], name, _percent(record), 3)


def _measured_difference(base: dict[str, Any], patched: dict[str, Any], name: str) -> str:
    metrics = patched["metrics"]
    own = f"{name}_difference" if f"{name}_difference_stderr" in metrics else "difference"
    known = {f"change{end}": metrics[f"{own}{end}"] for end in ("_stderr", "_ci") if f"{own}{end}" in metrics}
    return with_error({"change": metrics[name] - base["metrics"][name], **known}, "change", _percent(patched), 3, "+")


def _difference(published: Any, name: str) -> str | None:
    if name not in published or f"base_{name}" not in published:
        return None
    return f"{published[name] - published[f'base_{name}']:+.3f}"


def _caption(config: RunConfig, patched: dict[str, Any]) -> str:
    lines = [f"published: {config.published.get('source', '-')}"]
    if config.published.get("note"):
        lines.append(f"note: {config.published['note']}")
    if patched["num_skipped"]:
        lines.append(f"{patched['num_skipped']} files skipped")
    return "\n".join(lines)
