"""The part of the demo on vision-language models: questions about pictures to the reference LLaVA, questions about pages to the
reference LLaVA-NeXT, todre, atp and correlation beside random, uniform, unpatched and what can be answered without the image.

# What it shows

The third part asks questions. The bundled LLaVA (2.25 M parameters, 256 visual tokens; card: assets/easyvqa_llava.md) answers
97.27 ± 0.17 % of all 9,673 test questions of easy-VQA by single-question `generate()` (open questions 98.90 %, yes or no 96.69 %).
Here 500 of them (`--full`: all), todre and atp beside random and uniform with as many visual tokens; "tokens" is the mean over
decoder layers, GMACs are those of tower, connector and prefill. "blind" is the most frequent answer of the training questions to the same
words, without a look at the picture: 67.0 % on the whole test set.

| method | tokens | GMACs | implied | measured [95 %] | all % | vs unpatched | open % | yes/no % | loyalty % |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| unpatched | 256 | 0.796 | - | - | 97.8 ± 0.7 | - | 100.0 [97.3, 100.0] | 97.0 ± 0.9 | - |
| pitome + todre | 64 | 0.298 | 2.67x | 2.34x [2.18, 2.57] | 94.8 ± 1.0 | -3.0 ± 0.9 | 97.8 ± 1.3 | 93.7 ± 1.3 | 96.2 |
| todre | 64 | 0.375 | 2.13x | 2.02x [1.96, 2.20] | 95.4 ± 0.9 | -2.4 ± 0.8 | 99.3 ± 0.7 | 93.9 ± 1.3 | 96.8 |
| random | 64 | 0.375 | 2.13x | 2.23x [2.16, 2.42] | 97.2 ± 0.7 | -0.6 ± 0.5 | 100.0 [97.3, 100.0] | 96.1 ± 1.0 | 98.6 |
| uniform | 64 | 0.375 | 2.13x | 2.21x [2.14, 2.46] | 97.6 ± 0.7 | -0.2 ± 0.4 | 100.0 [97.3, 100.0] | 96.7 ± 0.9 | 99.0 |
| atp | 36 | 0.341 | 2.34x | 1.76x [1.45, 1.92] | 90.2 ± 1.3 | -7.6 ± 1.3 | 80.3 ± 3.4 | 93.9 ± 1.3 | 91.2 |
| random | 36 | 0.326 | 2.44x | 2.32x | 96.4 ± 0.8 | -1.4 ± 0.7 | 98.5 ± 1.0 | 95.6 ± 1.1 | 97.4 |
| uniform | 36 | 0.326 | 2.44x | 2.32x | 96.0 ± 0.9 | -1.8 ± 0.7 | 99.3 ± 0.7 | 94.8 ± 1.2 | 97.4 |
| pitome + todre | 26 | 0.233 | 3.42x | 2.75x [2.48, 3.04] | 91.4 ± 1.3 | -6.4 ± 1.2 | 94.2 ± 2.0 | 90.4 ± 1.6 | 92.0 |
| todre | 26 | 0.309 | 2.58x | 2.37x [2.32, 2.64] | 91.4 ± 1.3 | -6.4 ± 1.2 | 94.2 ± 2.0 | 90.4 ± 1.6 | 92.4 |
| random | 26 | 0.309 | 2.58x | 2.56x [2.37, 2.82] | 96.2 ± 0.9 | -1.6 ± 0.7 | 99.3 ± 0.7 | 95.0 ± 1.1 | 97.2 |
| uniform | 26 | 0.309 | 2.58x | 2.59x [2.42, 2.87] | 95.0 ± 1.0 | -2.8 ± 0.8 | 98.5 ± 1.0 | 93.7 ± 1.3 | 96.8 |
| blind | - | - | - | - | 67.4 | - | 26.3 | 82.9 | - |

The bundled LLaVA-NeXT (card: assets/easyvqa_llava_next.md) reads pages of 2 x 2 cells of which one to four are filled, as a view of the
page and a crop of each cell: 96.64 ± 0.30 % of 3,600 test questions. The demo asks 120, under `correlation`
and under random with as many tokens on average:

| method | tokens | GMACs | implied | measured [95 %] | all % | vs unpatched | 1 filled % | 2 % | 3 % | 4 % | kept of a blank crop | of a filled one |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| unpatched | 336 | 1.013 | - | - | 97.5 ± 1.4 | - | 100.0 [88.3, 100.0] | 96.8 ± 3.2 | 96.8 ± 3.2 | 96.6 ± 3.4 | - | - |
| correlation | 252 | 0.784 | 1.29x | 1.00x | 97.5 ± 1.4 | +0.0 [-3.1, +3.1] | 100.0 [88.3, 100.0] | 96.8 ± 3.2 | 96.8 ± 3.2 | 96.6 ± 3.4 | 26.0 | 52.5 |
| random | 252 | 0.782 | 1.29x | 1.24x | 97.5 ± 1.4 | +0.0 [-3.1, +3.1] | 100.0 [88.3, 100.0] | 96.8 ± 3.2 | 96.8 ± 3.2 | 96.6 ± 3.4 | 47.4 | 47.6 |
| correlation | 166 | 0.577 | 1.75x | 1.32x | 92.5 ± 2.4 | -5.0 ± 2.0 | 96.6 ± 3.4 | 87.1 ± 6.1 | 90.3 ± 5.4 | 96.6 ± 3.4 | 8.0 | 29.2 |
| random | 166 | 0.577 | 1.76x | 1.65x | 95.0 ± 2.0 | -2.5 ± 1.4 | 96.6 ± 3.4 | 96.8 ± 3.2 | 90.3 ± 5.4 | 96.6 ± 3.4 | 31.4 | 31.6 |
| blind | - | - | - | - | 30.8 | - | 31.0 | 25.8 | 29.0 | 37.9 | - | - |

**Random is hard to beat here, and none of these does.** Other methods for language models are not in this demo. Why was not measured; a guess: pictures with one large shape on a plain ground
survive any even sample, while ToDRE keeps the shape whole and leaves large parts of the ground out, as the pictures show. ATP, trained
for 200 steps on the frozen model, reaches its target of 36 tokens and gives prompts different numbers, and loses a further
2.0 ± 0.7 points when the prompts exchange their thresholds, so these hold something; yet its tokens are worth less than an even
sample. Correlation does what it is for, filled crops keep twice to four times as many tokens as blank ones, without gaining from it
at these counts. What to expect of models that read real pages these toys cannot say. Speed was measured on two CPU cores ("AMD EPYC").
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vtok.errors import ConfigError
from vtok.eval.common import terminal
from vtok.eval.common.records import Records
from vtok.eval.common.settings import Setting, twin
from vtok.eval.models.reference import asset
from vtok.eval.models.vlm import REFERENCE_LLAVA, REFERENCE_NEXT, VisionLanguageModel, load_vlm
from vtok.eval.report.questions import (
    HEADER,
    PAGE_HEADER,
    Record,
    findings,
    kept_tokens,
    ordered,
    page_row,
    plot,
    row,
    table,
    title,
)
from vtok.eval.report.tables import FLOOR
from vtok.eval.tasks.vqa.data import EASY_VQA, PAGES, Question, VQAData
from vtok.eval.tasks.vqa.evaluate import VQAOptions, evaluate
from vtok.eval.tasks.vqa.opening import open_vqa
from vtok.eval.viz.prompt_overlay import by_cell, crops_grid, survivors, write_sheet
from vtok.registry import METHODS

QUESTIONS, PAGE_QUESTIONS = 500, 120
SHARES = (0.25, 0.1)  # of the visual tokens that enter the LLM
TARGETS = (0.66, 0.33)  # of the tokens of crops, on average over calibration pages
BATCH, PAGE_BATCH, ANSWER = 50, 25, 4
CALIBRATION_PAGES, CELL_PAGES = 32, 40
TRAINED = {"atp": "easyvqa_llava_atp.safetensors"}  # method -> its modules for the reference LLaVA, in assets
TOWER_RATIO = 0.9  # share of its tokens that each block of the tower keeps under merging


def run_vqa_demo(
    out: Path,
    questions: int | None = QUESTIONS,
    page_questions: int | None = PAGE_QUESTIONS,
    shares: Sequence[float] = SHARES,
    targets: Sequence[float] = TARGETS,
    console: Console | None = None,
    models: Mapping[str, VisionLanguageModel] | None = None,
) -> tuple[list[Record], list[Record]]:
    """Asks what has no answer yet, prints two tables, writes `vqa.png`, `vqa_overlay.png` and `vqa_pages_overlay.png`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        questions: how many about pictures; `None` = all 9,673.
        page_questions: how many about pages; `None` = all 3,600.
        shares: of the visual tokens, which the methods keep before the LLM.
        targets: of the tokens of a page's crops, which correlation keeps on average.
        console: where the tables go.
        models: other models than the bundled ones, by the same names.

    Returns:
        The records about pictures and about pages, unpatched first.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    console = console or terminal.output()
    models = models or {}
    llava = models.get(REFERENCE_LLAVA) or load_vlm(REFERENCE_LLAVA)
    picture_runs = picture_settings(llava, shares)
    pictures = _ask(out, llava, EASY_VQA, picture_runs, FLOOR, questions, console)
    pages_model = models.get(REFERENCE_NEXT) or load_vlm(REFERENCE_NEXT)
    page_runs = page_settings(pages_model, targets)
    pages = _ask(out, pages_model, PAGES, page_runs, FLOOR[:1], page_questions, console)
    add_kept_by_cell(pages_model, page_runs, pages)
    console.print(table(pictures, HEADER, row, title(pictures)))
    for line in findings(pictures):
        console.print(f"- {line}")
    console.print(table(pages, PAGE_HEADER, page_row, title(pages)))
    for line in findings(pages):
        console.print(f"- {line}")
    plot(pictures, pages, out / "vqa.png")
    write_overlays(llava, picture_runs, pages_model, page_runs, pages, out)
    console.print(f"vqa.png, vqa_overlay.png, vqa_pages_overlay.png and every answer (samples.jsonl) are in {out}")
    return pictures, pages


