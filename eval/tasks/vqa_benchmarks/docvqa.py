"""DocVQA (Mathew et al., WACV 2021): questions about scanned pages; quoted on validation, or on the server's test set.

Files: `val_v1.0.json` (or `val_v1.0_withQT.json`), `{"data": [{"questionId", "question", "image", "answers"}]}`, and the pages.
The answers to `--split test` (`test_v1.0.json`) are the server's: nothing is scored but agreement, and the list of answers is
there to be handed in. The score is ANLS: 1 - edit distance / length of the longer text, the best over the answers, and 0
below 0.5.

| score | length of a text | exactly 0.5 |
|---|---|---|
| `anls` (lmms-eval, VLMEvalKit) | as it was written, although the distance is of texts in lower case with single spaces | 0.5 |
| `anls_definition` (as the paper has it) | of what is compared | 0 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vtok.errors import brief
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked, write_answers
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import (
    SHORT,
    Pictures,
    answer_list,
    entries,
    fields,
    load_json,
    located,
    text_of,
    texts_of,
)
from vtok.eval.tasks.vqa.task import QuestionTask, Sources

SPLIT = "val"
THRESHOLD = 0.5
_FORM = '{"data": [{"questionId", "question", "image", "answers"}, ...]}'


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and changes of a character that turn one text into the other, at least."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def compared(text: str) -> str:
    """What the distance is taken of: lower case, single spaces."""
    return " ".join(text.lower().split())


def _distance(prediction: str, answer: str, length: Callable[[str], int]) -> float:
    """Edit distance as a share of the longer text; 0 if both are empty."""
    longer = max(length(prediction), length(answer))
    return edit_distance(compared(prediction), compared(answer)) / longer if longer else 0.0


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer as lmms-eval computes it, in [0, 1]."""
    best = 1 - min(_distance(prediction, answer, len) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def anls_definition(prediction: str, answers: Sequence[str]) -> float:
    """The same as its definition has it: a distance of 0.5 is too far."""
    nearest = min(_distance(prediction, answer, lambda text: len(compared(text))) for answer in answers)
    return 1 - nearest if nearest < THRESHOLD else 0.0


def _question(entry: Any, place: str, image: Any, split: str) -> Question:
    number, text = fields(entry, ("questionId", "question"), place, _FORM)
    types = entry.get("question_types") or ()
    groups = {"type": texts_of(types, "'question_types'", place)[0]} if types else {}
    return Question(number, text_of(text, "'question'", place), answer_list(entry, place, _FORM, split), image, groups)


def _read(sources: Sources) -> VQAData:
    split = sources.split or SPLIT
    path = located(sources, f"{split}_v1.0*.json")
    pictures, found = Pictures.of(sources), []
    for i, entry in enumerate(entries(load_json(path, _FORM), "data", path, _FORM)):
        number, image = fields(entry, ("questionId", "image"), f"{path}: entry {i}", _FORM)
        place = f"{path}: question {brief(number)}"
        found.append(_question(entry, place, str(pictures.find(text_of(image, "'image'", place), place)), split))
    return checked("docvqa", found, path, pictures, SHORT, split)


TASK = QuestionTask(
    name="docvqa",
    read=_read,
    scores={
        "anls": lambda said, q: anls(said, q.answers),
        "anls_definition": lambda said, q: anls_definition(said, q.answers),
    },
    primary="anls",
    correct="anls",
    columns={"ANLS": "anls"},
    max_new_tokens=32,
    write=write_answers("questionId"),
    hub=Hub("lmms-lab-encoder/DocVQA", "DocVQA", "validation", _question, SHORT),
)
