"""MVBench (Li et al., CVPR 2024): 4,000 questions with choices about short videos, 200 of each of 20 kinds.

The letter is read as lmms-eval does: in front of a period at the beginning of an answer, else the first lone one from A to E in
either case. An empty answer does not count (in `accuracy_all` it is wrong).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, shown
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.metrics import without_punctuation
from vtok.eval.tasks.vqa.task import Files, Question, QuestionTask, Row, Rows, Sources
from vtok.eval.tasks.vqa.totals import Total, ratio
from vtok.eval.tasks.vqa_choice.letters import listed
from vtok.eval.tasks.vqa_video.videos import Span, Videos

# kind -> where its videos lie; names differ between revisions of the data, so that a file is looked for at any depth below
FOLDERS = {
    "action_antonym": "ssv2",
    "action_count": "perception",
    "action_localization": "sta",
    "action_prediction": "star",
    "action_sequence": "star",
    "character_order": "perception",
    "counterfactual_inference": "clevrer",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa",
    "fine_grained_action": "Moments_in_Time_Raw",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer",
    "moving_count": "clevrer",
    "moving_direction": "clevrer",
    "object_existence": "clevrer",
    "object_interaction": "star",
    "object_shuffle": "perception",
    "scene_transition": "scene_qa",
    "state_change": "perception",
    "unexpected_action": "FunQA_test",
}
KINDS = tuple(sorted(FOLDERS))
BEST = "Only give the best option.\n"
_FILE = Files("", '[{"video", "question", "candidates", "answer"}, ...]', image="video")
_CUT = "segment"
_FIRST = re.compile(r"([A-E])\.\s*.+", re.IGNORECASE)
_LONE = re.compile(r"\b([A-E])\b", re.IGNORECASE)


def read_letter(said: str) -> str:
    """The letter that an answer means, "" if it names none."""
    if found := _FIRST.fullmatch(said.strip()):
        return found.group(1).upper()
    text = without_punctuation(said.replace("\n", " ").replace("\t", " ").strip(), "official")
    found = _LONE.search(text)
    return found.group(1).upper() if found else ""


def _score(said: str, q: Question) -> float:
    return float(read_letter(said) == q.target) if said else float("nan")


def _parts(answers: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """[n, 20 * 2] of every kind: right answers, answers that count."""
    parts = np.zeros((len(questions), len(KINDS), 2))
    for i, (said, q) in enumerate(zip(answers, questions)):
        if said:
            parts[i, KINDS.index(q.groups["kind"])] = _score(said, q), 1
    return parts.reshape(len(questions), -1)


def _average(sums: np.ndarray) -> np.ndarray:
    """Mean over the kinds that are there."""
    s = sums.reshape(*sums.shape[:-1], len(KINDS), 2)
    return ratio(ratio(s[..., 0], s[..., 1]).sum(-1), (s[..., 1] > 0).sum(-1), np.nan)


def _question(row: Row) -> Question:
    options, wanted = row.texts("candidates"), row.text("answer")
    if wanted not in options:
        raise ConfigError(f"{row.place}: 'answer' must be one of its candidates {shown(list(options))}, found {shown(wanted)}")
    asked = f"Question:{row.text('question')}\nOption:\n{listed(options, '({}) {}')}\n"
    letter = chr(ord("A") + options.index(wanted))
    return Question(f"{row.part}/{row.number}", asked, (letter,), _seconds(row), {"kind": row.part})


def _seconds(row: Row) -> Any:
    """The video, or the part of it that a question is about."""
    start, end = row.get("start"), row.get("end")
    if start is None or end is None or Path(row.image).parent.name.endswith(_CUT):
        return row.image
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (start, end))
    if not numbers or not 0 <= start < end:
        raise ConfigError(f"{row.place}: 'start' and 'end' must be rising seconds, found {shown(start)} and {shown(end)}")
    return Span(row.image, float(start), float(end))


class _OfKind(Videos):
    """Videos, of which folders that hold frames count too."""

    def _by_name(self, name: str) -> list[Path]:
        folders = [path for path in find_files(self.folder, name) if path.is_dir()]
        return folders or super()._by_name(name)


def _read(sources: Sources) -> Rows:
    root, chosen = sources.folder, sources.split
    files = [path for path in find_files(root, "*.json") if path.stem in FOLDERS and chosen in ("", path.stem)]
    if not files:
        wanted = chosen or "KIND"
        raise ConfigError(f"{root} holds no file {wanted}.json, where KIND is one of {', '.join(KINDS)}; name MVBench's folder")

    def rows() -> Iterator[Row]:
        within: dict[str, Videos] = {}
        for path in files:
            folder = FOLDERS[path.stem]
            if folder not in within:
                own = _own_folder(sources.image_folder, folder) or sources.image_folder
                within[folder] = _OfKind(own, bool(sources.images), sources.frames)
            yield from _FILE.rows(path, within[folder], part=path.stem)

    videos = Videos.of(sources)
    return Rows(rows(), root, videos, chosen or "train", videos.title("mvbench"))


def _own_folder(root: Path, name: str) -> Path | None:
    """The folder of a kind's videos, the one that lies highest; `None` = there is none of that name."""
    held = [path for path in find_files(root, f"{name}*") if path.is_dir()]
    return min(held, key=lambda path: (len(path.parts), len(path.name)), default=None)


TASK = QuestionTask(
    name="mvbench",
    read=_read,
    question=_question,
    prompt=BEST,
    scores={"accuracy": _score, "accuracy_all": lambda said, q: float(read_letter(said) == q.target)},
    totals={"average": Total(_parts, _average, "kind")},
    correct="accuracy_all",
    columns={"accuracy": "accuracy", "average": "average"},
)
