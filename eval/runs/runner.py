"""Runs a `RunConfig`, or all points of its sweep, one configuration after the other; each is stored as soon as it is finished.

`results.jsonl` is the truth: a run that was stopped, at any moment, goes on with the configuration that it was at. Runs that
are started twice on one folder share the work: whoever is at a configuration holds its lock, and nobody runs it again. Of
several processes of one run (`vtok.eval.common.distributed`) the main one decides what is run and writes the records.
"""

from __future__ import annotations

import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from vtok.errors import BudgetError, ConfigError, VtokError
from vtok.eval.common import terminal
from vtok.eval.common.distributed import ProcessError, current
from vtok.eval.common.records import Records, key_of
from vtok.eval.common.settings import Setting, fastest_on_cpu
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.runs import models as runs_models
from vtok.eval.runs import records as runs_records
from vtok.eval.runs.loader import RunConfig, points
from vtok.eval.tasks import TASKS
from vtok.writing import reason, writable

RESULTS = "results.jsonl"
_WAIT = 1.0  # seconds between looks at a configuration that another start is at
_MINE, _HELD, _DONE = "mine", "held", "done"


@dataclass(frozen=True)
class Job:
    """One configuration: one model, one setting, one task."""

    config: RunConfig  # the run; its sweep is resolved
    task: str  # name
    setting: Setting  # what is patched; the unpatched model has a job of its own
    spec: Any  # what the file says about the setting
    key: str  # of the record

    @property
    def title(self) -> str:
        return f"{self.task}, {self.setting.title}"


@dataclass
class Outcome:
    """What a run gave."""

    # of all its configurations that have one, the unpatched model first in each group
    records: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # title of a configuration -> why it could not be run
    unmet: set[str] = field(default_factory=set)  # those among `left_out` whose budget no setting of the method meets
    resumed: int = 0  # how many were there before


def jobs_of(config: RunConfig, pretrained: bool = True, out: Path | None = None) -> list[list[Job]]:
    """All configurations of a run, those that differ in nothing but the setting together, the unpatched model first; keys
    depend on whether weights are loaded and leave the folder of the results, `out`, out of that of the data."""
    groups: dict[str, dict[str, Job]] = {}
    there: dict[str, Mapping[str, str | None]] = {}  # what points have in common is looked at once
    for point in points(config):
        for task in point.tasks:
            place = key_of({"data": point.data.get(task), "of": point.calibration.get(task), "options": point.options})
            if place not in there:
                there[place] = runs_records.content(point, task, out or config.folder)
            whole = [(Setting(), None), *zip(point.settings, point.specs)]
            keys = [runs_records.key(point, task, one, pretrained, there[place]) for one, _ in whole]
            found = [Job(point, task, one, spec, key) for (one, spec), key in zip(whole, keys)]
            group = groups.setdefault(found[0].key, {})
            for job in found:
                group.setdefault(job.key, job)
    return [list(group.values()) for group in groups.values()]


def run(
    config: RunConfig,
    out: Path | None = None,
    pretrained: bool = True,
    workers: int = 4,
    console: Console | None = None,
) -> Outcome:
    """Runs the configurations that have no record yet.

    Args:
        config: the run; every task must have its data.
        out: folder of `results.jsonl`; `None` = as the run says.
        pretrained: load the model's weights (False: random ones, to try a configuration out).
        workers: processes that read images.
        console: for progress and warnings; `None` = none.

    Returns:
        The records of all configurations, new and old. Settings that do not work on the model are left out and named.

    Raises:
        ConfigError: a task without data, options that no task has, a folder that cannot be written to.
        VtokError: the unpatched model cannot be evaluated.
    """
    console = console or Console(quiet=True)
    for task in config.tasks:
        if task not in config.data:
            raise ConfigError(f"{config.path} names no data; pass --data FOLDER (for task {task})")
    runs_models.check_options(config)
    for point in points(config):
        for task in point.tasks:
            runs_models.check_there(task, point.data[task], point.options)
    groups = jobs_of(config, pretrained, out)
    keys = current().agree([[job.key for job in group] for group in groups])  # they hold the times of files on this machine
    groups = [[replace(job, key=key) for job, key in zip(*both)] for both in zip(groups, keys)]
    records, outcome = _opened(out or config.folder), Outcome()
    done = _known(records, console)
    every = [job for group in groups for job in group]
    outcome.resumed = sum(job.key in done for job in every)
    others = [] if current().rank else _others(records, every, done)
    if others:
        console.print(
            f"{len(others)} configurations in {records.path} were measured on other data or weights, elsewhere, or by another "
            "release: they are measured again"
        )
    if outcome.resumed:
        console.print(f"{outcome.resumed} of {len(every)} configurations are in {records.path}; running the rest")
    on_cpu = current().device(config.options.get("device")) in (None, "cpu")
    if config.dtype == "bf16" and on_cpu and fastest_on_cpu() != "bf16" and outcome.resumed < len(every):
        console.print(
            "this processor has no bf16 instructions: with dtype fp32 in the run file it takes about a fifth of the time"
        )
    with terminal.progress(console) as progress:
        bar = progress.add_task(config.name, total=len(every), completed=outcome.resumed)
        for group in groups:
            if any(job.key not in done for job in group):
                runner = _Group(group, records, pretrained, workers, progress, outcome)
                runner.run(lambda: progress.advance(bar))
    done = _known(records)
    outcome.records = [done[job.key] for job in every if job.key in done]
    return outcome


