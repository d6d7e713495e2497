"""Runs a whole table of published results. Runs that differ in nothing but the method are one run of several methods: they
share the loaded model and what the unpatched one does.

Results are those of `vtok run`, under the same keys: what one of them has measured, the other does not measure again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from vtok.errors import ConfigError, VtokError, unknown
from vtok.eval.common.distributed import ProcessError
from vtok.eval.common.settings import Setting
from vtok.eval.published.tables import groups, without_method
from vtok.eval.runs import loader as runs
from vtok.eval.runs.loader import RunConfig
from vtok.eval.runs.models import check_there

Pair = Mapping[str, dict[str, Any]]  # "base" -> record of the unpatched model, "patched" -> the other


class TableResult(NamedTuple):
    """What running a table gave."""

    # (run as its file has it, task -> its two records), tasks without records left out; one a setting of a run
    rows: list[tuple[RunConfig, dict[str, Pair]]]
    left_out: dict[str, str]  # what was not run -> why
    resumed: int  # configurations that had been measured before


def read_data(values: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """task -> data, of what the command line gives: `FOLDER` for all tasks, `TASK=FOLDER` for one.

    Raises:
        ConfigError: two folders for all.
        UnknownNameError: a task that the table does not have.
    """
    found: dict[str, str] = {}
    general: list[str] = []
    for value in values:
        task, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            general.append(value)
        elif task in tasks:
            found[task] = path
        else:
            raise unknown("task", task, tasks)
    if len(general) > 1:
        raise ConfigError(f"--data {general[0]} and {general[1]} are both for all tasks; write TASK=FOLDER")
    return {task: found.get(task, general[0] if general else "") for task in tasks if task in found or general}


def with_paths(run: RunConfig, data: Mapping[str, str], weights: Path | None) -> dict[str, RunConfig]:
    """A run on data (before what it names itself) and weights that are at hand, task by task; tasks without data are left out.
    Raises `ConfigError`: the checkpoint that the run names is not there."""
    left_out = ("table", "published", "output", "task", "tasks", "data")
    content = {key: copy.deepcopy(value) for key, value in run.content.items() if key not in left_out}
    file = (content.get("options") or {}).get("checkpoint")
    if file:
        content["options"]["checkpoint"] = _checkpoint(run, Path(file), weights)
    known = {**run.data, **data}
    return {
        task: runs.checked(run.path, run.name, {**content, "task": task, "data": known[task]})
        for task in run.tasks
        if task in known
    }


def _checkpoint(run: RunConfig, file: Path, weights: Path | None) -> str:
    for path in (file, *([] if weights is None else [weights / file])):
        if path.is_file():
            return str(path)
    note = run.published.get("note", "")
    raise ConfigError(
        f"{run.name} needs the checkpoint {file}, which is not in {weights or Path.cwd()}; pass its folder as --weights"
        + (f" (note: {note})" if note else "")
    )


def joined(group: Sequence[RunConfig]) -> RunConfig:
    """One run of all methods of runs that differ in nothing else."""
    specs = {run.settings[i].title: spec for run in group for i, spec in enumerate(run.specs)}
    content = {**copy.deepcopy(without_method(group[0])), "methods": list(specs.values())}
    return runs.checked(", ".join(run.path for run in group), group[0].name, content)


def run_table(
    found: Sequence[RunConfig],
    data: Mapping[str, str],
    out: Path,
    pretrained: bool = True,
    workers: int = 4,
    weights: Path | None = None,
    console: Console | None = None,
) -> TableResult:
    """Measures what has no record yet, and reads the records of all.

    Args:
        found: runs of a table.
        data: task -> folder.
        out: folder of `results.jsonl`; a second start goes on where the first stopped.
        pretrained: load the models' weights (False: random ones, to try a table out).
        workers: processes that read images.
        weights: folder of checkpoints that runs name as files.
        console: for progress; `None` = none.

    Raises:
        ConfigError: no run has data, or data that is named is not there.
    """
    from vtok.eval.runs import runner

    for task, place in data.items():
        check_there(task, place)
    left_out: dict[str, str] = {}
    ready: dict[str, dict[str, RunConfig]] = {}
    for run in found:
        try:
            ready[run.name] = with_paths(run if pretrained else _without_checkpoint(run), data, weights)
        except VtokError as error:
            left_out[run.name] = str(error)
            continue
        for task in run.tasks:
            if task not in ready[run.name]:
                left_out[f"{run.name}, {task}"] = f"no data; pass --data {task}=FOLDER"
    each = [one for by_task in ready.values() for one in by_task.values()]
    if not each:
        raise ConfigError("nothing to run: " + "; ".join(dict.fromkeys(left_out.values())))
    resumed, pairs = 0, dict[tuple[str, str], dict[str, Pair]]()
    for group in groups(each):
        try:
            outcome = runner.run(joined(group), out, pretrained, workers, console)
        except ProcessError:
            raise
        except VtokError as error:  # a model that cannot be had must not cost the others
            left_out[f"{', '.join(run.name for run in group)}, {group[0].task}"] = str(error)
            continue
        resumed += outcome.resumed
        left_out |= outcome.left_out
        by_title = {record["setting"]: record for record in outcome.records}
        base = by_title.get(Setting().title)
        for run, title in ((one, setting.title) for one in group for setting in one.settings):
            patched = by_title.get(title)
            if base is not None and patched is not None:
                pairs.setdefault((run.name, title), {})[run.task] = {"base": base, "patched": patched}
    rows = []
    for run in found:
        for title in (setting.title for setting in run.settings):
            named = run if len(run.settings) == 1 else replace(run, name=f"{run.name}, {title}")
            rows.append((named, pairs.get((run.name, title), {})))
    return TableResult(rows, left_out, resumed)


def _without_checkpoint(run: RunConfig) -> RunConfig:
    """The same run on random weights."""
    options = {key: value for key, value in run.options.items() if key != "checkpoint"}
    return runs.checked(run.path, run.name, {**run.content, "options": options})
