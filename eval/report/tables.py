"""Tables, made in one place: columns over records, results or whatever else has one row a setting, for a terminal or as
GitHub Markdown. Numbers for other programs are frames (`vtok.eval.report.frame`), written here as CSV.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table as RichTable

from vtok.writing import replacing

if TYPE_CHECKING:
    import pandas as pd


class Column(NamedTuple):
    """One column.

    Attributes:
        name: in the header.
        cell: what a row shows.
        left: set flush left, as words are; numbers are set flush right.
        title: what it is, in a sentence, for the page.
        unit: behind the name on the page.
    """

    name: str
    cell: Callable[[Any], Any]
    left: bool = False
    title: str = ""
    unit: str = ""


@dataclass
class Table:
    """Text cells with what a medium can make of them; `console.print` takes it as it is.

    Attributes:
        header: names of the columns.
        rows: cells, line by line.
        left: which columns are set flush left.
        title, caption: above and below.
        styles: number of a row -> its style in a terminal, "dim" or "red".
        rules: numbers of rows with a rule behind them.
        look: further arguments of rich's table.
    """

    header: Sequence[str]
    rows: list[Sequence[str]]
    left: Sequence[bool]
    title: str | None = None
    caption: str | None = None
    styles: dict[int, str] = field(default_factory=dict)
    rules: set[int] = field(default_factory=set)
    look: dict[str, Any] = field(default_factory=dict)

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

    def __rich__(self) -> RichTable:
        made = RichTable(title=self.title, caption=self.caption, **self.look)
        for name, left in zip(self.header, self.left):
            made.add_column(name, justify="left" if left else "right", overflow="fold")
        for i, row in enumerate(self.rows):
            made.add_row(*row, style=self.styles.get(i), end_section=i in self.rules)
        return made

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
