"""What a run file may say was published for its operating point, checked key by key and read as figures.

```yaml
table: PiToMe DeiT          # of published results, or a list of tables
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
from functools import cache
from typing import Any, Literal, NamedTuple

from pydantic import create_model

from vtok.errors import ConfigError
from vtok.eval.common.checked import FileModel, validated
from vtok.eval.runs.schema import FIGURES

AVERAGE = "average"


class Source(FileModel):
    """Where figures are from, beside the figures themselves."""

    gflops: float | None = None
    base_gflops: float | None = None
    gflops_note: str | None = None
    images: int | None = None
    source: str
    note: str | None = None


class Figure(NamedTuple):
    """One published figure."""

    task: str  # whose it is; "" = a mean over several
    name: str  # of the metric, or `AVERAGE`
    value: float  # of the patched model, in percent (MME: points)
    base: float | None = None  # of the unpatched model; `None` = not stated
    source: str = ""  # who published it, where that is not the run's own source
    parts: tuple[tuple[str, str], ...] = ()  # (task, metric) that a mean is over


def check(where: str, tasks: Sequence[str], published: Mapping[str, Any]) -> None:
    """Raises unless `published` of a run file, which messages name, makes sense for the run's tasks; an empty one does.

    Raises:
        ConfigError: an unknown or missing key, a value of another type, no figure at all, a mean over tasks that do not run.
    """
    if not published:
        return
    validated(_model(tuple(tasks)), published, where, "published.")
    if any(task in FIGURES for task in tasks) and not list(_figures(tasks, published)):
        raise ConfigError(f"{where}: published holds no figure; known: {', '.join(_names(tasks))}")


def figures(tasks: Sequence[str], published: Mapping[str, Any]) -> list[Figure]:
    """All figures of an operating point, those of the run's own source first."""
    found = list(_figures(tasks, published))
    bases = {(one.task, one.name): one.base for one in found if one.base is not None}
    for other in published.get("also") or ():
        for one in _figures(tasks, other):
            base = bases.get((one.task, one.name)) if one.base is None else one.base
            found.append(one._replace(base=base, source=other["source"]))
    return found


@cache
def _model(tasks: tuple[str, ...]) -> type[Source]:
    """What `published` may hold for these tasks."""
    own = {task: _numbers(task) for task in tasks}
    fields: dict[str, Any] = own[tasks[0]]
    if len(tasks) > 1:
        known = (*tasks, *(f"{task}.{name}" for task in tasks for name in FIGURES.get(task, ())))
        fields = {task: (create_model(task, __base__=FileModel, **numbers) | None, None) for task, numbers in own.items()}
        fields |= {AVERAGE: (float | None, None), "average_of": (list[Literal[known]], [])}  # type: ignore[valid-type]
    one = create_model("Published", __base__=Source, **fields)
    return create_model("AllPublished", __base__=one, also=(list[one], []))  # type: ignore[valid-type]


def _numbers(task: str) -> dict[str, Any]:
    """The figures of a task, each of the patched and of the unpatched model."""
    return {key: (float | None, None) for name in FIGURES.get(task, ()) for key in (name, f"base_{name}")}


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
    if len(tasks) > 1 and content.get(AVERAGE) is not None:
        parts = tuple(_part(one) for one in content.get("average_of") or tasks)
        yield Figure("", AVERAGE, content[AVERAGE], 100.0, parts=parts)


def _part(text: str) -> tuple[str, str]:
    """ "mme.perception" -> (task, metric)."""
    task, _, name = text.partition(".")
    return task, name or FIGURES[task][0]
