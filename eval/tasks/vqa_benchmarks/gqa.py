"""GQA (Hudson and Manning, CVPR 2019): questions made from scene graphs, one right answer each.

Answers are compared as strictly as by lmms-eval, VLMEvalKit (`_vlmeval`), and GQA's eval.py with what LLaVA feeds it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace

from vtok.errors import ConfigError, shown
from vtok.eval.tasks.vqa.task import SHORT, Files, Hub, Question, QuestionTask, Row, write_answers

_FORM = '{"QUESTION": {"imageId", "question", "answer"}, ...}'
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_marks(text: str) -> str:
    """Lower case, no punctuation."""
    return text.lower().translate(_NO_PUNCTUATION)


def for_gqa(text: str) -> str:
    """An answer as LLaVA hands it to GQA's program."""
    return text.rstrip(".").lower()


def _question(row: Row) -> Question:
    types = row.get("types") or {}
    if not isinstance(types, Mapping):
        raise ConfigError(f"{row.place}: 'types' must be an object of texts, found {shown(types)}")
    kinds = replace(row, content=types)
    groups = {name: kind for name in ("structural", "semantic") if (kind := kinds.group(name))}
    if "structural" in groups:
        groups["answer"] = "open" if groups["structural"] == "query" else "binary"
    number = row.number if isinstance(row.number, str) else row.content.get("id", row.place)
    return Question(number, row.text("question"), (row.text("answer"),), row.image, groups)


TASK = QuestionTask(
    name="gqa",
    read=Files("{split}_questions.json", _FORM, "testdev_balanced", kind="object", image="imageId", ending=".jpg"),
    question=_question,
    prompt=SHORT,
    scores={
        "exact_match": lambda said, q: float(without_marks(said) == without_marks(q.target)),
        "exact_match_vlmeval": lambda said, q: float(said.strip().lower() == q.target.strip().lower()),
        "exact_match_official": lambda said, q: float(for_gqa(said) == q.target),
    },
    columns={"exact": "exact_match"},
    write=write_answers("questionId", "prediction", for_gqa),
    hub=Hub(
        "lmms-lab-encoder/GQA",
        "testdev_balanced_instructions",
        "testdev",
        _FORM,
        images="testdev_balanced_images",
        image_id="imageId",
    ),
)
