"""MMBench in English (Liu et al., ECCV 2024): questions with up to four choices, asked once for every rotation of the choices.

Files: one table of tabs, `mmbench_dev_*.tsv` or `MMBench_DEV_EN*.tsv`, columns `index`, `question`, `hint`, `A` .. `D`,
`answer`, `category`, `l2-category` and `image`, a picture in base64 or the `index` of the row that has it. Rows whose
`index` is the same but for whole millions are one question with its choices rotated.

| metric | a question is right if |
|---|---|
| `circular` (lmms-eval, the paper) | every rotation of it is; of tables without rotations the same as `vanilla` |
| `vanilla` | counted for each row alone |

An answer is read by the rules of the paper's program, a letter that stands alone or between marks, else the text of one
choice, and where they find nothing by `letter_of`: this is lmms-eval's `mmbench_en_dev_static`. Its `mmbench_en_dev` asks a
model of OpenAI there instead, and a question of which that makes nothing gets a letter by chance. What differs: lmms-eval
takes "nan", which stands for a choice that is not there, for the text of a choice (an answer with the word "banana" is then
that choice); here it is none. Answers to the test split are known to the evaluation server alone.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import digest, open_picture
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import located, secret, text_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources
from vtok.eval.tasks.vqa.totals import Total, ratio
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, letter_of
from vtok.writing import write

SPLIT = "dev"
INTRODUCTION = "There are several options:"
_LETTERS = "ABCD"
_READ = "ABCDE"  # letters that the paper's rules look for
_MILLION = 10**6
_COLUMNS = ("index", "question", "A", "image")
_FORM = "a table of tabs with the columns index, question, hint, A, B, C, D, answer, category, l2-category and image"
# marks in front of a letter and behind it, in the order in which they are looked for
_MARKS = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
    (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_MOST_WORDS = 3  # with "A" among more of them it may be the article


def infer_letter(said: str, options: Mapping[str, str]) -> str:
    """The letter that the paper's rules read out of an answer, "" if they find none or several.

    Args:
        said: by the model.
        options: letter -> text of the choice.
    """
    words = said.split()
    for before, behind in _MARKS:
        found = [letter for letter in _READ if f"{before}{letter}{behind}" in words]
        if len(found) == 1 and (before or behind or "A" not in words or len(words) <= _MOST_WORDS):
            return found[0]
    held = [letter for letter, text in options.items() if text.lower() in said.lower()]
    return held[0] if len(held) == 1 else ""


def _right(said: str, q: Question) -> float:
    options = q.facts["options"]
    return float((infer_letter(said, options) or letter_of(said, sorted(options))) == q.target)


def _parts(answers: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """[n, 2]: at the first row of every question whether all its rotations are right, and 1; elsewhere nothing."""
    parts, rows = np.zeros((len(questions), 2)), defaultdict[Any, list[int]](list)
    for i, q in enumerate(questions):
        rows[q.facts["base"]].append(i)
    for same in rows.values():
        parts[same[0]] = all(_right(answers[i], questions[i]) for i in same if questions[i].answers), 1
    return parts


def _circular(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1], np.nan)


def _cell(row: Mapping[str, Any], name: str, place: str) -> str:
    """A text; "" where there is none, which tables write in several ways."""
    value = row.get(name)
    if value is None or value != value or value in ("nan", "NaN", ""):
        return ""
    return text_of(value, f"{name!r}", place)


def _question(row: Mapping[str, Any], place: str, image: Any, split: str) -> Question:
    try:
        number = int(row.get("index"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(
            f"{place}: 'index' must be a whole number, found {shown(row.get('index'))}; expected {_FORM}"
        ) from None
    options = {letter: text for letter in _LETTERS if (text := _cell(row, letter, place))}
    answer, text = _cell(row, "answer", place), _cell(row, "question", place)
    if not text or not options:
        raise ConfigError(f"{place}: question {number} has no {'choices' if text else 'text'}; expected {_FORM}")
    if answer not in options and not (secret(split) and not answer):
        raise ConfigError(f"{place}: 'answer' must be one of its choices {', '.join(options)}, found {shown(answer)}")
    hint = _cell(row, "hint", place)
    told = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    asked = f"{hint} {text} " if hint else f"{text} "
    groups = {
        "category": _cell(row, "category", place),
        "ability": _cell(row, "l2-category", place) or _cell(row, "L2-category", place),
    }
    facts = {"options": options, "base": number % _MILLION}
    return Question(number, f"{asked}{INTRODUCTION}\n{told}\n", (answer,) if answer else (), image, groups, facts)


def _read(sources: Sources) -> VQAData:
    split = sources.split or SPLIT
    path = located(sources, f"*[bB]ench_{_any_case(split)}*.tsv")
    table, pictures, found = _table(path), _Encoded(path), []
    for i, row in enumerate(table):
        place = f"{path}: row {i}"
        q = _question(row, place, None, split)
        found.append(q._replace(image=pictures.add(q.doc_id, row.get("image"), place)))
    pictures.check()
    return _rotations(checked("mmbench", found, path, pictures, BY_LETTER, split), str(path))


def _any_case(text: str) -> str:
    return "".join(f"[{c.lower()}{c.upper()}]" for c in text)


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a file; cells hold whole pictures, which the module's limit would refuse."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    except csv.Error as error:
        raise ConfigError(f"{path} is not {_FORM}: {error}") from error
    finally:
        csv.field_size_limit(before)
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(map(repr, missing))}; expected {_FORM}")
    return rows


class _Encoded:
    """Pictures in a table, by the number of the row that has them."""

    def __init__(self, path: Path):
        self._path, self._texts, self._asked = path, dict[int, str](), dict[int, str]()

    def add(self, number: int, cell: Any, place: str) -> int:
        """Notes a row's picture, and says under which number it is read."""
        if not cell:
            raise ConfigError(f"{place}: question {number} has no 'image'; expected {_FORM}")
        if str(cell).isdigit():  # of another row
            self._asked[int(cell)] = place
            return int(cell)
        self._texts[number] = str(cell)
        return number

    def check(self) -> None:
        """Raises if a row names a picture that is not there."""
        for number, place in self._asked.items():
            if number not in self._texts:
                raise ConfigError(f"{place}: its image is that of row {number}, which has none; is the table whole?")

    def read(self, number: Any) -> Any:
        """A PIL image."""
        return open_picture(self._bytes(number), name=f"{self._path}, image of question {number}")

    def identify(self, number: Any) -> str:
        """Hash of the picture's file."""
        return digest(self._bytes(number))

    def _bytes(self, number: int) -> bytes:
        try:
            return base64.b64decode(self._texts[number], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"{self._path}: the image of question {number} is no base64: {brief(error)}") from error


