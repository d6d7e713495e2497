"""VQAv2 (Goyal et al., CVPR 2017): ten answers to every question, compared as three programs do, see `vqa.metrics`."""

from __future__ import annotations

import re
from dataclasses import replace

from vtok.errors import ConfigError
from vtok.eval.tasks.vqa.metrics import soft_accuracy
from vtok.eval.tasks.vqa.sources.files import find_vqav2
from vtok.eval.tasks.vqa.task import SHORT, Hub, Question, QuestionTask, Row, Sources, VQAData, write_answers

_SPLIT = re.compile(r"(train|val|test)(-dev)?\d{4}")
_FORM = '{"question_id", "question", "answers": [{"answer"}, ...]}'


def _read(sources: Sources) -> VQAData:
    if not sources.folder.is_dir() and not sources.questions:
        raise ConfigError(f"{sources.data} is no folder; name the one with VQAv2's questions, annotations and images")
    data = find_vqav2(sources.folder, sources.questions, sources.annotations, sources.images)
    split = _SPLIT.search(data.name)
    return replace(data, name="vqav2", split=split.group() if split else "")


def _question(row: Row) -> Question:
    groups = {"kind": row.group("answer_type")}
    return Question(row.key("question_id"), row.text("question"), row.answers(), row.image, groups)


TASK = QuestionTask(
    name="vqav2",
    read=_read,
    question=_question,
    prompt=SHORT,
    scores={
        "soft_accuracy": lambda said, q: soft_accuracy(said, q.answers),
        "soft_accuracy_official": lambda said, q: soft_accuracy(said, q.answers, "official"),
        "soft_accuracy_vlmeval": lambda said, q: soft_accuracy(said, q.answers, "vlmeval"),
    },
    columns={"soft": "soft_accuracy", "official": "soft_accuracy_official"},
    write=write_answers(),
    hub=Hub("lmms-lab-encoder/VQAv2", None, "validation", _FORM, same_image="image_id"),
)
