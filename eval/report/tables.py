"""What is derived from records: the table, `sweep.csv` and the Pareto plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vtok.eval.common.statistics import in_brackets, mean_stderr, paired_difference, with_error
from vtok.writing import replacing

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
FLOOR = ("random", "uniform")
HEADER = ("method", "budget", "tokens", "GMACs", "GFLOPs", "top-1 %", "vs unpatched", "implied", "measured [95 %]", "achieved")

CAPTION = (
    "± standard error, or [95 %] where no image differs; vs unpatched: paired; tokens: mean over blocks; measured: median of "
    "pairs [95 %]"
)


def is_unpatched(record: Record) -> bool:
    """Whether a record is that of the model as it came."""
    return "difference" not in record["metrics"]


def ordered(records: Sequence[Record]) -> list[Record]:
    """Unpatched first, then by falling budget, methods before the floor."""
    return sorted(records, key=lambda r: (-r["budget"], r["method"] in FLOOR, r["method"]))


def row(record: Record) -> tuple[str, ...]:
    """The cells of one configuration, as `HEADER` names them."""
    m, unpatched = record["metrics"], is_unpatched(record)
    measured = f"{record['speedup']:.2f}x{in_brackets(record['speedup_ci'])}" if "speedup" in record else "-"
    mean_tokens = sum(record["tokens"]["mean_per_layer"]) / len(record["tokens"]["mean_per_layer"])
    return (
        record["method"],
        f"{record['budget']:g}",
        f"{mean_tokens:.0f}",
        f"{record['gmacs']['model']:.3f}",
        f"{record['gflops']['model']:.3f}",
        with_error(m, "top1", digits=2),
        "-" if unpatched else with_error(m, "difference", digits=2, sign="+"),
        "-" if unpatched else f"{record['implied_speedup']:.2f}x",
        measured,
        f"{100 * record['achieved']:.0f} %" if "achieved" in record else "-",
    )


def table(records: Sequence[Record], title: str) -> Table:
    """A rich table with a rule between budgets."""
    from rich.table import Table

    result = Table(title=title, caption=CAPTION)
    for i, name in enumerate(HEADER):
        result.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    rows = ordered(records)
    for i, record in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["budget"] != record["budget"]
        style = "dim" if record["method"] in FLOOR else None
        result.add_row(*row(record), end_section=last, style=style)
    return result


def markdown(records: Sequence[Record]) -> str:
    """The same as a GitHub table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(row(r)) + " |" for r in ordered(records)]
    return "\n".join(lines)


def findings(records: Sequence[Record]) -> list[str]:
    """What the numbers say, in sentences: whether the task can rank methods, who does not beat random, who is slower."""
    patched = ordered([r for r in records if not is_unpatched(r)])
    random = {r["budget"]: r for r in patched if r["method"] == "random"}
    lines = []
    if random:
        lowest = random[min(random)]
        loss, error = -lowest["metrics"]["difference"], lowest["metrics"]["difference_stderr"]
        enough = "enough" if error > 0 and loss >= 3 * error else "too little"
        errors = f", {loss / error:.1f} standard errors" if error > 0 else ""
        lines.append(f"random at {lowest['budget']:g} of the FLOPs loses {loss:.2f} points{errors}: {enough} to rank methods")
    for r in patched:
        if r["method"] in FLOOR or r["budget"] not in random:
            continue
        change = correctness(r).astype(float) - correctness(random[r["budget"]])
        gap, error = mean_stderr(change)
        found = paired_difference(change).scaled(100)
        if gap <= 2 * error or found.sign <= 0:
            where = f"{r['budget']:g} of the FLOPs"
            lines.append(
                f"{r['method']} does not clearly beat random at {where}: {100 * gap:+.2f}{in_brackets(found.ends, '+.2f')}"
            )
    lines += [f"{r['method']} at {r['budget']:g} was slower than unpatched" for r in patched if _slower(r)]
    few = sum("speedup" in r and r["speedup_ci"] is None for r in patched)
    return [*lines, f"{few} settings were timed too few times for an interval of their speed-up"] if few else lines


def _slower(record: Record) -> bool:
    """Whether the whole interval of a measured speed-up lies below 1."""
    ends = record.get("speedup_ci")
    return ends is not None and ends[1] < 1


