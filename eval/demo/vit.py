"""The main job: every method for encoders on the reference ViT at three FLOPs budgets.

What it found: assets/docs/results/demo_vit.md in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

from vtok.eval.common import terminal
from vtok.eval.common.records import Record
from vtok.eval.demo.control import attention_kept, measure_controls, value_of_choice
from vtok.eval.demo.parts import measured, of_encoders, show, write_frame
from vtok.eval.models.data import FASHION_CLASSES, normalise
from vtok.eval.models.reference import load_reference_images, load_reference_vit
from vtok.eval.report.plots import plot
from vtok.eval.tasks.fashion import CALIBRATION
from vtok.eval.viz.overlay import overlay_sheet
from vtok.registry import encoder_methods

BUDGETS = (0.8, 0.6, 0.4)
OVERLAY_BUDGET = 0.6
_FIRST_ATS_BLOCK = 3
_OVERLAY_CLASSES = (9, 1, 8, 0, 5, 3)  # ankle boot, trouser, bag, T-shirt, sandal, dress


def run_demo(
    out: Path,
    count: int | None = 1000,
    budgets: Sequence[float] = BUDGETS,
    methods: Sequence[str] | None = None,
    batch_size: int = 100,
    control: bool = False,
    console: Console | None = None,
) -> list[Record]:
    """Runs what is missing, then writes `sweep.csv`, `pareto.png` and `overlays.png` beside `results.jsonl`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        count: test images, the first ones; `None` = all.
        budgets: shares of the model's FLOPs.
        methods: names; default all.
        batch_size: images a forward pass.
        control: also run every method's places and counts with the tokens drawn at random (`vtok.eval.common.control`).
        console: where the tables go.

    Returns:
        The records, unpatched first.
    """
    console = console or terminal.output()
    section = measured("demo_vit", out, console, num_samples=count, batch_size=batch_size, **of_encoders(methods, budgets))
    records = show(section, console)
    if control:
        console.print(value_of_choice(section, measure_controls(section, out, console)))
        shares = attention_kept(load_reference_vit(), _calibration(), _FIRST_ATS_BLOCK)
        console.print(
            f"- the half of the patches that the class token attends to most in block {_FIRST_ATS_BLOCK} holds this share of "
            "its attention in blocks 0, 1, ...: " + " ".join(f"{share:.2f}" for share in shares) + " (chance: 0.50)"
        )
    write_frame(out)
    plot([section], out / "pareto.png")
    write_overlays(out / "overlays.png", sorted(methods or encoder_methods(budget=True)))
    console.print(f"results.jsonl, sweep.csv, pareto.png and overlays.png are in {out}")
    return records


def _calibration() -> Tensor:
    return normalise(load_reference_images("calibration")[0][:CALIBRATION])


def write_overlays(path: Path, methods: Sequence[str]) -> None:
    """Kept and merged tokens of six test images, one of each of six classes."""
    images, labels = load_reference_images("test")
    rows = [int((labels == wanted).nonzero()[0]) for wanted in _OVERLAY_CLASSES]
    budget = {"flops": OVERLAY_BUDGET, "calibration": _calibration()}
    overlay_sheet(
        load_reference_vit(),
        normalise(images[rows]),
        [image[0].numpy() / 255 for image in images[rows]],
        [(method, method, budget) for method in methods],
        path,
        [FASHION_CLASSES[c] for c in _OVERLAY_CLASSES],
        f"after the last block at {OVERLAY_BUDGET:g} of the FLOPs",
    )
