"""The main job: methods for encoders on a DINOv2 that was really pretrained, labelled clip art, and photographs to look at.

What was measured: assets/docs/results/dinov2.md in the repository.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vtok.eval.common import terminal
from vtok.eval.common.records import Record
from vtok.eval.common.settings import fastest_on_cpu
from vtok.eval.demo.parts import measured, short_table, show, write_frame
from vtok.eval.models.dinov2.sheet import write_sheet
from vtok.eval.report.plots import plot

PICTURES = 128


def run_encoder_demo(
    out: Path, pictures: int | None = PICTURES, full: bool = False, console: Console | None = None
) -> list[Record]:
    """Runs what is missing, then prints a table and writes `dinov2.png` and `dinov2_overlays.png`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        pictures: evenly spaced ones of clip art; `None` = all 639.
        full: three budgets, and every method's places and counts with its tokens drawn at random.
        console: where the table goes.

    Returns:
        The records, unpatched first.

    Raises:
        ConfigError: the package with the encoder's weights is not installed.
    """
    console = console or terminal.output()
    name = "sweep_reference_dinov2" if full else "demo_dinov2"
    one_task = {"tasks": None, "task": "imagenet", "options": {"device": "cpu"}}
    section = measured(name, out, console, num_samples=pictures, dtype=fastest_on_cpu(), **one_task)
    records = show(section, console, short_table(section))
    write_frame(out)
    plot([section], out / "dinov2.png")
    write_sheet(out / "dinov2_overlays.png")
    console.print(f"dinov2.png and dinov2_overlays.png are in {out}")
    return records
