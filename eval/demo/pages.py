"""Questions about words in small print to the LLaVA-NeXT of pages, under every method for prompts, beside random and
downsampling: `python -m vtok.eval.demo.pages FOLDER`. Prints the table of assets/docs/results/pages.md, and draws what methods
keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer

from vtok.eval.common import terminal
from vtok.eval.common.statistics import with_error
from vtok.eval.demo.parts import kept_by_crop, measured, overview_tokens, settings_near
from vtok.eval.models.pages import draw_page
from vtok.eval.models.pages.compose import QUARTERS, quarter_of
from vtok.eval.models.vlm import REFERENCE_PRINT, VisionLanguageModel, load_vlm
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section
from vtok.eval.report.summary import gap_columns, part_columns
from vtok.eval.report.tables import Column, Table
from vtok.eval.tasks.vqa.data import PRINT, Question, VQAData
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.viz.prompt_overlay import question_sheet

SHOWN = ("random", "correlation", "hired", "divprune", "cdpruner", "fastv")
SHOWN_TOKENS = 48
POOLED = ("downsample",)  # whose tokens belong to no patch
CROP_PAGES = 40  # on which the tokens of blank and of filled crops are counted


def run_pages_demo(folder: Path, questions: int | None = None) -> Section:
    """Asks what has no answer yet (so many questions, or all), prints a table, and writes `pages_overlays.png` into the folder
    of results."""
    console = terminal.output()
    section = measured("sweep_reference_pages", folder, console, num_samples=questions)
    model, data = load_vlm(REFERENCE_PRINT), open_vqa(PRINT)
    crops = crops_of(model, data, section)
    print(pages_table(section, crops).markdown())
    write_pages_sheet(model, data, section, folder / "pages_overlays.png")
    console.print(f"pages_overlays.png and every answer (samples.jsonl) are in {folder}")
    return section


def pages_table(section: Section, crops: dict[str, tuple[float, float]]) -> Table:
    """Accuracy, paired differences, and by kind of question; tokens that crops keep (of `crops_of`)."""

    def kept(row: Row) -> str:
        return "{:.1f} / {:.1f}".format(*crops[row.label]) if row.label in crops else "-"

    columns = [
        Column("setting", lambda row: row.label, left=True),
        Column("tokens", lambda row: "-" if row.mean_tokens is None else f"{row.mean_tokens:.0f}"),
        Column("right %", lambda row: with_error(row.record["metrics"], row.primary or "", row.factor, 1)),
        *gap_columns(section, ("random", "downsample")),
        *part_columns(section, "kind"),
        Column("of 36: blank / filled", kept),
    ]
    return Table.of(section.rows, columns, part=lambda row: row.budget)


def crops_of(model: VisionLanguageModel, data: VQAData, section: Section) -> dict[str, tuple[float, float]]:
    """`kept_by_crop` of some pages."""
    chosen = list({q.image: q for q in data.questions}.values())[:CROP_PAGES]
    filled = [{quarter_of(word.place) for word in draw_page("test", q.image).words} for q in chosen]
    blank = np.array([[quarter not in there for quarter in range(QUARTERS)] for there in filled])
    return kept_by_crop(model, data, chosen, blank, [row for row in section.patched if row.method not in POOLED])


def write_pages_sheet(model: VisionLanguageModel, data: VQAData, section: Section, path: Path) -> None:
    """What methods of `SHOWN` with about `SHOWN_TOKENS` tokens keep of the crops of a sparse and of a dense page."""
    settings = settings_near(section, SHOWN, SHOWN_TOKENS, 0.2)
    heading = "patches of the crops whose tokens reach the last layer of the LLM; dropped ones are blue"
    question_sheet(model, data, shown_questions(data), settings, path, heading, overview_tokens(model))


def shown_questions(data: VQAData, pages: Sequence[int] = (5, 7)) -> list[Question]:
    """Two questions about each of two pages."""
    return [q for q in data.questions if q.image in pages and q.groups["kind"] in ("color", "under")]


if __name__ == "__main__":
    typer.run(run_pages_demo)
