"""Records as a pandas frame, one row a setting: what `sweep.csv` holds and what plots are drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from vtok.eval.common.records import difference
from vtok.eval.report.rows import Row, speed_ends
from vtok.eval.report.sections import Section
from vtok.eval.report.values import at, mapping

CSV = (
    *("model", "backend", "task", "dataset", "method", "setting", "budget", "params", "n", "metric", "value", "stderr"),
    *("difference", "difference_stderr", "difference_low", "difference_high", "tokens_in", "tokens_out", "gmacs", "gmacs_base"),
    *("gmacs_reduction", "implied_speedup", "samples_per_sec_base", "samples_per_sec", "speedup", "speedup_low"),
    *("speedup_high", "achieved", "kernel", "dtype", "device", "threads", "batch_size", "seed", "pareto", "key"),
)


def front_of(rows: Sequence[Row], x: Callable[[Row], float | None], less: bool) -> set[int]:
    """Numbers of the rows that no other one beats in x, a cost (`less` is better) or a gain, and in the headline metric."""
    points = [(i, (-v if less else v), r.score.value) for i, r in enumerate(rows) if (v := x(r)) is not None and r.score]

    def beaten(a: float, b: float) -> bool:
        return any(c >= a and d >= b and (c, d) != (a, b) for _, c, d in points)

    return {i for i, a, b in points if not beaten(a, b)}


def total_gmacs(row: Row) -> float | None:
    """GMACs per sample, token reduction included."""
    return row.total_gmacs


def frame(sections: Iterable[Section]) -> pd.DataFrame:
    """The settings of all sections; nothing (`None`) where a record says nothing.

    Returns:
        The columns of `CSV`, metrics as their task has them (percent or shares). `pareto` marks what no other setting of the
        section beats in score and GMACs, the reduction's included. Behind them, for plots: `section` (its number), `label`,
        `unpatched`, `baseline`, `score` and `score_error` in percent, `total_gmacs`, `mean_tokens`, `measured` (speed-up, 1 of
        the unpatched model).
    """
    rows = []
    for number, section in enumerate(sections):
        front = front_of(section.rows, total_gmacs, True)
        rows += [{**_recorded(row, i in front), **_derived(row, number)} for i, row in enumerate(section.rows)]
    return pd.DataFrame(rows, dtype=object)


def _recorded(row: Row, best: bool) -> dict[str, Any]:
    r, primary = row.record, row.primary or ""
    change, error, ends = difference({**r, "metrics": mapping(r.get("metrics")), "primary": primary})
    low, high = ends or (None, None)
    slow, fast = speed_ends(r) or (None, None)
    made = {
        "params": json.dumps(r.get("params")),
        "metric": primary or None,
        "value": at(r, "metrics", primary),
        "stderr": at(r, "metrics", f"{primary}_stderr"),
        "difference": change,
        "difference_stderr": error,
        "difference_low": low,
        "difference_high": high,
        "tokens_in": at(r, "tokens", "in"),
        "tokens_out": at(r, "tokens", "out"),
        "gmacs": at(r, "gmacs", "model"),
        "gmacs_base": at(r, "gmacs", "base"),
        "gmacs_reduction": at(r, "gmacs", "pruner"),
        "samples_per_sec_base": at(r, "samples_per_sec", "base"),
        "samples_per_sec": at(r, "samples_per_sec", "patched"),
        "speedup_low": slow,
        "speedup_high": fast,
        "kernel": at(r, "kernel", "patched") or at(r, "kernel", "base"),
        "pareto": best,
    }
    return {name: made[name] if name in made else r.get(name) for name in CSV}


def _derived(row: Row, section: int) -> dict[str, Any]:
    score = row.score
    return {
        "section": section,
        "label": row.label,
        "unpatched": row.unpatched,
        "baseline": row.baseline,
        "score": None if score is None else score.value,
        "score_error": None if score is None else score.error or 0.0,
        "total_gmacs": row.total_gmacs,
        "mean_tokens": row.mean_tokens,
        "measured": row.measured,
    }
