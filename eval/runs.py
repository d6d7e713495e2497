"""Runs as data: YAML files that name a model, a method and a task, and what was published for them.

A file is read with `yaml.safe_load` and checked key by key; every complaint names the file, the key and what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vtok.config import MethodConfig
from vtok.errors import ConfigError, UnknownNameError, VtokError, unknown
from vtok.registry import METHODS

# key -> (type, whether it must be there)
_KEYS: dict[str, tuple[Any, bool]] = {
    "model": (Mapping, True),
    "method": (Mapping, True),
    "task": (str, True),
    "data": (str, False),
    "batch_size": (int, False),
    "dtype": (str, False),
    "seed": (int, False),
    "published": (Mapping, False),
}
_MODEL_KEYS: dict[str, tuple[Any, bool]] = {"backend": (str, True), "name": (str, True), "pretrained": (str, False)}
_PUBLISHED_KEYS: dict[str, tuple[Any, bool]] = {
    "gflops": ((int, float), False),
    "base_gflops": ((int, float), False),
    "images": (int, False),
    "source": (str, True),
    "note": (str, False),
}
# task -> the figures that papers print for it, in percent, under the names of the task's metrics; each may have a `base_` one,
# of the unpatched model
FIGURES: dict[str, tuple[str, ...]] = {
    "imagenet": ("top1",),
    "retrieval": ("text_retrieval_recall@1", "image_retrieval_recall@1", "recall_sum"),
    "vqa": ("soft_accuracy", "exact_match"),
    "zeroshot": ("acc1",),
}
# task -> whose models it can build
BACKENDS: dict[str, tuple[str, ...]] = {
    "imagenet": ("timm",),
    "retrieval": ("open_clip", "transformers"),
    "vqa": ("transformers",),
    "zeroshot": ("open_clip", "transformers"),
}
_KINDS = {Mapping: "a mapping", str: "text", int: "a whole number", float: "a number"}
_NOT_PARAMETERS = ("model", "method", "input_size", "calibration", "trace")  # other arguments of vtok.patch and vtok.plan
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes:
        name: of the file, without its ending.
        backend: whose model it is.
        model: name under which the backend creates it.
        method: config object.
        task: name of the evaluation.
        pretrained: tag of open_clip's weights; `None` = the ones that the name stands for.
        data: folder of the data, or `None` if it must be given when running.
        batch_size: images a forward pass.
        dtype: "fp32", "bf16" or "fp16".
        seed: of anything random.
        published: figures to compare with: the task's (see `FIGURES`) and `base_` ones of the unpatched model, in percent;
            gflops, base_gflops (as the source counts them), images, source, note.
    """

    name: str
    backend: str
    model: str
    method: MethodConfig
    task: str
    pretrained: str | None = None
    data: str | None = None
    batch_size: int = 64
    dtype: str = "fp32"
    seed: int = 0
    published: Mapping[str, Any] = field(default_factory=dict)


def bundled() -> list[str]:
    """Names of the runs that come with vtok."""
    return sorted(p.name.removesuffix(".yaml") for p in files("vtok.configs").iterdir() if p.name.endswith(".yaml"))


def find(name: str) -> Path:
    """The file of a bundled run, or the path itself.

    Raises:
        UnknownNameError: neither a file nor a bundled run.
    """
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(f"{name} does not exist; `vtok configs` lists the runs that come with vtok")
        return Path(name)
    if name not in bundled():
        raise unknown("run", name, bundled())
    return Path(str(files("vtok.configs") / f"{name}.yaml"))


