"""What a task of questions about images is: how its files are read, how answers are scored, which figure is the headline.

A task is one file with a `QuestionTask` and one line in `QUESTION_TASKS`, `eval/tasks/__init__.py`. Everything else (asking,
records, paired differences, standard errors, tables, result files) follows from what it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vtok.eval.options import VQAOptions
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources import SHORT, Score, Sources, Write
from vtok.eval.tasks.vqa.sources.files import write_answers
from vtok.eval.tasks.vqa.sources.hub import Cell, Hub, is_dataset, read
from vtok.eval.tasks.vqa.sources.pictures import Pictures
from vtok.eval.tasks.vqa.sources.rows import Ask, Files, Row, Rows
from vtok.eval.tasks.vqa.totals import Total

__all__ = [  # what a task is made of
    "SHORT", "Cell", "Files", "Hub", "Pictures", "Question", "QuestionTask", "Row", "Rows", "Score", "Sources", "VQAData",
    "VQAOptions", "write_answers",
]  # fmt: skip


@dataclass(frozen=True)
class QuestionTask:
    """A set of questions, its scores and its files.

    Attributes:
        name: under which it is registered.
        read: files -> rows, of which `question` makes the questions (`Files` reads the commonest form), or the questions
            themselves; raises `ConfigError` naming the file, the question and what is expected.
        scores: name -> (answer, question) -> score of one question in [0, 1]; not a number = does not count. A record has
            their means.
        primary: name of the headline metric, one of `scores` or `totals`; "" = the first score.
        correct: name of the score that makes an answer right, from 0.5 on; "" = `primary`.
        sample: name of the score that every sample shows first; "" = that of `correct`.
        totals: name -> metric of the whole set that is no mean over questions.
        columns: metrics that the printed table shows, its heading -> name; the others stand below it.
        max_new_tokens: length of an answer at most, as lmms-eval has it.
        percent: whether metrics are in percent (or sums of percentages) instead of shares.
        write: (folder, name without ending, questions, answers) -> files in the public format; `None` = there is none.
        question: row of a file or of the `datasets` library -> question, or as many of them as the row holds.
        prompt: text behind every question.
        check: (questions, data as it was named) -> questions, what must hold for all of them together.
        hub: where the rows of the `datasets` library are; `None` = files alone.
    """

    name: str
    read: Callable[[Sources], Rows | VQAData]
    scores: Mapping[str, Score]
    primary: str = ""
    correct: str = ""
    sample: str = ""
    totals: Mapping[str, Total] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 16
    percent: bool = False
    write: Write | None = None
    question: Ask | None = None
    prompt: str = ""
    check: Callable[[VQAData, str], VQAData] | None = None
    hub: Hub | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "primary", self.primary or next(iter(self.scores)))
        object.__setattr__(self, "correct", self.correct or self.primary)

    @property
    def scale(self) -> float:
        """What shares are multiplied by in metrics."""
        return 100.0 if self.percent else 1.0

    def open(self, sources: Sources) -> VQAData:
        """Questions from files, or from a data set that the `datasets` library reads; errors name what is wrong with them."""
        hub = self.hub if is_dataset(sources.data) else None
        found = self.read(sources) if hub is None else read(self.name, hub, sources)
        if isinstance(found, Rows):
            assert self.question is not None, f"{self.name} says of no row what it asks"
            found = found.ask(self.name, self.question, self.prompt)
        return found if self.check is None else self.check(found, sources.data)

    def score_all(self, answer: str, question: Question) -> dict[str, float | None]:
        """Every score of one answer; `None` where it does not count."""
        found = {name: self.score_one(name, answer, question) for name in self.scores}
        return {name: value if value == value else None for name, value in found.items()}

    def score_one(self, name: str, answer: str, question: Question) -> float:
        """One score; not a number where it does not count, as nothing does for questions whose answers are not published."""
        return float(self.scores[name](answer, question)) if question.answers else float("nan")
