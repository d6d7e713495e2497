"""ScienceQA (Lu et al., NeurIPS 2022): school questions with choices: all, or (`scienceqa_img`) those with an image.

Answers are read as lmms-eval does (`letter_match`), and as LLaVA's program does (`parse_llava`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vtok.errors import ConfigError, brief, shown
from vtok.eval.tasks.vqa.sources.reading import load_json, located
from vtok.eval.tasks.vqa.task import Hub, Pictures, Question, QuestionTask, Row, Rows, Sources, VQAData
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, listed
from vtok.writing import write

SPLIT = "test"
LETTERS = "ABCDE"
_FORM = '{"NUMBER": {"question", "choices", "answer", "image"}, ...}'
_SPLIT_FORM = '{"test": [NUMBER, ...], ...}'
_SAYS = re.compile(r"The answer is ([A-E])")


def parse_llava(text: str) -> str:
    """The letter that LLaVA's program reads out of an answer, or ""."""
    text = text.replace("\n", ". ")
    if text.strip() in tuple(LETTERS):
        return text.strip()
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.search(_SAYS.pattern + r"\.", text) or _SAYS.search(text)
    return found.group(1) if found else ""


def letter_match(said: str, target: str) -> float:
    """lmms-eval's reading."""
    said = said.strip()
    if said.lower() == target.lower():
        return 1.0
    return float(len(said) >= 2 and said[0].isupper() and said[1] == "." and said[0].lower() == target.lower())


def prompt_text(question: str, choices: Sequence[str], hint: str) -> str:
    """Context, question, and one choice a line with its letter."""
    return (f"Context: {hint}\n" if hint else "") + f"{question}\n{listed(choices)}"


def _question(row: Row) -> Question:
    choices, answer = row.need("question", "choices", "answer")[1:]
    number_like = isinstance(answer, int) and not isinstance(answer, bool)
    if not isinstance(choices, list) or not number_like or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{row.place}: 'answer' must be the place of one of its choices {shown(choices)} from 0 on, got {shown(answer)}"
        )
    groups = {"subject": row.group("subject"), "kind": "text" if row.image is None else "image"}
    grade = re.fullmatch(r"grade(\d+)", row.group("grade"))
    if grade:
        groups["grade"] = "1-6" if int(grade.group(1)) <= 6 else "7-12"
    asked = prompt_text(row.text("question"), row.texts("choices"), row.text("hint") if row.get("hint") else "")
    return Question(str(row.number), asked, (chr(ord("A") + answer),), row.image, groups)


def _read(sources: Sources) -> Rows:
    path, split = located(sources, "problems.json"), sources.split or SPLIT
    problems, splits = load_json(path, _FORM), load_json(path.parent / "pid_splits.json", _SPLIT_FORM)
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        known = brief(", ".join(splits)) if isinstance(splits, dict) else type(splits).__name__
        raise ConfigError(
            f"{path.parent / 'pid_splits.json'} has no list of numbers under {shown(split)}, only {known} (--split)"
        )
    pictures = Pictures.of(sources)

    def rows() -> Iterator[Row]:
        for number in splits[split]:
            place = f"{path}: question {brief(number)}"
            entry = problems.get(str(number)) if isinstance(problems, dict) else None
            if entry is None:
                raise ConfigError(
                    f"{path} has no question {brief(number)}, which pid_splits.json counts among {split}; expected {_FORM}"
                )
            row = Row(entry, place, _FORM, number)
            shown_too = row.get("image") is not None
            yield replace(row, image=str(pictures.find(f"{split}/{number}/{row.text('image')}", place)) if shown_too else None)

    return Rows(rows(), path, pictures, split)


def _with_images(data: VQAData, data_name: str) -> VQAData:
    found = [q for q in data.questions if q.image is not None]
    if not found:
        raise ConfigError(f"{data_name} has no question with an image; --task scienceqa asks without")
    return replace(data, questions=found)


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """`{"results": {number: choice or -1}, "outputs": {number: answer}}`, as ScienceQA's and LLaVA's programs write it."""
    letters = {q.doc_id: parse_llava(said) for q, said in zip(questions, answers)}
    results = {number: LETTERS.index(letter) if letter else -1 for number, letter in letters.items()}
    content = {"results": results, "outputs": {q.doc_id: said for q, said in zip(questions, answers)}}
    write(folder / f"{name}.json", json.dumps(content))


_PATH = "lmms-lab-encoder/ScienceQA"
TASK = QuestionTask(
    name="scienceqa",
    read=_read,
    question=_question,
    prompt=BY_LETTER,
    # batches hold one kind of questions: those without an image come last
    check=lambda data, _: replace(data, questions=sorted(data.questions, key=lambda q: q.image is None)),
    scores={
        "exact_match": lambda said, q: letter_match(said, q.target),
        "exact_match_llava": lambda said, q: float(parse_llava(said) == q.target),
    },
    columns={"exact": "exact_match"},
    write=_write,
    hub=Hub(_PATH, "ScienceQA-FULL", SPLIT, _FORM, optional=True),
)
TASK_IMG = replace(TASK, name="scienceqa_img", check=_with_images, hub=Hub(_PATH, "ScienceQA-IMG", SPLIT, _FORM, optional=True))
