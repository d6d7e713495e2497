"""Searches the schedule of a method at a FLOPs budget on a small calibration set, and compares it with the default on others.

Every candidate costs what the default costs, or up to half a percent of the model's FLOPs less. What has been drawn and scored
is appended to `search.ndjson` at once: a second start goes on where the first was stopped, and ends as if nothing had happened.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtok.config import MethodConfig
from vtok.errors import ConfigError
from vtok.eval.common.records import Records, key_of
from vtok.eval.common.settings import model_name, versions
from vtok.eval.tune.result import SETTINGS, Candidate, Held, Plan, Tuned
from vtok.eval.tune.samples import Samples, digest, in_memory
from vtok.eval.tune.score import loss
from vtok.eval.tune.search import rungs, search, work
from vtok.eval.tune.subjects import Encoder, Subject, candidate
from vtok.registry import METHODS

DIGITS = 7  # of stored measures: a resumed search must see exactly what the first one saw

Progress = Callable[[str, int, int], None]  # (what is going on, done, in all); counts samples


class Tuning:
    """One search.

    Args:
        subject: model and method.
        plan: how to search.
        calibration: samples to search on.
        held_out: other samples to compare on at the end; `None` = leave that out.
        out: folder of `search.ndjson`.
        progress: told what is going on.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        calibration: Samples,
        held_out: Samples | None,
        out: Path,
        progress: Progress | None = None,
    ):
        self.subject, self.plan, self.calibration, self.held_out = subject, plan, calibration, held_out
        self.rungs = rungs(plan.search, plan.candidates, len(calibration), plan.eta)  # refuses what makes no sense, now
        self.records = Records(out / "search.ndjson")
        self.known = self.records.by_key()
        self.reused = 0
        self._progress, self._done = progress, 0
        self._base: dict[str, list[Tensor]] = {}
        held = 3 * len(held_out) if held_out is not None else 0
        self.total = work(self.rungs) + len(calibration) + held
        self._common = {**subject.identity, "dtype": str(next(subject.patched.parameters()).dtype), "vtok": versions()["vtok"]}

    def run(self) -> Tuned:
        """Searches and compares, or goes on with it.

        Raises:
            ConfigError: nothing can be searched, or the objective cannot be had.
            BudgetError: the default cannot meet the budget.
        """
        if not self.subject.space():
            given = ", ".join(f"{name}={value}" for name, value in self.subject.config.given().items()) or "the budget alone"
            raise ConfigError(f"nothing is left to search for {self.subject.config.name}: {given} fixes its schedule")
        candidates = self._candidates()
        self.rungs = rungs(self.plan.search, len(candidates), len(self.calibration), self.plan.eta)
        rounds = search(self.rungs, lambda number, start, stop: self._evaluate(candidates[number], number, start, stop))
        self._done = self.total - (3 * len(self.held_out) if self.held_out is not None else 0)
        held: dict[str, Held] = {}
        if self.held_out is not None:
            best = candidates[rounds[-1][0].candidate].config
            for name, config in zip(SETTINGS, (None, candidates[0].config, best)):
                held[name] = self._held(name, config)
        self._tell("done", self.total - self._done)
        return Tuned(candidates, rounds, held)

    def _tell(self, what: str, samples: int = 0) -> None:
        self._done += samples
        if self._progress is not None:
            self._progress(what, min(self._done, self.total), self.total)

    def _stored(self, identity: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of an identity, made and appended if it is not there."""
        key = key_of({**self._common, **identity})
        if key in self.known:
            self.reused += 1
        else:
            record = {"key": key, "kind": identity["kind"], **make()}
            self.records.append(record)
            self.known[key] = record
        return self.known[key]

    def _candidates(self) -> list[Candidate]:
        """The default, then what was drawn; fewer than asked for if the space holds no more."""
        about = {
            "method": self.subject.config.to_dict(),
            "flops": self.plan.flops,
            "seed": self.plan.seed,
            "calibration": self.calibration.identity,
        }
        found: list[Candidate] = []
        for number in range(self.plan.candidates):
            self._tell(f"drawing candidate {number}")

            def make(number: int = number) -> dict[str, Any]:
                if not found:
                    config, fraction = self.subject.default(self.plan.flops)
                    return {"candidate": 0, "method": config.to_dict(), "fraction": fraction, "point": None}
                taken = [one.config for one in found]
                drawn = candidate(self.subject, number, self.plan.seed, found[0].fraction, taken)
                if drawn is None:
                    return {"candidate": number, "method": None}
                point, (config, fraction) = drawn
                return {"candidate": number, "method": config.to_dict(), "fraction": fraction, "point": dict(point)}

            record = self._stored({"kind": "candidate", "number": number, **about}, make)
            if record["method"] is None:
                break
            found.append(Candidate(_config(record["method"]), record["fraction"], record["point"]))
        if len(found) < 2:
            raise ConfigError(
                f"no schedule of {self.subject.config.name} other than the default was found that costs "
                f"{found[0].fraction:.3f} of the FLOPs; try another budget"
            )
        return found

    def _evaluate(self, one: Candidate, number: int, start: int, stop: int) -> tuple[float, ...]:
        """The loss of a candidate on the first `stop` samples, of which it has seen `start`."""
        title = "default" if number == 0 else f"candidate {number}"
        self._scores(one.config, start, stop, title)
        seen = [record for record in (self._chunk(one.config, *span) for span in self._spans(stop)) if record is not None]
        values = {name: np.concatenate([record["values"][name] for record in seen]) for name in seen[0]["values"]}
        return loss(self.plan.objective, values)

    def _spans(self, stop: int) -> list[tuple[int, int]]:
        """The stretches in which the samples up to `stop` are shown."""
        ends = [0, *(rung.samples for rung in self.rungs if rung.samples <= stop)]
        return list(itertools.pairwise(ends))

    def _identity(self, config: MethodConfig, start: int, stop: int) -> dict[str, Any]:
        return {"kind": "scores", "method": config.to_dict(), "data": self.calibration.identity, "start": start, "stop": stop}

    def _chunk(self, config: MethodConfig, start: int, stop: int) -> dict[str, Any] | None:
        return self.known.get(key_of({**self._common, **self._identity(config, start, stop)}))

    def _scores(self, config: MethodConfig, start: int, stop: int, title: str) -> None:
        self._tell(title)

        def make() -> dict[str, Any]:
            values, _ = self._pass(self.calibration, config, start, stop, title)
            return {"method": config.to_dict(), "start": start, "stop": stop, "values": _plain(values)}

        self._stored(self._identity(config, start, stop), make)
        self._tell(title, stop - start)

    def _held(self, name: str, config: MethodConfig | None) -> Held:
        assert self.held_out is not None
        samples, title = self.held_out, f"{name} on held-out samples"
        self._tell(title)

        def make() -> dict[str, Any]:
            values, cost = self._pass(samples, config, 0, len(samples), title)
            return {"method": None if config is None else config.to_dict(), "values": _plain(values), "cost": cost}

        method = None if config is None else config.to_dict()
        record = self._stored({"kind": "held out", "method": method, "data": samples.identity}, make)
        self._tell(title, len(samples))
        return Held({key: np.asarray(value) for key, value in record["values"].items()}, record["cost"])

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
            self._base[samples.identity] = [torch.cat(parts)]
        return self._base[samples.identity][0]


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
        out: folder for `search.ndjson`; a second call with the same arguments goes on where the first was stopped.
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
    wanted = Plan(flops, **{"objective": subject.objective, **plan})
    return Tuning(subject, wanted, samples, other, Path(out), progress).run()


def _config(values: dict[str, Any]) -> MethodConfig:
    return METHODS.get(values["method"]).from_dict(values)


def _plain(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.{DIGITS}g}") for value in column.tolist()] for name, column in values.items()}
