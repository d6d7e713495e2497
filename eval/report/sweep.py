"""What is derived from the records of a run or a sweep: tables, `sweep.csv`, the picture, findings in words."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtok.eval.common.statistics import FEWEST, in_brackets, with_error
from vtok.eval.report.tables import FLOOR
from vtok.eval.runs.records import Record, difference
from vtok.writing import replacing

if TYPE_CHECKING:
    from rich.table import Table

UNPATCHED = "unpatched"
HEADER = (
    "setting",
    "tokens",
    "GMACs",
    "+ reduction",
    "metric %",
    "vs unpatched [95 %]",
    "implied",
    "measured [95 %]",
    "achieved",
)
CAPTION = "± standard error; vs unpatched: paired; tokens: mean over layers; measured: median of pairs; * on the Pareto front"


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Records that can be compared: of one model on the same data of one task under the same conditions, unpatched first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        names = ("task", "model", "dataset", "n", "dtype", "batch_size", "seed", "device")
        found.setdefault(json.dumps([record.get(name) for name in names]), []).append(record)
    return [sorted(group, key=lambda r: r["method"] != UNPATCHED) for group in found.values()]


def title(records: Sequence[Record]) -> str:
    """Of a group: model, data, how many samples."""
    first = records[0]
    return (
        f"{first['model']} on {first['dataset']} ({first['task']}), {first['n']} samples, {first['dtype']} on {first['device']}"
    )


def score(record: Record) -> float:
    """The headline metric in percent."""
    return _scale(record) * record["metrics"][record["primary"]]


def score_error(record: Record) -> float:
    """Its standard error in percent; 0 where there is none."""
    return _scale(record) * (record["metrics"].get(f"{record['primary']}_stderr") or 0.0)


def total_gmacs(record: Record) -> float | None:
    """GMACs a sample, of the model and of the reduction; `None` where they are not known."""
    macs = record.get("gmacs")
    return None if macs is None else macs["model"] + macs["pruner"]


def pareto(records: Sequence[Record]) -> set[str]:
    """Keys of the records of one group that no other dominates (fewer GMACs, reduction included, and at least the score)."""

    def dominated(r: Record) -> bool:
        here = (total_gmacs(r), score(r))
        others = [(total_gmacs(o), score(o)) for o in records if total_gmacs(o) is not None]
        return any(macs <= here[0] and value >= here[1] and (macs, value) != here for macs, value in others)  # type: ignore[operator]

    return {r["key"] for r in records if total_gmacs(r) is not None and not dominated(r)}


def row(record: Record, best: set[str]) -> tuple[str, ...]:
    """The cells of one configuration, as `HEADER` names them; `best` holds the keys of the Pareto front."""
    change, _, low_high = difference(record)
    scale, macs, layers = _scale(record), record.get("gmacs"), record.get("tokens", {}).get("mean_per_layer")
    return (
        record["setting"] + (" *" if record["key"] in best else ""),
        f"{sum(layers) / len(layers):.1f}" if layers else "-",
        f"{macs['model']:.3f}" if macs else "-",
        f"{macs['pruner']:.4f}" if macs else "-",
        with_error(record["metrics"], record["primary"], scale, 2),
        "-" if change is None else f"{scale * change:+.2f}" + _interval(low_high, scale),
        f"{record['implied_speedup']:.2f}x" if change is not None and "implied_speedup" in record else "-",
        f"{record['speedup']:.2f}x" + in_brackets(speed_ends(record)) if "speedup" in record else "-",
        f"{100 * record['achieved']:.0f} %" if record.get("achieved") is not None else "-",
    )


def table(records: Sequence[Record]) -> Table:
    """A rich table of one group."""
    from rich.table import Table

    result = Table(title=title(records), caption=CAPTION)
    header = (*HEADER[:4], f"{records[0]['primary']} %", *HEADER[5:])
    for i, name in enumerate(header):
        result.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    best = pareto(records)
    for record in records:
        result.add_row(*row(record, best), style="dim" if record["method"] in FLOOR else None)
    return result


def findings(records: Sequence[Record]) -> list[str]:
    """Which settings of a group were slower than unpatched, and by how much; how many were timed too seldom to tell."""
    few = [r for r in records if "speedup" in r and speed_ends(r) is None]
    slow = [(r, ends) for r in records if (ends := speed_ends(r)) is not None and r["speedup"] < 1]
    lines = [
        f"{r['setting']} was {'slower than unpatched' if ends[1] < 1 else 'no faster than unpatched'}: "
        f"{r['speedup']:.2f}x{in_brackets(ends)}"
        for r, ends in slow
    ]
    if few:
        lines.append(
            f"{len(few)} settings were timed in fewer than {FEWEST} pairs of batches: too few for an interval of their "
            "speed-up; take more samples or smaller batches"
        )
    return lines


def speed_ends(record: Record) -> list[float] | None:
    """The 95 % interval of a speed-up; `None` where there is none, or where it is from too few pairs."""
    return record.get("speedup_ci") if record.get("pairs", FEWEST) >= FEWEST else None


def flat(record: Record, best: set[str]) -> dict[str, Any]:
    """One row of `sweep.csv`: `model` first; metrics as the task has them, percent or shares."""
    change, error, low_high = difference(record)
    macs, speeds, kernels = record.get("gmacs", {}), record.get("samples_per_sec", {}), record.get("kernel") or {}
    low, high = speed_ends(record) or ("", "")
    return {
        "model": record["model"],
        "backend": record["backend"],
        "task": record["task"],
        "dataset": record["dataset"],
        "method": record["method"],
        "setting": record["setting"],
        "budget": _or_empty(record["budget"]),
        "params": json.dumps(record["params"]),
        "n": record["n"],
        "metric": record["primary"],
        "value": record["metrics"][record["primary"]],
        "stderr": _or_empty(record["metrics"].get(f"{record['primary']}_stderr")),
        "difference": _or_empty(change),
        "difference_stderr": _or_empty(error),
        "difference_low": _or_empty(low_high and low_high[0]),
        "difference_high": _or_empty(low_high and low_high[1]),
        "tokens_in": record.get("tokens", {}).get("in", ""),
        "tokens_out": record.get("tokens", {}).get("out", ""),
        "gmacs": macs.get("model", ""),
        "gmacs_base": macs.get("base", ""),
        "gmacs_reduction": macs.get("pruner", ""),
        "implied_speedup": record.get("implied_speedup", ""),
        "samples_per_sec_base": speeds.get("base", ""),
        "samples_per_sec": speeds.get("patched", ""),
        "speedup": record.get("speedup", ""),
        "speedup_low": low,
        "speedup_high": high,
        "achieved": _or_empty(record.get("achieved")),
        "kernel": kernels.get("patched", kernels.get("base", "")),
        "dtype": record["dtype"],
        "device": record["device"],
        "threads": record["threads"],
        "batch_size": record["batch_size"],
        "seed": record["seed"],
        "pareto": record["key"] in best,
        "key": record["key"],
    }


def write_csv(records: Sequence[Record], path: Path) -> None:
    """One flat row a configuration; `pareto` marks those that no other of the same model and data beats in both."""
    rows = [flat(record, pareto(group)) for group in groups(records) for record in group]
    with replacing(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _scale(record: Record) -> float:
    return 1.0 if record["percent"] else 100.0


def _interval(low_high: Sequence[float] | None, scale: float) -> str:
    return in_brackets(None if low_high is None else [scale * end for end in low_high], "+.2f")


def _or_empty(value: Any) -> Any:
    return "" if value is None else value
