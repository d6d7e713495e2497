"""The main job: every method on the reference ViT and real images at three FLOPs budgets, beside random, uniform, unpatched."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtok.eval import report
from vtok.eval.compare import Case, Comparison, Data, cases
from vtok.eval.control import attention_kept, controls
from vtok.eval.control import table as value_of_choice
from vtok.eval.data import FASHION_CLASSES, normalise
from vtok.eval.overlay import overlay_sheet
from vtok.eval.records import Records
from vtok.eval.reference import VIT_WEIGHTS, asset, load_reference_images, load_reference_vit
from vtok.eval.settings import Setting
from vtok.registry import encoder_methods

BUDGETS = (0.8, 0.6, 0.4)
CALIBRATION_IMAGES = 128
OVERLAY_BUDGET = 0.6
_FIRST_ATS_BLOCK = 3
_OVERLAY_CLASSES = (9, 1, 8, 0, 5, 3)  # ankle boot, trouser, bag, T-shirt, sandal, dress


def reference_data(count: int | None) -> Data:
    """The first `count` test images (`None` = all 10,000), normalised, and the calibration images."""
    images, labels = load_reference_images("test")
    calibration, _ = load_reference_images("calibration")
    return Data("fashion-mnist/test", normalise(images[:count]), labels[:count], normalise(calibration[:CALIBRATION_IMAGES]))


def model_name() -> str:
    """The reference ViT and the first digits of the hash of its weights."""
    return "fashion_vit@" + hashlib.sha256(asset(VIT_WEIGHTS).read_bytes()).hexdigest()[:8]


def run_demo(
    out: Path,
    count: int | None = 1000,
    budgets: Sequence[float] = BUDGETS,
    methods: Sequence[str] | None = None,
    batch_size: int = 100,
    control: bool = False,
    console: Console | None = None,
) -> list[report.Record]:
    """Runs what is missing, then writes `sweep.csv`, `pareto.png` and `overlays.png` beside `results.jsonl`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        count: test images; `None` = all.
        budgets: shares of the model's FLOPs.
        methods: names; default all.
        batch_size: images a forward pass.
        control: also run every method's places and counts with the tokens drawn at random (`vtok.eval.control`).
        console: where the tables go.

    Returns:
        The records, unpatched first.
    """
    console = console or Console()
    data, records = reference_data(count), Records(out / "results.jsonl")
    comparison = Comparison(load_reference_vit(), model_name(), data, records, batch_size)
    wanted = cases(sorted(methods or encoder_methods()), budgets)
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        todo = comparison.pending(wanted)
    for warning in damaged:
        console.print(f"[yellow]{warning.message}[/yellow]")
    if len(todo) < len(wanted):
        console.print(f"{len(wanted) - len(todo)} of {len(wanted)} configurations are in {records.path}; running the rest")
    _run(comparison, todo, console)
    found = records.by_key()
    done = report.ordered([found[comparison.key(case)] for case in wanted])
    title = f"reference ViT on Fashion-MNIST, {len(data)} test images"
    console.print(report.table(done, title))
    for line in report.findings(done):
        console.print(f"- {line}")
    if control:
        extra = [Case(Setting(choice), budget) for choice, budget in controls(done)]
        _run(comparison, comparison.pending(extra), console)
        found = records.by_key()
        console.print(value_of_choice(done + [found[comparison.key(case)] for case in extra]))
        shares = attention_kept(comparison.patched, data.calibration, _FIRST_ATS_BLOCK)
        console.print(
            f"- the half of the patches that the class token attends to most in block {_FIRST_ATS_BLOCK} holds this share of "
            "its attention in blocks 0, 1, ...: " + " ".join(f"{share:.2f}" for share in shares) + " (chance: 0.50)"
        )
    report.write_csv(done, out / "sweep.csv")
    report.plot(done, out / "pareto.png", title)
    write_overlays(comparison, out / "overlays.png", sorted(methods or encoder_methods()))
    console.print(f"results.jsonl, sweep.csv, pareto.png and overlays.png are in {out}")
    return done


def _run(comparison: Comparison, todo: Sequence[Case], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo) * len(comparison.data))
        for case in todo:
            progress.update(bar, description=f"{case.title:<36}")
            comparison.run(case, lambda images: progress.advance(bar, images))


def write_overlays(comparison: Comparison, path: Path, methods: Sequence[str]) -> None:
    """Kept and merged tokens of six test images, one of each of six classes."""
    images, labels = load_reference_images("test")
    rows = [int((labels == wanted).nonzero()[0]) for wanted in _OVERLAY_CLASSES]
    settings = []
    for method in methods:
        params = {"flops": OVERLAY_BUDGET, "calibration": comparison.data.calibration}
        settings.append((method, method, params))
    overlay_sheet(
        comparison.model,
        normalise(images[rows]),
        [image[0].numpy() / 255 for image in images[rows]],
        settings,
        path,
        [FASHION_CLASSES[c] for c in _OVERLAY_CLASSES],
        f"after the last block at {OVERLAY_BUDGET:g} of the FLOPs: dropped patches are dark, merged ones share a colour",
    )
