"""The picture of a sweep: the headline metric against GMACs and against measured speed, one row a model and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtok.eval.report.sweep import UNPATCHED, groups, pareto, score, score_error, title, total_gmacs
from vtok.eval.report.tables import FLOOR
from vtok.eval.runs.records import Record
from vtok.writing import replacing

WIDTH, HEIGHT = 11.5, 4.4  # inches of a row


def speed(record: Record) -> float | None:
    """Measured speed-up over unpatched; `None` where it was not measured."""
    return 1.0 if record["method"] == UNPATCHED else record.get("speedup")


def plot(records: Sequence[Record], path: Path) -> None:
    """Writes the picture: lines join the settings of a method, rings mark the Pareto front over GMACs, bars are standard errors
    and, of speed, 95 % intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = groups(records)
    figure, axes = plt.subplots(len(found), 2, figsize=(WIDTH, HEIGHT * len(found)), squeeze=False, layout="constrained")
    for group, (left, right) in zip(found, axes):
        _panel(left, group, total_gmacs, None)
        _panel(right, group, speed, "speedup_ci")
        left.set_title(title(group), loc="left", fontsize=9)
        left.set_xlabel("GMACs a sample, reduction included")
        right.set_xlabel("measured speed-up over unpatched")
        right.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        left.set_ylabel(f"{group[0]['primary']} (%)")
        right.sharey(left)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=130)
    plt.close(figure)


def _panel(axis: Any, group: Sequence[Record], x: Callable[[Record], float | None], interval: str | None) -> None:
    best = pareto(group)
    methods = list(dict.fromkeys(r["method"] for r in group if r["method"] != UNPATCHED))
    methods.sort(key=lambda name: (name in FLOOR, name))
    for i, method in enumerate(methods):
        points = sorted(p for r in group if r["method"] == method and (p := x(r)) is not None)
        rows = sorted((r for r in group if r["method"] == method and x(r) is not None), key=lambda r: (x(r), r["key"]))
        floor = method in FLOOR
        axis.errorbar(
            points,
            [score(r) for r in rows],
            yerr=[score_error(r) for r in rows],
            xerr=None if interval is None else _bars(rows, points, interval),
            label=method,
            color="0.55" if floor else f"C{i % 10}",
            linestyle=(0, (1 + 3 * FLOOR.index(method), 2)) if floor else "-",
            marker="x" if floor else "o",
            markersize=5,
            elinewidth=0.8,
            linewidth=1.3,
        )
        front = [(p, score(r)) for p, r in zip(points, rows) if r["key"] in best]
        if front:
            axis.plot(*zip(*front), "o", markersize=10, markerfacecolor="none", markeredgecolor="black", markeredgewidth=0.9)
    for record in group:
        if record["method"] == UNPATCHED:
            axis.axhline(score(record), color="black", linewidth=0.8)
            at = x(record)
            if at is not None:
                axis.plot(at, score(record), "k*", markersize=12, label=UNPATCHED)
    axis.grid(alpha=0.25)


def _bars(rows: Sequence[Record], points: Sequence[float], name: str) -> list[list[float]]:
    ends = [r.get(name) or (p, p) for r, p in zip(rows, points)]
    return [[p - low for p, (low, _) in zip(points, ends)], [high - p for p, (_, high) in zip(points, ends)]]
