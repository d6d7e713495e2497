"""MME (Fu et al., 2023): two questions about every image, one to be answered yes, one no, in 14 categories.

The metrics are in points: of a category 100 * accuracy + 100 * accuracy+ (images with both answers right); perception is the
sum over its 10 categories (2000 at most), cognition over its 4 (800), the total both. Papers quote either.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, shown
from vtok.eval.common.pictures import find_files, find_pictures
from vtok.eval.tasks.vqa.sources.reading import yes_no
from vtok.eval.tasks.vqa.task import SHORT, Hub, Pictures, Question, QuestionTask, Row, Rows, Sources, VQAData
from vtok.eval.tasks.vqa.totals import Total, ratio
from vtok.writing import write

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)
ASKED_FOR = " Please answer yes or no."  # stands in the files, and goes where SHORT is put behind
_FORM = "two lines QUESTION<TAB>Yes|No"
_HUB_FORM = '{"question_id", "category", "question", "answer"}'


def parse_mme(text: str) -> str:
    """ "yes", "no" or "other": the answer without periods, else the word within its first four characters; y and n count."""
    said = text.lower().strip().replace(".", "")
    if said in ("yes", "y"):
        return "yes"
    if said in ("no", "n"):
        return "no"
    if len(said) == 1:
        return "other"
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def _right(said: str, q: Question) -> float:
    return float(parse_mme(said) == q.target)


def _parts(answers: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """[n, 14 * 4] of every category: right answers, answers, images with both right, images (these at an image's first row)."""
    parts = np.zeros((len(questions), len(CATEGORIES), 4))
    pairs: dict[Any, list[int]] = defaultdict(list)
    for i, (said, q) in enumerate(zip(answers, questions)):
        parts[i, CATEGORIES.index(q.groups["category"]), :2] = _right(said, q), 1
        pairs[q.image].append(i)
    for rows in pairs.values():
        category = CATEGORIES.index(questions[rows[0]].groups["category"])
        parts[rows[0], category, 2:] = parts[rows, category, 0].sum() == 2, 1
    return parts.reshape(len(questions), -1)


def _points(first: int, last: int) -> Callable[[np.ndarray], np.ndarray]:
    """Sum of the scores of some categories; one that is not there adds nothing."""

    def combine(sums: np.ndarray) -> np.ndarray:
        s = sums.reshape(*sums.shape[:-1], len(CATEGORIES), 4)[..., first:last, :]
        points = 100 * (ratio(s[..., 0], s[..., 1]) + ratio(s[..., 2], s[..., 3]))
        return np.where(s[..., 1].sum(-1) > 0, points.sum(-1), np.nan)

    return combine


def _accuracy_plus(sums: np.ndarray) -> np.ndarray:
    s = sums.reshape(*sums.shape[:-1], len(CATEGORIES), 4).sum(-2)
    return 100 * ratio(s[..., 2], s[..., 3])


def _question(row: Row) -> Question:
    number, category, _, answer = row.need("question_id", "category", "question", "answer")
    if category not in CATEGORIES:
        raise ConfigError(f"{row.place}: {shown(category)} is none of MME's categories: {', '.join(CATEGORIES)}")
    said, line = yes_no(answer, row.place), row.text("question").strip()
    file = row.get("file")  # of the folders, whose numbers are those of questions; those of rows are of images
    key, file = (number, file) if file else (f"{number}/{said}", str(number).rpartition("/")[2])
    facts = {"line": line, "file": file}
    return Question(key, line.replace(ASKED_FOR, ""), (said,), row.image, {"category": category}, facts)


def _read(sources: Sources) -> Rows:
    root = sources.folder
    present = [category for category in CATEGORIES if (root / category).is_dir()]
    if not present:
        raise ConfigError(f"{root} has none of MME's folders ({', '.join(CATEGORIES)}); name the folder that holds them")
    return Rows((row for category in present for row in _rows(root / category)), root, Pictures(root), "test")


def _rows(folder: Path) -> Iterator[Row]:
    files, texts = _by_stem(folder), find_files(folder, "*.txt")
    if not texts:
        raise ConfigError(f"{folder} holds no text file with questions; expected one an image, of {_FORM}")
    for path in texts:
        if path.stem not in files:
            raise ConfigError(f"{path}: the image {path.stem} (.jpg, .png) is missing from {folder}")
        yield from _pair(path, folder.name, files[path.stem])


def _by_stem(folder: Path) -> dict[str, Path]:
    """Name without its ending -> image, at any depth."""
    found: dict[str, Path] = {}
    for path in find_pictures(folder):
        if found.setdefault(path.stem, path) is not path:
            raise ConfigError(f"{folder}: the image {path.stem} may be {found[path.stem]} or {path}; leave one of them")
    return found


def _pair(path: Path, category: str, image: Path) -> Iterator[Row]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    if len(lines) != 2 or any(line.count("\t") != 1 for line in lines):
        raise ConfigError(f"{path} must hold {_FORM}, found {len(lines)} lines: {' | '.join(lines)[:80]!r}")
    for i, (text, _, answer) in enumerate((line.partition("\t") for line in lines), 1):
        number = f"{category}/{image.name}/{i}"
        fields = {"question_id": number, "category": category, "question": text, "answer": answer, "file": image.name}
        yield Row(fields, f"{path}:{i}", _FORM, i, str(image))


def _paired(data: VQAData, place: str) -> VQAData:
    """The data, taken by whole images from now on, if every image is asked about twice."""
    wrong = [(image, count) for image, count in Counter(q.image for q in data.questions).items() if count != 2]
    if wrong:
        raise ConfigError(f"{place}: the image {wrong[0][0]} has {wrong[0][1]} questions; MME asks two about every image")
    return replace(data, whole=True)


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """A folder of files as MME's own program reads them: `image<TAB>question<TAB>answer<TAB>prediction` a line."""
    lines: dict[str, list[str]] = defaultdict(list)
    for q, said in zip(questions, answers):
        cells = (q.facts["file"], q.facts["line"], q.target.capitalize(), " ".join(said.split()))
        lines[q.groups["category"]].append("\t".join(cells))
    for category, rows in lines.items():
        write(folder / name / f"{category}.txt", "\n".join(rows) + "\n")


TASK = QuestionTask(
    name="mme",
    read=_read,
    question=_question,
    prompt=SHORT,
    check=_paired,
    scores={"accuracy": _right},
    totals={
        "total": Total(_parts, _points(0, len(CATEGORIES)), "category"),
        "perception": Total(_parts, _points(0, len(PERCEPTION)), "category"),
        "cognition": Total(_parts, _points(len(PERCEPTION), len(CATEGORIES)), "category"),
        "accuracy_plus": Total(_parts, _accuracy_plus, "category"),
    },
    primary="total",
    correct="accuracy",
    columns={"total": "total", "perception": "perception", "cognition": "cognition"},
    percent=True,
    write=_write,
    hub=Hub("lmms-lab-encoder/MME", None, "test", _HUB_FORM, same_image="question_id"),
)
