"""MMMU (Yue et al., CVPR 2024), validation: 900 college questions of 30 subjects with up to seven images, few without choices.

Images are shown in front of the text, which keeps their names, as lmms-eval does. Of an answer without any letter it draws
one by chance: what that gives on average counts in `accuracy`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from vtok.errors import ConfigError, brief, shown
from vtok.eval.tasks.vqa.sources import SHORT as BY_WORD
from vtok.eval.tasks.vqa.sources.reading import secret, text_of
from vtok.eval.tasks.vqa.task import Cell, Hub, Question, QuestionTask, Row, Rows, Sources
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, listed, stripped

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ),
}  # fmt: skip
IMAGES = tuple(f"image_{i}" for i in range(1, 8))
_FORM = '{"id", "question", "options", "question_type", "answer", "image_1", ..}'
_KINDS = ("multiple-choice", "open")
_STRIPPED = ",.!?;:'"
_FEW_WORDS = 5  # an answer of more may name a choice by its text
_TAILS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")  # what an open answer stands behind
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
# numbers with commas between thousands, with an exponent, and others
_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_POWERS = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def read_letter(said: str, options: Sequence[str]) -> str:
    """The letter of the choice that an answer means, "" if it names none.

    Looked for in turn: `(A)`, `A` before a space, `A.`, and, in an answer of more than five words, the text of a choice. Of
    several the last one counts; of several that stand before no space, or with a period, the first letter.
    """
    text = f" {stripped(said, _STRIPPED)} "
    letters = [chr(ord("A") + i) for i in range(len(options))]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    small = text.lower()
    if len(text.split()) <= _FEW_WORDS:
        return ""
    named = [(small.rfind(option.lower()), -i) for i, option in enumerate(options) if option.lower() in small]
    return letters[-max(named)[1]] if named else ""


def normal(text: str) -> list[float | str]:
    """A number to two places, or the text in small letters.

    A single letter gets a space on either side, lest it match any word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        small = text.lower()
        return [f" {small}", f"{small} "] if len(small) == 1 else [small]


def open_answers(said: str) -> list[float | str]:
    """What an answer without choices may mean: the ends of its lines behind words such as "is", and the numbers in them."""
    whole = said.strip().strip(".").lower()
    lines, ends = whole.split("\n"), []
    for i, line in enumerate(lines):
        tails, end = _TAILS if i + 1 < len(lines) else (*_TAILS, "="), ""
        for tail in tails:
            if tail in line:
                rest = line.split(tail)[-1].strip()
                end = rest if not end or len(rest) < len(end) else end
        if end and end not in _TRIVIAL:
            ends.append(end)
    ends = ends or [whole]
    numbers = [n for end in ends for pattern in (_THOUSANDS, _POWERS, _PLAIN) for n in pattern.findall(end)]
    return [value for text in (*ends, *numbers) for value in normal(text)]


def open_match(said: str, answers: Sequence[str]) -> bool:
    """Whether an answer without choices is one of the reference answers, or holds it if that is no number."""
    wanted = [value for answer in answers for value in normal(answer)]
    for found in open_answers(said):
        if isinstance(found, str):
            if any(isinstance(value, str) and value in found for value in wanted):
                return True
        elif found in wanted:
            return True
    return False


def _score(said: str, q: Question, guess: bool) -> float:
    options = q.facts["options"]
    if not options:
        return float(open_match(said, q.answers))
    letter = read_letter(said, options)
    return float(letter in q.answers) if letter else guess / len(options)


def _options(row: Row) -> list[str]:
    value = row.get("options") or []
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, list):
        raise ConfigError(f"{row.place}: 'options' must be a list of texts, found {shown(value)}")
    return [text_of(one, "every one of 'options'", row.place) for one in found]


def _question(row: Row) -> Question:
    number, kind, place = row.text("id"), row.text("question_type"), row.place
    if kind not in _KINDS:
        raise ConfigError(f"{place}: 'question_type' must be {' or '.join(_KINDS)}, found {shown(kind)}")
    asked, options = row.text("question"), _options(row) if kind == _KINDS[0] else []
    answer = row.get("answer")
    answers = tuple(text_of(one, "'answer'", place) for one in (answer if isinstance(answer, list) else [answer]) if one)
    if options and not set(answers) <= {chr(ord("A") + i) for i in range(len(options))} and not secret(row.split):
        raise ConfigError(f"{place}: 'answer' must be the letter of one of {len(options)} choices, found {shown(answer)}")
    asked += f"\n{listed(options)}\n{BY_LETTER}" if options else f"\n{BY_WORD}"
    named = sorted({f"image_{n}" for n in re.findall(r"<image (\d+)>", asked)})
    unknown = [name for name in named if name not in IMAGES]
    if unknown:
        raise ConfigError(f"{place}: its text names {brief(unknown[0])}; rows of MMMU have {IMAGES[0]} to {IMAGES[-1]}")
    images = tuple(Cell(row.image, name) for name in named) or None
    groups = {"kind": "choices" if options else "open", "images": "several" if len(named) > 1 else "one"}
    if subject := re.fullmatch(r"[^_]+_(.+)_\d+", number):
        groups["subject"] = subject.group(1)
        groups["discipline"] = next((name for name, held in DISCIPLINES.items() if subject.group(1) in held), "")
    return Question(row.get("id"), asked, () if answers in ((), ("?",)) else answers, images, groups, {"options": options})


def _read(sources: Sources) -> Rows:
    raise ConfigError(
        "MMMU is distributed as rows of the datasets library: pass hub, hub:NAME or a folder of its parquet files, not "
        f"{sources.data}"
    )


TASK = QuestionTask(
    name="mmmu",
    read=_read,
    question=_question,
    scores={
        "accuracy": lambda said, q: _score(said, q, True),
        "accuracy_unguessed": lambda said, q: _score(said, q, False),
    },
    correct="accuracy_unguessed",
    columns={"accuracy": "accuracy", "unguessed": "accuracy_unguessed"},
    max_new_tokens=128,
    hub=Hub("lmms-lab-encoder/MMMU", None, "validation", _FORM, columns=IMAGES),
)
