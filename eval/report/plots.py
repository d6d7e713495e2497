"""Plots, made in one place from a frame of records: the headline metric against a cost or a speed, one line a method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vtok.eval.common.records import BASELINES, UNPATCHED
from vtok.eval.report.frame import frame
from vtok.eval.report.rows import LABELS
from vtok.eval.report.sections import Section
from vtok.writing import replacing

WIDTH, HEIGHT = 5.75, 4.4  # inches of a panel
DPI = 130
_RING: dict[str, Any] = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 0.9}
_BLIND: dict[str, dict[str, Any]] = {
    name: {"color": colour, "linestyle": line, "marker": mark}
    for name, (colour, line, mark) in zip(BASELINES, (("0.6", (0, (5, 2)), "x"), ("0.3", (0, (1, 2)), "+")))
}
MACS = "GMACs per sample, incl. token-reduction overhead"


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    data: pd.DataFrame  # frame with the columns `method`, `unpatched`, `baseline` and those named here
    x: str  # x, y: columns
    y: str
    x_label: str  # x_label, y_label: of the axes
    y_label: str
    title: str = ""  # above
    error: str | None = None  # column with the standard error of y; `None` = no bars
    ends: tuple[str, str] | None = None  # columns with the ends of an interval of x; `None` = no bars
    front: str | None = None  # column that says what lies on the Pareto front, which gets a ring; `None` = nothing does
    levels: tuple[tuple[str, float], ...] = ()  # label -> y of a dotted line
    marker: float | None = None  # x of a dotted line; `None` = none


class Picture(Figure):
    """A figure that notebooks show without any backend of matplotlib being chosen."""

    def _repr_png_(self) -> bytes:
        held = io.BytesIO()
        self.savefig(held, dpi=DPI, format="png")
        return held.getvalue()


def draw(panels: Sequence[Sequence[Panel]], path: Path, title: str = "") -> None:
    """Writes what `figure` makes."""
    save(figure(panels, title), path)


def save(picture: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the name of the file says; it is there whole or not at all."""
    with replacing(Path(path)) as scratch:
        picture.savefig(scratch, dpi=DPI, format=Path(path).suffix.lstrip(".").lower() or "png")


def figure(panels: Sequence[Sequence[Panel]], title: str = "", caption: str = "") -> Picture:
    """A picture of rows of panels; those of a row with the same data share a legend and, if they show it, the axis of y.

    The unpatched model is a star and a level; methods that choose blindly are grey, random dashed and uniform dotted.
    """
    columns = max(len(row) for row in panels)
    made = Picture(figsize=(WIDTH * columns, HEIGHT * len(panels)), layout="constrained")
    axes = made.subplots(len(panels), columns, squeeze=False)
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
        made.suptitle(title)
    if caption:
        made.supxlabel(caption, fontsize=8)
    return made


def _style(method: str, late: bool, number: int) -> dict[str, Any]:
    """Colour, line and mark of a method; those that choose blindly are grey, each in its own way."""
    if not late:
        return {"color": f"C{number % 10}", "linestyle": "-", "marker": "o"}
    return _BLIND.get(method, {"color": "0.75", "linestyle": "-.", "marker": "."})


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
            **_style(str(method), bool(late), i),
            markersize=5,
            elinewidth=0.8,
            linewidth=1.3,
        )
        if panel.front is not None:
            best = points[points[panel.front].astype(bool)]
            axis.plot(best[panel.x], best[panel.y], "o", **_RING)
    if panel.front is not None:
        axis.plot([], [], "o", **_RING, label="Pareto front over GMACs")
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
    """Writes what `pareto` makes."""
    save(pareto(sections), path)


def pareto(sections: Sequence[Section]) -> Picture:
    """The headline metric of every section against GMACs and against measured speed.

    Rings mark the Pareto front over GMACs; bars are standard errors and, of speed, 95 % intervals.
    """
    rows = []
    for section in sections:
        data, first = frame([section]), section.rows[0]
        named = LABELS.get(str(first.primary), str(first.primary))
        label = f"{named} ({first.score.unit})" if first.score and first.score.unit else named
        common: dict[str, Any] = {"y": "score", "y_label": label, "error": "score_error", "front": "pareto"}
        macs = Panel(data, x="total_gmacs", x_label=MACS, title=section.title, **common)
        ends = ("speedup_low", "speedup_high")
        speed = Panel(data, x="measured", x_label="measured speed-up over unpatched", ends=ends, marker=1.0, **common)
        rows.append([macs, speed])
    bars = "Bars: standard error of the metric, 95 % interval of the speed-up (none from too few pairs)."
    return figure(rows, caption=f"Circles: Pareto front of the metric against GMACs, token reduction included. {bars}")


def speeds(section: Section) -> Picture:
    """Measured speed-ups of a benchmark with their 95 % intervals, beside what the GMACs imply."""
    rows = [row for row in section.patched if row.speedup is not None]
    made = Picture(figsize=(1.3 * WIDTH, 1.2 + 0.34 * len(rows)), layout="constrained")
    axis: Any = made.subplots()
    for place, row in enumerate(rows):
        assert row.speedup is not None
        point, ends = row.speedup.point, row.speedup.ends or [row.speedup.point] * 2
        bar = [[point - ends[0]], [ends[1] - point]]
        colour = {"bad": "C3", "good": "C2", "plain": "0.45"}[row.verdict[0]]
        axis.errorbar([point], [place], xerr=bar, fmt="o", color=colour, capsize=3)
        if row.implied is not None:
            axis.plot([row.implied], [place], "|", color="black", markersize=13, markeredgewidth=1.6)
    named = {"faster [95 %]": "C2", "no clear difference": "0.45", "slower": "C3"}
    for name, colour in named.items():
        axis.plot([], [], "o", color=colour, label=name)
    axis.plot([], [], "|", color="black", markersize=10, markeredgewidth=1.6, label="implied by GMACs")
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":", label=UNPATCHED)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel("speed-up over unpatched")
    axis.set_title(section.title, loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(alpha=0.25, axis="x")
    return made