def picture_settings(model: VisionLanguageModel, shares: Sequence[float]) -> list[Setting]:
    """The settings for prompts of one picture, most tokens first; those with trained modules at the budget they were trained
    for.
    """
    found = []
    for share in shares:
        todre = METHODS.get("todre")(keep=share)
        visual = model.net.config.image_seq_length
        merged = [METHODS.get("pitome")(ratio=TOWER_RATIO), METHODS.get("todre")(keep_tokens=round(share * visual))]
        found += [Setting(todre), Setting(merged), *(Setting(name, {"keep": share}) for name in FLOOR)]
    for name, file in TRAINED.items():
        if name in METHODS.names():
            found.append(Setting(name, {"weights": str(asset(file))}))
    return found


def page_settings(model: VisionLanguageModel, targets: Sequence[float]) -> list[Setting]:
    """Correlation at several budgets, its threshold calibrated on pages that are not asked about."""
    calibration = [calibration_pages(model)]
    return [Setting("correlation", {"target_keep": target, "calibration": calibration}) for target in targets]


def calibration_pages(model: VisionLanguageModel) -> Any:
    """Inputs of a few pages of training pictures, with as many filled cells as those of the test have on average."""
    import torch
    from PIL import Image

    from vtok.eval.models.easyvqa import Pictures, compose
    from vtok.eval.models.reference import load_reference_pictures
    from vtok.eval.models.reference_next import draw_cells

    generator = torch.Generator().manual_seed(0)
    source = Pictures(*load_reference_pictures("calibration"))
    rows = source.rows(draw_cells(CALIBRATION_PAGES, generator), generator)
    pages = compose(source.pictures, rows).permute(0, 2, 3, 1).numpy()
    return model.inputs([Image.fromarray(page) for page in pages], ["is top left blank?"] * len(pages))


