"""TextVQA (Singh et al., CVPR 2019): questions about text in photographs, ten answers each; quoted on the validation set.

Files: `TextVQA_0.5.1_val.json`, `{"data": [{"question_id", "image_id", "question", "answers"}]}`, and `IMAGE_ID.jpg`. With
`--ocr TextVQA_Rosetta_OCR_v0.2_val.json`, `{"data": [{"image_id", "ocr_tokens"}]}` (or `--ocr on` for rows of the
`datasets` library, which bring them), the prompt names the OCR tokens, as that of LLaVA-1.5 does and that of lmms-eval does
not: it moves the score by several points, so a record says it in `dataset`.

`soft_accuracy` is lmms-eval's and that of M4C's evaluator, which LLaVA runs; `soft_accuracy_vlmeval` leaves out the step
that sets words apart. The length of an answer has no limit in lmms-eval but that of its models for Hugging Face, 1,024
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.metrics import soft_accuracy
from vtok.eval.tasks.vqa.sources.files import checked, write_answers
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import (
    SHORT,
    Pictures,
    answer_list,
    entries,
    fields,
    load_json,
    located,
    number_of,
    text_of,
    texts_of,
)
from vtok.eval.tasks.vqa.task import QuestionTask, Sources

SPLIT = "val"
_FORM = '{"data": [{"question_id", "image_id", "question", "answers"}, ...]}'
_OCR_FORM = '{"data": [{"image_id", "ocr_tokens"}, ...]}'


def prompt_text(question: str, tokens: Sequence[str] | None) -> str:
    """The question with a capital first letter and small ones after it, and the OCR tokens where there are some to name."""
    reference = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens)}"
    return question.capitalize() + reference


def _question(entry: Any, place: str, image: Any, split: str, tokens: Sequence[str] | None) -> Question:
    number, text = fields(entry, ("question_id", "question"), place, _FORM)
    asked = prompt_text(text_of(text, "'question'", place), tokens)
    return Question(number, asked, answer_list(entry, place, _FORM, split), image, {})


def _read(sources: Sources) -> VQAData:
    split = sources.split or SPLIT
    path = located(sources, f"TextVQA_[0-9]*_{split}.json")
    pictures, found = Pictures.of(sources), []
    known = _ocr_tokens(Path(sources.ocr)) if sources.ocr else None
    for i, entry in enumerate(entries(load_json(path, _FORM), "data", path, _FORM)):
        number, image = fields(entry, ("question_id", "image_id"), f"{path}: entry {i}", _FORM)
        place = f"{path}: question {brief(number)}"
        file = str(pictures.find(f"{text_of(image, 'image_id', place)}.jpg", place))
        if known is not None and image not in known:
            raise ConfigError(
                f"{place}: {sources.ocr} has no tokens of image {brief(image)}; do both files belong to the same split?"
            )
        tokens = None if known is None else known[image]
        found.append(_question(entry, place, file, split, tokens))
    name = "textvqa" if known is None else "textvqa with OCR tokens"
    return checked(name, found, path, pictures, SHORT, split)


def _ocr_tokens(path: Path) -> dict[Any, list[str]]:
    """Image -> tokens."""
    found = {}
    for i, entry in enumerate(entries(load_json(path, _OCR_FORM), "data", path, _OCR_FORM)):
        image, tokens = fields(entry, ("image_id", "ocr_tokens"), f"{path}: entry {i}", _OCR_FORM)
        number_of(image, "'image_id'", f"{path}: entry {i}")
        found[image] = [*_tokens(tokens, f"{path}: image {brief(image)}")]
    return found


def _tokens(value: Any, place: str) -> tuple[str, ...]:
    """Texts, of which there may be none."""
    return () if value == [] else texts_of(value, "'ocr_tokens'", place)


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    tokens = None
    if row["ocr"]:
        (named,) = fields(row, ("ocr_tokens",), place, '{"ocr_tokens"} beside the question')
        tokens = _tokens(named, place)
    return _question(row, place, image, split, tokens)


TASK = QuestionTask(
    name="textvqa",
    read=_read,
    scores={
        "soft_accuracy": lambda said, q: soft_accuracy(said, q.answers, "textvqa"),
        "soft_accuracy_vlmeval": lambda said, q: soft_accuracy(said, q.answers, "vlmeval"),
    },
    primary="soft_accuracy",
    correct="soft_accuracy",
    columns={"soft": "soft_accuracy"},
    max_new_tokens=1024,
    write=write_answers(),
    hub=Hub("lmms-lab-encoder/textvqa", None, "validation", _from_row, SHORT, same_image="image_id"),
)
