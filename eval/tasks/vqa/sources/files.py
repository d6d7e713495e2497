"""VQAv2's questions, annotations and results, and lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtok import writing
from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.data import Question, VQAData, kind_of
from vtok.eval.tasks.vqa.sources import SHORT as ONE_WORD
from vtok.eval.tasks.vqa.sources import Write
from vtok.eval.tasks.vqa.sources.pictures import Numbered, Pictures
from vtok.eval.tasks.vqa.sources.reading import entries, load_json, load_lines
from vtok.eval.tasks.vqa.sources.rows import Row, Rows
from vtok.reading import exists

_LINE_FORM = '{"id", "image", "question", "answers"}'
_ASKED_FORM = '{"questions": [{"question_id", "image_id", "question"}, ...]}'
_NOTES_FORM = '{"annotations": [{"question_id", "answers": [{"answer"}, ...]}, ...]}'


def read_lines(path: Path, images: Path | None = None) -> VQAData:
    """Questions from lines of JSON, see `open_vqa`; images lie in a folder, or (`None`) in that of the file, not outside."""
    if not exists(path):
        raise ConfigError(f"{brief(path)} does not exist; name a file with an object {{id, image, question, answers}} a line")
    pictures = Pictures(images or path.parent, images is not None)

    def question(row: Row) -> Question:
        row.need("id", "image", "question", "answers")
        number, answers = row.key("id"), row.get("answers")
        if answers == []:
            raise ConfigError(f"{row.place}: question {brief(number)} has no answers")
        said = (answers,) if isinstance(answers, str) else row.texts("answers")
        file = pictures.find(row.text("image"), row.place, deep=False)
        return Question(number, row.text("question"), said, str(file), {"kind": kind_of(*said)})

    rows = (Row(one, place, _LINE_FORM) for place, one in load_lines(path, _LINE_FORM))
    return Rows(rows, path, pictures).ask(path.stem, question)


def find_vqav2(folder: Path, questions: str = "", annotations: str = "", images: str = "") -> VQAData:
    """`read_vqav2` of a folder, whose files are found where they are not named; test questions need no annotations."""
    asked = Path(questions) if questions else _only(folder, "uestions")
    secret = "test" in asked.name and not annotations and not any(folder.glob("*nnotations*.json"))
    notes = None if secret else Path(annotations) if annotations else _only(folder, "nnotations")
    return read_vqav2(asked, notes, Path(images) if images else folder, bool(images))


def read_vqav2(questions: Path, annotations: Path | None, images: Path, named: bool = True) -> VQAData:
    """Questions from VQAv2's files. An image is the file whose name ends with its number, such as COCO's.

    Without annotations the questions are those of a test, whose answers the evaluation server keeps. `named` says whether
    somebody named the folder of the images, see `Pictures`.
    """
    asked = _numbered(questions, "questions", _ASKED_FORM, "image_id", "question")
    known = {} if annotations is None else _notes(annotations)
    pictures = Numbered(images, named)

    def question(row: Row) -> Question:
        text = row.text("question")
        if annotations is not None and row.number not in known:
            raise ConfigError(
                f"{annotations} has no annotation of question {brief(row.number)}; do both files belong to the same split?"
            )
        answers, kind = known.get(row.number, ((), ""))
        pictures.find(row.key("image_id"), row.place)
        return Question(row.number, text, answers, row.get("image_id"), {"kind": kind})

    return Rows(asked, questions, pictures).ask(questions.stem, question, ONE_WORD)


def _numbered(path: Path, key: str, form: str, *needs: str) -> Iterator[Row]:
    """The rows of a list under a key, known by their "question_id"."""
    for i, entry in enumerate(entries(load_json(path, form), key, path, form)):
        row = Row(entry, f"{path}: entry {i}", form)
        row.need("question_id", *needs)
        number = row.key("question_id")
        yield replace(row, number=number, place=f"{path}: question {brief(number)}")


def _notes(annotations: Path) -> dict[Any, tuple[tuple[str, ...], str]]:
    """Question -> (answers, type of the answer)."""
    found: dict[Any, tuple[tuple[str, ...], str]] = {}
    for row in _numbered(annotations, "annotations", _NOTES_FORM, "answers"):
        (answers,), number = row.need("answers"), brief(row.number)
        if row.number in found:
            raise ConfigError(f"{annotations} has two annotations of question {number}; every question needs one")
        if not isinstance(answers, list) or not all(isinstance(one, dict) and "answer" in one for one in answers):
            raise ConfigError(f"{annotations}: the answers to question {number} are no objects with 'answer'")
        if not answers:
            raise ConfigError(f"{annotations}: question {number} has no answers")
        found[row.number] = row.texts("answers"), row.group("answer_type")
    return found


def read_results(path: Path) -> dict[Any, str]:
    """Answers in a public format for results, question -> answer.

    It is VQAv2's `[{"question_id", "answer"}, ...]`, or the same with "questionId" and "prediction" or "answer", as GQA and
    DocVQA have it.
    """
    form = '[{"question_id", "answer"}, ...]'
    listed = entries(load_json(path, form), None, path, form)
    first = listed[0] if listed and isinstance(listed[0], dict) else {}
    number = "questionId" if "questionId" in first else "question_id"
    answer = "prediction" if "prediction" in first else "answer"
    form, found = f'[{{"{number}", "{answer}"}}, ...]', dict[Any, str]()
    for i, entry in enumerate(listed):
        row = Row(entry, f"{path}: entry {i}", form)
        key, text = row.key(number), row.text(answer)
        if found.setdefault(key, text) != text:
            raise ConfigError(
                f"{path} has two answers to question {brief(key)}, {shown(found[key])} and {shown(text)}; every question "
                "needs one"
            )
    return found


def write_answers(number: str = "question_id", answer: str = "answer", said: Callable[[str], str] = str) -> Write:
    """Makes a function that writes a list of objects under these names, as evaluation servers take it."""

    def write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
        content = [{number: q.doc_id, answer: said(text)} for q, text in zip(questions, answers)]
        writing.write(folder / f"{name}.json", json.dumps(content))

    return write


def _only(folder: Path, part: str) -> Path:
    found = find_files(folder, f"*{part}*.json", deep=False)
    if len(found) != 1:
        raise ConfigError(f"{folder} holds {len(found)} files *{part}*.json; name the one to read")
    return found[0]
