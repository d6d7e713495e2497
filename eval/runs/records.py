"""The one shape of a run's records, whatever task they come from, and the key that says which configuration one belongs to.

`metrics` holds the task's own names; `primary` is the headline among them, `percent` says whether they are percent or shares.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vtok.config import MethodConfig
from vtok.eval.benchmarks.throughput import device_name
from vtok.eval.common.records import Record, finite, key_of, stamp
from vtok.eval.common.settings import Setting, versions
from vtok.eval.common.statistics import FEWEST, Z95, Interval
from vtok.eval.models.assets import asset
from vtok.eval.runs.loader import RunConfig
from vtok.eval.runs.methods import portable
from vtok.eval.runs.schema import FIGURES


def content(config: RunConfig, task: str, out: Path) -> dict[str, str | None]:
    """Stamps of the files that a task of a run reads: its data, those for calibration, and what its options name; the folder
    of the results, `out`, may lie in that of the data."""
    options = [one for value in config.options.values() for one in (value if isinstance(value, (list, tuple)) else [value])]
    named = {"data": config.data.get(task), "calibration": config.calibration.get(task)}
    named |= {f"options: {one}": one for one in options if isinstance(one, str)}
    return {what: found for what, path in named.items() if path and (found := stamp(path, out)) is not None}


def key(config: RunConfig, task: str, setting: Setting, pretrained: bool, there: Mapping[str, str | None]) -> str:
    """What identifies a configuration: everything that decides a result, but the machine. `there` is the task's `content`."""
    return key_of(
        {
            "task": task,
            "model": [config.backend, config.model, config.pretrained, pretrained, _stamp(config)],
            "setting": portable(plain(setting)),
            "data": [config.data.get(task), {what: one for what, one in there.items() if what != "calibration"}],
            "calibration": [config.calibration.get(task), there.get("calibration")] if "flops" in setting.params else None,
            "options": config.options,
            "num_samples": config.num_samples,
            "batch_size": config.batch_size,
            "dtype": config.dtype,
            "seed": config.seed,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "vtok": versions()["vtok"],
        }
    )


def plain(setting: Setting) -> Any:
    """What was asked for, as plain values: `None`, or a list with one mapping a method."""
    if setting.method is None:
        return None
    parts = setting.method if isinstance(setting.method, list) else [setting.method]
    found = [part.to_dict() if isinstance(part, MethodConfig) else {"method": part, **setting.params} for part in parts]
    return [*found, {"at_random": True}] if setting.at_random else found


def resolved(config: RunConfig, task: str, spec: Any) -> dict[str, Any]:
    """The run file of one configuration alone, which repeats a record; `spec` = what the run's file says about the setting."""
    left_out = ("method", "methods", "task", "tasks", "sweep", "output", "table", "published", "data", "calibration")
    found = {name: copy.deepcopy(value) for name, value in config.content.items() if name not in left_out}
    found |= {"batch_size": config.batch_size, "dtype": config.dtype, "seed": config.seed, "task": task, "method": spec}
    for name, given in (("data", config.data), ("calibration", config.calibration)):
        if task in given:
            found[name] = given[task]
    return found


def complete(record: Record, config: RunConfig, task: str, setting: Setting, extra: Mapping[str, Any]) -> Record:
    """A task's record with what all records of runs have, and `extra`, the `key` among it."""
    metrics = dict(record["metrics"])
    for name in [name.removesuffix("_stderr") for name in metrics if name.endswith("difference_stderr")]:
        middle, error = metrics[name], metrics[f"{name}_stderr"]
        known = error is not None and error > 0 and record["n"] >= FEWEST
        metrics.setdefault(f"{name}_ci", [middle - Z95 * error, middle + Z95 * error] if known else None)
    first = next((name for name in FIGURES.get(task, ()) if name in metrics), next(iter(metrics)))
    found = {
        **record,
        "task": task,
        "model": config.model,
        "backend": config.backend,
        "method": setting.name,
        "setting": portable(setting.title),
        "params": portable(record["params"]),
        "budget": setting.params.get("flops"),
        "metrics": metrics,
        "primary": record.get("primary", first),
        "percent": record.get("percent", False),
        "device_name": device_name(torch.device(record["device"])),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        **extra,
    }
    return finite(found | _times(found))


def whole(record: Record) -> bool:
    """Whether a record has what tables and pictures are made of; one that somebody has edited may lack it."""
    metrics, primary = record.get("metrics"), record.get("primary")
    texts = ("task", "model", "method", "setting", "dtype", "device")
    return (
        all(isinstance(record.get(name), str) for name in texts)
        and isinstance(metrics, dict)
        and isinstance(primary, str)
        and isinstance(metrics.get(primary), (int, float))
        and isinstance(record.get("n"), int)
        and {"params", "budget", "dataset", "percent", "backend", "seed", "threads", "batch_size"} <= set(record)
    )


def _times(record: Record) -> dict[str, Any]:
    """Fields of speed that a task gives in another form or leaves out; of questions they are those up to the first token."""
    found: dict[str, Any] = {}
    first = record.get("ttft_ms")
    if first is not None and "samples_per_sec" not in record:
        sides = {"base": first["patched"]} if record["method"] == "unpatched" else first
        found["samples_per_sec"] = {side: 1000 * record["batch_size"] / ms for side, ms in sides.items() if ms}
    if "speedup" in record and "implied_speedup" in record:
        speed = Interval(record["speedup"], *(record["speedup_ci"] or ())).scaled(1 / record["implied_speedup"])
        found |= {"achieved": speed.point, "achieved_ci": speed.ends}
    return found


def with_cost(base: Record | None, record: Record) -> list[Record]:
    """The unpatched model's record once more, with its GMACs, if it had none and a patched one beside it tells them.

    What a prompt costs is only known where the model is patched.
    """
    if base is None or "gmacs" in base or "gmacs" not in record or record["key"] == base["key"]:
        return []
    macs = {name: {"base": record[name]["base"], "model": record[name]["base"], "pruner": 0.0} for name in ("gmacs", "gflops")}
    return [{**base, **macs, "implied_speedup": 1.0}]


def _stamp(config: RunConfig) -> Any:
    """Sizes and times of the files of a model that is a path or comes with vtok: trained again, it is another one."""
    path = Path(config.model)
    if config.backend == "reference":
        path = asset(_WEIGHTS[config.model])
        return [path.stat().st_size, key_of({"weights": path.read_bytes().hex()})]
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    return [[os.path.basename(one), one.stat().st_size, one.stat().st_mtime_ns] for one in files]


_WEIGHTS = {
    "reference-vit": "fashion_vit.safetensors",
    "reference-dinov2": "clip_art/head.safetensors",  # the encoder's own file has a checksum
    "reference-clip": "easyvqa_clip/open_clip_model.safetensors",
    "reference-llava": "easyvqa_llava/model.safetensors",
    "reference-llava-next": "easyvqa_llava_next/differences.safetensors",
    "reference-scenes": "scenes/trained.safetensors",  # the encoder's own file has a checksum
    "reference-print": "pages/trained.safetensors",  # likewise
}
