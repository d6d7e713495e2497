"""VizWiz-VQA (Gurari et al., CVPR 2018): questions that blind people asked about photographs of their own, ten answers each.

Files: `val.json`, `[{"image", "question", "answers": [{"answer"}], "answer_type", "answerable"}]`, and the images.
lmms-eval and papers quote the validation set; the answers of `test` are known to the evaluation server alone (papers with
LLaVA quote it). The score is VQAv2's, after the steps that TextVQA takes; a model is told that it may say "Unanswerable".
The length of an answer has no limit in lmms-eval but that of its models for Hugging Face, 1,024 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.metrics import normalised, soft_accuracy
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import (
    SHORT,
    Pictures,
    answer_list,
    entries,
    fields,
    group_of,
    load_json,
    located,
    text_of,
)
from vtok.eval.tasks.vqa.task import QuestionTask, Sources
from vtok.writing import write

SPLIT = "val"
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
_FORM = '[{"image", "question", "answers": [{"answer"}, ...]}, ...]'


def _question(number: str, entry: Any, kind: str, place: str, image: Any, split: str) -> Question:
    (text,) = fields(entry, ("question",), place, _FORM)
    asked = text_of(text, "'question'", place).capitalize()
    return Question(number, asked, answer_list(entry, place, _FORM, split), image, {"kind": group_of(entry, kind, place)})


def _read(sources: Sources) -> VQAData:
    split = sources.split or SPLIT
    path = located(sources, f"{split}.json")
    pictures, found = Pictures.of(sources), []
    for i, entry in enumerate(entries(load_json(path, _FORM), None, path, _FORM)):
        place = f"{path}: entry {i}"
        (image,) = fields(entry, ("image",), place, _FORM)
        name = text_of(image, "'image'", place)
        file = str(pictures.find(name, place))
        found.append(_question(name.rpartition(".")[0], entry, "answer_type", place, file, split))
    return checked("vizwiz", found, path, pictures, UNSURE, split)


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    (number,) = fields(row, ("question_id",), place, '{"question_id", "question", "answers"}')
    name = text_of(number, "'question_id'", place).removesuffix(".jpg")
    return _question(name, row, "category", place, image, split)


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """`[{"image", "answer"}]`, as the evaluation server takes it: what is compared of an answer."""
    content = [{"image": f"{q.doc_id}.jpg", "answer": normalised(said, "textvqa")} for q, said in zip(questions, answers)]
    write(folder / f"{name}.json", json.dumps(content))


TASK = QuestionTask(
    name="vizwiz",
    read=_read,
    scores={"soft_accuracy": lambda said, q: soft_accuracy(said, q.answers, "textvqa")},
    primary="soft_accuracy",
    correct="soft_accuracy",
    columns={"soft": "soft_accuracy"},
    max_new_tokens=1024,
    write=_write,
    hub=Hub("lmms-lab-encoder/VizWiz-VQA", None, SPLIT, _from_row, UNSURE),
)
