"""DocVQA (Mathew et al., WACV 2021), scored by ANLS: 1 - edit distance / length of the longer text, and 0 below 0.5.

lmms-eval and VLMEvalKit take the length of texts as they were written, the paper that of what is compared (`_definition`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vtok.eval.tasks.vqa.task import SHORT, Files, Hub, Question, QuestionTask, Row, write_answers

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


def _question(row: Row) -> Question:
    groups = {"type": row.texts("question_types")[0]} if row.get("question_types") else {}
    return Question(row.key("questionId"), row.text("question"), row.answers(), row.image, groups)


TASK = QuestionTask(
    name="docvqa",
    read=Files("{split}_v1.0*.json", _FORM, "val", key="data", number="questionId"),
    question=_question,
    prompt=SHORT,
    scores={
        "anls": lambda said, q: anls(said, q.answers),
        "anls_definition": lambda said, q: anls_definition(said, q.answers),
    },
    columns={"ANLS": "anls"},
    max_new_tokens=32,
    write=write_answers("questionId"),
    hub=Hub("lmms-lab-encoder/DocVQA", "DocVQA", "validation", _FORM),
)
