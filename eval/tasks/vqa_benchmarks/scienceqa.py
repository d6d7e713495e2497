"""ScienceQA (Lu et al., NeurIPS 2022): school questions with choices: all, or (`scienceqa_img`) those with an image.

Files: `problems.json`, question -> `{"question", "choices", "answer", "hint", "image"}`, `pid_splits.json`, split ->
numbers, and `SPLIT/NUMBER/image.png`. Papers on images quote the 2,017 questions of the test split that have one; the whole
split has 4,241, the others are asked without an image.

| score | an answer is right if it is |
|---|---|
| `exact_match` (lmms-eval) | the letter, without case, or begins with the capital letter and a period |
| `exact_match_llava` (LLaVA) | the capital letter, or begins with it, a period and a space, or says "The answer is X" |
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import Pictures, fields, group_of, load_json, located, text_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources
from vtok.writing import write

LETTER = "\nAnswer with the option's letter from the given choices directly."
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
    lines = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices)]
    return (f"Context: {hint}\n" if hint else "") + f"{question}\n" + "\n".join(lines)


def _question(number: Any, entry: Any, place: str, image: Any) -> Question:
    text, choices, answer = fields(entry, ("question", "choices", "answer"), place, _FORM)
    number_like = isinstance(answer, int) and not isinstance(answer, bool)
    if not isinstance(choices, list) or not number_like or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{place}: 'answer' must be the place of one of its choices {shown(choices)} from 0 on, got {shown(answer)}"
        )
    groups = {"subject": group_of(entry, "subject", place), "kind": "text" if image is None else "image"}
    grade = re.fullmatch(r"grade(\d+)", group_of(entry, "grade", place))
    if grade:
        groups["grade"] = "1-6" if int(grade.group(1)) <= 6 else "7-12"
    prompt = prompt_text(
        text_of(text, "'question'", place),
        [text_of(choice, "every one of 'choices'", place) for choice in choices],
        text_of(entry.get("hint") or "", "'hint'", place),
    )
    return Question(number, prompt, (chr(ord("A") + answer),), image, groups)


def _read(sources: Sources) -> VQAData:
    path, split = located(sources, "problems.json"), sources.split or SPLIT
    problems, splits = load_json(path, _FORM), load_json(path.parent / "pid_splits.json", _SPLIT_FORM)
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        known = brief(", ".join(splits)) if isinstance(splits, dict) else type(splits).__name__
        raise ConfigError(
            f"{path.parent / 'pid_splits.json'} has no list of numbers under {shown(split)}, only {known} (--split)"
        )
    pictures, found = Pictures.of(sources), []
    for number in splits[split]:
        place = f"{path}: question {brief(number)}"
        entry = problems.get(str(number)) if isinstance(problems, dict) else None
        if entry is None:
            raise ConfigError(
                f"{path} has no question {brief(number)}, which pid_splits.json counts among {split}; expected {_FORM}"
            )
        image = entry.get("image") if isinstance(entry, dict) else None
        file = None if image is None else str(pictures.find(f"{split}/{number}/{text_of(image, 'image', place)}", place))
        found.append(_question(str(number), entry, place, file))
    # questions without an image last: batches hold one kind
    found.sort(key=lambda q: q.image is None)
    return checked("scienceqa", found, path, pictures, LETTER, split)


def _with_images(data: VQAData, place: str) -> VQAData:
    """The questions that have an image."""
    found = [q for q in data.questions if q.image is not None]
    if not found:
        raise ConfigError(f"{place} has no question with an image; --task scienceqa asks without")
    return replace(data, name="scienceqa_img", questions=found)


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    return _question(place.rpartition(" ")[2], row, place, image)


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """`{"results": {number: choice or -1}, "outputs": {number: answer}}`, as ScienceQA's and LLaVA's programs write it."""
    letters = {q.doc_id: parse_llava(said) for q, said in zip(questions, answers)}
    results = {number: LETTERS.index(letter) if letter else -1 for number, letter in letters.items()}
    content = {"results": results, "outputs": {q.doc_id: said for q, said in zip(questions, answers)}}
    write(folder / f"{name}.json", json.dumps(content))


def _sorted(data: VQAData, place: str) -> VQAData:
    return replace(data, questions=sorted(data.questions, key=lambda q: q.image is None))


_SCORES = {
    "exact_match": lambda said, q: letter_match(said, q.target),
    "exact_match_llava": lambda said, q: float(parse_llava(said) == q.target),
}
_PATH = "lmms-lab-encoder/ScienceQA"
TASK = QuestionTask(
    name="scienceqa",
    read=_read,
    scores=_SCORES,
    primary="exact_match",
    correct="exact_match",
    columns={"exact": "exact_match"},
    write=_write,
    hub=Hub(_PATH, "ScienceQA-FULL", SPLIT, _from_row, LETTER, optional=True, check=_sorted),
)
TASK_IMG = replace(
    TASK,
    name="scienceqa_img",
    read=lambda sources: _with_images(_read(sources), sources.data),
    hub=Hub(_PATH, "ScienceQA-IMG", SPLIT, _from_row, LETTER, optional=True, check=_with_images),
)
