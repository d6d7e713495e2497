"""Runs a `RunConfig` and sets what was published beside what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vtok.eval.runs import RunConfig
from vtok.eval.tasks import TASKS
from vtok.eval.tasks.timm_pipeline import Options

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
    options = Options(
        batch_size=config.batch_size,
        model_dtype=_DTYPES[config.dtype],
        pretrained=pretrained,
        seed=config.seed,
        workers=workers,
    )
    task = TASKS.get(config.task)
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        bar = progress.add_task(config.name, total=None)
        return task(
            config.model,
            data,
            [None, config.method],
            options,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )


def published_beside_measured(config: RunConfig, records: list[dict[str, Any]]) -> Table:
    """A table with one row a figure. Published GFLOPs count a multiply-accumulate once; so does the column beside them."""
    base, patched = records
    p = config.published
    table = Table(title=f"{config.name}: {config.model}, {config.method.name}", caption=_caption(config, patched))
    table.add_column("")
    table.add_column("published", justify="right")
    table.add_column("measured", justify="right")
    rows = (
        ("top-1 unpatched %", p.get("base_top1"), _accuracy(base)),
        ("top-1 patched %", p.get("top1"), _accuracy(patched)),
        (
            "difference",
            _difference(p),
            f"{patched['metrics']['difference']:+.3f} ± {patched['metrics']['difference_stderr']:.3f}",
        ),
        ("GMACs unpatched", p.get("base_gflops"), f"{base['gmacs']['model']:.3f}"),
        ("GMACs patched", p.get("gflops"), f"{patched['gmacs']['model']:.3f}"),
        ("images", p.get("images"), str(patched["n"])),
    )
    for name, published, measured in rows:
        table.add_row(name, "-" if published is None else str(published), measured)
    return table


def _accuracy(record: dict[str, Any]) -> str:
    return f"{record['metrics']['top1']:.3f} ± {record['metrics']['top1_stderr']:.3f}"


def _difference(published: Any) -> str | None:
    if "base_top1" not in published:
        return None
    return f"{published['top1'] - published['base_top1']:+.3f}"


def _caption(config: RunConfig, patched: dict[str, Any]) -> str:
    lines = [f"published: {config.published.get('source', '-')}"]
    if config.published.get("note"):
        lines.append(f"note: {config.published['note']}")
    if patched["num_skipped"]:
        lines.append(f"{patched['num_skipped']} files skipped")
    return "\n".join(lines)
