"""What is derived from records: the table, `sweep.csv` and the Pareto plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
FLOOR = ("random", "uniform")
HEADER = ("method", "budget", "tokens", "GMACs", "GFLOPs", "top-1 %", "vs unpatched", "implied", "measured", "achieved")

CAPTION = "± standard error; vs unpatched: paired; tokens: mean over blocks; measured: median of pairs [95 %]"


def ordered(records: Sequence[Record]) -> list[Record]:
    """Unpatched first, then by falling budget, methods before the floor."""
    return sorted(records, key=lambda r: (-r["budget"], r["method"] in FLOOR, r["method"]))


def row(record: Record) -> tuple[str, ...]:
    """The cells of one configuration, as `HEADER` names them."""
    m, unpatched = record["metrics"], "difference" not in record["metrics"]
    measured = (
        f"{record['speedup']:.2f}x [{record['speedup_ci'][0]:.2f}, {record['speedup_ci'][1]:.2f}]"
        if "speedup" in record
        else "-"
    )
    mean_tokens = sum(record["tokens"]["mean_per_layer"]) / len(record["tokens"]["mean_per_layer"])
    return (
        record["method"],
        f"{record['budget']:g}",
        f"{mean_tokens:.0f}",
        f"{record['gmacs']['model']:.3f}",
        f"{record['gflops']['model']:.3f}",
        f"{m['top1']:.2f} ± {m['top1_stderr']:.2f}",
        "-" if unpatched else f"{m['difference']:+.2f} ± {m['difference_stderr']:.2f}",
        "-" if unpatched else f"{record['implied_speedup']:.2f}x",
        measured,
        f"{100 * record['achieved']:.0f} %" if "achieved" in record else "-",
    )


def table(records: Sequence[Record], title: str) -> Table:
    """A rich table with a rule between budgets."""
    from rich.table import Table

    result = Table(
        title=title,
        caption="± standard error; vs unpatched: paired; tokens: mean over blocks; measured: median of pairs [95 %]",
    )
    for i, name in enumerate(HEADER):
        result.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
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
    """What the numbers say, in sentences: whether the task can rank methods, and who does not beat random at equal FLOPs."""
    patched = [r for r in records if "difference" in r["metrics"]]
    floor = {r["budget"]: r for r in patched if r["method"] == "random"}
    lines = []
    if floor:
        lowest = floor[min(floor)]
        loss, error = -lowest["metrics"]["difference"], lowest["metrics"]["difference_stderr"]
        told = loss >= 3 * error
        lines.append(
            f"random at {lowest['budget']:g} of the FLOPs loses {loss:.2f} points, {loss / max(error, 1e-9):.1f} standard errors: "
            + ("enough to rank methods" if told else "too little to rank methods")
        )
    for r in ordered(patched):
        if r["method"] in FLOOR or r["budget"] not in floor:
            continue
        other = floor[r["budget"]]
        gap = r["metrics"]["top1"] - other["metrics"]["top1"]
        if gap <= 0:
            lines.append(f"{r['method']} does not beat random at {r['budget']:g} of the FLOPs ({gap:+.2f} points)")
    lines += [
        f"{r['method']} at {r['budget']:g} was slower than unpatched" for r in ordered(patched) if r.get("speedup", 1) < 1
    ]
    return lines


def write_csv(records: Sequence[Record], path: Path) -> None:
    """One flat row a configuration, `model` first; `pareto` marks those that no other beats in both top-1 and GMACs."""
    best = pareto(records)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "method", "budget", "params", "dataset", "n", "top1", "top1_stderr", "difference", "difference_stderr"]
            + [
                "tokens_out",
                "gmacs",
                "gmacs_reduction",
                "implied_speedup",
                "speedup",
                "speedup_low",
                "speedup_high",
                "achieved",
                "pareto",
            ]
        )
        for r in ordered(records):
            m, ci = r["metrics"], r.get("speedup_ci", ["", ""])
            writer.writerow(
                [r["model"], r["method"], r["budget"], r["params"], r["dataset"], r["n"], m["top1"], m["top1_stderr"]]
                + [m.get("difference", ""), m.get("difference_stderr", ""), r["tokens"]["out"], r["gmacs"]["model"]]
                + [
                    r["gmacs"]["pruner"],
                    r["implied_speedup"],
                    r.get("speedup", ""),
                    *ci,
                    r.get("achieved", ""),
                    r["key"] in best,
                ]
            )


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


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Top-1 against GMACs and against measured speed-up, one line a method, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = next(r for r in records if "difference" not in r["metrics"])
    methods = sorted({r["method"] for r in records} - {base["method"]}, key=lambda m: (m in FLOOR, m))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    panels = (
        (axes[0], "GMACs per image (model)", lambda r: r["gmacs"]["model"], False),
        (axes[1], "measured speed-up over unpatched", lambda r: r.get("speedup"), True),
    )
    for axis, label, x_of, right_is_better in panels:
        for i, method in enumerate(methods):
            points = [r for r in ordered(records) if r["method"] == method and x_of(r) is not None]
            axis.errorbar(
                [x_of(r) for r in points],
                [r["metrics"]["top1"] for r in points],
                yerr=[r["metrics"]["top1_stderr"] for r in points],
                label=method,
                color="0.6" if method in FLOOR else f"C{i}",
                linestyle="--" if method in FLOOR else "-",
                marker="x" if method in FLOOR else "o",
                capsize=2,
            )
        axis.axhline(base["metrics"]["top1"], color="black", linewidth=0.8)
        axis.plot(
            1.0 if right_is_better else base["gmacs"]["model"], base["metrics"]["top1"], "k*", markersize=11, label="unpatched"
        )
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"top-1 on {base['n']} images (%)")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
