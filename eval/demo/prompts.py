"""The parts of the demo on vision-language models: questions about one small thing among many to the LLaVA of scenes, about
pictures to the reference LLaVA, about pages to the reference LLaVA-NeXT, beside what can be answered without the image.

Both take a folder `out` of results, where a second run with the same arguments goes on where the first stopped, numbers of
questions (`None` = all) and a console for their tables; they return records, unpatched first.

What they found: assets/docs/results/scenes.md and demo_questions.md in the repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.console import Console

from vtok.errors import ConfigError
from vtok.eval.common.records import Record
from vtok.eval.common.settings import fastest_on_cpu
from vtok.eval.demo.parts import (
    kept_by_crop,
    measured,
    overview_tokens,
    setting_of,
    settings_near,
    short_table,
    show,
    write_files,
)
from vtok.eval.models.vlm import REFERENCE_LLAVA, REFERENCE_NEXT, REFERENCE_SCENES, VisionLanguageModel, load_vlm
from vtok.eval.report.frame import frame
from vtok.eval.report.plots import Panel, draw
from vtok.eval.report.sections import Section
from vtok.eval.report.summary import blind_cells, metric_columns, part_columns, table
from vtok.eval.report.tables import Column, Table
from vtok.eval.runs.again import configs_of
from vtok.eval.tasks.vqa.data import EASY_VQA, PAGES, SCENES, Question, VQAData
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.viz.prompt_overlay import question_sheet

SCENE_QUESTIONS, QUESTIONS, PAGE_QUESTIONS = 200, 500, 120
CELL_PAGES = 40  # on which the tokens of blank and of filled crops are counted
SHOWN_TOKENS = 64
SHOWN = ("random", "downsample", "visionzip", "todre", "divprune", "cdpruner", "fastv", "sparsevlm")
_LEFT = "patches whose tokens reach the last layer of the LLM; dropped ones are blue"


def run_scenes_demo(out: Path, questions: int | None, full: bool, console: Console) -> list[Record]:
    """Asks what has no answer yet, then prints two tables and writes `scenes.png` and `scenes_overlays.png`.

    With `full` every method, at 128, 64 and 32 tokens.

    Raises:
        ConfigError: the package with the encoder's weights is not installed.
        MissingExtraError: transformers is not installed.
    """
    name = "sweep_reference_scenes" if full else "demo_scenes"
    section = measured(name, out, console, num_samples=questions, dtype=fastest_on_cpu())
    records = show(section, console, short_table(section))
    columns = [Column("setting", lambda row: row.label, left=True), *part_columns(section, "kind")]
    title = "accuracy by what is asked"
    console.print(Table.of(section.rows, columns, title, style=lambda row: "dim" if row.baseline else None))
    write_files(out, "scenes.png", section)
    model, data = load_vlm(REFERENCE_SCENES), open_vqa(SCENES)
    asked = [q for q in data.questions if q.image == 0 and q.groups["kind"] in ("color", "thing")]  # of one scene
    settings = settings_near(section, SHOWN, SHOWN_TOKENS, 0.1)
    question_sheet(model, data, asked, settings, out / "scenes_overlays.png", _LEFT)
    console.print(f"scenes.png, scenes_overlays.png and every answer (samples.jsonl) are in {out}")
    return records


def run_vqa_demo(
    out: Path,
    questions: int | None,
    page_questions: int | None,
    console: Console,
    methods: Mapping[str, Any] | None = None,
) -> tuple[list[Record], list[Record]]:
    """Asks what has no answer yet, prints two tables, writes `vqa.png`, `vqa_overlay.png` and `vqa_pages_overlay.png`.

    Args:
        methods: run file (`demo_llava`, `demo_llava_next`) -> settings other than its own, as it writes them.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    counts = {"demo_llava": questions, "demo_llava_next": page_questions}
    changes = {name: {"methods": own} for name, own in (methods or {}).items()}
    pictures, pages = (
        measured(name, out, console, num_samples=count, **changes.get(name, {})) for name, count in counts.items()
    )
    llava, next_ = load_vlm(REFERENCE_LLAVA), load_vlm(REFERENCE_NEXT)
    records = _show(pictures, [*part_columns(pictures, "kind"), *metric_columns(["agreement"])], console)
    crops = _kept_by_cell(next_, pages)
    columns = [
        Column("kept of a blank crop", lambda row: f"{crops[row.label][0]:.1f}" if row.label in crops else "-"),
        Column("of a filled one", lambda row: f"{crops[row.label][1]:.1f}" if row.label in crops else "-"),
    ]
    found = _show(pages, [*part_columns(pages, "density"), *columns], console)
    write_files(out)
    _plot(pictures, pages, out / "vqa.png")
    _write_overlays(llava, pictures, next_, pages, out)
    console.print(f"vqa.png, vqa_overlay.png, vqa_pages_overlay.png and every answer (samples.jsonl) are in {out}")
    return records, found


