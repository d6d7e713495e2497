"""The CLIP part of the demo: every method on the reference CLIP at two FLOPs budgets of its image tower, beside random, uniform
and unpatched: zero-shot accuracy on single pictures, retrieval on pages.

# What it shows

The second part of `make demo` runs them on a bundled CLIP (open_clip, 256 patches of 8 x 8 pixels, 1.9 M parameters;
card: assets/easyvqa_clip.md): zero-shot classification of single easy-VQA pictures into 24 classes, and retrieval among pages of
2 x 2 cells under captions such as "blue rectangle top left, red circle bottom right". The budget is that of the image tower. 148
pictures and 300 pages (`--full`: 888 and 1,000, where the unpatched model has 100.0 %, image R@1 68.6 %, text R@1 67.8 %: the
pages come in groups of four that differ in one cell, and 300 of them hold hardly a full group).

| method | budget | tokens | GMACs | implied | top-1 % | vs unpatched | image R@1 % | vs | text R@1 % | vs |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| unpatched | 1 | 257 | 0.498 | - | 100.0 [97.5, 100.0] | - | 96.3 ± 1.1 | - | 96.0 ± 1.1 | - |
| ats | 0.6 | 139 | 0.264 | 1.89x | 100.0 [97.5, 100.0] | +0.0 [-2.5, +2.5] | 69.7 ± 2.7 | -26.7 ± 2.7 | 67.0 ± 2.7 | -29.0 ± 2.7 |
| pitome | 0.6 | 155 | 0.287 | 1.74x | 100.0 [97.5, 100.0] | +0.0 [-2.5, +2.5] | 96.3 ± 1.1 | +0.0 [-1.3, +1.3] | 96.0 ± 1.1 | +0.0 [-1.3, +1.3] |
| tome | 0.6 | 160 | 0.299 | 1.66x | 100.0 [97.5, 100.0] | +0.0 [-2.5, +2.5] | 96.3 ± 1.1 | +0.0 [-1.3, +1.3] | 96.0 ± 1.1 | +0.0 [-1.3, +1.3] |
| zero_tprune | 0.6 | 134 | 0.271 | 1.84x | 56.8 ± 4.1 | -43.2 ± 4.1 | 24.0 ± 2.5 | -72.3 ± 2.7 | 17.3 ± 2.2 | -78.7 ± 2.5 |
| random | 0.6 | 161 | 0.300 | 1.66x | 99.3 ± 0.7 | -0.7 ± 0.7 | 88.3 ± 1.9 | -8.0 ± 1.8 | 88.7 ± 1.8 | -7.3 ± 1.6 |
| uniform | 0.6 | 161 | 0.300 | 1.66x | 99.3 ± 0.7 | -0.7 ± 0.7 | 92.7 ± 1.5 | -3.7 ± 1.3 | 90.7 ± 1.7 | -5.3 ± 1.5 |
| ats | 0.4 | 99 | 0.190 | 2.62x | 99.3 ± 0.7 | -0.7 ± 0.7 | 50.0 ± 2.9 | -46.3 ± 3.0 | 49.0 ± 2.9 | -47.0 ± 2.9 |
| pitome | 0.4 | 102 | 0.192 | 2.59x | 100.0 [97.5, 100.0] | +0.0 [-2.5, +2.5] | 96.3 ± 1.1 | +0.0 [-1.3, +1.3] | 95.7 ± 1.2 | -0.3 ± 0.3 |
| tome | 0.4 | 102 | 0.199 | 2.50x | 100.0 [97.5, 100.0] | +0.0 [-2.5, +2.5] | 95.3 ± 1.2 | -1.0 ± 0.9 | 94.7 ± 1.3 | -1.3 ± 0.8 |
| zero_tprune | 0.4 | 79 | 0.179 | 2.79x | 48.0 ± 4.1 | -52.0 ± 4.1 | 15.0 ± 2.1 | -81.3 ± 2.3 | 9.7 ± 1.7 | -86.3 ± 2.0 |
| random | 0.4 | 106 | 0.200 | 2.49x | 95.9 ± 1.6 | -4.1 ± 1.6 | 73.3 ± 2.6 | -23.0 ± 2.6 | 71.3 ± 2.6 | -24.7 ± 2.6 |
| uniform | 0.4 | 106 | 0.200 | 2.49x | 96.6 ± 1.5 | -3.4 ± 1.5 | 84.0 ± 2.1 | -12.3 ± 2.1 | 83.0 ± 2.2 | -13.0 ± 2.2 |

Single pictures are easy and hardly tell methods apart; pages do. Merging keeps the recall at 0.4 of the FLOPs, where random pruning
loses a large part of it. Zero-TPrune and ATS are below random again: in this model's early blocks most attention falls on the blank
background, which Zero-TPrune therefore keeps, and ATS drops more than half of the tokens in one early block, before the class token
has found the cells. Retrieval needs every cell of a page, so what is dropped early is missed.
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor, nn

from vtok.config import MethodConfig
from vtok.eval.common import terminal
from vtok.eval.common.records import Records, key_of
from vtok.eval.common.settings import Setting, backend, twin, versions
from vtok.eval.common.statistics import with_error
from vtok.eval.demo.compare import Case, cases, given
from vtok.eval.models.clip import CLIP_FOLDER, WEIGHTS_FILE
from vtok.eval.models.reference import (
    asset,
    load_reference_clip,
    load_reference_pages,
    normalise_page,
)
from vtok.eval.report.tables import FLOOR, Panel, Record, is_unpatched, ordered, plot_panels
from vtok.eval.tasks import captions, retrieval, zeroshot
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of

if TYPE_CHECKING:
    from rich.table import Table

BUDGETS = (0.6, 0.4)
PICTURES, PAGES = 148, 300  # evenly spaced
CALIBRATION_PAGES = 48
_ACCURACY = ("acc1", "difference")
_RECALLS = ("image_retrieval_recall@1", "text_retrieval_recall@1")
HEADER = ("method", "budget", "tokens", "GMACs", "implied", "top-1 %", "vs unpatched", "image R@1 %", "vs", "text R@1 %", "vs")
CAPTION = (
    "top-1: zero-shot, 24 classes; R@1: retrieval; ± standard error; vs: against unpatched, paired; tokens: mean over blocks"
)


def run_clip_demo(
    out: Path,
    pictures: int | None = PICTURES,
    pages: int | None = PAGES,
    budgets: Sequence[float] = BUDGETS,
    methods: Sequence[str] | None = None,
    console: Console | None = None,
) -> list[Record]:
    """Runs the configurations that have no record yet, all on the same batches, then prints a table and writes `clip.png`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        pictures: evenly spaced test pictures; `None` = all 888.
        pages: evenly spaced test pages; `None` = all 1,000.
        budgets: shares of the FLOPs of the image tower.
        methods: names; default all.
        console: where the table goes.

    Returns:
        The records, unpatched first; `metrics` holds those of zero-shot classification and of retrieval, as shares.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    console = console or terminal.output()
    counts = (pictures, pages)
    records = Records(out / "results.jsonl")
    wanted = cases(sorted(methods or encoder_methods(budget=True)), budgets)
    keys = {_key(case, counts): case for case in wanted}
    missing = [case for key, case in keys.items() if key not in records.by_key()]
    if missing:
        # differences are taken to the unpatched model on the same batches
        todo = [wanted[0], *(case for case in missing if case is not wanted[0])]
        for case, record in zip(todo, _measure(todo, counts, console)):
            records.append({"key": _key(case, counts), "budget": case.budget, **record})
    found = records.by_key()
    done = ordered([found[key] for key in keys])
    n = done[0]["n"]
    title = f"reference CLIP on easy-VQA: {n['pictures']} pictures, {n['pages']} pages"
    console.print(table(done, title))
    for line in findings(done):
        console.print(f"- {line}")
    plot(done, out / "clip.png", title)
    return done


