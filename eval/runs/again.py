"""The run file that measures a record once more: `vtok run FILE`, whatever task it comes from and however it was started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok.config import MethodConfig
from vtok.errors import ConfigError, VtokError
from vtok.eval.common.settings import Setting
from vtok.eval.models.assets import assets
from vtok.eval.runs.methods import ASSET, portable
from vtok.eval.runs.schema import BUNDLED_DATA, REFERENCE
from vtok.registry import METHODS

# fields of a task's options that a run file says elsewhere, or that change no result
ELSEWHERE = ("batch_size", "model_dtype", "pretrained", "seed", "num_samples", "workers", "output", "backend")
# the task of questions, answers of others, settings that have records of their own
_NOT_NAMED = ("task", "results", "baselines", "floors")
_SOLVED = ("calibration", "prompt", "input_size")  # a run makes these itself
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def run_file(
    task: str, model: Any, backend: str, data: Any, setting: Setting, options: Any, dtype: str
) -> dict[str, Any] | None:
    """What a run file holds that repeats one setting of a task; `None` where names do not say it all."""
    if not isinstance(model, str) or not isinstance(data, (str, os.PathLike)):
        return None
    try:
        method = _spec(setting)
    except (VtokError, TypeError, AttributeError):
        return None
    own = {
        field.name: _plain(value)
        for field in dataclasses.fields(options)
        if field.name not in (*ELSEWHERE, *_NOT_NAMED) and (value := getattr(options, field.name)) != _default(field)
    }
    found: dict[str, Any] = {
        "model": _model(model, backend, getattr(options, "pretrained", None)),
        "task": task,
        "data": os.fspath(data),
        "method": method,
        "batch_size": options.batch_size,
        "dtype": DTYPES.get(dtype, "fp32"),
        "seed": options.seed,
    }
    found |= {"num_samples": options.num_samples} if options.num_samples is not None else {}
    return found | ({"options": own} if own else {})


def of_record(record: Mapping[str, Any], task: str, methods: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The same from the fields of a record that holds no run file, as earlier releases wrote them; `methods` are (name,
    parameters) of what was patched in. Raises `VtokError` for those that are not known here."""
    parts = [_one(METHODS.get(name).create(**params)) for name, params in methods]
    n = record.get("n")
    counted = isinstance(n, int) and not isinstance(n, bool) and not record.get("num_skipped")
    found: dict[str, Any] = {
        "model": _model(str(record.get("model")), str(record.get("backend")), record.get("pretrained")),
        "task": task,
        "data": record.get("dataset"),
        "method": None if not parts else parts[0] if len(parts) == 1 else parts,
        "dtype": DTYPES.get(str(record.get("dtype")), "fp32"),
    }
    found |= {name: record[name] for name in ("batch_size", "seed") if isinstance(record.get(name), int)}
    return found | ({"num_samples": n} if counted else {})


def _model(name: str, backend: str, tag: Any) -> dict[str, Any]:
    """The key `model`; what comes with vtok has no tag of weights."""
    if name in BUNDLED_DATA:
        return {"backend": REFERENCE, "name": name}
    return {"backend": backend, "name": name} | ({"pretrained": tag} if isinstance(tag, str) and tag else {})


def methods_of(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of everything that a record says was patched in."""
    params = record.get("params")
    several = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else None
    held = [one if isinstance(one, Mapping) else {} for one in (several if several is not None else [params])]
    names = [one.get("method") for one in held] if several is not None else [record.get("method")]
    return [(str(name), {str(k): v for k, v in one.items() if k != "method"}) for name, one in zip(names, held)]


def configs_of(record: Mapping[str, Any]) -> list[MethodConfig]:
    """Config objects of a record; a file of weights that is not there is looked for among the bundled ones. Raises `VtokError`:
    a method or parameter that is not known here."""
    return [METHODS.get(name).create(**{k: _file(v) for k, v in params.items()}) for name, params in methods_of(record)]


def _file(value: Any) -> Any:
    if not isinstance(value, str) or not ("/" in value or value.startswith(ASSET)) or Path(value).exists():
        return value
    brought = assets() / Path(value.removeprefix(ASSET)).name
    return str(brought) if brought.is_file() else value


def _spec(setting: Setting) -> Any:
    """What a run file says about a setting; raises for the path of a saved patch, and for what is no method or parameter."""
    if setting.method is None:
        return None
    if setting.at_random:
        return _spec(dataclasses.replace(setting, at_random=False)) | {"at_random": True}
    if isinstance(setting.method, (list, tuple)):
        return [_spec(Setting(part)) for part in setting.method]
    if isinstance(setting.method, MethodConfig):
        return _one(setting.method)
    if setting.method not in METHODS.names():
        raise ConfigError(f"{setting.method} is no method")
    params = {name: value for name, value in setting.params.items() if name not in _SOLVED}
    budget = {"flops": params.pop("flops")} if "flops" in params else {}
    return _one(METHODS.get(setting.method).create(**params)) | budget


def _one(config: MethodConfig) -> dict[str, Any]:
    return portable({"name": config.name, **config.given()})


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value
