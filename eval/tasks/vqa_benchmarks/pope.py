"""POPE (Li et al., EMNLP 2023): is there a ... in the image? Yes or no, 3,000 questions a variant.

Files: `coco_pope_adversarial.json`, `coco_pope_popular.json`, `coco_pope_random.json`, an object `{"question_id", "image",
"text", "label"}` a line, and COCO's images. Those of the three that are there are asked, each a group.

Three programs read an answer in three ways, and what is neither yes nor no is counted in three ways:

| parser | yes, no | anything else |
|---|---|---|
| lmms-eval (names without ending) | the answer is the word, without case | neither; no miss (recall) if the label is yes |
| LLaVA (`_llava`) | no if "No", "no" or "not" is a word of the first sentence | yes |
| VLMEvalKit (`_vlmeval`) | the word is in the answer and the other one is not | neither; a miss if the label is yes |

`yes_ratio` is the share of answers that are yes; `yes_ratio_labels` that of labels, which is what lmms-eval prints under the
name `pope_yes_ratio`. Papers quote F1 or accuracy: say which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, shown
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.metrics import without_punctuation
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import SHORT, Pictures, fields, group_of, load_lines, number_of, text_of, yes_no
from vtok.eval.tasks.vqa.task import QuestionTask, Score, Sources
from vtok.eval.tasks.vqa.totals import Total, ratio
from vtok.writing import write

VARIANTS = ("adversarial", "popular", "random")
_FORM = '{"question_id", "image", "text", "label"}'
_HUB_FORM = '{"question_id", "question", "answer", "category"}'


def parse_whole(text: str) -> str:
    """lmms-eval's reading: "yes", "no" or ""."""
    word = text.strip().lower()
    return word if word in ("yes", "no") else ""


def parse_llava(text: str) -> str:
    """LLaVA's reading: "yes" or "no"; "NO" is a yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_words(text: str) -> str:
    """VLMEvalKit's reading: "yes", "no" or ""."""
    words = without_punctuation(text.lower(), "vlmeval").split()
    found = {word for word in ("yes", "no") if word in words}
    return found.pop() if len(found) == 1 else ""


# ending of the metrics' names -> parser, and whether an answer that is neither misses a label yes
PARSERS: dict[str, tuple[Callable[[str], str], bool]] = {
    "": (parse_whole, False),
    "_llava": (parse_llava, True),
    "_vlmeval": (parse_words, True),
}


def _counts(parse: Callable[[str], str], misses: bool) -> Callable[[Sequence[str], Sequence[Question]], np.ndarray]:
    """[n, 3] true positives, false positives, false negatives."""

    def parts(answers: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
        said = [parse(text) for text in answers]
        rows = [
            (
                answer == "yes" == q.target,
                answer == "yes" != q.target,
                q.target == "yes" and (answer == "no" or (misses and not answer)),
            )
            for answer, q in zip(said, questions)
        ]
        return np.array(rows, float)

    return parts


def _precision(s: np.ndarray) -> np.ndarray:
    return ratio(s[..., 0], s[..., 0] + s[..., 1])


def _recall(s: np.ndarray) -> np.ndarray:
    return ratio(s[..., 0], s[..., 0] + s[..., 2])


def _f1(s: np.ndarray) -> np.ndarray:
    p, r = _precision(s), _recall(s)
    return ratio(2 * p * r, p + r)


def _scores() -> dict[str, Score]:
    found: dict[str, Score] = {}
    for ending, (parse, _) in PARSERS.items():
        found |= {f"accuracy{ending}": _right(parse), f"yes_ratio{ending}": _yes(parse)}
    return found | {"yes_ratio_labels": lambda said, q: float(q.target == "yes")}


def _right(parse: Callable[[str], str]) -> Score:
    return lambda said, q: float(parse(said) == q.target)


def _yes(parse: Callable[[str], str]) -> Score:
    return lambda said, q: float(parse(said) == "yes")


def _totals() -> dict[str, Total]:
    combines = {"f1": _f1, "precision": _precision, "recall": _recall}
    return {
        f"{name}{ending}": Total(_counts(parse, misses), combine)
        for ending, (parse, misses) in PARSERS.items()
        for name, combine in combines.items()
    }


def _read(sources: Sources) -> VQAData:
    files = _files(sources)
    pictures, found = Pictures.of(sources), []
    for variant, path in files.items():
        for place, entry in load_lines(path, _FORM):
            number, image, text, label = fields(entry, ("question_id", "image", "text", "label"), place, _FORM)
            file = str(pictures.find(text_of(image, "'image'", place), place))
            group = {"variant": variant} if variant else {}
            number_of(number, "'question_id'", place)
            key = f"{variant}/{number}" if variant else number
            found.append(Question(key, text_of(text, "'text'", place).strip(), (yes_no(label, place),), file, group))
    return checked("pope", found, next(iter(files.values())), pictures, SHORT, "+".join(filter(None, files)))


def _files(sources: Sources) -> Mapping[str, Path]:
    """Variant -> file; the variant is read off the file's name."""
    one = sources.questions or (sources.data if sources.folder.is_file() else "")
    if one:
        return {next((variant for variant in VARIANTS if variant in Path(one).stem), ""): Path(one)}
    if sources.split and sources.split not in VARIANTS:
        raise ConfigError(
            f"POPE has no split {shown(sources.split)}; one of {', '.join(VARIANTS)}, or none for all that are there"
        )
    wanted = (sources.split,) if sources.split else VARIANTS
    found = {variant: find_files(sources.folder, f"*pope_{variant}.json") for variant in wanted}
    for paths in found.values():
        if len(paths) > 1:
            raise ConfigError(f"{sources.folder} holds {paths[0].name} and {paths[1].name}; name the one to read (--questions)")
    files = {variant: paths[0] for variant, paths in found.items() if paths}
    if not files:
        raise ConfigError(f"{sources.data} holds no file coco_pope_{{{','.join(wanted)}}}.json; name its folder or one of them")
    return files


def _write(folder: Path, name: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """POPE's own form, `{"question", "answer"}` a line, one file a variant."""
    for variant in dict.fromkeys(q.groups.get("variant", "") for q in questions):
        lines = [
            json.dumps({"question": q.text, "answer": said})
            for q, said in zip(questions, answers)
            if q.groups.get("variant", "") == variant
        ]
        ending = f"-{variant}" if variant else ""
        write(folder / f"{name}{ending}.jsonl", "\n".join(lines) + "\n")


def _from_row(row: Any, place: str, image: Any, split: str) -> Question:
    number, text, label = fields(row, ("question_id", "question", "answer"), place, _HUB_FORM)
    variant = group_of(row, "category", place)
    key = f"{variant}/{number}" if variant else number
    group = {"variant": variant} if variant else {}
    return Question(key, text_of(text, "'question'", place).strip(), (yes_no(label, place),), image, group)


TASK = QuestionTask(
    name="pope",
    read=_read,
    scores=_scores(),
    totals=_totals(),
    primary="f1",
    correct="accuracy",
    columns={"F1": "f1", "accuracy": "accuracy"},
    max_new_tokens=128,
    write=_write,
    hub=Hub("lmms-lab-encoder/POPE", None, "test", _from_row, SHORT, same_image="image_source"),
)