def _key(case: Case, counts: tuple[int | None, int | None]) -> str:
    weights = asset(f"{CLIP_FOLDER}/{WEIGHTS_FILE}").read_bytes()
    return key_of(
        {
            "model": "easyvqa_clip@" + hashlib.sha256(weights).hexdigest()[:8],
            "method": case.setting.name,
            "params": given(case.setting),
            "budget": case.budget,
            "data": "easyvqa",
            "n": counts,
            "vtok": versions()["vtok"],
        }
    )


def _measure(todo: Sequence[Case], counts: tuple[int | None, int | None], console: Console) -> list[Record]:
    """One record a case, in order: costs, and the metrics of both tasks."""
    encoder = load_reference_clip()
    calibration = normalise_page(load_reference_pages("calibration").images[:CALIBRATION_PAGES])
    settings = [_resolved(case, encoder.net, calibration) for case in todo]
    with terminal.progress(console) as progress:
        bar = progress.add_task("reference CLIP", total=None)

        def advance(before: int, rest: int | None, done: int, total: int) -> None:
            progress.update(bar, completed=before + done, total=total + before if rest is None else before + total + rest)

        rest = counts[1] or len(load_reference_pages("test").captions)
        own = zeroshot.ZeroshotOptions(num_samples=counts[0], workers=0)
        accuracy = zeroshot.evaluate(encoder, zeroshot.PICTURES, settings, own, lambda d, t: advance(0, rest, d, t))
        first = accuracy[0]["n"]
        options = retrieval.RetrievalOptions(num_samples=counts[1], workers=0)
        recall = retrieval.evaluate(encoder, captions.PAGES, settings, options, lambda d, t: advance(first, None, d, t))
    kept = ("method", "params", "tokens", "gmacs", "gflops", "implied_speedup", "dtype", "device", "batch_size", "versions")
    return [
        {name: b[name] for name in kept}
        | {
            "model": encoder.name,
            "backend": backend(encoder.net),
            "dataset": f"{a['dataset']} + {b['dataset']}",
            "n": {"pictures": a["n"], "pages": b["n"]},
            "metrics": b["metrics"] | a["metrics"],
            "command": ["vtok", "demo", *([] if counts[0] is not None else ["--full"]), "--no-vqa"],
        }
        for a, b in zip(accuracy, recall)
    ]


