"""OCRBench (Liu et al., 2023): 1,000 questions about text in images, of ten types.

Files: `OCRBench.json`, `[{"dataset_name", "id", "image_path", "question", "answers", "type"}]`, and the images. An answer
is right if it holds one of the reference answers, without case and with new lines as spaces; of handwritten formulas
(HME100k) with case and without any spaces. Papers print the number of right answers of all 1,000: `accuracy` times 1,000.
lmms-eval also reads full-width letters, digits and marks as the usual ones; `accuracy_official` is that of the authors'
program, which does not.
"""

from __future__ import annotations

from typing import Any

from vtok.errors import brief
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import Pictures, entries, fields, group_of, load_json, located, text_of, texts_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources

_FORM = '[{"dataset_name", "image_path", "question", "answers", "type"}, ...]'
_HUB_FORM = '{"dataset", "question", "answer", "question_type"}'
_FORMULAS = "HME100k"
# "！" to "～" and the ideographic space -> "!" to "~" and the space
_USUAL = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


def holds(said: str, answers: tuple[str, ...], formula: bool, wide: bool = True) -> float:
    """Whether an answer holds one of the reference answers.

    Args:
        said: by the model.
        answers: reference answers.
        formula: whether case counts and spaces do not.
        wide: whether full-width characters are read as the usual ones.
    """

    def compared(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return (text.translate(_USUAL) if wide else text).lower().strip().replace("\n", " ")

    return float(any(compared(answer) in compared(said.strip()) for answer in answers))


def _question(number: Any, source: str, text: Any, answers: Any, kind: Any, place: str, image: Any) -> Question:
    said = (answers,) if isinstance(answers, str) else texts_of(answers, "'answers'", place)
    groups = {"type": group_of({"type": kind}, "type", place)}
    return Question(number, text_of(text, "'question'", place).strip(), said, image, groups, {"formula": source == _FORMULAS})


def _read(sources: Sources) -> VQAData:
    path = located(sources, "OCRBench.json")
    pictures, found = Pictures.of(sources), []
    for i, entry in enumerate(entries(load_json(path, _FORM), None, path, _FORM)):
        place = f"{path}: entry {i}"
        names = ("dataset_name", "image_path", "question", "answers", "type")
        source, image, text, answers, kind = fields(entry, names, place, _FORM)
        source = text_of(source, "'dataset_name'", place)
        file = str(pictures.find(text_of(image, "'image_path'", place), place))
        # its numbers are those of the data sets that it is made of
        found.append(_question(f"{i}/{brief(source)}", source, text, answers, kind, place, file))
    return checked("ocrbench", found, path, pictures, "", "test")


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    source, text, answers, kind = fields(row, ("dataset", "question", "answer", "question_type"), place, _HUB_FORM)
    return _question(f"{place.rpartition(' ')[2]}/{brief(source)}", source, text, answers, kind, place, image)


TASK = QuestionTask(
    name="ocrbench",
    read=_read,
    scores={
        "accuracy": lambda said, q: holds(said, q.answers, q.facts["formula"]),
        "accuracy_official": lambda said, q: holds(said, q.answers, q.facts["formula"], wide=False),
    },
    primary="accuracy",
    correct="accuracy",
    columns={"accuracy": "accuracy"},
    max_new_tokens=128,
    hub=Hub("echo840/OCRBench", None, "test", _from_row, ""),
)
