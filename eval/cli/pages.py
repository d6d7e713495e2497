"""`vtok report RESULTS...`, one HTML page of results, and `vtok viz MODEL METHOD IMAGE`, the token maps of one image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vtok.errors import ConfigError, brief
from vtok.eval.cli.flags import SETTING_HELP
from vtok.eval.common import terminal
from vtok.eval.runs.names import check_methods
from vtok.writing import apart, writable


def write_page(
    results: Annotated[
        list[Path], typer.Argument(help="results.jsonl, JSON of vtok run, eval or bench, or folders that hold such files")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file of the page")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="of the page")] = "vtok report",
    gallery: Annotated[
        int, typer.Option(min=0, help="also draw so many images a section; bundled models are built anew for that")
    ] = 0,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="draw this one: a file, or the number of a bundled image or question; may be repeated"),
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="single questions shown a section")] = 12,
) -> None:
    """Writes results as one self-contained HTML page: tables, plots, what is significant, how to repeat it."""
    from vtok.eval.report.html import ReportOptions, write_report

    options = ReportOptions(title, gallery, tuple(image or ()), questions)
    with terminal.errors().status("reading") as status:
        report = write_report(results, output, options, lambda words: status.update(Text(words)))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for name, words in report.headlines:
        console.print(f"- {name}: {words}")
    for problem in report.problems:
        console.print(f"! {problem}")
    console.print(f"written: {report.path}")


def draw_tokens(
    model: Annotated[
        str,
        typer.Argument(
            help="a timm name, open_clip:NAME/TAG, transformers:OWNER/NAME, "
            "reference, reference-clip, reference-llava(-next), reference-scenes, reference-print"
        ),
    ],
    method: Annotated[str, typer.Argument(help=SETTING_HELP)],
    image: Annotated[str, typer.Argument(help="image file, or the number of an image that comes with a reference model")],
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="file: .png for a sheet, .gif for an animation; may be repeated")
    ] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="to a vision-language model")] = None,
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights (they decide what is merged)")] = True,
) -> None:
    """Draws which tokens of an image are merged, dropped and kept, layer by layer; of vision-language models in the LLM too."""
    check_methods([method])
    from vtok.eval.report.tables import Table
    from vtok.eval.runs.loader import parse_setting
    from vtok.eval.viz.draw import FORMATS
    from vtok.eval.viz.token_maps import visualize

    files = output or [Path("viz.png")]
    for path in files:  # not after the model has run
        if path.suffix.lower() not in FORMATS:
            raise ConfigError(f"--output takes files that end in {' or '.join(FORMATS)}, got {brief(path)!r}")
    apart(files, [image, model, method])
    for path in files:
        writable(path)
    setting = parse_setting(method)
    chosen: Any
    chosen, params = setting if isinstance(setting, tuple) else (setting, {})
    maps = visualize(model, chosen, image, question=question, pretrained=pretrained, **params)
    console = terminal.output(80)
    left = [("image", str(maps.patches)), *((stage.name, str(stage.tokens)) for stage in maps.stages)]
    console.print(Table.plain(("", "tokens"), left, title=maps.title))
    for line in (*([] if maps.answer is None else [f"answer: {maps.answer}"]), *maps.notes):
        console.print(f"- {line}", highlight=False, markup=False)
    for path in files:
        console.print(f"written: {maps.save(path)}", highlight=False, markup=False, soft_wrap=True)
