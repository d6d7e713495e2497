"""Plots, made in one place from a frame of records: the headline metric against a cost or a speed, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vtok.eval.common.records import UNPATCHED
from vtok.eval.report.frame import frame
from vtok.eval.report.sections import Section
from vtok.writing import replacing

WIDTH, HEIGHT = 5.75, 4.4  # inches of a panel


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        data: frame with the columns `method`, `unpatched`, `baseline` and those named here.
        x, y: columns.
        x_label, y_label: of the axes.
        title: above.
        error: column with the standard error of y; `None` = no bars.
        ends: columns with the ends of an interval of x; `None` = no bars.
        front: column that says what lies on the Pareto front, which gets a ring; `None` = nothing does.
        levels: label -> y of a dotted line.
        marker: x of a dotted line; `None` = none.
    """

    data: pd.DataFrame
    x: str
    y: str
    x_label: str
    y_label: str
    title: str = ""
    error: str | None = None
    ends: tuple[str, str] | None = None
    front: str | None = None
    levels: tuple[tuple[str, float], ...] = ()
    marker: float | None = None


def draw(panels: Sequence[Sequence[Panel]], path: Path, title: str = "") -> None:
    """Writes a picture of rows of panels; those of a row with the same data share a legend and, if they show it, the axis of y.

    The unpatched model is a star and a level; methods that choose blindly are grey and dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(row) for row in panels)
    size = (WIDTH * columns, HEIGHT * len(panels))
    figure, axes = plt.subplots(len(panels), columns, figsize=size, squeeze=False, layout="constrained")
    for row, places in zip(panels, axes):
        for panel, axis in zip(row, places):
            _draw(axis, panel)
            if panel.data is not row[0].data:
                axis.legend(frameon=False, fontsize=8)
            elif axis is not places[0] and panel.y == row[0].y:
                axis.sharey(places[0])
        handles = places[0].get_legend_handles_labels()
        if all(panel.data is row[0].data for panel in row):
            places[len(row) - 1].legend(*handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            places[0].legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=130)
    plt.close(figure)


def _draw(axis: Any, panel: Panel) -> None:
    known = panel.data[panel.data[panel.x].notna() & panel.data[panel.y].notna()].sort_values([panel.x])
    patched = known[~known["unpatched"].astype(bool)].assign(late=lambda d: d["baseline"].astype(bool))
    for i, ((late, method), points) in enumerate(patched.groupby(["late", "method"])):
        x, y = points[panel.x].astype(float), points[panel.y].astype(float)
        bars: Any = None
        if panel.ends is not None:
            ends = [points[name].astype(float).fillna(x) for name in panel.ends]
            bars = [(x - ends[0]).abs(), (ends[1] - x).abs()]
        axis.errorbar(
            x,
            y,
            yerr=None if panel.error is None else points[panel.error].astype(float).fillna(0),
            xerr=bars,
            label=method,
            color="0.55" if late else f"C{i % 10}",
            linestyle=(0, (1 + 3 * (i % 2), 2)) if late else "-",
            marker="x" if late else "o",
            markersize=5,
            elinewidth=0.8,
            linewidth=1.3,
        )
        if panel.front is not None:
            best = points[points[panel.front].astype(bool)]
            ring = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 0.9}
            axis.plot(best[panel.x], best[panel.y], "o", **ring)
    for _, base in known[known["unpatched"].astype(bool)].iterrows():
        axis.axhline(base[panel.y], color="black", linewidth=0.8)
        axis.plot(base[panel.x], base[panel.y], "k*", markersize=12, label=UNPATCHED)
    for label, level in panel.levels:
        axis.axhline(level, color="black", linewidth=0.8, linestyle=":", label=label)
    if panel.marker is not None:
        axis.axvline(panel.marker, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    axis.set_title(panel.title, loc="left", fontsize=9)
    axis.grid(alpha=0.25)


def plot(sections: Sequence[Section], path: Path) -> None:
    """The headline metric of every section against GMACs and against measured speed.

    Rings mark the Pareto front over GMACs; bars are standard errors and, of speed, 95 % intervals.
    """
    rows = []
    for section in sections:
        data, first = frame([section]), section.rows[0]
        label = f"{first.primary} ({first.score.unit})" if first.score and first.score.unit else str(first.primary)
        common: dict[str, Any] = {"y": "score", "y_label": label, "error": "score_error", "front": "pareto"}
        macs = Panel(data, x="total_gmacs", x_label="GMACs a sample, reduction included", title=section.title, **common)
        ends = ("speedup_low", "speedup_high")
        speed = Panel(data, x="measured", x_label="measured speed-up over unpatched", ends=ends, marker=1.0, **common)
        rows.append([macs, speed])
    draw(rows, path)
