"""Video-MME (Fu et al., CVPR 2025) without subtitles: questions with four choices about videos of up to an hour."""

from __future__ import annotations

from vtok.errors import ConfigError
from vtok.eval.tasks.vqa.task import Hub, Question, QuestionTask, Row, Rows, Sources
from vtok.eval.tasks.vqa_choice.letters import BY_LETTER, letter_of, one_of_four

TOLD = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond with only "
    "the letter (A, B, C, or D) of the correct option.\n"
)
_FORM = '{"videoID", "question_id", "question", "options", "answer", "duration", "domain", "task_type"}'


def _question(row: Row) -> Question:
    row.need("question_id", "question", "options", "answer")
    told = "\n".join(row.texts("options"))  # with their letters
    groups = {name: row.group(name) for name in ("duration", "domain", "task_type")}
    answers = (one_of_four(row),)
    return Question(row.get("question_id"), f"{TOLD}{row.text('question')}\n{told}\n", answers, row.image, groups)


def _read(sources: Sources) -> Rows:
    raise ConfigError(
        "Video-MME's questions are rows of the datasets library: pass hub, or the folder with its parquet file and its videos, "
        f"not {sources.data}"
    )


TASK = QuestionTask(
    name="videomme",
    read=_read,
    question=_question,
    prompt=BY_LETTER,
    scores={"accuracy": lambda said, q: float(letter_of(said) == q.target)},
    columns={"accuracy": "accuracy"},
    hub=Hub("lmms-eval/Video-MME", "videomme", "test", _FORM, video="videoID"),
)
