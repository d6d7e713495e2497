"""Evaluation tasks by name: functions `(model, data, settings, options, progress) -> records`, one record a setting.

The model, a name or unpatched, is left as it is; all settings see the same batches. A setting is `None` (unpatched), a method,
(method, parameters), or a `Setting`; `progress` is called with (samples done, samples). A record is described in
`vtok.eval.common.records`. Errors are `ConfigError` for data, models and options that cannot be read or do not fit together,
`UnsupportedModelError` for a method that does not work on the model, `MissingExtraError` for what is not installed.

Other packages add theirs through the entry-point groups `vtok.tasks` and `vtok.question_tasks`.
"""

from __future__ import annotations

from typing import Any

from vtok.registry import Registry

# questions about images and videos: each file has a `QuestionTask`, see `eval/tasks/vqa/task.py`; `vtok eval vqa --task NAME`
_QUESTIONS = {
    "chartqa": "vtok.eval.tasks.vqa_benchmarks.chartqa:TASK",
    "docvqa": "vtok.eval.tasks.vqa_benchmarks.docvqa:TASK",
    "gqa": "vtok.eval.tasks.vqa_benchmarks.gqa:TASK",
    "mmbench": "vtok.eval.tasks.vqa_choice.mmbench:TASK",
    "mme": "vtok.eval.tasks.vqa_benchmarks.mme:TASK",
    "mmmu": "vtok.eval.tasks.vqa_choice.mmmu:TASK",
    "mvbench": "vtok.eval.tasks.vqa_video.mvbench:TASK",
    "ocrbench": "vtok.eval.tasks.vqa_benchmarks.ocrbench:TASK",
    "pope": "vtok.eval.tasks.vqa_benchmarks.pope:TASK",
    "refcoco": "vtok.eval.tasks.vqa_benchmarks.refcoco:TASK",
    "scienceqa": "vtok.eval.tasks.vqa_benchmarks.scienceqa:TASK",
    "scienceqa_img": "vtok.eval.tasks.vqa_benchmarks.scienceqa:TASK_IMG",
    "seedbench": "vtok.eval.tasks.vqa_choice.seedbench:TASK",
    "textvqa": "vtok.eval.tasks.vqa_benchmarks.textvqa:TASK",
    "videomme": "vtok.eval.tasks.vqa_video.videomme:TASK",
    "vizwiz": "vtok.eval.tasks.vqa_benchmarks.vizwiz:TASK",
    "vqa": "vtok.eval.tasks.vqa.plain:TASK",
    "vqav2": "vtok.eval.tasks.vqa_benchmarks.vqav2:TASK",
}
QUESTION_TASKS: Registry[Any] = Registry("question task", _QUESTIONS, group="vtok.question_tasks")
TASKS: Registry[Any] = Registry(
    "task",
    {
        **{name: f"vtok.eval.tasks.vqa.evaluate:BY_TASK.{name}" for name in _QUESTIONS},
        "agreement": "vtok.eval.tasks.agreement:evaluate",
        "imagenet": "vtok.eval.tasks.imagenet:evaluate",
        "retrieval": "vtok.eval.tasks.clip.retrieval:evaluate",
        "vqa": "vtok.eval.tasks.vqa.evaluate:evaluate",
        "zeroshot": "vtok.eval.tasks.clip.zeroshot:evaluate",
    },
    group="vtok.tasks",
)
# what records of a task call it, where that is clip_benchmark's name -> the task
RECORDED = {"zeroshot_classification": "zeroshot", "zeroshot_retrieval": "retrieval"}
