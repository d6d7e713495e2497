"""Video-MME (Fu et al., CVPR 2025) without subtitles: 2,700 questions with four choices about 900 videos of up to an hour.

Rows of the `datasets` library, `videomme/test-*.parquet` of the public distribution, and beside them the videos,
`VIDEOID.mp4` (or .MP4, .mkv); with `--data hub` their folder is `--images`. `--frames` says how many frames are shown, at
equal distances (lmms-eval leaves it to the model, papers print 8 to 768). An answer is read by `letter_of`, as lmms-eval
does.
"""

from __future__ import annotations

from typing import Any

from vtok.errors import ConfigError, shown
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import fields, group_of, text_of, texts_of
from vtok.eval.tasks.vqa.task import QuestionTask, Sources
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, letter_of

TOLD = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond with only "
    "the letter (A, B, C, or D) of the correct option.\n"
)
_FORM = '{"videoID", "question_id", "question", "options", "answer", "duration", "domain", "task_type"}'


def _video(row: Any) -> str:
    """Name of a row's video, without its ending."""
    (name,) = fields(row, ("videoID",), "a row", _FORM)
    return text_of(name, "'videoID'", "a row")


def _from_row(row: Any, place: str, video: Any, split: str) -> Question:
    number, text, options, answer = fields(row, ("question_id", "question", "options", "answer"), place, _FORM)
    if answer not in ("A", "B", "C", "D"):
        raise ConfigError(f"{place}: 'answer' must be A, B, C or D, found {shown(answer)}")
    told = "\n".join(texts_of(options, "'options'", place))  # with their letters
    groups = {name: group_of(row, name, place) for name in ("duration", "domain", "task_type")}
    return Question(number, f"{TOLD}{text_of(text, repr('question'), place)}\n{told}\n", (answer,), video, groups)


def _read(sources: Sources) -> VQAData:
    raise ConfigError(
        "Video-MME's questions are rows of the datasets library: pass hub, or the folder with its parquet file and its videos, "
        f"not {sources.data}"
    )


TASK = QuestionTask(
    name="videomme",
    read=_read,
    scores={"accuracy": lambda said, q: float(letter_of(said) == q.target)},
    primary="accuracy",
    correct="accuracy",
    columns={"accuracy": "accuracy"},
    hub=Hub("lmms-eval/Video-MME", "videomme", "test", _from_row, BY_LETTER, video=_video),
)
