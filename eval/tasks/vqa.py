"""Questions about images, answered by any Hugging Face vision-language model, unpatched and patched on the same batches.

Every question is asked on its own: greedy `generate()`, batches padded on the left. What a method costs is a paired difference
with its standard error; what it saves is the time to the first token, paired batch by batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vtok
from vtok.errors import ConfigError
from vtok.eval.settings import Setting, evaluating, placed
from vtok.eval.tasks.timm_pipeline import TYPES
from vtok.eval.tasks.vqa_data import VQAData, open_vqa
from vtok.eval.tasks.vqa_files import read_results
from vtok.eval.tasks.vqa_job import Job
from vtok.eval.tasks.vqa_pipeline import Progress
from vtok.eval.vlm_models import VisionLanguageModel, load_vlm


@dataclass(frozen=True)
class VQAOptions:
    """Flags of visual question answering.

    Attributes:
        questions: file with VQAv2's questions; "" = find it in the folder of the data.
        annotations: file with VQAv2's annotations; "" = find it.
        images: folder of the images; "" = the folder of the data.
        results: file with answers of another program, `[{"question_id", "answer"}]`, scored as one more record.
        prompt: text behind every question; `None` = what the data brings (VQAv2: "Answer the question using a single word or
            phrase." on a line of its own; easy-VQA: nothing).
        max_new_tokens: length of an answer at most.
        num_samples: questions to ask, one of each of so many equal stretches; `None` = all.
        batch_size: questions in a batch.
        floors: also random and uniform, which keep before the LLM the share of visual tokens that each setting keeps on average
            over the decoder layers.
        device: `None` = the GPU if there is one.
        model_dtype: "float32", "bfloat16" or "float16"; `None` = the model's own.
        seed: of methods that draw.
        output: folder of `samples.jsonl`, `results.jsonl` and a file of answers a setting; a second run goes on where the first
            was stopped. "" = none.
    """

    questions: str = ""
    annotations: str = ""
    images: str = ""
    results: str = ""
    prompt: str | None = None
    max_new_tokens: int = 16
    num_samples: int | None = None
    batch_size: int = 16
    floors: bool = False
    device: str | None = None
    model_dtype: str | None = None
    seed: int = 0
    output: str = ""


def evaluate(
    model: str | VisionLanguageModel,
    data: str | os.PathLike | VQAData,
    settings: Sequence[Any] = (None,),
    options: VQAOptions | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, loyalty, tokens and times of every setting, all on the same batches.

    Args:
        model: a name (see `load_vlm`), or an unpatched model, which is left as it is.
        data: see `open_vqa`, or questions.
        settings: each `None` (unpatched), a method, (method, parameters), a list of configs, or a `Setting`.
        options: see `VQAOptions`.
        progress: called with (questions done, questions).

    Returns:
        One record a setting: `metrics` holds shares in [0, 1]: `exact_match`, `soft_accuracy` (lmms-eval's normalisation),
        `soft_accuracy_official`, each with `_stderr` and, against the unpatched setting, paired `_difference`,
        `_difference_stderr` and `_difference_ci` (95 %); `loyalty`, the share of answers that are the unpatched model's.
        `groups` holds the same for parts of the questions, `blind` the share that is right from the question alone (`None` =
        unknown). `tokens` are visual tokens, in the prompt and in the decoder layers; `kv_bytes` keys and values of a prompt;
        `ttft_ms` a batch's time to the first token, `decode_ms_per_token` each further one, `speedup` the paired speed-up of
        the first token, `implied_speedup` its bound.

    Raises:
        ConfigError: nothing to ask, data or a model that cannot be read, processor and model that do not belong together.
        UnsupportedModelError: a method does not work on the model.
        MissingExtraError: transformers is not installed.
    """
    options = options or VQAOptions()
    chosen = [Setting.of(value) for value in settings]
    if not chosen:
        raise ConfigError("nothing to evaluate: name at least one setting, None for the unpatched model")
    for name in ("batch_size", "max_new_tokens", "num_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if not isinstance(data, VQAData):
        data = open_vqa(data, options.questions, options.annotations, options.images)
    data = data.take(options.num_samples)
    if options.prompt is not None:
        data = data.with_prompt(options.prompt)
    outside = None if not options.results else _foreign(Path(options.results), data)
    vlm = load_vlm(model) if isinstance(model, str) else model
    if vtok.info(vlm.net).patched:
        raise ConfigError("evaluate patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")
    folder = Path(options.output) if options.output else None
    device = options.device or ("cuda" if torch.cuda.is_available() else None)
    with evaluating(vlm.net):
        base = placed(vlm.net, _type(options.model_dtype), device)
        model = VisionLanguageModel(base, vlm.processor, vlm.name)
        job = Job(model, data, folder, options.batch_size, options.max_new_tokens, options.seed)
        job.run([job.entry(setting) for setting in chosen], progress)
        if options.floors:
            job.run(job.floors(), progress)
    return job.records(outside)


def _foreign(path: Path, data: VQAData) -> tuple[str, list[str]]:
    answers = read_results(path)
    missing = [q.doc_id for q in data.questions if q.doc_id not in answers]
    if missing:
        raise ConfigError(f"{path} has no answer to {len(missing)} of {len(data.questions)} questions, the first: {missing[0]}")
    return path.stem, [answers[q.doc_id] for q in data.questions]


def _type(name: str | None) -> torch.dtype | None:
    if name is not None and name not in TYPES:
        raise ConfigError(f"unknown type {name!r}; known: {', '.join(TYPES)}")
    return None if name is None else TYPES[name]