def _show(section: Section, columns: Sequence[Column], console: Console) -> list[Record]:
    """A table with the best answers without the image as its last line."""
    shown = table(section, columns, digits=1, brief=attrgetter("method"))
    shown.add(blind_cells(section, shown.header))
    return show(section, console, shown)


def _kept_by_cell(model: VisionLanguageModel, section: Section) -> dict[str, tuple[float, float]]:
    """Setting -> tokens that a (blank, filled) crop keeps on average, from one question each of some pages."""
    from vtok.eval.models.easyvqa import BLANK
    from vtok.eval.models.reference_next import load_reference_page_questions

    data = open_vqa(PAGES)
    one_each = list({q.image: q for q in data.questions}.values())
    chosen = [one_each[i * len(one_each) // CELL_PAGES] for i in range(CELL_PAGES)]
    blank = load_reference_page_questions().cells[[q.image for q in chosen]].numpy() == BLANK  # [pages, 4]
    return kept_by_crop(model, data, chosen, blank, section.patched)


def _plot(pictures: Section, pages: Section, path: Path) -> None:
    """Accuracy against visual tokens: all and open questions about pictures, and questions about pages."""
    panels = [
        _panel(pictures, "pictures: all questions (%)"),
        _panel(pictures, "pictures: open questions (%)", ("kind", "open")),
    ]
    draw([[*panels, _panel(pages, "pages: all questions (%)")]], path, f"{pictures.title}, and {pages.title}")


def _panel(section: Section, label: str, part: tuple[str, str] | None = None) -> Panel:
    data, rows = frame([section]), section.rows
    held = [row.record["metrics"] if part is None else row.record["groups"][part[0]][part[1]] for row in rows]
    blind = section.first["blind"] if part is None else held[0]["blind"]
    data = data.assign(
        shown=[100 * one["exact_match"] for one in held], error=[100 * (one["exact_match_stderr"] or 0) for one in held]
    )
    levels = (("without the image", 100 * blind),)
    return Panel(data, "mean_tokens", "shown", "visual tokens, mean over decoder layers", label, error="error", levels=levels)


def _write_overlays(
    llava: VisionLanguageModel, pictures: Section, next_: VisionLanguageModel, pages: Section, out: Path
) -> None:
    """Two pictures with two questions each under every method alone, and four pages from sparse to dense."""
    data = open_vqa(EASY_VQA)
    alone = {row.method: setting_of(row) for row in pictures.patched if len(configs_of(row.record)) == 1}
    question_sheet(llava, data, two_questions(data), sorted(alone.items()), out / "vqa_overlay.png", _LEFT)
    found = open_vqa(PAGES)
    question_sheet(
        next_,
        found,
        [next(q for q in found.questions if q.groups["density"] == n) for n in "1234"],
        [(row.label, setting_of(row)) for row in pages.patched],
        out / "vqa_pages_overlay.png",
        "tokens of the crops that enter the LLM; dropped ones are blue",
        overview_tokens(next_),
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
