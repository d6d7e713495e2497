"""Questions about images, answered by any Hugging Face vision-language model, unpatched and patched on the same batches.

Every question is asked on its own: greedy `generate()`, batches padded on the left. What a method costs is a paired difference
with its standard error; what it saves is the time to the first token, paired batch by batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import vtok
from vtok.errors import ConfigError
from vtok.eval.common.distributed import current
from vtok.eval.common.settings import Setting, dtype_of, evaluating, to_device
from vtok.eval.models.vlm import VisionLanguageModel, load_vlm
from vtok.eval.runs.again import run_file
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.vqa.data import VQAData
from vtok.eval.tasks.vqa.job import Job
from vtok.eval.tasks.vqa.pipeline import Asking, Progress
from vtok.eval.tasks.vqa.sources.files import read_results
from vtok.eval.tasks.vqa.task import QuestionTask, Sources, VQAOptions


def evaluate(
    model: str | VisionLanguageModel,
    data: str | os.PathLike | VQAData,
    settings: Sequence[Any] = (None,),
    options: VQAOptions | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, agreement, tokens and times; see `vtok.eval.tasks` for what all tasks share.

    Args:
        model: a name (see `load_vlm`), or a model.
        data: folder or file of the task's data (of the task "vqa": see `open_vqa`); "hub", "hub:NAME" or a folder of the
            `datasets` library; or questions.
        settings, options, progress: see there, and `VQAOptions`; a setting may also be a list of configs.

    Returns:
        Records whose `metrics` hold the scores and totals of the task, `groups` the same for parts of the questions, `blind`
        the share that is right from the question alone (`None` = unknown). `tokens` are visual tokens, in the prompt and in the
        decoder layers; `kv_bytes` keys and values of a prompt; `ttft_ms` a batch's time to the first token,
        `decode_ms_per_token` each further one.
    """
    options = options or VQAOptions()
    chosen = Setting.several(settings)
    for name in ("batch_size", "max_new_tokens", "num_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    task: QuestionTask = QUESTION_TASKS.get(options.task)
    named = data
    if not isinstance(data, VQAData):
        places = (options.questions, options.annotations, options.images, options.ocr, options.split)
        data = task.open(Sources(os.fspath(data), *places, options.frames))
    data = data.take(options.num_samples).shrunk(options.shrink)
    if options.prompt is not None:
        data = data.with_prompt(options.prompt)
    data, skipped = data.readable()
    if not data.questions:
        raise ConfigError(f"none of the pictures of {data.name} can be read; the first: {skipped[0][0]}: {skipped[0][1]}")
    outside = None if not options.results else _foreign(Path(options.results), data)
    vlm = load_vlm(model) if isinstance(model, str) else model
    if vtok.info(vlm.net).patched:
        raise ConfigError("evaluate patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")
    folder = Path(options.output) if options.output else None
    device = current().device(options.device)
    with evaluating(vlm.net):
        base = to_device(vlm.net, dtype_of(options.model_dtype), device)
        model = VisionLanguageModel(base, vlm.processor, vlm.name, options.frames_as_images)
        longest = task.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        again = partial(run_file, task.name, vlm.name, "transformers", named, options=options, dtype=dtype)
        asking = Asking(model, data, task, options.batch_size, longest, options.seed)
        job = Job(asking, folder, again, skipped)
        job.run([job.entry(setting) for setting in chosen], progress)
        if options.baselines:
            job.run(job.baselines(), progress)
    return job.records(outside)


class _ByTask:
    """`evaluate` with one task, whichever task the options name: `BY_TASK.gqa(model, data, ...)`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        @wraps(evaluate)
        def evaluate_task(
            model: Any, data: Any, settings: Any = (None,), options: VQAOptions | None = None, progress: Progress | None = None
        ) -> list[dict[str, Any]]:
            return evaluate(model, data, settings, replace(options or VQAOptions(), task=name), progress)

        return evaluate_task


BY_TASK = _ByTask()


def _foreign(path: Path, data: VQAData) -> tuple[str, list[str]]:
    answers = read_results(path)
    missing = [q.doc_id for q in data.questions if q.doc_id not in answers]
    if missing:
        raise ConfigError(f"{path} has no answer to {len(missing)} of {len(data.questions)} questions, the first: {missing[0]}")
    return path.stem, [answers[q.doc_id] for q in data.questions]