def _rotations(data: VQAData, place: str) -> VQAData:
    """The data, of which a part holds whole questions: rotations are about the picture of the first of them."""
    first = {q.facts["base"]: q.image for q in reversed(data.questions)}
    return replace(data, questions=[q._replace(image=first[q.facts["base"]]) for q in data.questions], whole=True)


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """A table of tabs with index and prediction, beside the choices, as the evaluation server takes it once it is a sheet."""
    table = io.StringIO()
    out = csv.writer(table, delimiter="\t", lineterminator="\n")
    out.writerow(["index", *_LETTERS, "answer", "prediction"])
    for q, said in zip(questions, answers):
        out.writerow([q.doc_id, *(q.facts["options"].get(letter, "") for letter in _LETTERS), q.target, " ".join(said.split())])
    write(folder / f"{name}.tsv", table.getvalue())


TASK = QuestionTask(
    name="mmbench",
    read=_read,
    scores={"vanilla": _right},
    totals={"circular": Total(_parts, _circular)},
    primary="circular",
    correct="vanilla",
    columns={"circular": "circular", "vanilla": "vanilla"},
    max_new_tokens=1024,
    write=_write,
    hub=Hub("lmms-lab-encoder/MMBench", "en", SPLIT, _question, BY_LETTER, check=_rotations),
)
