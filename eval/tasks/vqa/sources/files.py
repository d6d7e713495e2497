"""Files with questions: VQAv2's questions, annotations and results, and lines of JSON."""

from __future__ import annotations

import filecmp
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtok import writing
from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import digest, find_files, find_pictures, open_picture
from vtok.eval.tasks.vqa.data import Question, VQAData, kind_of
from vtok.eval.tasks.vqa.sources import Write
from vtok.eval.tasks.vqa.sources.reading import (
    Pictures,
    entries,
    fields,
    group_of,
    load_json,
    load_lines,
    number_of,
    text_of,
    texts_of,
)
from vtok.reading import exists

ONE_WORD = "\nAnswer the question using a single word or phrase."  # what lmms-eval puts behind VQAv2's questions
_LAST_NUMBER = re.compile(r"(\d+)$")
_COCO_DIGITS = 12  # of the number in the name of COCO's files
_LINE_FORM = '{"id", "image", "question", "answers"}'


def read_lines(path: Path, images: Path | None = None) -> VQAData:
    """Questions from lines of JSON; see `open_vqa`.

    Args:
        path: of the file.
        images: folder of the images; `None` = that of the file, which they may not lie outside of.

    Raises:
        ConfigError: the line that is malformed, or the image that is missing, is named.
    """
    if not exists(path):
        raise ConfigError(f"{brief(path)} does not exist; name a file with an object {{id, image, question, answers}} a line")
    questions, pictures = [], Pictures(images or path.parent, images is not None)
    for place, one in load_lines(path, _LINE_FORM):
        number, image, text, answers = fields(one, ("id", "image", "question", "answers"), place, _LINE_FORM)
        number = number_of(number, "'id'", place)
        if answers == []:
            raise ConfigError(f"{place}: question {brief(number)} has no answers")
        said = (answers,) if isinstance(answers, str) else texts_of(answers, "'answers'", place)
        file = pictures.find(text_of(image, "'image'", place), place, deep=False)
        questions.append(Question(number, text_of(text, "'question'", place), said, str(file), {"kind": kind_of(*said)}))
    return checked(path.stem, questions, path, pictures)


def find_vqav2(folder: Path, questions: str = "", annotations: str = "", images: str = "") -> VQAData:
    """`read_vqav2` of a folder, whose files are found where they are not named; test questions need no annotations.

    Raises:
        ConfigError: see `only` and `read_vqav2`.
    """
    asked = Path(questions) if questions else only(folder, "uestions")
    secret = "test" in asked.name and not annotations and not any(folder.glob("*nnotations*.json"))
    notes = None if secret else Path(annotations) if annotations else only(folder, "nnotations")
    return read_vqav2(asked, notes, Path(images) if images else folder, bool(images))


def read_vqav2(questions: Path, annotations: Path | None, images: Path, named: bool = True) -> VQAData:
    """Questions from VQAv2's files. An image is the file whose name ends with its number, such as COCO's.

    Args:
        questions: file.
        annotations: file; `None` for test questions, whose answers the evaluation server keeps.
        images: folder.
        named: whether somebody named it as that of the images; see `Pictures`.

    Raises:
        ConfigError: a file of another form, a question without annotation or with two, an image that is missing, or a number
            that stands for several images.
    """
    form = '{"questions": [{"question_id", "image_id", "question"}, ...]}'
    asked = entries(load_json(questions, form), "questions", questions, form)
    known = {} if annotations is None else _notes(annotations)
    pictures, found = _Numbered(images, named), []
    for i, one in enumerate(asked):
        number, image, text = fields(one, ("question_id", "image_id", "question"), f"{questions}: entry {i}", form)
        place = f"{questions}: question {brief(number_of(number, 'question_id', f'{questions}: entry {i}'))}"
        if annotations is not None and number not in known:
            raise ConfigError(
                f"{annotations} has no annotation of question {brief(number)}; do both files belong to the same split?"
            )
        answers, kind = known.get(number, ((), ""))
        pictures.find(number_of(image, "image_id", place), place)
        found.append(Question(number, text_of(text, "'question'", place), answers, image, {"kind": kind}))
    return checked(questions.stem, found, questions, pictures, ONE_WORD)


def _notes(annotations: Path) -> dict[Any, tuple[tuple[str, ...], str]]:
    """Question -> (answers, type of the answer)."""
    form = '{"annotations": [{"question_id", "answers": [{"answer"}, ...]}, ...]}'
    found: dict[Any, tuple[tuple[str, ...], str]] = {}
    for i, note in enumerate(entries(load_json(annotations, form), "annotations", annotations, form)):
        number, answers = fields(note, ("question_id", "answers"), f"{annotations}: entry {i}", form)
        place = f"{annotations}: question {brief(number_of(number, 'question_id', f'{annotations}: entry {i}'))}"
        if number in found:
            raise ConfigError(f"{annotations} has two annotations of question {brief(number)}; every question needs one")
        if not isinstance(answers, list) or not all(isinstance(one, dict) and "answer" in one for one in answers):
            raise ConfigError(f"{annotations}: the answers to question {brief(number)} are no objects with 'answer'")
        if not answers:
            raise ConfigError(f"{annotations}: question {brief(number)} has no answers")
        found[number] = texts_of(answers, "'answers'", place), group_of(note, "answer_type", place)
    return found


