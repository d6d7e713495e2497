"""What a run file may hold: its keys, their types, and the sentences that say what is wrong with one.

Every complaint names the file, the key and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtok.errors import ConfigError, shown, unknown

Keys = dict[str, tuple[Any, bool]]  # key -> (type, whether it must be there)
KEYS: Keys = {
    "table": ((str, list), False),
    "model": (Mapping, True),
    "method": ((Mapping, list), False),
    "methods": (list, False),
    "task": (str, False),
    "tasks": (list, False),
    "data": ((str, Mapping), False),
    "calibration": ((str, Mapping), False),
    "options": (Mapping, False),
    "num_samples": (int, False),
    "batch_size": (int, False),
    "dtype": (str, False),
    "seed": (int, False),
    "sweep": ((Mapping, list), False),
    "output": (str, False),
    "published": (Mapping, False),
}
MODEL_KEYS: Keys = {"backend": (str, True), "name": (str, True), "pretrained": (str, False)}
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
    "reference-clip": {"zeroshot": "reference-pictures", "retrieval": "reference-pages"},
    "reference-llava": {"vqa": "easy-vqa"},
    "reference-llava-next": {"vqa": "easy-vqa-pages"},
}
# task -> whose models it can build; tasks that are not listed ask vision-language models
BACKENDS: dict[str, tuple[str, ...]] = {
    "imagenet": ("timm", REFERENCE),
    "retrieval": ("open_clip", "transformers", REFERENCE),
    "vqa": ("transformers", REFERENCE),
    "zeroshot": ("open_clip", "transformers", REFERENCE),
}
DTYPES = ("fp32", "bf16", "fp16")
_KINDS = {Mapping: "a mapping", str: "text", int: "a whole number", float: "a number", list: "a list"}


def check_keys(where: str, prefix: str, content: Mapping[str, Any], keys: Keys) -> None:
    """Raises unless a mapping has the keys that it must have, and no others, of the right types.

    Args:
        where: the file, for the message.
        prefix: of the keys, "model." for instance.
        content: the mapping.
        keys: what is allowed.

    Raises:
        ConfigError: a key is unknown or missing, or its value of another type.
    """
    for key, value in content.items():
        if key not in keys:
            name = key if isinstance(key, str) else shown(key)
            raise ConfigError(f"{where}: {unknown('key', f'{prefix}{name}', (prefix + k for k in keys))}")
        kind, needed = keys[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ConfigError(f"{where}: {prefix}{key} must be {' or '.join(_KINDS[k] for k in kinds)}, got {shown(value)}")
    for key, (_, needed) in keys.items():
        if needed and content.get(key) is None:
            raise ConfigError(f"{where}: {prefix}{key} is missing")


def check_choice(where: str, key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises unless a value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{where}: {key} must be one of {', '.join(allowed)}, got {shown(value)}")


def check_positive(where: str, content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises unless numbers, where they are given, are at least 1."""
    for name in names:
        if content.get(name) is not None and content[name] < 1:
            raise ConfigError(f"{where}: {name} must be at least 1, got {content[name]}")


def one_of_two(where: str, content: Mapping[str, Any], single: str, several: str) -> list[Any]:
    """The values of a key that is written for one, `method`, or for several, `methods`.

    Raises:
        ConfigError: neither or both are there, or the list is empty.
    """
    given = [key for key in (single, several) if content.get(key) is not None]
    if not given:
        raise ConfigError(f"{where}: {single} is missing; give {single}, or a list {several}")
    if len(given) > 1:
        raise ConfigError(f"{where}: give {single} or {several}, not both")
    values = [content[single]] if given == [single] else content[several]
    if not values:
        raise ConfigError(f"{where}: {several} is an empty list; give one at least")
    return list(values)


def by_task(where: str, key: str, value: Any, tasks: Sequence[str]) -> dict[str, str]:
    """task -> path, of a key that holds one path for all tasks or a mapping.

    Raises:
        ConfigError: a task that the run does not have, or no path.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return dict.fromkeys(tasks, value)
    check_keys(where, f"{key}.", value, dict.fromkeys(tasks, (str, False)))
    return {task: path for task, path in value.items() if path is not None}


def check_model(where: str, model: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Raises unless the tasks can build a model.

    Raises:
        ConfigError: a backend or a reference model that a task does not work with.
    """
    check_keys(where, "model.", model, MODEL_KEYS)
    for task in tasks:
        known = BACKENDS.get(task) or tuple(sorted({name for names in BACKENDS.values() for name in names}))
        check_choice(where, "model.backend", model["backend"], known)
    if model["backend"] != REFERENCE:
        return
    check_choice(where, "model.name", model["name"], tuple(BUNDLED_DATA))
    if model.get("pretrained") is not None:
        raise ConfigError(f"{where}: model.pretrained: {model['name']} comes with its weights; leave it out")
    for task in tasks:
        fitting = [name for name, data in BUNDLED_DATA.items() if _kind(task) in data]
        if model["name"] not in fitting:
            raise ConfigError(
                f"{where}: task {task} needs as model.name one of {', '.join(fitting)}, got {shown(model['name'])}"
            )


def _kind(task: str) -> str:
    """The task whose models a task takes: what is not listed asks questions."""
    return task if task in BACKENDS else "vqa"
