"""VizWiz-VQA (Gurari et al., CVPR 2018): questions that blind people asked about photographs of their own, ten answers each.

The score is VQAv2's, after the steps that TextVQA takes; a model is told that it may say "Unanswerable".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vtok.eval.tasks.vqa.metrics import normalised, soft_accuracy
from vtok.eval.tasks.vqa.task import SHORT, Files, Hub, Question, QuestionTask, Row
from vtok.writing import write

UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
_FORM = '[{"image", "question", "answers": [{"answer"}, ...]}, ...]'


def _question(row: Row) -> Question:
    of_file = row.get("image") is not None
    name = row.text("image").rpartition(".")[0] if of_file else row.text("question_id").removesuffix(".jpg")
    kind = row.group("answer_type") or row.group("category")
    return Question(name, row.text("question").capitalize(), row.answers(), row.image, {"kind": kind})


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """`[{"image", "answer"}]`, as the evaluation server takes it: what is compared of an answer."""
    content = [{"image": f"{q.doc_id}.jpg", "answer": normalised(said, "textvqa")} for q, said in zip(questions, answers)]
    write(folder / f"{name}.json", json.dumps(content))


TASK = QuestionTask(
    name="vizwiz",
    read=Files("{split}.json", _FORM, "val"),
    question=_question,
    prompt=UNSURE,
    scores={"soft_accuracy": lambda said, q: soft_accuracy(said, q.answers, "textvqa")},
    columns={"soft": "soft_accuracy"},
    max_new_tokens=1024,
    write=_write,
    hub=Hub("lmms-lab-encoder/VizWiz-VQA", None, "val", '{"question_id", "question", "answers"}'),
)
