"""SEED-Bench (Li et al., CVPR 2024), its 14,233 questions about images: nine types, four choices.

Files: `SEED-Bench.json`, `{"questions": [{"question_id", "question", "choice_a" .. "choice_d", "answer", "data_type",
"data_id", "question_type_id"}], "question_type": {name: number}}`, and the images, `DATA_ID` without an ending. Questions
about videos (`data_type` "video") are left out: papers on images quote the images. The first character of an answer counts,
without case.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Cell, Hub
from vtok.eval.tasks.vqa.sources.reading import Pictures, entries, fields, group_of, load_json, located, number_of, text_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, listed

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_FORM = '{"questions": [{"question_id", "question", "choice_a" .. "choice_d", "answer", "data_type", "data_id"}, ...]}'
_IMAGE = "image"


def first_letter(said: str) -> str:
    """The first character of an answer as a small letter."""
    return said.strip()[:1].lower()


def _question(entry: Any, place: str, image: Any, types: Mapping[str, str]) -> Question:
    number, text, answer, *choices = fields(entry, ("question_id", "question", "answer", *_CHOICES), place, _FORM)
    if answer not in ("A", "B", "C", "D"):
        raise ConfigError(f"{place}: 'answer' must be A, B, C or D, found {shown(answer)}")
    told = [text_of(choice, f"{name!r}", place) for name, choice in zip(_CHOICES, choices)]
    kind = group_of(entry, "question_type_id", place)
    groups = {"type": types.get(kind, kind)}
    return Question(number, f"{text_of(text, repr('question'), place)}\n{listed(told)}", (answer,), image, groups)


class _WithoutEndings(Pictures):
    """Images whose files have no ending."""

    def _by_name(self, name: str) -> list[Path]:
        if self._index is None:
            self._index = {}
            for path in find_files(self.folder):
                if path.is_file():
                    self._index.setdefault(path.stem, []).append(path)
        return self._index.get(name, [])


def _read(sources: Sources) -> VQAData:
    path = located(sources, "SEED-Bench.json")
    content = load_json(path, _FORM)
    listing = entries(content, "questions", path, _FORM)
    named = content.get("question_type")
    types = {str(number): str(name) for name, number in named.items()} if isinstance(named, dict) else {}
    pictures, found = _WithoutEndings.of(sources), []
    for i, entry in enumerate(listing):
        kind, number = fields(entry, ("data_type", "question_id"), f"{path}: entry {i}", _FORM)
        if kind != _IMAGE:
            continue
        place = f"{path}: question {brief(number_of(number, 'question_id', f'{path}: entry {i}'))}"
        (image,) = fields(entry, ("data_id",), place, _FORM)
        found.append(_question(entry, place, str(pictures.find(text_of(image, "'data_id'", place), place)), types))
    return checked("seedbench", found, path, pictures, BY_LETTER, "test")


def _from_row(row: Any, place: str, image: Any, split: str) -> list[Question]:
    """None for a question about a video."""
    (kind,) = fields(row, ("data_type",), place, _FORM)
    return [_question(row, place, Cell(image, "image", 0), {})] if kind == _IMAGE else []


TASK = QuestionTask(
    name="seedbench",
    read=_read,
    scores={"accuracy": lambda said, q: float(first_letter(said) == q.target.lower())},
    primary="accuracy",
    correct="accuracy",
    columns={"accuracy": "accuracy"},
    max_new_tokens=1024,
    hub=Hub("lmms-lab-encoder/SEED-Bench", None, "test", _from_row, BY_LETTER),
)
