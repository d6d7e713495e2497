"""What a task of questions about images is: how its files are read, how answers are scored, which figure is the headline.

A task is one file with a `QuestionTask` and one line in `QUESTION_TASKS`, `eval/tasks/__init__.py`. Everything else (asking,
records, paired differences, standard errors, tables, result files) follows from what it declares.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vtok.eval.common.checked import Count, DType, Seed, check_fields
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.hub import Hub, is_dataset, read
from vtok.eval.tasks.vqa.sources import Score, Sources, Write
from vtok.eval.tasks.vqa.totals import Total

__all__ = ["QuestionTask", "Score", "Sources", "VQAOptions"]


@dataclass(frozen=True)
class VQAOptions:
    """Flags of visual question answering.

    Attributes:
        task: whose files, prompts and scores: "vqa" (the bundled questions, lines of JSON, VQAv2's files), "chartqa", "docvqa",
            "gqa", "mmbench", "mme", "mmmu", "mvbench", "ocrbench", "pope", "refcoco", "scienceqa", "scienceqa_img",
            "seedbench", "textvqa", "videomme", "vizwiz" or "vqav2".
        questions: file with the questions; "" = find it in the folder of the data.
        annotations: file with VQAv2's annotations; "" = find it.
        images: folder of the images, or of the videos; "" = the folder of the data.
        ocr: file with TextVQA's OCR tokens, which are then put into the prompt; "" = no tokens in the prompt.
        split: part of the data; "" = the one that the task is quoted on. Of test splits whose answers are kept secret (vqav2,
            textvqa, docvqa, vizwiz) the files for the evaluation server are written, and agreement is measured.
        results: file with answers of another program, `[{"question_id", "answer"}]`, scored as one more record.
        prompt: text behind every question; `None` = what the task brings (VQAv2: "Answer the question using a single word or
            phrase." on a line of its own; easy-VQA: nothing).
        max_new_tokens: length of an answer at most; `None` = the task's, 16 for most.
        num_samples: questions to ask, one of each of so many equal stretches; `None` = all.
        frames: of a video that the model is shown, at equal distances.
        frames_as_images: whether frames are shown as so many images: to models that read no videos.
        shrink: factor that the sides of every picture are divided by before the processor sees it (VTC-Bench: 2, 3, 4, 5, 10).
            Of models of native resolution (Qwen-VL) about its square fewer tokens are left; others make it large again.
        batch_size: questions in a batch.
        baselines: also random and uniform, which keep before the LLM the share of visual tokens that each setting keeps on
            average over the decoder layers.
        floors: deprecated name of `baselines`.
        device: `None` = the GPU if there is one.
        model_dtype: "float32", "bfloat16" or "float16"; `None` = the model's own.
        seed: of methods that draw, and of the bootstrap.
        output: folder of `samples.jsonl`, `results.jsonl` and a file of answers a setting; a second run goes on where the first
            was stopped. "" = none.
    """

    task: str = "vqa"
    questions: str = ""
    annotations: str = ""
    images: str = ""
    ocr: str = ""
    split: str = ""
    results: str = ""
    prompt: str | None = None
    max_new_tokens: Count | None = None
    num_samples: Count | None = None
    frames: Count = 16
    frames_as_images: bool = False
    shrink: Count = 1
    batch_size: Count = 16
    baselines: bool = False
    device: str | None = None
    model_dtype: DType | None = None
    seed: Seed = 0
    output: str = ""
    floors: bool = False

    def __post_init__(self) -> None:
        if self.floors is True:
            warnings.warn("`floors` is called `baselines` now", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "baselines", True)
        check_fields(self)


@dataclass(frozen=True)
class QuestionTask:
    """A set of questions, its scores and its files.

    Attributes:
        name: under which it is registered.
        read: files -> questions; raises `ConfigError` naming the file, the question and what is expected.
        scores: name -> (answer, question) -> score of one question in [0, 1]; not a number = does not count. A record has
            their means.
        primary: name of the headline metric, one of `scores` or `totals`.
        correct: name of the score that makes an answer right, from 0.5 on.
        sample: name of the score that every sample shows first; "" = that of `correct`.
        totals: name -> metric of the whole set that is no mean over questions.
        columns: metrics that the printed table shows, its heading -> name; the others stand below it.
        max_new_tokens: length of an answer at most, as lmms-eval has it.
        percent: whether metrics are in percent (or sums of percentages) instead of shares.
        write: (folder, name without ending, questions, answers) -> files in the public format; `None` = there is none.
        hub: where the rows of the `datasets` library are; `None` = files alone.
    """

    name: str
    read: Callable[[Sources], VQAData]
    scores: Mapping[str, Score]
    primary: str
    correct: str
    sample: str = ""
    totals: Mapping[str, Total] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 16
    percent: bool = False
    write: Write | None = None
    hub: Hub | None = None

    @property
    def scale(self) -> float:
        """What shares are multiplied by in metrics."""
        return 100.0 if self.percent else 1.0

    def open(self, sources: Sources) -> VQAData:
        """Questions from files, or from a data set that the `datasets` library reads.

        Raises:
            ConfigError: the data is not there or not of the form.
            MissingExtraError: `datasets` is needed and not installed.
        """
        if self.hub is not None and is_dataset(sources.data):
            return read(self.name, self.hub, sources)
        return self.read(sources)

    def score_all(self, answer: str, question: Question) -> dict[str, float | None]:
        """Every score of one answer; `None` where it does not count."""
        found = {name: self.score_one(name, answer, question) for name in self.scores}
        return {name: value if value == value else None for name, value in found.items()}

    def score_one(self, name: str, answer: str, question: Question) -> float:
        """One score; not a number where it does not count, as nothing does for questions whose answers are not published."""
        return float(self.scores[name](answer, question)) if question.answers else float("nan")
