"""The main job: every method for encoders on the reference ViT and real images at three FLOPs budgets, beside random, uniform, unpatched.

# What it shows

The bundled model is a small ViT (196 patches of 2 x 2 pixels, 1.4 M parameters, 87.9 % top-1; card: assets/fashion_vit.md), the
images are the Fashion-MNIST test set. `make demo` runs every method at three FLOPs budgets on 1,000 of them (`vtok demo --full`:
all 10,000), prints such a table and writes `results.jsonl`, `sweep.csv`, `pareto.png` and `overlays.png` into `results/demo`. A
second run goes on where the first was stopped. The table here is that of `vtok demo --images 2000`.

| method | budget | tokens | GMACs | GFLOPs | top-1 % | vs unpatched | implied | measured [95 %] | achieved |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| unpatched | 1 | 197 | 0.351 | 0.702 | 88.70 ± 0.71 | - | - | - | - |
| ats | 0.8 | 156 | 0.272 | 0.543 | 87.25 ± 0.75 | -1.45 ± 0.50 | 1.29x | 0.75x [0.58, 1.41] | 58 % |
| pitome | 0.8 | 155 | 0.270 | 0.540 | 88.40 ± 0.72 | -0.30 ± 0.19 | 1.30x | 0.99x [0.89, 1.09] | 76 % |
| tome | 0.8 | 158 | 0.275 | 0.551 | 88.40 ± 0.72 | -0.30 ± 0.16 | 1.27x | 1.03x [0.53, 1.11] | 81 % |
| zero_tprune | 0.8 | 146 | 0.261 | 0.521 | 87.60 ± 0.74 | -1.10 ± 0.38 | 1.35x | 0.85x [0.76, 0.89] | 63 % |
| random | 0.8 | 161 | 0.281 | 0.562 | 88.25 ± 0.72 | -0.45 ± 0.31 | 1.25x | 1.16x [1.12, 1.19] | 93 % |
| uniform | 0.8 | 161 | 0.281 | 0.562 | 87.80 ± 0.73 | -0.90 ± 0.32 | 1.25x | 1.13x [0.44, 1.21] | 91 % |
| ats | 0.6 | 122 | 0.212 | 0.423 | 84.30 ± 0.81 | -4.40 ± 0.64 | 1.66x | 0.68x [0.49, 0.82] | 41 % |
| pitome | 0.6 | 119 | 0.204 | 0.407 | 88.10 ± 0.72 | -0.60 ± 0.27 | 1.72x | 1.32x [0.89, 2.34] | 76 % |
| tome | 0.6 | 119 | 0.207 | 0.414 | 88.55 ± 0.71 | -0.15 ± 0.22 | 1.70x | 1.35x [1.29, 1.39] | 80 % |
| zero_tprune | 0.6 | 104 | 0.195 | 0.390 | 87.00 ± 0.75 | -1.70 ± 0.48 | 1.80x | 1.10x [0.49, 1.53] | 61 % |
| random | 0.6 | 122 | 0.210 | 0.420 | 86.35 ± 0.77 | -2.35 ± 0.47 | 1.67x | 1.55x [1.52, 4.13] | 93 % |
| uniform | 0.6 | 122 | 0.210 | 0.420 | 87.30 ± 0.74 | -1.40 ± 0.45 | 1.67x | 1.48x [0.95, 4.13] | 88 % |
| ats | 0.4 | 80 | 0.140 | 0.280 | 77.20 ± 0.94 | -11.50 ± 0.89 | 2.51x | 1.38x [1.28, 1.46] | 55 % |
| pitome | 0.4 | 78 | 0.136 | 0.271 | 88.25 ± 0.72 | -0.45 ± 0.39 | 2.59x | 1.83x [1.73, 1.90] | 71 % |
| tome | 0.4 | 79 | 0.141 | 0.283 | 87.45 ± 0.74 | -1.25 ± 0.42 | 2.48x | 1.54x [1.44, 2.20] | 62 % |
| zero_tprune | 0.4 | 62 | 0.128 | 0.257 | 80.55 ± 0.89 | -8.15 ± 0.79 | 2.73x | 1.73x [1.36, 2.11] | 63 % |
| random | 0.4 | 81 | 0.140 | 0.281 | 83.85 ± 0.82 | -4.85 ± 0.65 | 2.50x | 1.93x [1.63, 2.22] | 77 % |
| uniform | 0.4 | 81 | 0.140 | 0.281 | 85.10 ± 0.80 | -3.60 ± 0.59 | 2.50x | 2.12x [1.43, 2.14] | 85 % |

± is a standard error, "vs unpatched" is paired image by image, "tokens" is the mean over blocks, "measured" the median of paired
batches on two CPU cores, with other work on the machine. Where a method is slower than unpatched, the table says so: this model is only 96 wide, so that at a
budget of 0.8 there is less to save than deciding costs. `vtok.eval.benchmarks.throughput` has models of the usual size.


**Who beats random?** Random pruning loses 4.9 points at 0.4 of the FLOPs, so the task tells methods apart. Merging (ToMe, PiToMe)
clearly beats it at 0.6 and 0.4. **ATS and Zero-TPrune do not, on this model.** `vtok demo --control` shows why: it runs each method's
own places and token counts with the tokens drawn at random, and what is left is the value of the method's choice, in points:

| method | 0.8 | 0.6 | 0.4 |
|---|---:|---:|---:|
| pitome | +0.10 ± 0.32 | +1.20 ± 0.47 | +4.75 ± 0.67 |
| tome | +0.25 ± 0.32 | +1.60 ± 0.45 | +2.10 ± 0.56 |
| zero_tprune | -0.05 ± 0.39 | +0.20 ± 0.53 | -0.50 ± 0.87 |
| ats | -0.10 ± 0.56 | -1.30 ± 0.73 | -3.60 ± 1.04 |

- Zero-TPrune's choice is worth nothing measurable here, and its few large steps cost more than random's many small ones: with
  random tokens the same schedule gets 81.1 at 0.4, a little in every block 83.9.
- ATS's choice is worse than chance at low budgets. It follows the class token, which in this small model (10 epochs of training)
  attends to other patches early than late: the half that it attends to most in block 3 holds 93 % of its attention there and 40 to
  58 % of it in blocks 8 to 11, where chance is 50 % (the same command prints it). What ATS drops early is missed later.
- Patches of 2 x 2 pixels are near copies of their neighbours, which favours merging and even coverage (uniform beats random).

None of this contradicts the papers, which report models trained on ImageNet; the sampling and ranking themselves reproduce the
authors' arrays. It says what to check before pruning a model of your own.
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vtok.eval.common import terminal
from vtok.eval.common.records import Records
from vtok.eval.common.settings import Setting
from vtok.eval.demo.compare import Case, Comparison, Data, cases
from vtok.eval.demo.control import attention_kept, controls
from vtok.eval.demo.control import table as value_of_choice
from vtok.eval.models.data import FASHION_CLASSES, normalise
from vtok.eval.models.reference import VIT_WEIGHTS, asset, load_reference_images, load_reference_vit
from vtok.eval.report import tables as report
from vtok.eval.viz.overlay import overlay_sheet
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
        control: also run every method's places and counts with the tokens drawn at random (`vtok.eval.demo.control`).
        console: where the tables go.

    Returns:
        The records, unpatched first.
    """
    console = console or terminal.output()
    data, records = reference_data(count), Records(out / "results.jsonl")
    shown = [
        *(["--full"] if count is None else ["--images", str(count)]),
        *(["--budgets", ",".join(f"{budget:g}" for budget in budgets)] if tuple(budgets) != BUDGETS else []),
    ]
    command = ["vtok", "demo", *shown, "-b", str(batch_size), *(["--control"] if control else []), "--no-clip", "--no-vqa"]
    comparison = Comparison(load_reference_vit(), model_name(), data, records, batch_size, command)
    wanted = cases(sorted(methods or encoder_methods(budget=True)), budgets)
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        todo = comparison.pending(wanted)
    for warning in damaged:
        console.print(str(warning.message), style=terminal.WARNING)
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
    write_overlays(comparison, out / "overlays.png", sorted(methods or encoder_methods(budget=True)))
    console.print(f"results.jsonl, sweep.csv, pareto.png and overlays.png are in {out}")
    return done


def _run(comparison: Comparison, todo: Sequence[Case], console: Console) -> None:
    with terminal.progress(console) as progress:
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
