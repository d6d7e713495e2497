"""GQA (Hudson and Manning, CVPR 2019): questions made from scene graphs, one right answer each; quoted on testdev_balanced.

Files: `testdev_balanced_questions.json`, an object question -> `{"imageId", "question", "answer", "types"}`, and the images,
`IMAGEID.jpg`. Programs differ in how strictly they compare:

| score | compares |
|---|---|
| `exact_match` (lmms-eval) | without case and without the marks of `string.punctuation`, white space inside as it is |
| `exact_match_vlmeval` (VLMEvalKit) | without case and outer white space |
| `exact_match_official` (GQA's eval.py as LLaVA feeds it) | lower case without periods at its end, letter for letter |
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked, write_answers
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import SHORT, Pictures, fields, group_of, load_json, located, text_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources

SPLIT = "testdev_balanced"
_FORM = '{"QUESTION": {"imageId", "question", "answer"}, ...}'
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_marks(text: str) -> str:
    """Lower case, no punctuation."""
    return text.lower().translate(_NO_PUNCTUATION)


def for_gqa(text: str) -> str:
    """An answer as LLaVA hands it to GQA's program."""
    return text.rstrip(".").lower()


def _question(number: Any, entry: Any, place: str, image: Any) -> Question:
    text, answer = fields(entry, ("question", "answer"), place, _FORM)
    types = entry.get("types") or {}
    if not isinstance(types, Mapping):
        raise ConfigError(f"{place}: 'types' must be an object of texts, found {shown(types)}")
    groups = {name: kind for name in ("structural", "semantic") if (kind := group_of(types, name, place))}
    if "structural" in groups:
        groups["answer"] = "open" if groups["structural"] == "query" else "binary"
    said = text_of(answer, "'answer'", place)
    return Question(number, text_of(text, "'question'", place), (said,), image, groups)


def _read(sources: Sources) -> VQAData:
    split = sources.split or SPLIT
    path = located(sources, f"{split}_questions.json")
    content, pictures = load_json(path, _FORM), Pictures.of(sources)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not of the form {_FORM}: it holds {type(content).__name__}")
    found = []
    for number, entry in content.items():
        place = f"{path}: question {brief(number)}"
        (image,) = fields(entry, ("imageId",), place, _FORM)
        found.append(_question(number, entry, place, str(pictures.find(f"{text_of(image, 'imageId', place)}.jpg", place))))
    return checked("gqa", found, path, pictures, SHORT, split)


TASK = QuestionTask(
    name="gqa",
    read=_read,
    scores={
        "exact_match": lambda said, q: float(without_marks(said) == without_marks(q.target)),
        "exact_match_vlmeval": lambda said, q: float(said.strip().lower() == q.target.strip().lower()),
        "exact_match_official": lambda said, q: float(for_gqa(said) == q.target),
    },
    primary="exact_match",
    correct="exact_match",
    columns={"exact": "exact_match"},
    write=write_answers("questionId", "prediction", for_gqa),
    hub=Hub(
        "lmms-lab-encoder/GQA",
        "testdev_balanced_instructions",
        "testdev",
        lambda row, place, image, split: _question(row.get("id", place), row, place, image),
        SHORT,
        images="testdev_balanced_images",
        image_id="imageId",
    ),
)