def _ask(
    out: Path,
    model: VisionLanguageModel,
    data: str,
    settings: Sequence[Setting],
    floors: Sequence[str],
    count: int | None,
    console: Console,
) -> list[Record]:
    """Records of the unpatched model, the settings, and floors with as many tokens as settings that have none yet."""
    size = BATCH if data == EASY_VQA else PAGE_BATCH
    options = VQAOptions(num_samples=count, batch_size=size, max_new_tokens=ANSWER, device="cpu", output=str(out / data))
    with terminal.progress(console) as progress:
        bar = progress.add_task(f"{model.name}, {data}", total=None)
        records = evaluate(
            model, data, [None, *settings], options, lambda done, total: progress.update(bar, completed=done, total=total)
        )
        lacking = [Setting(name, {"keep": share}) for share in shares_without_floor(records) for name in floors]
        if lacking:
            records += evaluate(model, data, [None, *lacking], options)[1:]
    everything = Records(out / "results.jsonl")
    known = everything.by_key()
    everything.extend([record for record in records if record["key"] not in known])
    return ordered(records)


def shares_without_floor(records: Sequence[Record]) -> list[float]:
    """Shares of visual tokens at which a method has no random one beside it: none that keeps as many to within a tenth."""
    at = [kept_tokens(r) for r in records if r["method"] == "random"]
    found: list[float] = []
    for record in records[1:]:
        kept = kept_tokens(record)
        if record["method"] in FLOOR or any(abs(kept - one) <= 0.1 * one for one in at):
            continue
        at.append(kept)
        found.append(round(kept / record["tokens"]["in"], 4))
    return found


