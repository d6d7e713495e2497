"""Runs as data: YAML files that name a model, methods and tasks, and what was published for them, checked key by key.

"A run is data" of assets/docs/evaluate.md has the keys; every complaint names the file, the key and what is allowed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vtok.config import MethodConfig
from vtok.errors import ConfigError, shown, unknown
from vtok.eval.common.checked import validated
from vtok.eval.common.settings import Setting
from vtok.eval.published.schema import check as check_published
from vtok.eval.runs import yaml_text
from vtok.eval.runs.methods import parse_method as parse_method  # others look for these here
from vtok.eval.runs.methods import parse_setting as parse_setting
from vtok.eval.runs.methods import read_setting, with_budget
from vtok.eval.runs.names import SUITES as SUITES
from vtok.eval.runs.names import bundled as bundled
from vtok.eval.runs.names import find
from vtok.eval.runs.schema import BACKENDS as BACKENDS
from vtok.eval.runs.schema import BUNDLED_DATA, KEYS, REFERENCE, RunFile, by_task, check_known, check_model, one_of_two
from vtok.eval.tasks import TASKS
from vtok.writing import apart, writable

NOT_REPRODUCIBLE = "not_reproducible"  # a table in the folder of the runs, which vtok.eval.published.tables reads


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    name: str  # of the file, without its ending
    backend: str  # whose model it is: "timm", "open_clip", "transformers", or "reference" for one that comes with vtok
    model: str  # name under which the backend creates it
    settings: tuple[Setting, ...]  # what to compare with the unpatched model
    tasks: tuple[str, ...]  # names of the evaluations
    pretrained: str | None = None  # tag of open_clip's weights; `None` = the ones that the name stands for
    # task -> folder or name of its data; tasks without one must be given it when running
    data: Mapping[str, str] = field(default_factory=dict)
    # task -> folder or name of data for budgets of methods whose counts depend on the image
    calibration: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the tasks' own options, by name
    num_samples: int | None = None  # how many of the data, spread evenly; `None` = all
    batch_size: int = 64  # images or questions a forward pass
    dtype: str = "fp32"  # "fp32", "bf16" or "fp16"
    seed: int = 0  # of anything random
    # dotted key -> values; the run stands for all combinations (see `points`). "flops" is a budget for every
    # setting
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    output: str | None = None  # folder of the results; `None` = `results/NAME`
    published: Mapping[str, Any] = field(default_factory=dict)  # figures to compare with, see `vtok.eval.published.schema`
    tables: tuple[str, ...] = ()  # of published results that the run belongs to
    content: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all of this as plain values, as the file says it
    path: str = field(default="", compare=False)  # of the file, as messages name it
    file: str = field(default="", compare=False)  # the file itself

    @property
    def task(self) -> str:
        """The one task of a run that has one. Raises `ConfigError`: it has several."""
        if len(self.tasks) > 1:
            raise ConfigError(f"{self.path}: expected one task, found {', '.join(self.tasks)}")
        return self.tasks[0]

    @property
    def method(self) -> MethodConfig:
        """The config of a run of one method with its own numbers. Raises `ConfigError`: it compares or combines several, or has
        a budget."""
        if len(self.settings) > 1 or not isinstance(self.settings[0].method, MethodConfig):
            found = ", ".join(setting.title for setting in self.settings)
            raise ConfigError(f"{self.path}: expected one method with its own parameters, found {found}")
        return self.settings[0].method

    @property
    def specs(self) -> list[Any]:
        """What the file says about each of the `settings`."""
        return one_of_two(self.path, self.content, "method", "methods")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.output) if self.output else Path("results") / self.name


def load(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a run.

    Args:
        name: of a bundled run, or path of a YAML file.
        overrides: `key=value`, `method.ratio=0.95` or `methods.0.r=8`; values are read as YAML.

    Raises:
        ConfigError: not YAML, a key that is missing, unknown or of the wrong type, a value that is not allowed.
    """
    path = find(name)
    content = yaml_text.read(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(KEYS)}, found {type(content).__name__}")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {shown(text)}")
        put(content, key, yaml_text.parse(value, f"--set {text}", kind="the value is not YAML"), f"--set {text}")
    given = f" with --set {' --set '.join(overrides)}" if overrides else ""
    return replace(checked(f"{path}{given}", path.stem, content), file=str(path))


def texts(value: Any) -> list[str]:
    """Every text in plain values: among them are the files that a run reads."""
    if isinstance(value, Mapping):
        return [text for one in value.values() for text in texts(one)]
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []


