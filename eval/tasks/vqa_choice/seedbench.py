"""SEED-Bench (Li et al., CVPR 2024), 14,233 questions about images; the first character of an answer counts, without case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vtok.errors import brief
from vtok.eval.tasks.vqa.sources.pictures import WithoutEndings
from vtok.eval.tasks.vqa.sources.reading import entries, load_json, located
from vtok.eval.tasks.vqa.task import Cell, Hub, Question, QuestionTask, Row, Rows, Sources
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, listed, one_of_four

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_FORM = '{"questions": [{"question_id", "question", "choice_a" .. "choice_d", "answer", "data_type", "data_id"}, ...]}'
_IMAGE = "image"


def first_letter(said: str) -> str:
    """The first character of an answer as a small letter."""
    return said.strip()[:1].lower()


def _question(row: Row) -> Question | list[Question]:
    if row.need("data_type") != [_IMAGE]:
        return []
    number, answer = row.key("question_id"), one_of_four(row)
    asked = f"{row.text('question')}\n{listed([row.text(name) for name in _CHOICES])}"
    image = Cell(row.image, "image", 0) if isinstance(row.image, int) else row.image
    return Question(number, asked, (answer,), image, {"type": row.group("question_type_id")})


def _read(sources: Sources) -> Rows:
    path = located(sources, "SEED-Bench.json")
    content = load_json(path, _FORM)
    listing, named = entries(content, "questions", path, _FORM), content.get("question_type")
    types = {str(number): str(name) for name, number in named.items()} if isinstance(named, dict) else {}
    pictures = WithoutEndings.of(sources)

    def rows() -> Iterator[Row]:
        for i, entry in enumerate(listing):
            row = Row(entry, f"{path}: entry {i}", _FORM)
            if row.need("data_type", "question_id")[0] == _IMAGE:
                row = replace(row, place=f"{path}: question {brief(row.key('question_id'))}")
                kind = row.group("question_type_id")
                image = str(pictures.find(row.text("data_id"), row.place))
                yield replace(row, content={**entry, "question_type_id": types.get(kind, kind)}, image=image)

    return Rows(rows(), path, pictures, "test")


TASK = QuestionTask(
    name="seedbench",
    read=_read,
    question=_question,
    prompt=BY_LETTER,
    scores={"accuracy": lambda said, q: float(first_letter(said) == q.target.lower())},
    columns={"accuracy": "accuracy"},
    max_new_tokens=1024,
    hub=Hub("lmms-lab-encoder/SEED-Bench", None, "test", _FORM),
)
