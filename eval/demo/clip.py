"""The CLIP part of the demo: every method on the reference CLIP at two FLOPs budgets of its image tower, beside random, uniform
and unpatched: zero-shot accuracy on single pictures, retrieval on pages.

What it found: assets/docs/results/demo_clip.md in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from rich.console import Console

from vtok.eval.common import terminal
from vtok.eval.common.records import Record
from vtok.eval.demo.parts import measured, of_encoders, show, write_frame
from vtok.eval.report.plots import plot
from vtok.eval.report.summary import metric_columns, table

BUDGETS = (0.6, 0.4)
PICTURES, PAGES = 148, 300  # evenly spaced


def run_clip_demo(
    out: Path,
    pictures: int | None = PICTURES,
    pages: int | None = PAGES,
    budgets: Sequence[float] = BUDGETS,
    methods: Sequence[str] | None = None,
    console: Console | None = None,
) -> tuple[list[Record], list[Record]]:
    """Runs the configurations that have no record yet, then prints two tables and writes `clip.png`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        pictures: evenly spaced test pictures; `None` = all 888.
        pages: evenly spaced test pages; `None` = all 1,000.
        budgets: shares of the FLOPs of the image tower.
        methods: names; default all.
        console: where the tables go.

    Returns:
        The records of zero-shot classification and of retrieval, unpatched first; metrics are shares.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    console = console or terminal.output()
    about = of_encoders(methods, budgets)
    first = measured("demo_clip_pictures", out, console, num_samples=pictures, **about)
    second = measured("demo_clip_pages", out, console, num_samples=pages, **about)
    records = show(first, console, table(first, digits=1, brief=attrgetter("label")))
    found = show(
        second, console, table(second, metric_columns(["image_retrieval_recall@1"]), digits=1, brief=attrgetter("label"))
    )
    write_frame(out)
    plot([first, second], out / "clip.png")
    console.print(f"clip.png is in {out}")
    return records, found
