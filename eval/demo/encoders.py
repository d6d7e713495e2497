"""The parts of the demo on vision encoders: a DINOv2 that was really pretrained, and the small ViT and CLIP.

All take a folder `out` of results, where a second run with the same arguments goes on where the first stopped, and a console
for their tables; they return records, unpatched first.

What they found: assets/docs/results/dinov2.md, demo_vit.md and demo_clip.md in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from rich.console import Console
from torch import Tensor

from vtok.eval.common.records import Record
from vtok.eval.common.settings import fastest_on_cpu
from vtok.eval.demo.control import attention_kept, measure_controls, value_of_choice
from vtok.eval.demo.parts import measured, of_encoders, short_table, show, write_files
from vtok.eval.models.data import FASHION_CLASSES, normalise
from vtok.eval.models.dinov2.sheet import write_sheet
from vtok.eval.models.reference import load_reference_images, load_reference_vit
from vtok.eval.report.summary import metric_columns, table
from vtok.eval.tasks.fashion import CALIBRATION
from vtok.eval.viz.overlay import overlay_sheet
from vtok.registry import encoder_methods

DINOV2_PICTURES = 128
BUDGETS, CLIP_BUDGETS = (0.8, 0.6, 0.4), (0.6, 0.4)
OVERLAY_BUDGET = 0.6
CLIP_PICTURES, CLIP_PAGES = 148, 300  # evenly spaced
_FIRST_ATS_BLOCK = 3
_OVERLAY_CLASSES = (9, 1, 8, 0, 5, 3)  # ankle boot, trouser, bag, T-shirt, sandal, dress


def run_encoder_demo(out: Path, pictures: int | None, full: bool, console: Console) -> list[Record]:
    """The main job: runs what is missing, then prints a table and writes `dinov2.png` and `dinov2_overlays.png`.

    Args:
        pictures: evenly spaced ones of clip art; `None` = all 639.
        full: three budgets, and every method's places and counts with its tokens drawn at random.

    Raises:
        ConfigError: the package with the encoder's weights is not installed.
    """
    name = "sweep_reference_dinov2" if full else "demo_dinov2"
    one_task = {"tasks": None, "task": "imagenet", "options": {"device": "cpu"}}
    section = measured(name, out, console, num_samples=pictures, dtype=fastest_on_cpu(), **one_task)
    records = show(section, console, short_table(section))
    write_files(out, "dinov2.png", section)
    write_sheet(out / "dinov2_overlays.png")
    console.print(f"dinov2.png and dinov2_overlays.png are in {out}")
    return records


def run_demo(
    out: Path,
    count: int | None,
    budgets: Sequence[float],
    console: Console,
    methods: Sequence[str] | None = None,
    batch_size: int = 100,
    control: bool = False,
) -> list[Record]:
    """The small ViT under every method for encoders (or those named): writes `pareto.png` and `overlays.png` beside
    `results.jsonl`.

    Args:
        count: test images, the first ones; `None` = all.
        budgets: shares of the model's FLOPs.
        control: also run every method's places and counts with the tokens drawn at random (`vtok.eval.common.control`).
    """
    section = measured("demo_vit", out, console, num_samples=count, batch_size=batch_size, **of_encoders(methods, budgets))
    records = show(section, console)
    if control:
        console.print(value_of_choice(section, measure_controls(section, out, console)))
        shares = attention_kept(load_reference_vit(), _calibration(), _FIRST_ATS_BLOCK)
        console.print(
            f"- the half of the patches that the class token attends to most in block {_FIRST_ATS_BLOCK} holds this share of "
            "its attention in blocks 0, 1, ...: " + " ".join(f"{share:.2f}" for share in shares) + " (chance: 0.50)"
        )
    write_files(out, "pareto.png", section)
    _write_overlays(out / "overlays.png", sorted(methods or encoder_methods(budget=True)))
    console.print(f"results.jsonl, sweep.csv, pareto.png and overlays.png are in {out}")
    return records


def _calibration() -> Tensor:
    return normalise(load_reference_images("calibration")[0][:CALIBRATION])


def _write_overlays(path: Path, methods: Sequence[str]) -> None:
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


def run_clip_demo(
    out: Path,
    pictures: int | None,
    pages: int | None,
    budgets: Sequence[float],
    methods: Sequence[str] | None,
    console: Console,
) -> tuple[list[Record], list[Record]]:
    """The small CLIP at FLOPs budgets of its image tower, zero-shot on pictures and retrieval on pages; writes `clip.png`.

    Args:
        pictures, pages: evenly spaced ones of the test set; `None` = all 888, all 1,000.
        methods: names; `None` = all.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    about, brief = of_encoders(methods, budgets), attrgetter("label")
    first = measured("demo_clip_pictures", out, console, num_samples=pictures, **about)
    second = measured("demo_clip_pages", out, console, num_samples=pages, **about)
    records = show(first, console, table(first, digits=1, brief=brief))
    found = show(second, console, table(second, metric_columns(["image_retrieval_recall@1"]), digits=1, brief=brief))
    write_files(out, "clip.png", first, second)
    console.print(f"clip.png is in {out}")
    return records, found
