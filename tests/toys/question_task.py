"""A toy set of questions: lines `picture|question|answer` in a file, right if the answer begins with the same letter."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vtok.errors import ConfigError
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.task import QuestionTask, Sources


def _read(sources: Sources) -> VQAData:
    file = sources.folder / "questions.txt"
    if not file.is_file():
        raise ConfigError(f"{sources.data} has no questions.txt; name a folder that has")

    def picture(name: Any) -> Image.Image:
        return Image.open(sources.folder / name).convert("RGB")

    rows = [line.split("|") for line in file.read_text(encoding="utf-8").splitlines()]
    return VQAData("toy", [Question(i, text, (said,), name, {}) for i, (name, text, said) in enumerate(rows)], picture)


TASK = QuestionTask(
    name="toy",
    read=_read,
    scores={"first_letter": lambda said, question: float(said[:1] == question.target[:1])},
    primary="first_letter",
    correct="first_letter",
)
