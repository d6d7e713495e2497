"""OCRBench (Liu et al., 2023): 1,000 questions about text in images; an answer is right if it holds a reference answer.

lmms-eval reads full-width characters as the usual ones; the authors' program (`accuracy_official`) does not.
"""

from __future__ import annotations

from vtok.errors import brief
from vtok.eval.tasks.vqa.task import Files, Hub, Question, QuestionTask, Row

_FORM = '[{"dataset_name", "image_path", "question", "answers", "type"}, ...]'
_HUB_FORM = '{"dataset", "question", "answer", "question_type"}'
_NAMES = {"dataset": "dataset_name", "answer": "answers", "question_type": "type"}
_FORMULAS = "HME100k"
# "！" to "～" and the ideographic space -> "!" to "~" and the space
_USUAL = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


def holds(said: str, answers: tuple[str, ...], formula: bool, wide: bool = True) -> float:
    """Whether an answer holds a reference answer, of a `formula` with case and without spaces; `wide`: full width is none."""

    def compared(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return (text.translate(_USUAL) if wide else text).lower().strip().replace("\n", " ")

    return float(any(compared(answer) in compared(said.strip()) for answer in answers))


def _question(row: Row) -> Question:
    source, _, answers, _ = row.need("dataset", "question", "answer", "question_type")
    said = (answers,) if isinstance(answers, str) else row.texts("answer")
    number = f"{row.number}/{brief(row.text('dataset'))}"  # its own numbers are those of the data sets that it is made of
    facts = {"formula": source == _FORMULAS}
    return Question(number, row.text("question").strip(), said, row.image, {"type": row.text("question_type")}, facts)


TASK = QuestionTask(
    name="ocrbench",
    read=Files("OCRBench.json", _FORM, "test", image="image_path", names=_NAMES),
    question=_question,
    scores={
        "accuracy": lambda said, q: holds(said, q.answers, q.facts["formula"]),
        "accuracy_official": lambda said, q: holds(said, q.answers, q.facts["formula"], wide=False),
    },
    columns={"accuracy": "accuracy"},
    max_new_tokens=128,
    hub=Hub("echo840/OCRBench", None, "test", _HUB_FORM),
)
