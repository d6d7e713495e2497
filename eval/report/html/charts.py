"""Plots as numbers for inline SVG: the template only writes them down. Colours are classes, so that they follow the theme.

Shapes: pixels of a view box; x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vtok.eval.common.records import BASELINES
from vtok.eval.report.frame import front_of
from vtok.eval.report.rows import Row, Score
from vtok.eval.report.sections import Section
from vtok.eval.report.values import Interval, figure, with_ends

WIDTH, HEIGHT = 430, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 46
SMALL_WIDTH, SMALL_HEIGHT = 230, 150
PALETTE = 8  # colours and shapes that the style sheet has
LOOKS = ("baseline-a", "baseline-b")  # classes of the baselines
_R = 4.6  # of a mark


class Tick(NamedTuple):
    """Where a number of an axis stands."""

    place: float
    words: str


class Mark(NamedTuple):
    """One setting in a plot."""

    x: float
    y: float
    low: float | None  # y of the ends of the error bar; `None` = none
    high: float | None
    path: str  # of the shape
    front: bool  # whether it lies on the Pareto front: filled, the others hollow
    title: str  # tooltip
    left: float | None = None  # x of the ends of the interval; `None` = none
    right: float | None = None


class Line(NamedTuple):
    """One method; of tokens per layer one setting."""

    name: str
    look: str  # class of its colour
    points: str  # "x,y x,y ..." of the line that joins its marks
    marks: list[Mark]
    sample: str = ""  # path of its shape around (9, 7), for the legend


class Plot(NamedTuple):
    """Axes with lines on them."""

    title: str
    summary: str  # for a screen reader
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    level: float | None = None  # y of the unpatched model, `None` = it is not known
    front: str = ""  # "x,y ..." through the Pareto front
    base: Mark | None = None  # mark of the unpatched model
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[float, float, float, float] = (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)


def looks(sections: Sequence[Section]) -> dict[str, tuple[str, int]]:
    """Method -> (class of its colour, number of its shape): the same on the whole page."""
    names = dict.fromkeys(row.method for s in sections for row in s.patched if not row.baseline)
    own = {name: (f"c{i % PALETTE}", i % PALETTE) for i, name in enumerate(names)}
    return own | {name: (look, PALETTE + i) for i, (name, look) in enumerate(zip(BASELINES, LOOKS))}


def pareto(
    section: Section,
    look: dict[str, tuple[str, int]],
    x: Callable[[Row], float | None],
    less: bool,
    label: str,
    ends: Callable[[Row], Interval | None] = lambda row: None,
) -> Plot | None:
    """Accuracy against x, a cost (`less` is better) or a gain; `None` where fewer than two settings have both. Controls whose
    tokens were drawn stand in tables alone."""
    shown = [(r, value, r.score) for r in section.rows if not r.drawn and (value := x(r)) is not None and r.score]
    if len(shown) < 2 or all(row.unpatched for row, _, _ in shown):
        return None
    rows, score = [row for row, _, _ in shown], shown[0][2]
    front = front_of(rows, x, less)
    wide = [None if (found := ends(row)) is None else found.ends for row in rows]
    spans = [(one.value - (one.error or 0.0), one.value + (one.error or 0.0)) for _, _, one in shown]
    xs = [value for _, value, _ in shown]
    to_x, x_ticks = _axis([*xs, *(end for one in wide for end in one or ())], _LEFT, WIDTH - _RIGHT)
    to_y, y_ticks = _axis([end for span in spans for end in span], HEIGHT - _BOTTOM, _TOP)
    marks: dict[str, list[Mark]] = {}
    base = None
    for i, (row, value, own) in enumerate(shown):
        place = to_x(value), to_y(own.value)
        shape = _shape("star" if row.unpatched else str(look[row.method][1]), *place)
        low, high = (to_y(end) for end in spans[i]) if spans[i][0] < spans[i][1] else (None, None)
        left, right = (None, None) if (known := wide[i]) is None else (to_x(end) for end in known)
        mark = Mark(*place, low, high, shape, i in front, _tooltip(row, own, value, label), left, right)
        if row.unpatched:
            base = mark
        else:
            marks.setdefault(row.method, []).append(mark)
    lines = []
    for name, settings in marks.items():
        settings.sort(key=lambda mark: mark.x)
        joined = _points((mark.x, mark.y) for mark in settings)
        lines.append(Line(name, look[name][0], joined, settings, _shape(str(look[name][1]), 9, 7)))
    on_front = sorted((to_x(xs[i]), to_y(shown[i][2].value)) for i in front)
    best = [rows[i].label for i in sorted(front, key=lambda i: xs[i])]
    return Plot(
        f"{score.label} against {label}",
        f"{len(rows)} settings; on the Pareto front: {', '.join(best)}. The table below holds every number.",
        label,
        f"{score.label} ({score.unit})" if score.unit else score.label,
        x_ticks,
        y_ticks,
        lines,
        None if base is None else base.y,
        _points(on_front) if len(on_front) > 1 else "",
        base,
    )


def layers(section: Section, look: dict[str, tuple[str, int]]) -> list[Plot]:
    """Tokens after every layer, one small plot a method, all on the same axes."""
    shown = [row for row in section.patched if len(row.per_layer) > 1 and not row.drawn]
    if not shown:
        return []
    depth = max(len(row.per_layer) for row in shown)
    most = max(max(row.per_layer) for row in shown)
    most = max(most, *(row.tokens_in or 0 for row in shown))
    box = (34.0, 8.0, SMALL_WIDTH - 8.0, SMALL_HEIGHT - 24.0)
    to_x, x_ticks = _axis([0, depth - 1], box[0], box[2], 5, margin=0, whole=True)
    to_y, y_ticks = _axis([0, most], box[3], box[1], 4, margin=0)
    plots = []
    level = next((to_y(row.tokens_in) for row in shown if row.tokens_in is not None), None)
    for name in dict.fromkeys(row.method for row in shown):
        lines, told = [], []
        for row in (r for r in shown if r.method == name):
            steps = [(to_x(i), to_y(value)) for i, value in enumerate(row.per_layer)]
            first, last = figure(row.per_layer[0], 0), figure(row.per_layer[-1], 0)
            end = Mark(*steps[-1], None, None, "", False, f"{row.label}: {last} tokens at the end")
            lines.append(Line(row.label, look[name][0], _points(steps), [end]))
            told.append(f"{row.label}: {first} to {last}")
        about = f"Tokens after each layer. {'; '.join(told)}"
        size = SMALL_WIDTH, SMALL_HEIGHT, box
        plots.append(Plot(name, about, "layer", "tokens", x_ticks, y_ticks, lines, level, "", None, *size))
    return plots


def _axis(
    values: Sequence[float], start: float, stop: float, bins: int = 5, margin: float = 0.06, whole: bool = False
) -> tuple[Callable[[float], float], list[Tick]]:
    """(value -> pixel, round numbers between the ends)."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    room = (high - low) * margin or (0 if margin == 0 else max(abs(high) * 0.1, 0.5))
    low, high = low - room, high + room
    if low == high:
        high = low + 1

    def to(value: float) -> float:
        return round(start + (value - low) / (high - low) * (stop - start), 2)

    found = [float(v) for v in MaxNLocator(bins, integer=whole).tick_values(low, high) if low - 1e-9 <= v <= high + 1e-9]
    digits = next((d for d in range(6) if all(abs(round(v, d) - v) < 1e-9 * max(1.0, abs(v)) for v in found)), 6)
    return to, [Tick(to(v), figure(v, digits)) for v in found]


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _tooltip(row: Row, score: Score, x: float, label: str) -> str:
    error = "" if score.error is None else f" ± {figure(score.error, 2)}"
    words = f"{row.label}: {figure(score.value, 2, unit=f' {score.unit}')}{error}, {label} {x:.3g}"
    return words + (f", measured {with_ends(row.speedup, 2, unit='×')}" if row.speedup else "")


