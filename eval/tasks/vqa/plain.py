"""Questions of any origin: the bundled ones of easy-VQA, lines of JSON, VQAv2's files. The task `vqa` without `--task`."""

from __future__ import annotations

from vtok.eval.tasks.vqa.metrics import exact_match, soft_accuracy
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.tasks.vqa.task import QuestionTask, write_answers

TASK = QuestionTask(
    name="vqa",
    read=lambda sources: open_vqa(sources.data, sources.questions, sources.annotations, sources.images),
    scores={
        "exact_match": lambda said, q: float(exact_match(said, q.target)),
        "soft_accuracy": lambda said, q: soft_accuracy(said, q.answers),
        "soft_accuracy_official": lambda said, q: soft_accuracy(said, q.answers, "official"),
    },
    sample="soft_accuracy",
    columns={"exact": "exact_match", "soft": "soft_accuracy"},
    write=write_answers(),
)
