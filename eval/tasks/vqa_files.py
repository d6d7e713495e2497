"""Files with questions: VQAv2's questions, annotations and results, and lines of JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtok import writing
from vtok.errors import ConfigError
from vtok.eval.tasks.vqa_data import Question, VQAData, kind_of

if TYPE_CHECKING:
    from vtok.eval.tasks.vqa_task import Write

ONE_WORD = "\nAnswer the question using a single word or phrase."  # what lmms-eval puts behind VQAv2's questions
IMAGES = (".jpg", ".jpeg", ".png")
_LAST_NUMBER = re.compile(r"(\d+)$")


def read_lines(path: Path, images: Path) -> VQAData:
    """Questions from lines of JSON; see `open_vqa`.

    Raises:
        ConfigError: the line that is malformed, or the image that is missing, is named.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name a file with an object {{id, image, question, answers}} a line")
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            answers = (one["answers"],) if isinstance(one["answers"], str) else tuple(str(answer) for answer in one["answers"])
            if not answers:
                raise ConfigError(f"{path}:{number}: question {one['id']} has no answers")
            question = Question(one["id"], str(one["question"]), answers, str(one["image"]), {"kind": kind_of(*answers)})
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path}:{number} is not an object {{"id", "image", "question", "answers"}}: {type(error).__name__} {error}'
            ) from error
        if not (images / question.image).is_file():
            raise ConfigError(f"{path}:{number}: the image {images / question.image} is missing; pass the folder of the images")
        questions.append(question)
    return checked(path.stem, questions, path, lambda file: open_image(images / file))


def find_vqav2(folder: Path, questions: str = "", annotations: str = "", images: str = "") -> VQAData:
    """`read_vqav2` of a folder, whose files are found where they are not named; test questions need no annotations.

    Raises:
        ConfigError: see `only` and `read_vqav2`.
    """
    asked = Path(questions) if questions else only(folder, "uestions")
    secret = "test" in asked.name and not annotations and not any(folder.glob("*nnotations*.json"))
    notes = None if secret else Path(annotations) if annotations else only(folder, "nnotations")
    return read_vqav2(asked, notes, Path(images) if images else folder)


def read_vqav2(questions: Path, annotations: Path | None, images: Path) -> VQAData:
    """Questions from VQAv2's files. An image is the file whose name ends with its number, such as COCO's.

    Args:
        questions: file.
        annotations: file; `None` for test questions, whose answers the evaluation server keeps.
        images: folder.

    Raises:
        ConfigError: a file of another form, a question without annotation, or an image that is missing.
    """
    asked = json_list(questions, "questions", ("question_id", "image_id", "question"))
    known = {} if annotations is None else _notes(annotations)
    files = _numbered(images)
    found = []
    for one in asked:
        number, image = one["question_id"], one["image_id"]
        if annotations is not None and number not in known:
            raise ConfigError(f"{annotations} has no annotation of question {number}; do both files belong to the same split?")
        answers, kind = known.get(number, ((), ""))
        if image not in files:
            raise ConfigError(
                f"the image of question {number} is missing: no file in {images} has a name that ends with {image} (.jpg, .png)"
            )
        found.append(Question(number, str(one["question"]), answers, image, {"kind": kind}))
    return checked(questions.stem, found, questions, lambda image: open_image(files[image]), ONE_WORD)


def _notes(annotations: Path) -> dict[Any, tuple[tuple[str, ...], str]]:
    """Question -> (answers, type of the answer)."""
    found = {}
    for note in json_list(annotations, "annotations", ("question_id", "answers")):
        number = note["question_id"]
        try:
            answers = tuple(str(answer["answer"]) for answer in note["answers"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{annotations}: the answers to question {number} are no objects with 'answer'") from error
        if not answers:
            raise ConfigError(f"{annotations}: question {number} has no answers")
        found[number] = answers, str(note.get("answer_type", ""))
    return found


def read_results(path: Path) -> dict[Any, str]:
    """Answers in a public format for results, question -> answer: VQAv2's `[{"question_id", "answer"}, ...]`, or the same with
    "questionId" and "prediction" or "answer", as GQA and DocVQA have it.

    Raises:
        ConfigError: the file is of another form.
    """
    entries = json_list(path, None, ())
    first = entries[0] if entries and isinstance(entries[0], dict) else {}
    number = "questionId" if "questionId" in first else "question_id"
    answer = "prediction" if "prediction" in first else "answer"
    entries = json_list(path, None, (number, answer))
    return {entry[number]: str(entry[answer]) for entry in entries}


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


def checked(
    name: str, questions: list[Question], path: Path, read: Callable[[Any], Any], prompt: str = "", split: str = ""
) -> VQAData:
    """The questions of a file.

    Raises:
        ConfigError: there are none, or a number stands for more than one.
    """
    repeated = [number for number, count in Counter(q.doc_id for q in questions).items() if count > 1]
    if repeated:
        raise ConfigError(f"{path} asks question {repeated[0]} more than once; every question needs a number of its own")
    if not questions:
        raise ConfigError(f"{path} holds no questions")
    return VQAData(name, questions, read, prompt, split=split)


def only(folder: Path, part: str) -> Path:
    """The one JSON file in a folder whose name holds a part.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = sorted(folder.glob(f"*{part}*.json"))
    if len(found) != 1:
        raise ConfigError(f"{folder} holds {len(found)} files *{part}*.json; name the one to read")
    return found[0]


def json_list(path: Path, key: str | None, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The list of objects that a JSON file holds (under a key), each with all `fields`."""
    form = "[{" + ", ".join(f'"{name}"' for name in fields) + "}, ...]"
    if key is not None:
        form = f'{{"{key}": {form}}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = list(content if key is None else content[key])
        for entry in entries:
            for name in fields:
                entry[name]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is not of VQAv2's form {form}: {type(error).__name__} {error}") from error
    return entries


def _numbered(folder: Path) -> dict[int, Path]:
    """Number at the end of its name -> image file, at any depth."""
    found = {}
    for path in sorted(folder.rglob("*")):
        number = _LAST_NUMBER.search(path.stem)
        if number and path.suffix.lower() in IMAGES:
            found[int(number.group(1))] = path
    return found


def open_image(path: Path) -> Any:
    """A PIL image in RGB.

    Raises:
        ConfigError: the file is no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}") from error
