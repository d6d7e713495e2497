"""VQAv2 (Goyal et al., CVPR 2017): ten answers to every question; quoted on validation, or on the server's test-dev.

Files: questions `{"questions": [{"question_id", "image_id", "question"}]}`, annotations `{"annotations": [{"question_id",
"answers", "answer_type"}]}`, COCO's images, found by the number at the end of their names. `answers_*.json` are lists that
the evaluation server takes. `soft_accuracy` has lmms-eval's normalisation, `_official` that of vqaEval.py, `_vlmeval`
VLMEvalKit's with its corrected pattern for periods; see `vqa_metrics`.

Test questions need no annotations: nothing is scored but agreement, and the lists are there to be handed in.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from vtok.errors import ConfigError, brief
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.metrics import soft_accuracy
from vtok.eval.tasks.vqa.sources.files import find_vqav2, write_answers
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import SHORT, fields, group_of, secret, text_of, texts_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources

_SPLIT = re.compile(r"(train|val|test)(-dev)?\d{4}")
_FORM = '{"question_id", "question", "answers": [{"answer"}, ...]}'


def _read(sources: Sources) -> VQAData:
    if not sources.folder.is_dir() and not sources.questions:
        raise ConfigError(f"{sources.data} is no folder; name the one with VQAv2's questions, annotations and images")
    data = find_vqav2(sources.folder, sources.questions, sources.annotations, sources.images)
    split = _SPLIT.search(data.name)
    return replace(data, name="vqav2", split=split.group() if split else "")


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    number, text = fields(row, ("question_id", "question"), place, _FORM)
    answers = row.get("answers") or ()
    said = texts_of(answers, "'answers'", place) if answers else ()
    if not said and not secret(split):
        raise ConfigError(f"{place}: question {brief(number)} has no answers; expected {_FORM}")
    return Question(number, text_of(text, "'question'", place), said, image, {"kind": group_of(row, "answer_type", place)})


TASK = QuestionTask(
    name="vqav2",
    read=_read,
    scores={
        "soft_accuracy": lambda said, q: soft_accuracy(said, q.answers),
        "soft_accuracy_official": lambda said, q: soft_accuracy(said, q.answers, "official"),
        "soft_accuracy_vlmeval": lambda said, q: soft_accuracy(said, q.answers, "vlmeval"),
    },
    primary="soft_accuracy",
    correct="soft_accuracy",
    columns={"soft": "soft_accuracy", "official": "soft_accuracy_official"},
    write=write_answers(),
    hub=Hub("lmms-lab-encoder/VQAv2", None, "validation", _from_row, SHORT, same_image="image_id"),
)