def put(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets the value under a dotted key; parts of it that are numbers count the entries of a list, from 0. Raises
    `ConfigError`: a part of the key leads into something that is neither a mapping nor a list, or past its end."""
    *parents, last = key.split(".")
    place: Any = content
    for depth, part in enumerate([*parents, last]):
        above = ".".join(parents[:depth])
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"{where}: {above} is a list of {len(place)}; say which by a number from 0, e.g. {above}.0")
            step: Any = int(part)
        elif isinstance(place, dict):
            step = part
        else:
            raise ConfigError(f"{where}: {above} is not a mapping")
        if depth == len(parents):
            place[step] = value
        else:
            place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]


def checked(where: str, name: str, content: Mapping[str, Any]) -> RunConfig:
    """A run from plain values, as a file holds them; messages say `where` they come from. Raises `ConfigError`: a key that is
    missing, unknown or of the wrong type, a value that is not allowed."""
    file = validated(RunFile, content, where)
    specs = one_of_two(where, content, "method", "methods")
    tasks = tuple(one_of_two(where, content, "task", "tasks"))
    for task in tasks:
        if task not in TASKS.names():
            raise ConfigError(f"{where}: {unknown('task', task, TASKS.names())}")
    check_model(where, file.model, tasks)
    check_published(where, tasks, file.published or {})
    settings = tuple(
        read_setting(where, "method" if file.methods is None else f"methods.{i}", spec)
        for i, spec in enumerate(copy.deepcopy(specs))
    )
    titles = [setting.title for setting in settings]
    for title in titles:
        if titles.count(title) > 1:
            raise ConfigError(f"{where}: methods names {title} {titles.count(title)} times; once is enough")
    brought = BUNDLED_DATA.get(file.model.name, {}) if file.model.backend == REFERENCE else {}
    tables = tuple([file.table] if isinstance(file.table, str) else file.table or ())
    if not all(name.strip() for name in tables):
        raise ConfigError(f"{where}: table must be the name of a table or a list of names, got {shown(file.table)}")
    same = ("num_samples", "batch_size", "dtype", "seed", "output")
    return RunConfig(
        name=name,
        backend=file.model.backend,
        model=file.model.name,
        settings=settings,
        tasks=tasks,
        pretrained=file.model.pretrained,
        data={t: d for t, d in brought.items() if t in tasks} | by_task(where, "data", file.data or {}, tasks),
        calibration=by_task(where, "calibration", file.calibration or {}, tasks),
        sweep=_sweep(where, file.sweep or {}),
        options=file.options or {},
        published=file.published or {},
        tables=tables,
        content=content,
        path=where,
        **{key: getattr(file, key) for key in same},
    )


def _sweep(where: str, value: Mapping[str, list[Any]] | list[Any]) -> dict[str, list[Any]]:
    """dotted key -> values; a list alone holds budgets. Raises `ConfigError`: a key that a sweep cannot vary."""
    if isinstance(value, list):
        return {"flops": value} if value else {}
    varied = [key for key in KEYS if key not in ("sweep", "output", "published", "table")]
    for key in value:
        if key.split(".")[0] not in varied and key != "flops":
            check_known(where, "sweep.", [key], ["flops", *varied])
    return dict(value)


def prepared(output: Path | None, inputs: Iterable[Any] = ()) -> Path | None:
    """The file for results, if there will be one, its folder made now: not after hours of measuring. Raises `ConfigError`:
    nothing can be written there, or it is one of the inputs (`None`s and words that name no file are not)."""
    if output is not None:
        apart([output], [one for one in inputs if one is not None])
        writable(output)
    return output


def points(config: RunConfig) -> list[RunConfig]:
    """Every combination of a run's `sweep`, each a run without one; the run itself if it has none.

    The first key varies slowest. Settings that say `flops: null` keep their own numbers under every budget.

    Raises:
        ConfigError: a combination that is no valid run.
    """
    if not config.sweep:
        return [config]
    keys = list(config.sweep)
    found = []
    for values in itertools.product(*config.sweep.values()):
        where = f"{config.path}: sweep point " + ", ".join(f"{key}={value}" for key, value in zip(keys, values))
        content: dict[str, Any] = copy.deepcopy({key: value for key, value in config.content.items() if key != "sweep"})
        for key, value in zip(keys, values):
            if key == "flops":
                _set_budget(content, value, where)
            else:
                put(content, key, copy.deepcopy(value), where)
        found.append(replace(checked(where, config.name, content), output=config.output))
    return found


def _set_budget(content: dict[str, Any], flops: Any, where: str) -> None:
    if content.get("methods") is not None:
        content["methods"] = [with_budget(where, f"methods.{i}", one, flops) for i, one in enumerate(content["methods"])]
    else:
        content["method"] = with_budget(where, "method", content.get("method"), flops)
