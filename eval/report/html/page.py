"""Puts the page together: `vtok report` and `vtok.eval.write_report`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import vtok
from vtok.errors import ConfigError, MissingExtraError
from vtok.eval.report.frame import front_of, total_gmacs
from vtok.eval.report.html import charts
from vtok.eval.report.html.gallery import gallery
from vtok.eval.report.html.groups import group_tables
from vtok.eval.report.html.questions import questions
from vtok.eval.report.html.repeat import environment, repeat
from vtok.eval.report.html.table import all_scores, speeds, summary
from vtok.eval.report.read import read
from vtok.eval.report.sections import Section, findings, headline_of, sections
from vtok.eval.report.values import count
from vtok.writing import apart, writable, write

if TYPE_CHECKING:
    from jinja2 import Environment

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ReportOptions:
    """What a page holds besides the numbers.

    Attributes:
        title: of the page.
        gallery: images drawn a section, 0 = none: models are built anew for that.
        images: files or numbers of bundled images to draw instead of evenly spaced ones.
        questions: single questions shown a section.
    """

    title: str = "vtok report"
    gallery: int = 0
    images: tuple[str, ...] = ()
    questions: int = 12


@dataclass(frozen=True)
class Report:
    """What was written."""

    path: Path  # of the page
    headlines: list[tuple[str, str]]  # (section, what is significant in it)
    problems: list[str] = field(default_factory=list)  # what could not be read or drawn


def write_report(
    results: Sequence[str | Path],
    output: str | Path = "report.html",
    options: ReportOptions | None = None,
    progress: Progress = lambda words: None,
) -> Report:
    """Writes one HTML file that needs nothing else: no network, no other file.

    Args:
        results: files or folders of `vtok run`, `sweep`, `eval`, `bench --json` and `demo`.
        output: the file.
        options: see `ReportOptions`.
        progress: told what is being done.

    Returns:
        Where it is, what is significant, and what could not be read or drawn; damaged lines end up there and on the page.

    Raises:
        ConfigError: there are no results, or the file cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    options, target = options or ReportOptions(), Path(output)
    if target.is_dir():
        raise ConfigError(
            f"the report cannot be written to {target}: it is a folder; name a file such as {target / 'report.html'}"
        )
    if target.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        raise ConfigError(f"the report is a page of HTML, {target} is a name for results; name a file such as report.html")
    progress("reading")
    found = read(results)
    apart([target], [*results, *found.files])
    writable(target)
    parts, grouped = [], sections(found.records)
    look = charts.looks(grouped)
    for number, section in enumerate(grouped, 1):
        progress(section.title)
        parts.append(_part(section, number, look, found.samples, options, progress))
    sources = f"{count(len(found.records), 'result')} in {count(len(found.files), 'file')}"
    page = render(options.title, parts, found.problems, sources)
    write(target, page)
    drawn = [f"{p.section.title}: {problem}" for p in parts if p.gallery for problem in p.gallery.problems]
    return Report(target, [(part.section.title, part.headline) for part in parts], found.problems + drawn)


def _part(
    section: Section,
    number: int,
    look: dict[str, tuple[str, int]],
    samples: dict[str, list[dict[str, Any]]],
    options: ReportOptions,
    progress: Progress = lambda words: None,
) -> SimpleNamespace:
    """A section as the template writes it."""
    asked = questions(section, samples, options.questions)
    drawn = None
    if not section.bench and (options.gallery or options.images):
        drawn = gallery(section, asked, max(options.gallery, 1), options.images, progress)
    plots = [
        charts.pareto(section, look, total_gmacs, True, "GMACs per sample, token reduction included"),
        charts.pareto(section, look, lambda row: row.measured, False, "measured speed-up", lambda row: row.speedup),
    ]
    front = front_of(section.rows, total_gmacs, True) if plots[0] else set()
    return SimpleNamespace(
        id=f"s{number}",
        section=section,
        headline=headline_of(section),
        findings=findings(section),
        table=summary(section, front),
        scores=all_scores(section),
        plots=[plot for plot in plots if plot is not None],
        layers=charts.layers(section, look),
        speeds=speeds(section),
        groups=group_tables(section),
        asked=asked,
        gallery=drawn,
        environment=environment(section),
        repeat=repeat(section, number),
    )


def render(title: str, parts: Sequence[SimpleNamespace], problems: Sequence[str], sources: str) -> str:
    """The page as text. Everything that comes from results is escaped; a policy in the page forbids all other scripts."""
    env = _environment()
    script = env.get_template("report.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return env.get_template("report.html").render(
        title=title,
        parts=parts,
        problems=problems,
        sources=sources,
        version=vtok.__version__,
        made=datetime.now(timezone.utc),
        script=script,
        script_hash=f"sha256-{digest}",
        style=env.get_template("report.css").render(),
    )


@cache
def _environment() -> Environment:
    """Templates are compiled once."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "eval") from error
    return Environment(
        loader=PackageLoader("vtok.eval.report.html"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
