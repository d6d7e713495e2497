"""MMBench in English (Liu et al., ECCV 2024): questions with up to four choices, asked once for every rotation of the choices.

An answer is read by the rules of the paper's program, and where they find nothing by `letter_of`: lmms-eval's
`mmbench_en_dev_static`, but that "nan", which stands for a choice that is not there, is no text of a choice here.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import digest, open_picture
from vtok.eval.tasks.vqa.sources.reading import located, secret, text_of
from vtok.eval.tasks.vqa.task import Hub, Question, QuestionTask, Row, Rows, Sources, VQAData
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
    """The letter (of letter -> text) that the paper's rules read out of an answer, "" if they find none or several."""
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


def _cell(row: Row, name: str) -> str:
    """A text; "" where there is none, which tables write in several ways."""
    value = row.get(name)
    if value is None or value != value or value in ("nan", "NaN", ""):
        return ""
    return text_of(value, f"{name!r}", row.place)


def _question(row: Row) -> Question:
    number, place = _number(row), row.place
    options = {letter: text for letter in _LETTERS if (text := _cell(row, letter))}
    answer, text, hint = _cell(row, "answer"), _cell(row, "question"), _cell(row, "hint")
    if not text or not options:
        raise ConfigError(f"{place}: question {number} has no {'choices' if text else 'text'}; expected {_FORM}")
    if answer not in options and not (secret(row.split) and not answer):
        raise ConfigError(f"{place}: 'answer' must be one of its choices {', '.join(options)}, found {shown(answer)}")
    told = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    asked = f"{hint} {text} " if hint else f"{text} "
    ability = _cell(row, "l2-category") or _cell(row, "L2-category")
    groups, facts = {"category": _cell(row, "category"), "ability": ability}, {"options": options, "base": number % _MILLION}
    return Question(number, f"{asked}{INTRODUCTION}\n{told}\n", (answer,) if answer else (), row.image, groups, facts)


def _number(row: Row) -> int:
    try:
        return int(row.get("index"))
    except (TypeError, ValueError):
        found = shown(row.get("index"))
        raise ConfigError(f"{row.place}: 'index' must be a whole number, found {found}; expected {_FORM}") from None


def _read(sources: Sources) -> Rows:
    split = sources.split or SPLIT
    any_case = "".join(f"[{c.lower()}{c.upper()}]" for c in split)
    path = located(sources, f"*[bB]ench_{any_case}*.tsv")
    rows = [Row(content, f"{path}: row {i}", _FORM, i, split=split) for i, content in enumerate(_table(path))]
    texts = {_number(row): str(row.get("image")) for row in rows}

    def with_picture(row: Row) -> Row:
        number, cell = _number(row), str(row.get("image"))
        if not cell:
            raise ConfigError(f"{row.place}: question {number} has no 'image'; expected {_FORM}")
        owner = int(cell) if cell.isdigit() else number
        if not texts.get(owner) or texts[owner].isdigit():
            raise ConfigError(f"{row.place}: its image is that of row {owner}, which has none; is the table whole?")
        return replace(row, image=owner)

    return Rows(map(with_picture, rows), path, _Encoded(path, texts), split)


def _table(path: Path) -> list[dict[str, str]]:
    import pandas as pd

    try:
        text = io.StringIO(path.read_text(encoding="utf-8-sig"))
        found = pd.read_csv(text, sep="\t", dtype=str, keep_default_na=False, index_col=False).fillna("")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: no table
        raise ConfigError(f"{path} is not {_FORM}: {brief(error)}") from error
    missing = [name for name in _COLUMNS if found.empty or name not in found]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(map(repr, missing))}; expected {_FORM}")
    return found.to_dict("records")


class _Encoded:
    """Pictures in base64, by the number of the row of a table that has them."""

    def __init__(self, path: Path, texts: Mapping[int, str]):
        self._path, self._texts = path, texts

    def read(self, number: Any) -> Any:
        return open_picture(self._bytes(number), name=f"{self._path}, image of question {number}")

    def identify(self, number: Any) -> str:
        return digest(self._bytes(number))

    def _bytes(self, number: int) -> bytes:
        try:
            return base64.b64decode(self._texts[number], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"{self._path}: the image of question {number} is no base64: {brief(error)}") from error


def _rotations(data: VQAData, data_name: str) -> VQAData:
    """The data, of which a part holds whole questions: rotations are about the picture of the first of them."""
    first = {q.facts["base"]: q.image for q in reversed(data.questions)}
    return replace(data, questions=[q._replace(image=first[q.facts["base"]]) for q in data.questions], whole=True)


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """A table of tabs with index and prediction, beside the choices, as the evaluation server takes it once it is a sheet."""
    import pandas as pd

    rows = [
        [q.doc_id, *(q.facts["options"].get(letter, "") for letter in _LETTERS), q.target, " ".join(said.split())]
        for q, said in zip(questions, answers)
    ]
    table = pd.DataFrame(rows, columns=["index", *_LETTERS, "answer", "prediction"])
    write(folder / f"{name}.tsv", table.to_csv(sep="\t", index=False, lineterminator="\n"))


TASK = QuestionTask(
    name="mmbench",
    read=_read,
    question=_question,
    prompt=BY_LETTER,
    check=_rotations,
    scores={"vanilla": _right},
    totals={"circular": Total(_parts, lambda sums: ratio(sums[..., 0], sums[..., 1], np.nan))},
    primary="circular",
    correct="vanilla",
    columns={"circular": "circular", "vanilla": "vanilla"},
    max_new_tokens=1024,
    write=_write,
    hub=Hub("lmms-lab-encoder/MMBench", "en", SPLIT, _FORM),
)
