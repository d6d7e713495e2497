"""Tables, made in one place: columns over records, results or whatever else has one row a setting, for a terminal or as
GitHub Markdown. Numbers for other programs are frames (`vtok.eval.report.frame`), written here as CSV.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable
from rich.text import Text

from vtok.writing import replacing

if TYPE_CHECKING:
    import pandas as pd


class Column(NamedTuple):
    """One column."""

    name: str  # in the header
    cell: Callable[[Any], Any]  # what a row shows
    left: bool = False  # set flush left, as words are; numbers are set flush right
    title: str = ""  # what it is, in a sentence, for the page
    unit: str = ""  # behind the name on the page


_FIRST, _FLEXIBLE = 30, 24  # columns of a terminal: of what a row is called, if a third of the room is less; of texts at least


class _Part(NamedTuple):
    """A column for a terminal: header and cells with their line breaks; `flexible` = broken between words as there is room."""

    name: str
    cells: list[str]
    left: bool
    flexible: bool
    width: int


def _folded(cell: str, room: int) -> str:
    """What a row is called, on lines of so many columns, broken behind commas, brackets and words where that is possible."""
    lines = [""]
    for piece in re.findall(r"[^\s,(+]+[,(+]?\s*|[\s,(+]", cell):
        for part in [piece] if len(piece.rstrip()) <= room else textwrap.wrap(piece, room):
            if len((lines[-1] + part).rstrip()) > room:
                lines.append("")
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


@dataclass
class Table:
    """Text cells with what a medium can make of them; `console.print` takes it as it is."""

    header: Sequence[str]  # names of the columns
    rows: list[Sequence[str]]  # cells, line by line
    left: Sequence[bool]  # which columns are set flush left
    title: str | None = None  # title, caption: above and below
    caption: str | None = None
    styles: dict[int, str] = field(default_factory=dict)  # number of a row -> its style in a terminal, "dim" or "red"
    rules: set[int] = field(default_factory=set)  # numbers of rows with a rule behind them
    look: dict[str, Any] = field(default_factory=dict)  # further arguments of rich's table

    @classmethod
    def of(
        cls,
        rows: Iterable[Any],
        columns: Sequence[Column],
        title: str | None = None,
        caption: str | None = None,
        style: Callable[[Any], str | None] = lambda row: None,
        part: Callable[[Any], Any] = lambda row: None,
        **look: Any,
    ) -> Table:
        """Columns laid over rows.

        Args:
            rows: what the columns' functions take.
            columns: from left to right.
            title, caption: above and below.
            style: of a row.
            part: what a row belongs to; there is a rule wherever it changes.
            look: further arguments of rich's table.
        """
        rows = list(rows)
        cells: list[Sequence[str]] = [tuple(column.cell(row) for column in columns) for row in rows]
        styles = {i: found for i, row in enumerate(rows) if (found := style(row)) is not None}
        parts = [part(row) for row in rows]
        rules = {i for i, (one, after) in enumerate(itertools.pairwise(parts)) if one != after}
        names, left = [column.name for column in columns], [column.left for column in columns]
        return cls(names, cells, left, title, caption, styles, rules, look)

    @classmethod
    def plain(cls, header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, **about: Any) -> Table:
        """Cells that are text already; the first `left` columns are words."""
        return cls(header, list(rows), [i < left for i in range(len(header))], **about)

    def add(self, cells: Sequence[str], style: str | None = "dim") -> None:
        """One more line, behind a rule."""
        self.rules.add(len(self.rows) - 1)
        if style is not None:
            self.styles[len(self.rows)] = style
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable | Text]:
        """The table for a terminal of any width: words and numbers are never broken. What does not fit beside the first column
        goes into further tables below, each with the first column again; columns that say nothing are left out."""
        stacks = self._stacks(options.max_width)
        alone: dict[str, Any] = {"title": self.title, "caption": self.caption} if len(stacks) == 1 else {}
        if self.title and not alone:
            yield Text(self.title, "italic")
        for parts in stacks:
            made: RichTable = RichTable(**alone, **self.look)
            for part in parts:
                side: Any = "left" if part.left else "right"
                made.add_column(part.name, justify=side, overflow="fold", no_wrap=not part.flexible, min_width=part.width)
            for i, row in enumerate(zip(*(part.cells for part in parts))):
                made.add_row(*row, style=self.styles.get(i), end_section=i in self.rules)
            yield made
        if self.caption and not alone:
            yield Text(self.caption, "italic dim")

    def _stacks(self, room: int) -> list[list[_Part]]:
        """The columns of every table that is printed."""
        shown = [j for j in range(len(self.header)) if not j or not self.rows or any(row[j] != "-" for row in self.rows)]
        parts = [self._part(j, room, False) for j in shown]
        if sum(part.width + 3 for part in parts) + 1 > room:
            parts = [self._part(j, room, True) for j in shown]
        stacks, first = [parts[:1]], parts[:1]
        for part in parts[1:]:
            if len(stacks[-1]) > 1 and sum(one.width + 3 for one in (*stacks[-1], part)) + 1 > room:
                stacks.append(list(first))
            stacks[-1].append(part)
        return stacks

    def _part(self, j: int, room: int, narrow: bool) -> _Part:
        """A column as it is printed; `narrow` = intervals and what follows an arrow stand on lines of their own."""
        cells = [str(row[j]) for row in self.rows]
        flexible = j > 0 and self.left[j]
        if not j:
            cells = [_folded(cell, max(_FIRST, room // 3)) for cell in cells]
        elif narrow and not flexible:
            cells = [cell.replace(" [", "\n[").replace(" -> ", "\n-> ") for cell in cells]
        lines = [cell_len(line) for cell in cells for line in cell.splitlines()]
        header = self.header[j].replace("[95 %]", "[95\u00a0%]")
        words = max((cell_len(word) for word in header.split(" ")), default=1)
        width = max(words, min(_FLEXIBLE, max(lines, default=1)) if flexible else max(lines, default=1))
        name = header if flexible else "\n".join(textwrap.wrap(header, width, break_on_hyphens=False))
        return _Part(name, cells, self.left[j], flexible, width)

    def markdown(self) -> str:
        """The cells as a GitHub table, without title and caption."""
        rule = "|".join("---" if left else "---:" for left in self.left)
        lines = [self.header, *self.rows]
        head, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n".join([head, f"|{rule}|", *body])

    def html(self) -> str:
        """The table as HTML, title and caption included; notebooks show it. Their style sheets have the class."""
        align = ["left" if left else "right" for left in self.left]

        def line(cells: Sequence[str], tag: str) -> str:
            made = (f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, align))
            return f"<tr>{''.join(made)}</tr>"

        above, below = (f"<p>{escape(words)}</p>" if words else "" for words in (self.title, self.caption))
        body = "".join(line(row, "td") for row in self.rows)
        head = line(self.header, "th")
        return f'{above}<table class="dataframe"><thead>{head}</thead><tbody>{body}</tbody></table>{below}'


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """A frame as CSV, empty where nothing is known; the file is there whole or not at all."""
    with replacing(path) as scratch:
        frame.to_csv(scratch, index=False, lineterminator="\r\n")
