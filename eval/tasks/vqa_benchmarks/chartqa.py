"""ChartQA (Masry et al., Findings of ACL 2022): questions about charts, written by people or made by a program, 1,250 each.

Files: `test_human.json` and `test_augmented.json`, lists of `{"imgname", "query", "label"}`, and the images, `png/`. A
number is right within 5 % of the target, a text if it is equal without case (relaxed accuracy). A percent sign divides by
100; a target of 0 has no 5 %, so that it is compared as a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtok.errors import ConfigError
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import Pictures, entries, fields, load_json, text_of
from vtok.eval.tasks.vqa.task import QuestionTask, Score, Sources

ONE_WORD = "\nAnswer the question with a single word."
PARTS = ("human", "augmented")
TOLERANCE = 0.05
_FORM = '[{"imgname", "query", "label"}, ...]'
_HUB_FORM = '{"type", "question", "answer"}'


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


def _read(sources: Sources) -> VQAData:
    split, found = sources.split or "test", []
    one = sources.questions or (sources.data if sources.folder.is_file() else "")
    if one:
        files = {next((part for part in PARTS if part in Path(one).stem), "human"): Path(one)}
    else:
        files = {part: _only(sources.folder, f"{split}_{part}.json") for part in PARTS}
    for part, path in files.items():
        beside = path.parent / "png"
        home = Path(sources.images) if sources.images else beside if beside.is_dir() else path.parent
        pictures = Pictures(home, bool(sources.images))
        for i, entry in enumerate(entries(load_json(path, _FORM), None, path, _FORM)):
            place = f"{path}: entry {i}"
            image, text, label = fields(entry, ("imgname", "query", "label"), place, _FORM)
            file = str(pictures.find(text_of(image, "'imgname'", place), place))
            asked, answer = text_of(text, "'query'", place), text_of(label, "'label'", place)
            found.append(Question(f"{part}/{i}", asked, (answer,), file, {"part": part}))
    return checked("chartqa", found, next(iter(files.values())), pictures, ONE_WORD, split)


def _only(folder: Path, name: str) -> Path:
    found = find_files(folder, name)
    if len(found) != 1:
        raise ConfigError(f"{folder} holds {len(found)} files {name}; ChartQA has one of each of {' and '.join(PARTS)}")
    return found[0]


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    kind, text, answer = fields(row, ("type", "question", "answer"), place, _HUB_FORM)
    part = PARTS[0] if str(kind).startswith("human") else PARTS[1]
    number = place.rpartition(" ")[2]
    said = text_of(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer, "'answer'", place)
    return Question(f"{part}/{number}", text_of(text, "'question'", place), (said,), image, {"part": part})


TASK = QuestionTask(
    name="chartqa",
    read=_read,
    scores={
        "relaxed_overall": lambda said, q: relaxed(said, q.target),
        "relaxed_human_split": _part("human"),
        "relaxed_augmented_split": _part("augmented"),
    },
    primary="relaxed_overall",
    correct="relaxed_overall",
    columns={"relaxed": "relaxed_overall", "human": "relaxed_human_split", "augmented": "relaxed_augmented_split"},
    hub=Hub("lmms-lab-encoder/ChartQA", None, "test", _from_row, ONE_WORD),
)