def correctness(record: Record) -> np.ndarray:
    """[n] bool: which images a configuration got right."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(record["correct"]), np.uint8), count=record["n"]).astype(bool)


def flat(record: Record, best: set[str]) -> dict[str, Any]:
    """One row of `sweep.csv`; `best` holds the keys of the Pareto front."""
    metrics, low_high = record["metrics"], record.get("speedup_ci") or ("", "")
    return {
        "model": record["model"],
        "method": record["method"],
        "budget": record["budget"],
        "params": json.dumps(record["params"]),
        "dataset": record["dataset"],
        "n": record["n"],
        "top1": metrics["top1"],
        "top1_stderr": metrics["top1_stderr"],
        "difference": metrics.get("difference", ""),
        "difference_stderr": metrics.get("difference_stderr", ""),
        "tokens_out": record["tokens"]["out"],
        "gmacs": record["gmacs"]["model"],
        "gmacs_reduction": record["gmacs"]["pruner"],
        "implied_speedup": record["implied_speedup"],
        "speedup": record.get("speedup", ""),
        "speedup_low": low_high[0],
        "speedup_high": low_high[1],
        "achieved": record.get("achieved", ""),
        "pareto": record["key"] in best,
    }


def write_csv(records: Sequence[Record], path: Path) -> None:
    """One flat row a configuration, `model` first; `pareto` marks those that no other beats in both top-1 and GMACs."""
    rows = [flat(record, pareto(records)) for record in ordered(records)]
    with replacing(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def pareto(records: Sequence[Record]) -> set[str]:
    """Keys of the configurations that no other dominates (fewer MACs and at least the accuracy)."""

    def dominated(r: Record) -> bool:
        macs, top1 = r["gmacs"]["model"], r["metrics"]["top1"]
        return any(
            o["gmacs"]["model"] <= macs
            and o["metrics"]["top1"] >= top1
            and (o["gmacs"]["model"], o["metrics"]["top1"]) != (macs, top1)
            for o in records
        )

    return {r["key"] for r in records if not dominated(r)}


class Panel(NamedTuple):
    """What one plot shows: functions of a record that give x, y and the standard error of y (`None` = no point)."""

    x_label: str
    y_label: str
    x: Callable[[Record], float | None]
    y: Callable[[Record], float]
    error: Callable[[Record], float]


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Top-1 against GMACs and against measured speed-up, one line a method, with standard errors."""
    n = next(r["n"] for r in records if is_unpatched(r))
    top1, error = lambda r: r["metrics"]["top1"], lambda r: r["metrics"]["top1_stderr"]
    label = f"top-1 on {n} images (%)"
    macs = Panel("GMACs per image (model)", label, lambda r: r["gmacs"]["model"], top1, error)
    speed = Panel(
        "measured speed-up over unpatched", label, lambda r: 1.0 if is_unpatched(r) else r.get("speedup"), top1, error
    )
    plot_panels(records, (macs, speed), path, title, share_y=True)


def plot_panels(records: Sequence[Record], panels: Sequence[Panel], path: Path, title: str, share_y: bool = False) -> None:
    """Panels side by side, one line a method with standard errors, the unpatched model as a star and a level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = next(r for r in records if is_unpatched(r))
    methods = sorted({r["method"] for r in records} - {base["method"]}, key=lambda m: (m in FLOOR, m))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.6), sharey=share_y, layout="constrained")
    for axis, panel in zip(axes, panels):
        for i, method in enumerate(methods):
            points = [r for r in ordered(records) if r["method"] == method and panel.x(r) is not None]
            axis.errorbar(
                [panel.x(r) for r in points],
                [panel.y(r) for r in points],
                yerr=[panel.error(r) for r in points],
                label=method,
                color="0.6" if method in FLOOR else f"C{i}",
                linestyle="--" if method in FLOOR else "-",
                marker="x" if method in FLOOR else "o",
                capsize=2,
            )
        axis.axhline(panel.y(base), color="black", linewidth=0.8)
        axis.plot(panel.x(base), panel.y(base), "k*", markersize=11, label="unpatched")
        axis.set_xlabel(panel.x_label)
        axis.grid(alpha=0.25)
        if axis is axes[0] or not share_y:
            axis.set_ylabel(panel.y_label)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=130)
    plt.close(figure)
