"""MME (Fu et al., 2023): two questions about every image, one to be answered yes, one no, in 14 categories.

Files: a folder for every category with, per image, a text file of two lines `question<TAB>Yes|No` and the image of the same
name beside it, or both in `questions_answers_YN/` and `images/`. The metrics are in points, sums of percentages:

    score of a category = 100 * accuracy + 100 * accuracy+   (accuracy+: images with both answers right)
    perception = sum over its 10 categories (2000 at most), cognition = over its 4 (800), total = both

Papers quote perception or the total without saying so: a record has both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, shown
from vtok.eval.common.pictures import find_files, find_pictures
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import SHORT, Pictures, fields, text_of, yes_no
from vtok.eval.tasks.vqa.task import QuestionTask, Sources
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


def _question(number: str, category: str, line: str, answer: str, image: Any, file: str, place: str) -> Question:
    text, facts = line.strip().replace(ASKED_FOR, ""), {"line": line.strip(), "file": file}
    return Question(number, text, (yes_no(answer, place),), image, {"category": category}, facts)


def _read(sources: Sources) -> VQAData:
    root = sources.folder
    present = [category for category in CATEGORIES if (root / category).is_dir()]
    if not present:
        raise ConfigError(f"{root} has none of MME's folders ({', '.join(CATEGORIES)}); name the folder that holds them")
    found = []
    for category in present:
        files = _by_stem(root / category)
        texts = find_files(root / category, "*.txt")
        if not texts:
            raise ConfigError(f"{root / category} holds no text file with questions; expected one an image, of {_FORM}")
        for path in texts:
            if path.stem not in files:
                raise ConfigError(f"{path}: the image {path.stem} (.jpg, .png) is missing from {root / category}")
            found += _pair(path, category, files[path.stem])
    data = checked("mme", found, root, Pictures(root), SHORT, "test")
    return _paired(data, str(root))


def _by_stem(folder: Path) -> dict[str, Path]:
    """Name without its ending -> image, at any depth.

    Raises:
        ConfigError: two images have one name.
    """
    found: dict[str, Path] = {}
    for path in find_pictures(folder):
        if found.setdefault(path.stem, path) is not path:
            raise ConfigError(f"{folder}: the image {path.stem} may be {found[path.stem]} or {path}; leave one of them")
    return found


def _pair(path: Path, category: str, image: Path) -> list[Question]:
    """The two questions of a text file."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    if len(lines) != 2 or any(line.count("\t") != 1 for line in lines):
        raise ConfigError(f"{path} must hold {_FORM}, found {len(lines)} lines: {' | '.join(lines)[:80]!r}")
    return [
        _question(f"{category}/{image.name}/{i}", category, text, answer, str(image), image.name, f"{path}:{i}")
        for i, (text, _, answer) in enumerate((line.partition("\t") for line in lines), 1)
    ]


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    number, category, text, answer = fields(row, ("question_id", "category", "question", "answer"), place, _HUB_FORM)
    if category not in CATEGORIES:
        raise ConfigError(f"{place}: {shown(category)} is none of MME's categories: {', '.join(CATEGORIES)}")
    key, file = f"{number}/{yes_no(answer, place)}", str(number).rpartition("/")[2]
    return _question(key, category, text_of(text, "'question'", place), answer, image, file, place)


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
    hub=Hub("lmms-lab-encoder/MME", None, "test", _from_row, SHORT, same_image="question_id", check=_paired),
)
