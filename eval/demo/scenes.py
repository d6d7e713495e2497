"""The part of the demo on questions about one small thing among many, to the LLaVA of scenes: methods for prompts beside random
and downsampling.

What was measured: assets/docs/results/scenes.md in the repository.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vtok.eval.common import terminal
from vtok.eval.common.records import Record
from vtok.eval.common.settings import fastest_on_cpu
from vtok.eval.demo.parts import measured, settings_near, short_table, show, write_frame
from vtok.eval.models.vlm import REFERENCE_SCENES, load_vlm
from vtok.eval.report.plots import plot
from vtok.eval.report.sections import Section
from vtok.eval.report.summary import part_columns
from vtok.eval.report.tables import Column, Table
from vtok.eval.tasks.vqa.data import SCENES, Question, VQAData
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.viz.prompt_overlay import question_sheet

QUESTIONS = 200
SHOWN_TOKENS = 64
SHOWN = ("random", "downsample", "visionzip", "todre", "divprune", "cdpruner", "fastv", "sparsevlm")


def run_scenes_demo(
    out: Path, questions: int | None = QUESTIONS, full: bool = False, console: Console | None = None
) -> list[Record]:
    """Asks what has no answer yet, then prints two tables and writes `scenes.png` and `scenes_overlays.png`.

    Args:
        out: folder of results; a second run with the same arguments goes on where the first stopped.
        questions: how many; `None` = all.
        full: every method, at 128, 64 and 32 tokens.
        console: where the tables go.

    Returns:
        The records, unpatched first.

    Raises:
        ConfigError: the package with the encoder's weights is not installed.
        MissingExtraError: transformers is not installed.
    """
    console = console or terminal.output()
    name = "sweep_reference_scenes" if full else "demo_scenes"
    section = measured(name, out, console, num_samples=questions, dtype=fastest_on_cpu())
    records = show(section, console, short_table(section))
    console.print(kinds_table(section))
    write_frame(out)
    plot([section], out / "scenes.png")
    write_scenes_sheet(section, out / "scenes_overlays.png")
    console.print(f"scenes.png, scenes_overlays.png and every answer (samples.jsonl) are in {out}")
    return records


def kinds_table(section: Section) -> Table:
    """Accuracy by kind of question, a line a setting."""
    columns = [Column("setting", lambda row: row.label, left=True), *part_columns(section, "kind")]
    return Table.of(section.rows, columns, "accuracy by what is asked", style=lambda row: "dim" if row.baseline else None)


def write_scenes_sheet(section: Section, path: Path) -> None:
    """What methods of `SHOWN` with about `SHOWN_TOKENS` tokens keep for two questions about one scene."""
    model, data = load_vlm(REFERENCE_SCENES), open_vqa(SCENES)
    settings = settings_near(section, SHOWN, SHOWN_TOKENS, 0.1)
    heading = "patches whose tokens reach the last layer of the LLM; dropped ones are blue"
    question_sheet(model, data, two_questions(data), settings, path, heading)


def two_questions(data: VQAData, scene: int = 0) -> list[Question]:
    """Two questions about different things of one scene."""
    return [q for q in data.questions if q.image == scene and q.groups["kind"] in ("color", "thing")]
