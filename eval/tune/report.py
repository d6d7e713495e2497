"""What a search found: a table, the paired difference of tuned and default with its interval, and files to use it by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vtok.config import MethodConfig
from vtok.eval.common.records import Records, bits, key_of
from vtok.eval.common.settings import versions
from vtok.eval.common.statistics import Interval, in_brackets, mean_interval, mean_stderr, paired_difference, share, with_error
from vtok.eval.options import Plan
from vtok.eval.report.tables import Table
from vtok.eval.tune.models import Prepared
from vtok.eval.tune.samples import Samples
from vtok.eval.tune.subjects import Subject
from vtok.eval.tune.tuner import Held, Tuned

# measure -> (title, factor to the unit shown, digits, whether more is better)
MEASURES: dict[str, tuple[str, float, int, bool]] = {
    "top1": ("top-1 %", 100.0, 2, True),
    "agreement": ("agreement %", 100.0, 2, True),
    "cross_entropy": ("cross-entropy, nats", 1.0, 4, False),
    "kl": ("KL, nats", 1.0, 4, False),
    "distance": ("1 - cosine", 1.0, 5, False),
}
_PRIMARY = ("top1", "agreement", "distance")


def paired(a: np.ndarray, b: np.ndarray) -> Interval:
    """Mean of a - b with its 95 % interval, a score interval where both are shares."""
    shares = all(np.isin(values, (0, 1)).all() for values in (a, b))
    return paired_difference(a - b) if shares else mean_interval(a - b)


def primary(tuned: Tuned) -> str:
    """The measure that users care for most, of those that there are."""
    return next(name for name in _PRIMARY if name in tuned.held_out["default"].values)


def table(tuned: Tuned, subject: Subject, held_out: Samples) -> Table:
    """One row a setting, on held-out samples."""
    values = tuned.held_out["default"].values
    measures = [name for name in MEASURES if name in values]
    default = tuned.held_out["default"]
    lines = []
    for name, held in tuned.held_out.items():
        cells = _costs(held.cost, default.cost)
        for measure in measures:
            _, scale, digits, _ = MEASURES[measure]
            trivial = name == "unpatched" and measure not in ("top1", "cross_entropy")
            cells.append("-" if trivial else with_error(_mean(measure, held.values[measure]), measure, scale, digits))
        lines.append([name, *cells])
    shown = Table.plain(
        ("setting", "GMACs", "pruner", "tokens out", *(MEASURES[name][0] for name in measures)),
        lines,
        title=f"{subject.name}, {subject.config.name}: {len(values[measures[0]])} held-out samples of {held_out.name}",
        caption="± standard error; tuned - default is paired, sample by sample, with its 95 % interval",
    )
    if tuned.best:
        shown.add(["tuned - default", "", "", "", *(_told(gap(tuned, name), name) for name in measures)], style=None)
    return shown


def gap(tuned: Tuned, measure: str, name: str = "tuned", beside: str = "default") -> Interval:
    """By how much a setting differs from another on held-out samples, in the unit shown."""
    values = [tuned.held_out[one].values[measure] for one in (name, beside)]
    return paired(*values).scaled(MEASURES[measure][1])


def _told(found: Interval, measure: str) -> str:
    digits = MEASURES[measure][2]
    return f"{found.point:+.{digits}f}{in_brackets(found.ends, f'+.{digits}f')}"


def _mean(measure: str, values: np.ndarray, scale: float = 1.0) -> dict[str, Any]:
    """A measure with its standard error and its 95 % interval, under the names that records have."""
    mean, error = mean_stderr(values)
    ends = (share if np.isin(values, (0, 1)).all() else mean_interval)(values).scaled(scale).ends
    return {measure: scale * mean, f"{measure}_stderr": scale * error, f"{measure}_ci": ends}


def _costs(cost: Mapping[str, Any], of_default: Mapping[str, Any]) -> list[str]:
    """GMACs of the model and of the reduction, tokens; a model that is not patched may not say, but the default knows."""
    macs = cost.get("gmacs", {"model": of_default["gmacs"]["base"], "pruner": 0.0})
    return [f"{macs['model']:.4f}", f"{macs['pruner']:.4f}", f"{cost['tokens']['out']:.1f}" if "tokens" in cost else "-"]


def finding(tuned: Tuned) -> str:
    """One sentence on what the search was worth."""
    if not tuned.best:
        return "the default was best on the calibration set: nothing to gain from these candidates"
    measure = primary(tuned)
    (title, _, _, more), found = MEASURES[measure], gap(tuned, measure)
    text = f"{title}: {_told(found, measure)} against the default"
    if not found.sign:
        return f"{text}: no difference that {len(tuned.held_out['tuned'].values[measure])} held-out samples could show"
    better = (found.point > 0) == more
    return f"{text}: the tuned schedule is {'better' if better else 'worse'} on held-out samples"


def schedule(config: MethodConfig) -> str:
    """The parameters of a method that are not at their defaults."""
    return ", ".join(f"{name}={value}" for name, value in config.given().items()) or "defaults"


def tokens(held: Held) -> str:
    """Mean tokens that leave each block (of a vision-language model: visual ones that enter each layer)."""
    return " ".join(f"{count:.0f}" for count in held.cost["tokens"]["mean_per_layer"])


def records_of(tuned: Tuned, subject: Subject, plan: Plan, held_out: Samples) -> list[dict[str, Any]]:
    """One record a setting, as evaluation tasks write them."""
    found = []
    base, first = tuned.held_out["unpatched"].values, next(subject.patched.parameters())
    for name, held in tuned.held_out.items():
        number = {"unpatched": None, "default": 0, "tuned": tuned.best}[name]
        one = None if number is None else tuned.candidates[number]
        metrics: dict[str, Any] = {}
        for measure, column in held.values.items():
            metrics |= _mean(measure, column, MEASURES[measure][1])
        if one is not None and "top1" in metrics:
            change = gap(tuned, "top1", name, "unpatched")
            error = 100 * mean_stderr(held.values["top1"] - base["top1"])[1]
            metrics |= {"difference": change.point, "difference_stderr": error, "difference_ci": change.ends}
        if name == "tuned":
            for measure in held.values:
                change = gap(tuned, measure)
                metrics |= {f"{measure}_against_default": change.point, f"{measure}_against_default_ci": change.ends}
        record = {
            "task": held_out.task,
            "model": subject.name,
            "backend": subject.backend,
            "method": "unpatched" if one is None else subject.config.name,
            "setting": name if one is None else f"{name}: {subject.config.name}({schedule(one.config)})",
            "params": {} if one is None else {k: v for k, v in one.config.to_dict().items() if k != "method"},
            "budget": None if one is None else plan.flops,
            "fraction": 1.0 if one is None else one.fraction,
            "dataset": held_out.name,
            "n": len(next(iter(held.values.values()))),
            "metrics": metrics,
            "primary": primary(tuned),
            "percent": MEASURES[primary(tuned)][1] == 100,
            **held.cost,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "threads": torch.get_num_threads(),
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "versions": versions(),
        }
        if "top1" in held.values:
            record["correct"] = bits(held.values["top1"] > 0.5)
        record["key"] = key_of({**subject.identity, "setting": record["setting"], "data": held_out.identity, "of": "tune"})
        found.append(record)
    return found


def run_file(tuned: Tuned, made: Prepared, plan: Plan, about: str, output: str = "") -> str:
    """The winner as a run file: `vtok run` takes it. `about` is the comment on top, `output` the folder for the results of the
    run."""
    winner = tuned.candidates[tuned.best].config
    content: dict[str, Any] = {
        "model": dict(made.model),
        "method": {"name": winner.name, **{name: _plain(value) for name, value in winner.given().items()}},
        "task": made.held_out.task,
        "data": made.held_out.dataset,
        "batch_size": plan.batch_size,
        "seed": plan.seed,
        "options": dict(made.options),
        "output": output,
    }
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    kept = {key: value for key, value in content.items() if value not in ("", {})}
    return comment + yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=120)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def keep_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Appends what the file does not hold yet."""
    kept = Records(path)
    there = kept.by_key()
    kept.extend(record for record in records if record["key"] not in there)