def read_results(path: Path) -> dict[Any, str]:
    """Answers in a public format for results, question -> answer: VQAv2's `[{"question_id", "answer"}, ...]`, or the same with
    "questionId" and "prediction" or "answer", as GQA and DocVQA have it.

    Raises:
        ConfigError: the file is of another form, or has two answers to one question.
    """
    form = '[{"question_id", "answer"}, ...]'
    listed = entries(load_json(path, form), None, path, form)
    first = listed[0] if listed and isinstance(listed[0], dict) else {}
    number = "questionId" if "questionId" in first else "question_id"
    answer = "prediction" if "prediction" in first else "answer"
    form, found = f'[{{"{number}", "{answer}"}}, ...]', dict[Any, str]()
    for i, entry in enumerate(listed):
        place = f"{path}: entry {i}"
        key, value = fields(entry, (number, answer), place, form)
        text = text_of(value, repr(answer), place)
        if found.setdefault(number_of(key, repr(number), place), text) != text:
            raise ConfigError(
                f"{path} has two answers to question {brief(key)}, {shown(found[key])} and {shown(text)}; every question "
                "needs one"
            )
    return found


def write_answers(number: str = "question_id", answer: str = "answer", said: Callable[[str], str] = str) -> Write:
    """Makes a function that writes a list of objects, as evaluation servers take it; see `QuestionTask.write`.

    Args:
        number: name of the question's number.
        answer: name of the answer.
        said: what is written of an answer.
    """

    def write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
        content = [{number: q.doc_id, answer: said(text)} for q, text in zip(questions, answers)]
        writing.write(folder / f"{name}.json", json.dumps(content))

    return write


def checked(name: str, questions: list[Question], path: Path, pictures: Any, prompt: str = "", split: str = "") -> VQAData:
    """The questions of a file.

    Args:
        name: of the data set.
        questions: in their order.
        path: of the file, for messages.
        pictures: what `read`s and `identify`es their images, such as `Pictures`.
        prompt: what stands behind every question.
        split: part of the data set.

    Raises:
        ConfigError: there are none, or a number stands for more than one.
    """
    for q in questions:
        number_of(q.doc_id, "what a question is known by", str(path))
    repeated = [number for number, count in Counter(q.doc_id for q in questions).items() if count > 1]
    if repeated:
        raise ConfigError(f"{path} asks question {repeated[0]} more than once; every question needs a number of its own")
    if not questions:
        raise ConfigError(f"{path} holds no questions")
    return VQAData(name, questions, pictures.read, prompt, split=split, identify=pictures.identify)


def only(folder: Path, part: str) -> Path:
    """The one JSON file in a folder whose name holds a part.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = find_files(folder, f"*{part}*.json", deep=False)
    if len(found) != 1:
        raise ConfigError(f"{folder} holds {len(found)} files *{part}*.json; name the one to read")
    return found[0]


class _Numbered:
    """Images by the number at the end of their names, at any depth.

    COCO writes it with twelve digits: such a file goes before others with the same number, which are other data sets' pictures,
    previews or masks. Files that are the same byte for byte are one picture.
    """

    def __init__(self, folder: Path, named: bool):
        self._pictures = Pictures(folder, named)
        self._files: dict[int, list[Path]] = defaultdict(list)
        for path in find_pictures(folder):
            if number := _LAST_NUMBER.search(path.stem):
                self._files[int(number.group(1))].append(path)

    def find(self, image: Any, place: str) -> Path:
        """The file of an image.

        Args:
            image: its number.
            place: what asks for it, for messages.

        Raises:
            ConfigError: it is missing, may be one of several, or lies outside the folder.
        """
        found, folder = self._files.get(image, []), self._pictures.folder
        if not found:
            raise ConfigError(
                f"{place}: its image is missing: no file in {folder} has a name that ends with {brief(image)} (.jpg, .png)"
            )
        named = [path for path in found if _of_coco(path)] or found
        others = [path for path in named[1:] if not filecmp.cmp(named[0], path, shallow=False)]
        if others:
            raise ConfigError(
                f"{place}: the image {brief(image)} may be {named[0]} or {others[0]}; pass the folder of one (--images)"
            )
        return self._pictures.find(str(named[0].relative_to(folder)), place)

    def read(self, image: Any) -> Any:
        """A PIL image."""
        return open_picture(self.find(image, "reading"))

    def identify(self, image: Any) -> str:
        """Hash of the file."""
        return digest(self.find(image, "reading"))


def _of_coco(path: Path) -> bool:
    number = _LAST_NUMBER.search(path.stem)
    return number is not None and len(number.group(1)) == _COCO_DIGITS
