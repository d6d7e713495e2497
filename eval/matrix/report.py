"""The support matrix as a table of model families and methods, reasons as numbered notes.

What there is more of stands in the rows: families of encoders, methods for vision-language models.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from vtok.errors import ConfigError
from vtok.eval.matrix.encoder import FAILED, NO, STATUSES, TOWER, VLM, WITH_OPTIONS, YES, Cell, counts
from vtok.eval.report.tables import Table
from vtok.reports.text import keywords
from vtok.testing.encoder_oracle import TOLERANCE
from vtok.testing.prompt_oracle import TOLERANCE as PROMPT_TOLERANCE

BEGIN, END = "<!-- support matrix: `vtok matrix --markdown` -->", "<!-- end of the support matrix -->"
LEGEND = (
    "Yes: with the method as it is, tokens go down on every tiny model of the row, and the output is that of the full-length "
    "pass in which what was taken away is masked instead; a merged token must moreover count as so many copies of itself. "
    "With options: the same, with the parameters of the note. No: refused, with the sentence of the note. "
    f"Checked in float64, to {TOLERANCE:g} of the largest output."
)
VLM_LEGEND = (
    "Yes: both prompts of a batch, the shorter one padded on the left, lose visual tokens on every tiny model of the family, "
    "and the logits are those of the unpatched model that reads the whole prompts, the features of the patched pass in them, "
    "under a mask in every decoder layer that hides what was dropped. Tower: the same, but tokens go down in the vision tower "
    "alone. With options: the same, with the parameters of the note. No: refused. Prompts hold several images; a method for "
    "videos, or one that needs pages cut into crops or one image a prompt, got those. "
    f"Checked in float32, to {PROMPT_TOLERANCE:g} of the largest logit."
)


class Report:
    """Rows and notes of a matrix.

    Attributes:
        header: of the columns: a family, the number of its tiny models and methods; or a method and families with these
            numbers.
        numbers: columns that hold numbers.
        rows: texts of the cells, with the numbers of their notes.
        groups: which rows belong together.
        notes: what the numbers stand for.
    """

    def __init__(self, found: Sequence[Cell]):
        methods = list(dict.fromkeys(c.method for c in found))
        families = list(dict.fromkeys((c.backend, c.family) for c in found))
        self.notes: list[str] = []
        self._numbers: dict[str, int] = {}
        cells = {f: [[c for c in found if (c.backend, c.family, c.method) == (*f, m)] for m in methods] for f in families}
        size = {f: len(cells[f][0]) for f in families}
        self.rows: list[tuple[tuple[str, tuple[int, ...]], ...]]
        if len(methods) > len(families):
            self.header: tuple[str, ...] = ("method", *(f"{f[1]} ({size[f]})" if size[f] > 1 else f[1] for f in families))
            self.rows = [((method, ()), *(self._summary(cells[f][i]) for f in families)) for i, method in enumerate(methods)]
            self.numbers, self.groups = frozenset[int](), [""] * len(methods)
        else:
            self.header = ("family", "models", *methods)
            self.rows = [
                ((f"{f[0]}: {f[1]}", ()), (str(size[f]), ()), *(self._summary(same) for same in cells[f])) for f in families
            ]
            self.numbers, self.groups = frozenset({1}), [f[0] for f in families]
        self.counts = counts(found)

    def table(self, marked: Callable[[tuple[int, ...]], str]) -> Table:
        """The cells, each with the numbers of its notes as a function writes them."""
        rows: list[Sequence[str]] = [[text + marked(notes) for text, notes in row] for row in self.rows]
        rules = {i for i, (one, after) in enumerate(itertools.pairwise(self.groups)) if one != after}
        return Table(self.header, rows, [i not in self.numbers for i in range(len(self.header))], rules=rules)

    def _summary(self, same: Sequence[Cell]) -> tuple[str, tuple[int, ...]]:
        """One method on the models of a family: (text, numbers of notes)."""
        tally = Counter(c.status for c in same)
        if len(tally) == 1:
            text = same[0].status
        else:
            words = {YES: f"of {len(same)}", TOWER: "tower", WITH_OPTIONS: "with options", NO: "no", FAILED: "FAILED"}
            text = ", ".join(f"{tally[status]} {words[status]}" for status in STATUSES if tally[status])
        return text, tuple(dict.fromkeys(self._note(c) for c in same if c.status != YES))

    def _note(self, cell: Cell) -> int:
        """The number of what there is to say about a cell; what differs in the names of classes or methods is said once."""
        if cell.status == WITH_OPTIONS:
            note = f"{cell.method} with {keywords(cell.request)}; without: {_reason(cell)}."
            key = f"{cell.method} with {keywords(cell.request)}"
        else:
            key = note = f"{cell.status}: {re.sub(rf'^{cell.method} ', 'the method ', _reason(cell))}."
        if key not in self._numbers:
            self._numbers[key] = len(self.notes) + 1
            self.notes.append(f"{note} {cell.remark}." if cell.remark else note)
        return self._numbers[key]


def _reason(cell: Cell) -> str:
    """A reason in words that are right for all models of a kind."""
    reason = cell.reason
    for name, words in cell.classes.items():
        reason = re.sub(rf"\b{re.escape(name)}\b", words, reason.replace(f"this {name}", "this model"))
    return reason


def table(found: Sequence[Cell], caption: str) -> Table:
    """For a terminal, the notes and counts under it left out."""
    report = Report(found)
    made = report.table(lambda notes: "".join(f" [{n}]" for n in notes))
    made.caption = caption
    return made


def parts(found: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of vision encoders and of vision-language models, one table each; those that are empty left out."""
    both = [c for c in found if c.backend != VLM], [c for c in found if c.backend == VLM]
    return [part for part in both if part]


def _legend(part: Sequence[Cell]) -> str:
    return VLM_LEGEND if part[0].backend == VLM else LEGEND


def notes(found: Sequence[Cell]) -> str:
    """What stands under the table in a terminal."""
    report = Report(found)
    return "\n".join([*(f"[{i}] {note}" for i, note in enumerate(report.notes, 1)), _legend(found), report.counts])


def markdown(found: Sequence[Cell]) -> str:
    """The same as GitHub tables, ready for a page."""
    return "\n\n".join(_markdown(part) for part in parts(found))


def _markdown(found: Sequence[Cell]) -> str:
    report = Report(found)
    lines = [report.table(lambda notes: f" <sup>{', '.join(map(str, notes))}</sup>" if notes else "").markdown()]
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(report.notes, 1))]
    return "\n".join([*lines, "", _legend(found), "", f"**{report.counts}**"])


def put_into(text: str, made: str, begin_mark: str = BEGIN, end_mark: str = END) -> str:
    """A page with the part between two markers replaced; a `ConfigError` if there are none."""
    head, begin, rest = text.partition(begin_mark)
    _, end, tail = rest.partition(end_mark)
    if not begin or not end:
        raise ConfigError(
            f"the file has no place for the matrix; put these two lines where it belongs: {begin_mark} and {end_mark}"
        )
    return f"{head}{begin_mark}\n\n{made}\n\n{end_mark}{tail}"