def add_kept_by_cell(model: VisionLanguageModel, settings: Sequence[Setting], records: Sequence[Record]) -> None:
    """Adds to records of pages how many tokens blank and filled crops keep on average, from one question each of some pages."""
    from vtok.eval.models.easyvqa import BLANK
    from vtok.eval.models.reference_next import load_reference_page_questions

    data = open_vqa(PAGES)
    one_each = list({q.image: q for q in data.questions}.values())
    chosen = [one_each[i * len(one_each) // CELL_PAGES] for i in range(CELL_PAGES)]
    blank = load_reference_page_questions().cells[[q.image for q in chosen]].numpy() == BLANK  # [pages, 4]
    for record in records:
        setting = _setting_of(record, settings)
        if setting is None:
            continue
        found = survivors(model, setting.apply(twin(model.net)), data, chosen, new_tokens=1)
        cells = by_cell(crops_grid(found.left, overview_tokens(model)))
        record["kept_of_crops"] = {"blank": float(cells[blank].mean()), "filled": float(cells[~blank].mean())}


def overview_tokens(model: VisionLanguageModel) -> int:
    """Tokens of the view of a whole page."""
    vision = model.net.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def _setting_of(record: Record, settings: Sequence[Setting]) -> Setting | None:
    """What a record was measured with."""
    for setting in settings:
        if setting.title == record["title"]:
            return setting
    if record["method"] in FLOOR:
        return Setting(record["method"], {"keep": record["params"]["keep"]})
    return None


def write_overlays(
    llava: VisionLanguageModel,
    picture_runs: Sequence[Setting],
    pages_model: VisionLanguageModel,
    page_runs: Sequence[Setting],
    pages: Sequence[Record],
    out: Path,
) -> None:
    """Two pictures with two questions each under every method that drops, and four pages from sparse to dense."""
    data = open_vqa(EASY_VQA)
    dropping = {setting.name: setting for setting in reversed(picture_runs) if not isinstance(setting.method, list)}
    write_sheet(
        llava,
        data,
        two_questions(data),
        sorted(dropping.items()),
        out / "vqa_overlay.png",
        "patches whose tokens reach the last layer of the LLM; dropped ones are dark",
    )
    found = open_vqa(PAGES)
    floors = [_setting_of(r, ()) for r in pages if r["method"] == FLOOR[0]]
    settings = [*page_runs, *(setting for setting in floors if setting is not None)]
    write_sheet(
        pages_model,
        found,
        [next(q for q in found.questions if q.groups["density"] == n) for n in "1234"],
        [(setting.title, setting) for setting in settings],
        out / "vqa_pages_overlay.png",
        "tokens of the crops that enter the LLM; dropped ones are dark",
        overview_tokens(pages_model),
    )


def two_questions(data: VQAData) -> list[Question]:
    """An open and a yes/no question about each of the first two pictures of different classes."""
    found: list[Question] = []
    for image in dict.fromkeys(q.image for q in data.questions):
        own = [q for q in data.questions if q.image == image]
        pair = [next((q for q in own if q.groups["kind"] == kind), None) for kind in ("open", "yes/no")]
        if None not in pair and (not found or pair[0].target != found[0].target):  # type: ignore[union-attr]
            found += [q for q in pair if q is not None]
        if len(found) == 4:
            return found
    raise ConfigError("the data has no two pictures with an open and a yes/no question each")