def _resolved(case: Case, model: nn.Module, calibration: Tensor) -> list[MethodConfig] | None:
    """The configs that a case's budget leads to, found once for both tasks; `None` for the unpatched model."""
    if case.setting.method is None:
        return None
    setting = Setting(case.setting.method, {**case.setting.params, "calibration": calibration})
    channels, height, width = calibration.shape[1:]
    run = run_of(setting.apply(twin(model), (channels, height, width)))
    assert run is not None
    return list(run.patch.configs)


def row(record: Record) -> tuple[str, ...]:
    """The cells of one configuration, as `HEADER` names them."""
    m, unpatched = record["metrics"], is_unpatched(record)
    layers = record["tokens"]["mean_per_layer"]
    cells = [
        record["method"],
        f"{record['budget']:g}",
        f"{sum(layers) / len(layers):.0f}",
        f"{record['gmacs']['model']:.3f}",
        "-" if unpatched else f"{record['implied_speedup']:.2f}x",
    ]
    for name, change in (_ACCURACY, *((recall, f"{recall}_difference") for recall in _RECALLS)):
        cells.append(with_error(m, name, 100))
        cells.append("-" if unpatched else with_error(m, change, 100, sign="+"))
    return tuple(cells)


def table(records: Sequence[Record], title: str) -> Table:
    """A rich table with a rule between budgets."""
    from rich.table import Table

    result = Table(title=title, caption=CAPTION)
    for i, name in enumerate(HEADER):
        result.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    rows = ordered(records)
    for i, record in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["budget"] != record["budget"]
        result.add_row(*row(record), end_section=last, style="dim" if record["method"] in FLOOR else None)
    return result


def markdown(records: Sequence[Record]) -> str:
    """The same as a GitHub table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row(r)) + " |" for r in ordered(records)])


def findings(records: Sequence[Record]) -> list[str]:
    """Who is below random by more than two standard errors of the two losses, or not clearly above it."""
    lines = []
    by_place = {(r["method"], r["budget"]): r["metrics"] for r in records}
    for record in ordered([r for r in records if r["method"] not in FLOOR and not is_unpatched(r)]):
        random = by_place.get(("random", record["budget"]))
        if random is None:
            continue
        behind = [label for label, name in _COMPARED.items() if record["metrics"][name] < random[name]]
        if behind:
            lines.append(f"{record['method']} is below random at {record['budget']:g} of the FLOPs in {' and '.join(behind)}")
    return lines


_COMPARED = {"zero-shot top-1": "acc1", "image R@1": _RECALLS[0], "text R@1": _RECALLS[1]}


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Zero-shot top-1 and the mean of both recalls at 1 against GMACs."""

    def macs(r: Record) -> Any:
        return r["gmacs"]["model"]

    def mean_recall(r: Record) -> float:
        return 50 * sum(r["metrics"][name] for name in _RECALLS)

    def recall_error(r: Record) -> float:
        # the two recalls share their images: the errors are added as if they went fully together
        return 50 * sum(r["metrics"][f"{name}_stderr"] for name in _RECALLS)

    accuracy = Panel(
        "GMACs per image (image tower)",
        "zero-shot top-1, 24 classes (%)",
        macs,
        lambda r: 100 * r["metrics"]["acc1"],
        lambda r: 100 * r["metrics"]["acc1_stderr"],
    )
    recall = Panel("GMACs per image (image tower)", "recall at 1, mean of both directions (%)", macs, mean_recall, recall_error)
    plot_panels(records, (accuracy, recall), path, title)
