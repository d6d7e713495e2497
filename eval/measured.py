"""What `vtok.benchmark` and `vtok.evaluate` return: records, with the tables and plots that the program makes of them."""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from html import escape
from io import StringIO
from typing import Any

import pandas as pd
from rich.console import Console

from vtok.eval.benchmarks import result as bench
from vtok.eval.report.frame import CSV, frame
from vtok.eval.report.plots import Picture, pareto, save, speeds
from vtok.eval.report.sections import Section, sections
from vtok.eval.report.summary import gap_columns, table, told
from vtok.eval.report.tables import Table
from vtok.measuring import Results
from vtok.writing import write

_COLUMNS = 132  # of a table where nobody says how wide it may be


class Measured(Results):
    """Records of one model, unpatched and patched.

    Args:
        records: plain values, one mapping a setting.
    """

    def __init__(self, records: Sequence[dict[str, Any]]):
        self.records = list(records)

    @property
    @abstractmethod
    def table(self) -> Table:
        """One line a setting."""

    @property
    @abstractmethod
    def notes(self) -> list[str]:
        """Sentences below the table."""

    @cached_property
    def section(self) -> Section:
        """The records as reports see them."""
        (found,) = sections(self.records)
        return found

    def to_pandas(self) -> pd.DataFrame:
        """One row a setting, in the columns of `sweep.csv` (see `vtok.eval.report.frame`), those left out that are empty."""
        return frame([self.section])[list(CSV)].dropna(axis="columns", how="all").infer_objects()

    @abstractmethod
    def plot(self, path: str | os.PathLike | None = None) -> Picture:
        """A matplotlib figure, which notebooks show; with a path it is written there, too."""

    def markdown(self) -> str:
        """The table as GitHub Markdown, its caption and the notes below it."""
        caption = [self.table.caption, ""] if self.table.caption else []
        return "\n".join([self.table.markdown(), "", *caption, *(f"- {note}" for note in self.notes), ""])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the records as JSON, of which `vtok report` makes a page."""
        write(path, json.dumps(self.records, indent=2, default=str))

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return f"{self.table.html()}<ul>{notes}</ul>" if notes else self.table.html()

    def __str__(self) -> str:
        held = StringIO()
        width = shutil.get_terminal_size((_COLUMNS, 1)).columns
        console = Console(file=held, width=width, markup=False, emoji=False, highlight=False, no_color=True)
        console.print(self.table)
        for note in self.notes:
            console.print(f"- {note}")
        return held.getvalue().rstrip("\n")

    __repr__ = __str__


class Benchmark(Measured):
    """Speed of patched models against the unpatched one.

    Args:
        results: one a setting.
    """

    def __init__(self, results: Sequence[bench.Timed]):
        super().__init__([asdict(result) for result in results])
        self.results = list(results)

    @property
    def table(self) -> Table:
        return bench.table(self.results)

    @property
    def notes(self) -> list[str]:
        warning = self.results[0].warning
        return [*([warning] if warning else []), *(f"{result.setting}: {result.verdict}" for result in self.results)]

    def to_pandas(self) -> pd.DataFrame:
        """One row a setting, in their order; what was measured of the unpatched and the patched model has two columns."""
        known = super().to_pandas().drop(columns="pareto")
        place = {id(record): i for i, record in enumerate(self.records)}
        known.index = pd.Index([place[id(row.record)] for row in self.section.rows])
        pairs = [{key: value for key, value in one.items() if isinstance(value, dict)} for one in self.records]
        nested = pd.json_normalize(pairs, sep="_").dropna(axis="columns", how="all")
        more = [name for name in nested if str(name).endswith(("_base", "_patched")) and name not in known]
        return known.sort_index().join(nested[more])

    def plot(self, path: str | os.PathLike | None = None) -> Picture:
        return _written(speeds(self.section), path)


class Evaluation(Measured):
    """Scores of patched models beside those of the unpatched one."""

    @property
    def table(self) -> Table:
        return table(self.section, gap_columns(self.section))

    @property
    def notes(self) -> list[str]:
        return told(self.section)

    def plot(self, path: str | os.PathLike | None = None) -> Picture:
        return _written(pareto([self.section]), path)


def _written(picture: Picture, path: str | os.PathLike | None) -> Picture:
    if path is not None:
        save(picture, os.fspath(path))
    return picture
