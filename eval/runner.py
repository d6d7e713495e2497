"""Runs a `RunConfig` and sets what was published beside what is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vtok.errors import ConfigError
from vtok.eval.runs import FIGURES, RunConfig
from vtok.eval.tasks import TASKS

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run_config(
    config: RunConfig, data: Path, pretrained: bool = True, workers: int = 4, console: Console | None = None
) -> list[dict[str, Any]]:
    """Runs a configuration's task, unpatched and patched on the same batches.

    Args:
        config: the run.
        data: folder of the data.
        pretrained: load the model's weights (False: random ones, to try a configuration out).
        workers: processes that read images.
        console: for the progress bar; `None` = none.

    Returns:
        The records of the unpatched and of the patched model.
    """
    task = TASKS.get(config.task)
    options = _options(task, config, pretrained, workers)
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        bar = progress.add_task(config.name, total=None)
        return task(
            config.model,
            data,
            [None, *config.settings],
            options,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _options(task: Any, config: RunConfig, pretrained: bool, workers: int) -> Any:
    """The task's own options, from what a run says; the class is read off the task's annotation.

    Raises:
        ConfigError: the task does not say which options it takes.
    """
    hint = get_type_hints(task).get("options")
    kind = next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)
    if kind is None:
        raise ConfigError(f"task {config.task} must annotate its parameter `options` with a dataclass, found {hint!r}")
    wanted = {
        "batch_size": config.batch_size,
        "model_dtype": _DTYPES[config.dtype],
        "pretrained": pretrained,
        "seed": config.seed,
        "workers": workers,
    }
    if config.backend != "timm":  # weights go by tag there, and names need a backend
        wanted |= {"pretrained": (config.pretrained or "") if pretrained else "", "backend": config.backend}
    known = {field.name for field in dataclasses.fields(kind)}
    made: Any = kind
    return made(**{name: value for name, value in wanted.items() if name in known})


def published_beside_measured(config: RunConfig, records: list[dict[str, Any]]) -> Table:
    """A table with one row a figure, in percent. Published GFLOPs count a multiply-accumulate once, as we do here."""
    base, patched = records
    p = config.published
    table = Table(title=f"{config.name}: {config.model}, {config.settings[0].name}", caption=_caption(config, patched))
    table.add_column("")
    table.add_column("published", justify="right")
    table.add_column("measured", justify="right")
    rows: list[tuple[str, Any, str]] = []
    for name in FIGURES.get(config.task, ()):
        label = {"top1": "top-1", "acc1": "top-1"}.get(name, name.replace("_", " "))
        rows += [
            (f"{label} unpatched %", p.get(f"base_{name}"), _measured(config, base, name)),
            (f"{label} patched %", p.get(name), _measured(config, patched, name)),
            ("difference", _difference(p, name), _measured_difference(config, base, patched, name)),
        ]
    if "gmacs" in base:
        rows += [
            ("GMACs unpatched", p.get("base_gflops"), f"{base['gmacs']['model']:.3f}"),
            ("GMACs patched", p.get("gflops"), f"{patched['gmacs']['model']:.3f}"),
        ]
    rows.append(("images", p.get("images"), str(patched["n"])))
    for name, published, measured in rows:
        table.add_row(name, "-" if published is None else str(published), measured)
    return table


def _percent(config: RunConfig) -> float:
    """Factor from a task's metrics to percent: clip_benchmark's are shares."""
    return 1.0 if config.task == "imagenet" else 100.0


def _with_error(text: str, error: float | None, scale: float) -> str:
    return text if error is None else f"{text} ± {scale * error:.3f}"


def _measured(config: RunConfig, record: dict[str, Any], name: str) -> str:
    scale, metrics = _percent(config), record["metrics"]
    return _with_error(f"{scale * metrics[name]:.3f}", metrics.get(f"{name}_stderr"), scale)


def _measured_difference(config: RunConfig, base: dict[str, Any], patched: dict[str, Any], name: str) -> str:
    scale, metrics = _percent(config), patched["metrics"]
    error = metrics.get(f"{name}_difference_stderr", metrics.get("difference_stderr"))
    return _with_error(f"{scale * (metrics[name] - base['metrics'][name]):+.3f}", error, scale)


def _difference(published: Any, name: str) -> str | None:
    if name not in published or f"base_{name}" not in published:
        return None
    return f"{published[name] - published[f'base_{name}']:+.3f}"


def _caption(config: RunConfig, patched: dict[str, Any]) -> str:
    lines = [f"published: {config.published.get('source', '-')}"]
    if config.published.get("note"):
        lines.append(f"note: {config.published['note']}")
    if patched["num_skipped"]:
        lines.append(f"{patched['num_skipped']} files skipped")
    return "\n".join(lines)
