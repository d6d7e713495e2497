"""What a run file may say was published for its operating point, checked key by key and read as figures.

```yaml
table: PiToMe DeiT          # of the reproduction book, or a list of tables
published:
  top1: 78.26               # the task's own metric, in percent (MME: points); `base_` = of the unpatched model
  base_top1: 79.83
  gflops: 2.698             # and base_gflops, as the source counts them
  gflops_note: ...          # why vtok counts more than 3 % more or less
  images: 50000
  source: ...
  note: ...
  also: [...]               # other figures of the same operating point, each with its source
```

A run of several tasks has the figures of each under the task's name, `gqa: {exact_match: 63.3, base_exact_match: 64.2}`, and
may have an `average`: the mean over the metrics in `average_of`, such as `[mme.perception, gqa]`, of the share in percent of
the unpatched figure that is left; a task alone stands for its headline, and without `average_of` all tasks count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vtok.errors import ConfigError, shown
from vtok.eval.runs.schema import FIGURES, Keys, check_choice, check_keys

AVERAGE = "average"
_NUMBER = (int, float)
_COMMON: Keys = {
    "gflops": (_NUMBER, False),
    "base_gflops": (_NUMBER, False),
    "gflops_note": (str, False),
    "images": (int, False),
    "source": (str, True),
    "note": (str, False),
}
_SEVERAL: Keys = {AVERAGE: (_NUMBER, False), "average_of": (list, False)}


class Figure(NamedTuple):
    """One published figure.

    Attributes:
        task: whose it is; "" = a mean over several.
        name: of the metric, or `AVERAGE`.
        value: of the patched model, in percent (MME: points).
        base: of the unpatched model; `None` = not stated.
        source: who published it, where that is not the run's own source.
        parts: (task, metric) that a mean is over.
    """

    task: str
    name: str
    value: float
    base: float | None = None
    source: str = ""
    parts: tuple[tuple[str, str], ...] = ()


def check(where: str, tasks: Sequence[str], published: Mapping[str, Any]) -> None:
    """Raises unless `published` of a run file makes sense for the run's tasks.

    Args:
        where: the file, for messages.
        tasks: of the run.
        published: the mapping; an empty one is fine.

    Raises:
        ConfigError: an unknown or missing key, a value of another type, no figure at all, a mean over tasks that do not run.
    """
    if not published:
        return
    _check_one(where, "published.", tasks, published, {"also": (list, False)})
    if any(task in FIGURES for task in tasks) and not list(_figures(tasks, published)):
        raise ConfigError(f"{where}: published holds no figure; known: {', '.join(_names(tasks))}")
    for i, other in enumerate(published.get("also") or ()):
        prefix = f"published.also.{i}"
        if not isinstance(other, Mapping):
            raise ConfigError(f"{where}: {prefix} must be a mapping of figures and their source, got {shown(other)}")
        _check_one(where, f"{prefix}.", tasks, other, {})


def figures(tasks: Sequence[str], published: Mapping[str, Any]) -> list[Figure]:
    """All figures of an operating point, those of the run's own source first."""
    found = list(_figures(tasks, published))
    bases = {(one.task, one.name): one.base for one in found if one.base is not None}
    for other in published.get("also") or ():
        for one in _figures(tasks, other):
            base = bases.get((one.task, one.name)) if one.base is None else one.base
            found.append(one._replace(base=base, source=other["source"]))
    return found


def _check_one(where: str, prefix: str, tasks: Sequence[str], content: Mapping[str, Any], more: Keys) -> None:
    if len(tasks) == 1:
        check_keys(where, prefix, content, _task_keys(tasks[0]) | _COMMON | more)
        return
    check_keys(where, prefix, content, dict.fromkeys(tasks, (Mapping, False)) | _SEVERAL | _COMMON | more)
    for task in tasks:
        check_keys(where, f"{prefix}{task}.", content.get(task) or {}, _task_keys(task))
    known = [*tasks, *(f"{task}.{name}" for task in tasks for name in FIGURES.get(task, ()))]
    for part in content.get("average_of") or ():
        check_choice(where, f"{prefix}average_of", part, known)


def _task_keys(task: str) -> Keys:
    names = FIGURES.get(task, ())
    return {key: (_NUMBER, False) for name in names for key in (name, f"base_{name}")}


def _names(tasks: Sequence[str]) -> list[str]:
    if len(tasks) == 1:
        return list(FIGURES.get(tasks[0], ()))
    return [*(f"{task}.{name}" for task in tasks for name in FIGURES.get(task, ())), AVERAGE]


def _figures(tasks: Sequence[str], content: Mapping[str, Any]) -> Iterator[Figure]:
    for task in tasks:
        own = content if len(tasks) == 1 else content.get(task) or {}
        for name in FIGURES.get(task, ()):
            if own.get(name) is not None:
                yield Figure(task, name, own[name], own.get(f"base_{name}"))
    if content.get(AVERAGE) is not None:
        parts = tuple(_part(one) for one in content.get("average_of") or tasks)
        yield Figure("", AVERAGE, content[AVERAGE], 100.0, parts=parts)


def _part(text: str) -> tuple[str, str]:
    """ "mme.perception" -> (task, metric)."""
    task, _, name = text.partition(".")
    return task, name or FIGURES[task][0]
