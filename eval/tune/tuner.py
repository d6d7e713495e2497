"""Searches the schedule of a method at a FLOPs budget on a small calibration set, and compares it with the default on others.

Every candidate costs what the default costs, or up to half a percent of the model's FLOPs less. What has been drawn and scored
is in `search.journal` at once: a second start goes on with the candidate that the first was stopped at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from optuna.trial import Trial
from torch import Tensor, nn

from vtok.config import MethodConfig
from vtok.errors import ConfigError
from vtok.eval.common.records import key_of
from vtok.eval.common.settings import model_name, versions
from vtok.eval.options import Plan
from vtok.eval.tune.samples import Samples, digest, in_memory
from vtok.eval.tune.score import Values, loss
from vtok.eval.tune.search import Search, TrialRandom, stages
from vtok.eval.tune.subjects import DRAWS, Encoder, Subject, at_budget
from vtok.registry import METHODS
from vtok.writing import writable

SETTINGS = ("unpatched", "default", "tuned")  # that are compared on held-out samples
DIGITS = 7  # of stored measures: a resumed search must see exactly what the first one saw
JOURNAL = "search.journal"

Progress = Callable[[str, int, int], None]  # (what is going on, done, in all); counts samples


@dataclass(frozen=True)
class Candidate:
    """A schedule.

    Attributes:
        config: of the method.
        fraction: of the unpatched model's FLOPs that it needs, on the calibration set where it depends on the image.
        point: of the search space; `None` = the default.
        samples: of the calibration set that it has seen: all, unless it was dropped.
        loss: on these, the smaller the better; what comes later breaks ties.
    """

    config: MethodConfig
    fraction: float
    point: dict[str, Any] | None = None
    samples: int = 0
    loss: tuple[float, ...] = ()


@dataclass(frozen=True)
class Held:
    """A setting on held-out samples: measure -> [samples], and its `tokens`, `gmacs`, `implied_speedup`."""

    values: Values
    cost: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        candidates: all, the default first.
        held_out: "unpatched", "default" and "tuned" -> what they do on held-out samples; empty without any.
        resumed: candidates that an earlier start had finished.
    """

    candidates: list[Candidate]
    held_out: dict[str, Held]
    resumed: int = 0

    @property
    def best(self) -> int:
        """Number of the candidate that won on all calibration samples; 0 = the default, which wins a tie."""
        most = self.candidates[0].samples
        return min((i for i, one in enumerate(self.candidates) if one.samples == most), key=lambda i: self.candidates[i].loss)

    @property
    def winner(self) -> MethodConfig:
        """The setting that won."""
        return self.candidates[self.best].config