class _Group:
    """Configurations of one model on one task, which share the loaded model and what the unpatched one answered."""

    def __init__(
        self, jobs: Sequence[Job], records: Records, pretrained: bool, workers: int, progress: Progress, outcome: Outcome
    ):
        self.jobs, self.records, self.progress, self.outcome = jobs, records, progress, outcome
        self.config, self.task_name = jobs[0].config, jobs[0].task
        self.task = TASKS.get(self.task_name)
        self.options = runs_models.task_options(
            self.config, self.task_name, pretrained, workers, records.path.parent / self.task_name / slug(self.config.model)
        )
        self.model = runs_models.load_for(self.task_name, self.config, self.options)
        self.memory: BaselineCache[Any] = BaselineCache()

    def run(self, advance: Callable[[], None]) -> None:
        """Runs what nobody else is at, then what others were at and did not finish."""
        done = _known(self.records)
        waiting = [job for job in self.jobs if job.key not in done]
        while waiting:
            held = []
            for job in waiting:
                with self._claimed(job) as state:
                    if state == _MINE:
                        self._try(job)
                if state == _HELD:
                    held.append(job)
                else:
                    advance()
            if len(held) == len(waiting):
                time.sleep(_WAIT)
            waiting = held

    @contextmanager
    def _claimed(self, job: Job) -> Iterator[str]:
        """Whether a configuration is this run's to do, held by another start, or done; the same in all processes of the run."""
        state, lock = None, FileLock(self.records.path.parent / ".running" / f"{job.key}.lock")
        try:
            if current().rank == 0:
                try:
                    lock.acquire(blocking=False)
                except Timeout:  # an OSError too: another start has it
                    state = _HELD
                except OSError as error:
                    raise ConfigError(f"{lock.lock_file} cannot be written: {reason(error)}") from error
                else:
                    state = _DONE if job.key in finished(self.records) else _MINE
            yield current().agree(state) or _HELD
        finally:
            lock.release()

    def _try(self, job: Job) -> None:
        try:
            record = self.measure(job)
        except VtokError as error:
            if job.setting.method is None or isinstance(error, ProcessError):
                raise
            current().share_error(error)
            self.outcome.left_out[job.title] = str(error)
            if isinstance(error, BudgetError):
                self.outcome.unmet.add(job.title)
            return
        if current().rank == 0:
            base = finished(self.records).get(self.jobs[0].key)
            self.records.extend([record, *runs_records.with_cost(base, record)])

    def measure(self, job: Job) -> dict[str, Any]:
        """The record of one configuration, measured beside the unpatched model."""
        started = time.time()
        unpatched = job.setting.method is None
        base = _known(self.records).get(self.jobs[0].key)
        prompt = None if base is None else runs_models.prompt_of(base, runs_models.network(self.model))
        setting = runs_models.resolved_setting(job.setting, self.model, None if unpatched else self._calibration, prompt)
        bar = self.progress.add_task(f"  {job.title}", total=None)
        try:
            found = self.task(
                self.model,
                self.config.data[job.task],
                [None] if unpatched else [None, setting],
                self.options,
                lambda done, total: self.progress.update(bar, completed=done, total=total),
                **({"memory": self.memory} if "memory" in inspect.signature(self.task).parameters else {}),
            )[-1]
        finally:
            self.progress.remove_task(bar)
        extra: dict[str, Any] = {
            "key": job.key,
            "config": runs_records.resolved(job.config, job.task, job.spec),
            "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 2),
            "processes": current().world,
        }
        if isinstance(self.model, VisionLanguageModel):
            sides = {"base": Setting()} if unpatched else {"base": Setting(), "patched": setting}
            extra["kernel"] = {side: runs_models.prompt_kernel(self.model, one) for side, one in sides.items()}
        return runs_records.complete(found, job.config, job.task, job.setting, extra)

    @cached_property
    def _calibration(self) -> Any:
        """Calibration inputs, made when the first setting may want them."""
        return runs_models.calibration_for(self.task_name, self.config, self.model, self.options)


def _others(records: Records, jobs: Sequence[Job], done: Mapping[str, Any]) -> list[str]:
    """Titles of configurations without a record that the file has one of under another key: what they read has changed."""
    held = [record.get("config") for record in finished(records).values()]
    return [job.title for job in jobs if job.key not in done and runs_records.resolved(job.config, job.task, job.spec) in held]


def slug(name: str) -> str:
    """A model's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "model"


def with_data(config: RunConfig, data: Path | None) -> RunConfig:
    """The run on other data, for all of its tasks."""
    if data is None:
        return config
    content = {**config.content, "data": str(data)}  # from which the points of a sweep are made
    return replace(config, data=dict.fromkeys(config.tasks, str(data)), content=content)


def _opened(out: Path) -> Records:
    try:
        (out / ".running").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"results cannot be written to {out}: {reason(error)}") from error
    writable(out / RESULTS)
    return Records(out / RESULTS)


def _known(records: Records, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """`finished` as the main process sees it, in all processes."""
    return current().agree(finished(records, console) if current().rank == 0 else {})


def finished(records: Records, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """key -> newest record; damaged lines are reported on a console, if there is one."""
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        found = {key: record for key, record in records.by_key().items() if runs_records.whole(record)}
    if console is not None:
        for warning in damaged:
            console.print(str(warning.message), style=terminal.WARNING)
    return found


def all_records(out: Path) -> list[dict[str, Any]]:
    """The newest record of every configuration in a folder of results, whichever start measured it; what was measured again,
    because its data or weights had changed, stands there once."""
    newest = {json.dumps(record.get("config", key), sort_keys=True): record for key, record in finished(_opened(out)).items()}
    return list(newest.values())
