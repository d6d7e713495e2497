"""What a task of questions about images is: how its files are read, how answers are scored, which figure is the headline.

A task is one file with a `QuestionTask` and one line in `QUESTION_TASKS`, `eval/tasks/__init__.py`. Everything else (asking,
records, paired differences, standard errors, tables, result files) follows from what it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vtok.eval.options import VQAOptions
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources import Score, Sources, Write
from vtok.eval.tasks.vqa.sources.hub import Hub, is_dataset, read
from vtok.eval.tasks.vqa.totals import Total

__all__ = ["QuestionTask", "Score", "Sources", "VQAOptions"]


@dataclass(frozen=True)
class QuestionTask:
    """A set of questions, its scores and its files.

    Attributes:
        name: under which it is registered.
        read: files -> questions; raises `ConfigError` naming the file, the question and what is expected.
        scores: name -> (answer, question) -> score of one question in [0, 1]; not a number = does not count. A record has
            their means.
        primary: name of the headline metric, one of `scores` or `totals`.
        correct: name of the score that makes an answer right, from 0.5 on.
        sample: name of the score that every sample shows first; "" = that of `correct`.
        totals: name -> metric of the whole set that is no mean over questions.
        columns: metrics that the printed table shows, its heading -> name; the others stand below it.
        max_new_tokens: length of an answer at most, as lmms-eval has it.
        percent: whether metrics are in percent (or sums of percentages) instead of shares.
        write: (folder, name without ending, questions, answers) -> files in the public format; `None` = there is none.
        hub: where the rows of the `datasets` library are; `None` = files alone.
    """

    name: str
    read: Callable[[Sources], VQAData]
    scores: Mapping[str, Score]
    primary: str
    correct: str
    sample: str = ""
    totals: Mapping[str, Total] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 16
    percent: bool = False
    write: Write | None = None
    hub: Hub | None = None

    @property
    def scale(self) -> float:
        """What shares are multiplied by in metrics."""
        return 100.0 if self.percent else 1.0

    def open(self, sources: Sources) -> VQAData:
        """Questions from files, or from a data set that the `datasets` library reads.

        Raises:
            ConfigError: the data is not there or not of the form.
            MissingExtraError: `datasets` is needed and not installed.
        """
        if self.hub is not None and is_dataset(sources.data):
            return read(self.name, self.hub, sources)
        return self.read(sources)

    def score_all(self, answer: str, question: Question) -> dict[str, float | None]:
        """Every score of one answer; `None` where it does not count."""
        found = {name: self.score_one(name, answer, question) for name in self.scores}
        return {name: value if value == value else None for name, value in found.items()}

    def score_one(self, name: str, answer: str, question: Question) -> float:
        """One score; not a number where it does not count, as nothing does for questions whose answers are not published."""
        return float(self.scores[name](answer, question)) if question.answers else float("nan")
