"""Evaluation tasks by name. An entry is a function `(model, data_dir, settings, options) -> records`, one record a setting.

Other packages add theirs through the entry-point groups `vtok.tasks` and `vtok.question_tasks`.
"""

from __future__ import annotations

from typing import Any

from vtok.registry import Registry

# questions about images: each file declares a `QuestionTask`, see `eval/tasks/vqa_task.py`; `vtok eval vqa --task NAME`
_QUESTIONS = {
    "chartqa": "vtok.eval.tasks.vqa_chartqa:TASK",
    "docvqa": "vtok.eval.tasks.vqa_docvqa:TASK",
    "gqa": "vtok.eval.tasks.vqa_gqa:TASK",
    "mme": "vtok.eval.tasks.vqa_mme:TASK",
    "pope": "vtok.eval.tasks.vqa_pope:TASK",
    "scienceqa": "vtok.eval.tasks.vqa_scienceqa:TASK",
    "scienceqa_img": "vtok.eval.tasks.vqa_scienceqa:TASK_IMG",
    "textvqa": "vtok.eval.tasks.vqa_textvqa:TASK",
    "vqa": "vtok.eval.tasks.vqa_plain:TASK",
    "vqav2": "vtok.eval.tasks.vqa_v2:TASK",
}
QUESTION_TASKS: Registry[Any] = Registry("question task", _QUESTIONS, group="vtok.question_tasks")
TASKS: Registry[Any] = Registry(
    "task",
    {
        **{name: f"{entry}.evaluate" for name, entry in _QUESTIONS.items()},
        "imagenet": "vtok.eval.tasks.imagenet:evaluate",
        "retrieval": "vtok.eval.tasks.retrieval:evaluate",
        "vqa": "vtok.eval.tasks.vqa:evaluate",
        "zeroshot": "vtok.eval.tasks.zeroshot:evaluate",
    },
    group="vtok.tasks",
)
# what records of a task call it, where that is clip_benchmark's name -> the task
RECORDED = {"zeroshot_classification": "zeroshot", "zeroshot_retrieval": "retrieval"}