class Tuning:
    """One search, with `search.journal` in the folder `out`; without `held_out` samples nothing is compared at the end."""

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        calibration: Samples,
        held_out: Samples | None,
        out: Path,
        progress: Progress | None = None,
    ):
        self.subject, self.calibration, self.held_out, self.out = subject, calibration, held_out, out
        self.plan = replace(plan, objective=plan.objective or subject.objective)
        self.stages = stages(plan.search, len(calibration), plan.eta)  # refuses what makes no sense, now
        self._progress, self._done = progress, 0
        self._base: dict[str, Tensor] = {}
        self._searched = (plan.candidates + 1) * len(calibration)
        self.total = self._searched + (len(SETTINGS) * len(held_out) if held_out is not None else 0)
        self._common = {**subject.identity, "dtype": str(next(subject.patched.parameters()).dtype), "vtok": versions()["vtok"]}

    def run(self) -> Tuned:
        """Searches and compares, or goes on with it.

        Raises:
            ConfigError: nothing can be searched, the objective cannot be had, or another start is at work in the folder.
            BudgetError: the default cannot meet the budget.
        """
        if not self.subject.space():
            given = ", ".join(f"{name}={value}" for name, value in self.subject.config.given().items()) or "the budget alone"
            raise ConfigError(f"nothing is left to search for {self.subject.config.name}: {given} fixes its schedule")
        writable(self.out / JOURNAL)
        lock = FileLock(self.out / ".search.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"another search is at work in {self.out}; wait for it, or name another folder with --out"
            ) from None
        try:
            return self._run()
        finally:
            lock.release()

    def _run(self) -> Tuned:
        plan = self.plan
        about: dict[str, Any] = {
            **self._common,
            "method": self.subject.config.to_dict(),
            "calibration": self.calibration.identity,
            **{name: getattr(plan, name) for name in ("flops", "search", "eta", "objective", "seed")},
        }
        search = Search(self.out / JOURNAL, about, plan.search, plan.eta, plan.seed)
        resumed = len(found := self._candidates(search))
        self._done = resumed * len(self.calibration)
        while len(found) < plan.candidates and (trial := self._drawn(search, found)) is not None:
            self._evaluate(search, trial)
            found = self._candidates(search)
        if len(found) < 2:
            raise ConfigError(
                f"no schedule of {self.subject.config.name} other than the default was found that costs "
                f"{found[0].fraction:.3f} of the FLOPs; try another budget"
            )
        tuned = Tuned(found[: plan.candidates], {}, resumed)
        self._done = self._searched
        if self.held_out is not None:
            for name, config in zip(SETTINGS, (None, found[0].config, tuned.winner)):
                tuned.held_out[name] = self._held(search, self.held_out, name, config)
        self._tell("done", self.total - self._done)
        return tuned

    def _tell(self, what: str, samples: int = 0) -> None:
        self._done += samples
        if self._progress is not None:
            self._progress(what, min(self._done, self.total), self.total)

    def _candidates(self, search: Search) -> list[Candidate]:
        """What the journal says of the candidates so far, the default first."""
        found = []
        for trial in search.trials():
            seen = [stop for stop in self.stages if _seen(stop) in trial.user_attrs]
            if "method" in trial.user_attrs and seen:
                config, fraction, point = (trial.user_attrs[name] for name in ("method", "fraction", "point"))
                lost = loss(self.plan.objective, self._values(trial.user_attrs, seen[-1]))
                found.append(Candidate(_config(config), fraction, point, seen[-1], lost))
        return found

    def _drawn(self, search: Search, found: list[Candidate]) -> Trial | None:
        """The next candidate: the default, then points that meet its cost with a setting of their own.

        `None` after `DRAWS` points without success, of earlier starts too: the space holds no more.
        """
        self._tell(f"drawing candidate {len(found)}")
        if not found:
            return self._kept(search.ask(), None, *self.subject.default(self.plan.flops))
        space, taken = self.subject.space(), [one.config for one in found]
        while True:
            missed = [trial for trial in search.trials()[-DRAWS:] if "method" not in trial.user_attrs]
            if len(missed) == DRAWS:
                return None
            trial = search.ask()
            point = {name: space[name].draw(TrialRandom(trial, name)) for name in sorted(space)}
            priced = at_budget(self.subject, point, found[0].fraction, taken)
            if priced is not None:
                return self._kept(trial, point, *priced)
            search.finish(trial)

    def _kept(self, trial: Trial, point: Any, config: MethodConfig, fraction: float) -> Trial:
        for name, value in (("point", point), ("fraction", fraction), ("method", config.to_dict())):
            trial.set_user_attr(name, value)
        return trial

    def _evaluate(self, search: Search, trial: Trial) -> None:
        """Shows a candidate one stage of samples after the other, as long as it is among the best; the default sees all."""
        title = "default" if trial.user_attrs["point"] is None else f"candidate {len(self._candidates(search))}"
        config, start = _config(trial.user_attrs["method"]), 0
        measures: dict[str, Any] = {}
        for stage, stop in enumerate(self.stages):
            self._tell(title)
            values, _ = self._pass(self.calibration, config, start, stop, title)
            measures[_seen(stop)] = _plain(values)
            trial.set_user_attr(_seen(stop), measures[_seen(stop)])
            self._tell(title, stop - start)
            lost = loss(self.plan.objective, self._values(measures, stop))[0]
            goes_on = search.report(trial, stage, lost)
            if stop == len(self.calibration):
                search.finish(trial, lost)
            elif not goes_on and trial.user_attrs["point"] is not None:
                search.finish(trial)
                self._tell(title, len(self.calibration) - stop)  # what it need not see
                break
            start = stop

    def _values(self, attributes: dict[str, Any], stop: int) -> dict[str, np.ndarray]:
        """Measures of a candidate on the first `stop` samples."""
        parts = [attributes[_seen(one)] for one in self.stages if one <= stop]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _held(self, search: Search, samples: Samples, name: str, config: MethodConfig | None) -> Held:
        title, method = f"{name} on held-out samples", None if config is None else config.to_dict()
        key = "held out " + key_of({"method": method, "data": samples.identity})
        self._tell(title)
        if key not in search.study.user_attrs:
            values, cost = self._pass(samples, config, 0, len(samples), title)
            search.study.set_user_attr(key, {"values": _plain(values), "cost": cost})
        self._tell(title, len(samples))
        record = search.study.user_attrs[key]
        return Held({measure: np.asarray(value) for measure, value in record["values"].items()}, record["cost"])

    def _pass(
        self, samples: Samples, config: MethodConfig | None, start: int, stop: int, title: str
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(measures, costs) of the samples start..stop under a setting."""
        base, size = self._unpatched(samples), self.plan.batch_size
        model = self.subject.apply(config)
        found: list[dict[str, np.ndarray]] = []
        costs, counts, row = [], [], start
        try:
            for inputs, labels in samples.read(start, stop, size):
                outputs = self.subject.outputs(model, inputs)
                found.append(self.subject.values(outputs, base[row : row + len(outputs)], labels))
                costs.append(self.subject.cost(model))
                counts.append(len(outputs))
                row += len(outputs)
                self._tell(title)
        finally:
            self.subject.apply(None)
        values = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
        return values, self.subject.cost_fields(costs, counts)

    def _unpatched(self, samples: Samples) -> Tensor:
        """[S, K]: outputs of the unpatched model for all samples; computed once."""
        if samples.identity not in self._base:
            parts, model = [], self.subject.apply(None)
            for inputs, _ in samples.read(0, len(samples), self.plan.batch_size):
                parts.append(self.subject.outputs(model, inputs).float().cpu())
                self._tell("unpatched outputs", len(parts[-1]) if samples is self.calibration else 0)
            self._base[samples.identity] = torch.cat(parts)
        return self._base[samples.identity]


def tune(
    model: nn.Module,
    method: str | MethodConfig,
    flops: float,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    held_out: tuple[Tensor, Tensor | None] | None = None,
    out: str | os.PathLike,
    progress: Progress | None = None,
    **plan: Any,
) -> Tuned:
    """`vtok tune` on tensors: any vision encoder that vtok patches, classifier or not.

    Args:
        model: unpatched, in eval mode; it returns class scores or one embedding an image.
        method: name or config object; parameters that are set stay as they are.
        flops: share of the unpatched model's FLOPs to leave.
        images: [S, C, H, W] as the model takes them, in random order.
        labels: [S] int64; without them objectives that need none can be used.
        held_out: other images and their labels, or `None`, to compare default and winner on.
        out: folder for `search.journal`; a second call with the same arguments goes on where the first was stopped.
        progress: called with (what, samples done, samples in all).
        **plan: fields of `Plan`: search, candidates, eta, objective, seed, batch_size.

    Returns:
        What was found; `vtok.patch(model, tuned.winner)` takes it.

    Raises:
        ConfigError, UnsupportedModelError, BudgetError: see `Tuning`.
    """
    channels, height, width = images.shape[1:]
    config = METHODS.get(method)() if isinstance(method, str) else method
    samples = in_memory("images", images, labels, digest(images))
    other = None if held_out is None else in_memory("held-out images", *held_out, digest(held_out[0]))
    subject = Encoder(model, model_name(model), config, samples, (channels, height, width))
    return Tuning(subject, Plan(flops, **plan), samples, other, Path(out), progress).run()


def _seen(stop: int) -> str:
    """The attribute of a trial that holds its measures on the stage that ends at a number of samples."""
    return f"measures up to {stop}"


def _config(values: dict[str, Any]) -> MethodConfig:
    return METHODS.get(values["method"]).from_dict(values)


def _plain(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.{DIGITS}g}") for value in column.tolist()] for name, column in values.items()}
