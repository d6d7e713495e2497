"""What a run file may hold: its keys and their types, and which model goes with which task.

Every complaint names the file, the key and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from vtok.errors import ConfigError, shown, unknown
from vtok.eval.common.checked import Count, FileModel, Seed, check_choice

# task -> the figures that papers print for it, in percent (mme: points), under the names of the task's metrics; each may have a
# `base_` one, of the unpatched model. The first is the headline.
FIGURES: dict[str, tuple[str, ...]] = {
    "chartqa": ("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"),
    "docvqa": ("anls",),
    "gqa": ("exact_match",),
    "imagenet": ("top1",),
    "mmbench": ("circular", "vanilla"),
    "mme": ("total", "perception", "cognition"),
    "mmmu": ("accuracy",),
    "mvbench": ("average", "accuracy"),
    "ocrbench": ("accuracy",),
    "pope": ("f1", "accuracy"),
    "refcoco": ("acc_50",),
    "retrieval": ("text_retrieval_recall@1", "image_retrieval_recall@1", "recall_sum"),
    "scienceqa": ("exact_match",),
    "scienceqa_img": ("exact_match",),
    "seedbench": ("accuracy",),
    "textvqa": ("soft_accuracy",),
    "videomme": ("accuracy",),
    "vizwiz": ("soft_accuracy",),
    "vqa": ("soft_accuracy", "exact_match"),
    "vqav2": ("soft_accuracy",),
    "zeroshot": ("acc1",),
}
REFERENCE = "reference"
# reference model -> task -> the data that comes with vtok for it
BUNDLED_DATA: dict[str, dict[str, str]] = {
    "reference-vit": {"imagenet": "fashion-mnist"},
    "reference-dinov2": {"imagenet": "clip-art", "agreement": "photographs"},
    "reference-clip": {"zeroshot": "reference-pictures", "retrieval": "reference-pages"},
    "reference-llava": {"vqa": "easy-vqa"},
    "reference-llava-next": {"vqa": "easy-vqa-pages"},
    "reference-scenes": {"vqa": "scenes"},
    "reference-print": {"vqa": "print"},
}
# task -> whose models it can build; tasks that are not listed ask vision-language models
BACKENDS: dict[str, tuple[str, ...]] = {
    "agreement": (REFERENCE,),
    "imagenet": ("timm", REFERENCE),
    "retrieval": ("open_clip", "transformers", REFERENCE),
    "vqa": ("transformers", REFERENCE),
    "zeroshot": ("open_clip", "transformers", REFERENCE),
}


class ModelEntry(FileModel):
    """`model` of a run file."""

    backend: str
    name: str
    pretrained: str | None = None


class RunFile(FileModel):
    """A run file; `vtok.eval.runs.loader.RunConfig` says what the keys mean."""

    table: str | list[str] | None = None
    model: ModelEntry
    method: Mapping[Any, Any] | list[Any] | None = None
    methods: list[Any] | None = None
    task: str | None = None
    tasks: list[str] | None = None
    data: str | dict[str, str | None] | None = None
    calibration: str | dict[str, str | None] | None = None
    options: dict[str, Any] | None = None
    num_samples: Count | None = None
    batch_size: Count = 64
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Seed = 0
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] | list[Any] | None = None
    output: str | None = None
    published: dict[str, Any] | None = None


KEYS = tuple(RunFile.model_fields)


def one_of_two(where: str, content: Mapping[str, Any], single: str, several: str) -> list[Any]:
    """The values of a key that is written for one, `method`, or for several, `methods`. Raises `ConfigError`: neither or both
    are there, or the list is empty."""
    given = [key for key in (single, several) if content.get(key) is not None]
    if not given:
        raise ConfigError(f"{where}: {single} is missing; give {single}, or a list {several}")
    if len(given) > 1:
        raise ConfigError(f"{where}: give {single} or {several}, not both")
    values = [content[single]] if given == [single] else content[several]
    if not values:
        raise ConfigError(f"{where}: {several} is an empty list; give one at least")
    return list(values)


def check_known(where: str, prefix: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises `ConfigError` unless all keys are among those that there are."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: {unknown('key', prefix + name, [prefix + one for one in known])}")


def by_task(where: str, key: str, value: str | Mapping[str, str | None], tasks: Sequence[str]) -> dict[str, str]:
    """task -> path, of a key that holds one path for all tasks or a mapping. Raises `ConfigError`: a task that the run does not
    have."""
    if isinstance(value, str):
        return dict.fromkeys(tasks, value)
    check_known(where, f"{key}.", value, tasks)
    return {task: path for task, path in value.items() if path is not None}


def check_model(where: str, model: ModelEntry, tasks: Sequence[str]) -> None:
    """Raises `ConfigError` for a backend or a reference model that a task does not work with."""
    for task in tasks:
        known = BACKENDS.get(task) or tuple(sorted({name for names in BACKENDS.values() for name in names}))
        check_choice(where, "model.backend", model.backend, known)
    if model.backend != REFERENCE:
        return
    check_choice(where, "model.name", model.name, tuple(BUNDLED_DATA))
    if model.pretrained is not None:
        raise ConfigError(f"{where}: model.pretrained: {model.name} comes with its weights; leave it out")
    for task in tasks:
        fitting = [name for name, data in BUNDLED_DATA.items() if _kind(task) in data]
        if model.name not in fitting:
            raise ConfigError(f"{where}: task {task} needs as model.name one of {', '.join(fitting)}, got {shown(model.name)}")


def _kind(task: str) -> str:
    """The task whose models a task takes: what is not listed asks questions."""
    return task if task in BACKENDS else "vqa"
