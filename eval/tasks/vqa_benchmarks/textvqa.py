"""TextVQA (Singh et al., CVPR 2019): questions about text in photographs, ten answers each.

Prompts with OCR tokens are LLaVA-1.5's, without them lmms-eval's, whose models for Hugging Face limit answers to 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief
from vtok.eval.tasks.vqa.metrics import soft_accuracy
from vtok.eval.tasks.vqa.sources.reading import entries, load_json
from vtok.eval.tasks.vqa.task import SHORT, Files, Hub, Question, QuestionTask, Row, Rows, Sources, write_answers

_FORM = '{"data": [{"question_id", "image_id", "question", "answers"}, ...]}'
_FILE = Files("TextVQA_[0-9]*_{split}.json", _FORM, "val", key="data", number="question_id", image="image_id", ending=".jpg")
_OCR_FORM = '{"data": [{"image_id", "ocr_tokens"}, ...]}'


def prompt_text(question: str, tokens: Sequence[str] | None) -> str:
    """The question with a capital first letter and small ones after it, and the OCR tokens where there are some to name."""
    reference = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens)}"
    return question.capitalize() + reference


def _question(row: Row) -> Question:
    asked = prompt_text(row.text("question"), _tokens(row) if row.ocr else None)
    return Question(row.key("question_id"), asked, row.answers(), row.image, {})


def _tokens(row: Row) -> tuple[str, ...]:
    """OCR tokens, of which there may be none."""
    return () if row.get("ocr_tokens") == [] else row.texts("ocr_tokens")


def _read(sources: Sources) -> Rows:
    found = _FILE(sources)
    if not sources.ocr:
        return found
    known = _ocr_tokens(Path(sources.ocr))

    def rows() -> Iterator[Row]:
        for row in found.rows:
            image = row.get("image_id")
            if image not in known:
                raise ConfigError(
                    f"{row.place}: {sources.ocr} has no tokens of image {brief(image)}; do both files belong to the same split?"
                )
            yield replace(row, content={**row.content, "ocr_tokens": known[image]}, ocr=True)

    return replace(found, rows=rows(), name="textvqa with OCR tokens")


def _ocr_tokens(path: Path) -> dict[Any, Any]:
    """Image -> tokens."""
    listed = entries(load_json(path, _OCR_FORM), "data", path, _OCR_FORM)
    rows = (Row(entry, f"{path}: entry {i}", _OCR_FORM) for i, entry in enumerate(listed))
    return {row.key("image_id"): [*_tokens(row)] for row in rows}


TASK = QuestionTask(
    name="textvqa",
    read=_read,
    question=_question,
    prompt=SHORT,
    scores={
        "soft_accuracy": lambda said, q: soft_accuracy(said, q.answers, "textvqa"),
        "soft_accuracy_vlmeval": lambda said, q: soft_accuracy(said, q.answers, "vlmeval"),
    },
    columns={"soft": "soft_accuracy"},
    max_new_tokens=1024,
    write=write_answers(),
    hub=Hub(
        "lmms-lab-encoder/textvqa",
        None,
        "validation",
        '{"question_id", "question", "answers", "ocr_tokens"}',
        same_image="image_id",
    ),
)