def _polygon(x: float, y: float, corners: int, r: float, turn: float = 0.0, inner: float | None = None) -> str:
    """A regular polygon, or a star with `inner` radius."""
    total = corners * (1 if inner is None else 2)
    points = []
    for i in range(total):
        radius = r if inner is None or i % 2 == 0 else inner
        angle = 2 * math.pi * i / total - math.pi / 2 + turn
        points.append(f"{x + radius * math.cos(angle):.1f} {y + radius * math.sin(angle):.1f}")
    return "M" + "L".join(points) + "Z"


def _cross(x: float, y: float, r: float, turned: bool) -> str:
    d = r * 0.75
    if turned:
        return f"M{x - d:.1f} {y - d:.1f}L{x + d:.1f} {y + d:.1f}M{x - d:.1f} {y + d:.1f}L{x + d:.1f} {y - d:.1f}"
    return f"M{x - r:.1f} {y:.1f}H{x + r:.1f}M{x:.1f} {y - r:.1f}V{y + r:.1f}"


def _shape(name: str, x: float, y: float) -> str:
    """Shapes differ like colours do: nothing is told by colour alone."""
    circle = f"M{x - _R:.1f} {y:.1f}a{_R} {_R} 0 1 0 {2 * _R} 0a{_R} {_R} 0 1 0 {-2 * _R} 0Z"
    return {
        "star": _polygon(x, y, 5, 8.0, inner=3.4),
        "0": circle,
        "1": _polygon(x, y, 4, 1.25 * _R, math.pi / 4),
        "2": _polygon(x, y, 3, 1.3 * _R),
        "3": _polygon(x, y, 4, 1.35 * _R),
        "4": _polygon(x, y, 3, 1.3 * _R, math.pi),
        "5": _polygon(x, y, 5, 1.2 * _R),
        "6": _polygon(x, y, 6, 1.15 * _R),
        "7": _polygon(x, y, 4, 1.5 * _R, inner=0.6 * _R),
        "8": _cross(x, y, _R, True),
        "9": _cross(x, y, _R, False),
    }[name]