def load(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a run.

    Args:
        name: of a bundled run, or path of a YAML file.
        overrides: `key=value` or `method.ratio=0.95`; values are read as YAML.

    Raises:
        ConfigError: not YAML, a key that is missing, unknown or of the wrong type, a value that is not allowed.
    """
    path = find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(_KEYS)}, found {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return _checked(path, content)


def _override(content: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, got {text!r}")
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {text}: {parent} is not a mapping")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML: {error}") from error


def _checked(path: Path, content: dict[str, Any]) -> RunConfig:
    _check_keys(path, "", content, _KEYS)
    model, method = content["model"], dict(content["method"])
    _check_keys(path, "model.", model, _MODEL_KEYS)
    published = content.get("published", {})
    if published:
        _check_keys(path, "published.", published, _published_keys(content["task"]))
    _check_choice(path, "model.backend", model["backend"], _backends(content["task"]))
    _check_choice(path, "dtype", content.get("dtype", "fp32"), DTYPES)
    if "name" not in method:
        raise ConfigError(f"{path}: method.name is missing; known methods: {', '.join(METHODS.names())}")
    try:
        config = METHODS.get(method.pop("name")).create(**method)
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: method: {error}") from error
    except VtokError as error:
        raise ConfigError(f"{path}: method: {error}") from error
    if content.get("batch_size") is not None and content["batch_size"] < 1:
        raise ConfigError(f"{path}: batch_size must be at least 1, got {content['batch_size']}")
    rest = {k: content[k] for k in ("data", "batch_size", "dtype", "seed") if content.get(k) is not None}
    tag = model.get("pretrained")
    return RunConfig(path.stem, model["backend"], model["name"], config, content["task"], tag, published=published, **rest)


def _published_keys(task: str) -> dict[str, tuple[Any, bool]]:
    """What `published` may hold for a task; the first figure must be there."""
    number = (int, float)
    figures = FIGURES.get(task, ())
    own: dict[str, tuple[Any, bool]] = {name: (number, name == figures[0]) for name in figures}
    return own | {f"base_{name}": (number, False) for name in figures} | _PUBLISHED_KEYS


def _backends(task: str) -> tuple[str, ...]:
    """Whose models a task builds; a task from another package may build any."""
    return BACKENDS.get(task) or tuple(sorted({name for names in BACKENDS.values() for name in names}))


def _check_keys(path: Path, prefix: str, content: Mapping[str, Any], keys: dict[str, tuple[Any, bool]]) -> None:
    for key, value in content.items():
        if key not in keys:
            raise ConfigError(f"{path}: {unknown('key', f'{prefix}{key}', (prefix + k for k in keys))}")
        kind, _ = keys[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            names = " or ".join(_KINDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"{path}: {prefix}{key} must be {names}, got {value!r}")
    for key, (_, needed) in keys.items():
        if needed and content.get(key) is None:
            raise ConfigError(f"{path}: {prefix}{key} is missing")


def _check_choice(path: Path, key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{path}: {key} must be one of {', '.join(allowed)}, got {value!r}")


class _Tuples(yaml.SafeLoader):
    """Plain values and, besides, tuples of them."""


def _tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node))


_Tuples.add_constructor("!tuple", _tuple)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Reads a method as the command line writes it: `tome`, `tome:r=13`, `tome:r=(8,-1)`, `zero_tprune:layers=[2],retain=0.9`.

    Returns:
        (name, parameters).

    Raises:
        ConfigError: the part after the colon is not `key=value, ...`.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return name, {}
    try:
        text_in_yaml = re.sub(r"\(([^()]*)\)", r"!tuple [\1]", rest.replace("=", ": "))
        params = yaml.load("{" + text_in_yaml + "}", _Tuples)
    except yaml.YAMLError:
        params = None
    if not isinstance(params, dict) or any(value is None and f"{key}=null" not in rest for key, value in params.items()):
        raise ConfigError(f"cannot read {text!r}; write a method as name or name:key=value,key=value, e.g. tome:r=13")
    for key in params:
        if key in _NOT_PARAMETERS:
            raise ConfigError(f"{text!r}: {key} is no parameter of a method")
    return name, params


def parse_setting(text: str) -> Any:
    """Reads one method, or several joined by "+" that are patched together: `pitome:ratio=0.9+todre:keep=0.1`.

    Returns:
        What a task takes as a setting: (name, parameters), or a list of configs.

    Raises:
        ConfigError: see `parse_method`.
        UnknownNameError: one of several methods, or a parameter of it, does not exist.
    """
    parts = re.split(r"\+(?=[A-Za-z_]\w*(?:[:+]|$))", text)  # not the plus sign of a number
    if len(parts) == 1:
        return parse_method(text)
    pairs = [parse_method(part.strip()) for part in parts]
    return [METHODS.get(name).create(**params) for name, params in pairs]


def prepared(output: Path | None) -> Path | None:
    """The file for results, its folder made now: not after hours of measuring.

    Raises:
        ConfigError: nothing can be written there.
    """
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"results cannot be written to {output}: {error}") from error
        if output.is_dir():
            raise ConfigError(f"results cannot be written to {output}: it is a folder")
    return output
