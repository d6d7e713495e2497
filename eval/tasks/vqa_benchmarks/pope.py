"""POPE (Li et al., EMNLP 2023): is there a ... in the image? Yes or no, 3,000 questions a variant.

Three programs read an answer in three ways (`PARSERS`), and count in three ways what is neither yes nor no. `yes_ratio` is the
share of answers that are yes, `yes_ratio_labels` that of labels, which lmms-eval prints as `pope_yes_ratio`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vtok.errors import ConfigError, shown
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.metrics import without_punctuation
from vtok.eval.tasks.vqa.sources.reading import yes_no
from vtok.eval.tasks.vqa.task import SHORT, Files, Hub, Pictures, Question, QuestionTask, Row, Rows, Score, Sources
from vtok.eval.tasks.vqa.totals import Total, ratio
from vtok.writing import write

VARIANTS = ("adversarial", "popular", "random")
_FILE = Files("", '{"question_id", "image", "text", "label"}', kind="lines", names={"question": "text", "answer": "label"})
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


def _says(parse: Callable[[str], str], word: str = "") -> Score:
    """Whether an answer means a word, or (without one) what is right."""
    return lambda said, q: float(parse(said) == (word or q.target))


_SCORES = {
    **{
        name: score
        for ending, (parse, _) in PARSERS.items()
        for name, score in ((f"accuracy{ending}", _says(parse)), (f"yes_ratio{ending}", _says(parse, "yes")))
    },
    "yes_ratio_labels": lambda said, q: float(q.target == "yes"),
}
_TOTALS = {
    f"{name}{ending}": Total(_counts(parse, misses), combine)
    for ending, (parse, misses) in PARSERS.items()
    for name, combine in (("f1", _f1), ("precision", _precision), ("recall", _recall))
}


def _question(row: Row) -> Question:
    variant, number = row.part or row.group("category"), row.key("question_id")
    group, text = {"variant": variant} if variant else {}, row.text("question").strip()
    answer = yes_no(row.need("answer")[0], row.place)
    return Question(f"{variant}/{number}" if variant else number, text, (answer,), row.image, group)


def _read(sources: Sources) -> Rows:
    files, pictures = _files(sources), Pictures.of(sources)
    rows = (row for variant, path in files.items() for row in _FILE.rows(path, pictures, part=variant))
    return Rows(rows, next(iter(files.values())), pictures, "+".join(filter(None, files)))


def _files(sources: Sources) -> Mapping[str, Path]:
    """Variant -> file; the variant is read off the file's name."""
    if sources.one_file:
        one = Path(sources.one_file)
        return {next((variant for variant in VARIANTS if variant in one.stem), ""): one}
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


TASK = QuestionTask(
    name="pope",
    read=_read,
    question=_question,
    prompt=SHORT,
    scores=_SCORES,
    totals=_TOTALS,
    primary="f1",
    correct="accuracy",
    columns={"F1": "f1", "accuracy": "accuracy"},
    max_new_tokens=128,
    write=_write,
    hub=Hub("lmms-lab-encoder/POPE", None, "test", _HUB_FORM, same_image="image_source"),
)
