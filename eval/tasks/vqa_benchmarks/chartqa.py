"""ChartQA (Masry et al., Findings of ACL 2022): a number is right within 5 % of the target (relaxed accuracy), as in lmms-eval.

A percent sign divides by 100; a target of 0 has no 5 %, so that it is compared as a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vtok.errors import ConfigError
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.task import Files, Hub, Pictures, Question, QuestionTask, Row, Rows, Score, Sources

ONE_WORD = "\nAnswer the question with a single word."
PARTS = ("human", "augmented")
TOLERANCE = 0.05
_NAMES = {"question": "query", "answer": "label"}
_FILE = Files("", '[{"imgname", "query", "label"}, ...]', image="imgname", names=_NAMES)


def number_of(text: str) -> float | None:
    """The number that a text is, a hundredth of it before a percent sign; `None` if it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(prediction: str, target: str) -> float:
    """1.0 if an answer is right, else 0.0."""
    said, wanted = number_of(prediction), number_of(target)
    if said is not None and wanted:
        return float(abs(said - wanted) / abs(wanted) <= TOLERANCE)
    return float(prediction.lower() == target.lower())


def _part(part: str) -> Score:
    """The score of a part of the questions; the others do not count."""
    return lambda said, q: relaxed(said, q.target) if q.groups["part"] == part else float("nan")


def _read(sources: Sources) -> Rows:
    split = sources.split or "test"
    if sources.one_file:
        one = Path(sources.one_file)
        files = {next((part for part in PARTS if part in one.stem), "human"): one}
    else:
        files = {part: _only(sources.folder, f"{split}_{part}.json") for part in PARTS}

    def rows() -> Iterator[Row]:
        for part, path in files.items():
            beside = path.parent / "png"
            home = Path(sources.images) if sources.images else beside if beside.is_dir() else path.parent
            yield from _FILE.rows(path, Pictures(home, bool(sources.images)), part=part)

    return Rows(rows(), next(iter(files.values())), Pictures.of(sources), split)


def _only(folder: Path, name: str) -> Path:
    found = find_files(folder, name)
    if len(found) != 1:
        raise ConfigError(f"{folder} holds {len(found)} files {name}; ChartQA has one of each of {' and '.join(PARTS)}")
    return found[0]


def _question(row: Row) -> Question:
    part, answer = row.part or PARTS[not row.text("type").startswith("human")], row.get("answer")
    listed = not row.part and isinstance(answer, list) and len(answer) == 1  # as rows of the datasets library may have it
    said = row.texts("answer")[0] if listed else row.text("answer")
    return Question(f"{part}/{row.number}", row.text("question"), (said,), row.image, {"part": part})


TASK = QuestionTask(
    name="chartqa",
    read=_read,
    question=_question,
    prompt=ONE_WORD,
    scores={
        "relaxed_overall": lambda said, q: relaxed(said, q.target),
        "relaxed_human_split": _part("human"),
        "relaxed_augmented_split": _part("augmented"),
    },
    columns={"relaxed": "relaxed_overall", "human": "relaxed_human_split", "augmented": "relaxed_augmented_split"},
    hub=Hub("lmms-lab-encoder/ChartQA", None, "test", '{"type", "question", "answer"}'),
)
