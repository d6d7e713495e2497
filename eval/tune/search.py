"""Drawing candidates and dropping the hopeless ones, by Optuna: its samplers, its successive halving, its journal.

Nothing here knows of models. A candidate is a trial: its parameters are what a `Dimension` drew, its value is its loss.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import optuna
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from vtok.errors import ConfigError, brief, unknown
from vtok.eval.common.records import key_of
from vtok.reading import exists

LEAST_SAMPLES = 32  # a first impression on fewer is noise
STARTUP = 10  # trials at random before the tree of Parzen estimators has something to learn from
_EDGE = 1e-6  # of the unit interval: normal numbers end at 4.75 standard deviations

# name -> (the sampler of a seed, whether candidates are dropped early)
_SEARCHES: dict[str, tuple[Callable[[int], BaseSampler], bool]] = {
    "tpe": (lambda seed: TPESampler(seed=seed, n_startup_trials=STARTUP), True),
    "halving": (lambda seed: RandomSampler(seed=seed), True),
    "random": (lambda seed: RandomSampler(seed=seed), False),
}
SEARCHES = tuple(_SEARCHES)


class TrialRandom(random.Random):
    """Random numbers that are parameters of a trial, so that a sampler sees, and may learn, what a `Dimension` draws.

    The parameters are called `name.kind.number`, with the name of the dimension.
    """

    def __init__(self, trial: Trial, name: str):
        super().__init__(0)
        self._trial, self._name, self._counts = trial, name, dict[str, int]()

    def _called(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, -1) + 1
        return f"{self._name}.{kind}.{self._counts[kind]}"

    def random(self) -> float:
        return self._trial.suggest_float(self._called("unit"), 0, 1)

    def uniform(self, a: float, b: float) -> float:
        return self._trial.suggest_float(self._called("real"), a, b)

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return NormalDist(mu, sigma).inv_cdf(self._trial.suggest_float(self._called("normal"), _EDGE, 1 - _EDGE))

    def randint(self, a: int, b: int) -> int:
        return self._trial.suggest_int(self._called("whole"), a, b)

    def choice(self, seq: Any) -> Any:
        return seq[self._trial.suggest_categorical(self._called("choice"), range(len(seq)))]

    def sample(self, population: Sequence[Any], k: int, *, counts: Any = None) -> list[Any]:
        name = self._called("first of")
        ranks = [self._trial.suggest_float(f"{name}.{i}", 0, 1) for i in range(len(population))]
        return [population[i] for i in sorted(range(len(population)), key=ranks.__getitem__)[:k]]


def stages(search: str, samples: int, eta: int = 3) -> list[int]:
    """Numbers of samples after which a candidate is looked at; the last is all of them. After a stage the best 1 / eta go on.

    Raises:
        UnknownNameError: no such search.
        ConfigError: a number is too small.
    """
    if search not in _SEARCHES:
        raise unknown("search", search, SEARCHES)
    for name, value, least in (("images", samples, 1), ("eta", eta, 2)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    found = [samples]
    while _SEARCHES[search][1] and found[0] // eta >= LEAST_SAMPLES:
        found.insert(0, found[0] // eta)
    return found


class Search:
    """A search in a journal, from which a later start goes on and ends as if it had never been stopped.

    A trial that was stopped in the middle is given up and drawn again: what is suggested follows from the seed and the finished
    trials alone. So does what is dropped: Optuna's pruner keeps notes in its study, so it has one of its own, in memory, to
    which finished trials are told again at the start. Several searches of other `identity` may share the file, one at a time.

    Raises:
        ConfigError: the file is no such journal.
    """

    def __init__(self, path: Path, identity: Any, search: str, eta: int, seed: int):
        self.eta, self._seed, (self._sampler, early) = eta, seed, _SEARCHES[search]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            _without_torn_line(path)
            storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
            self.study = optuna.create_study(storage=storage, study_name=key_of(identity), load_if_exists=True)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is no journal of a search: {brief(error)}; name another folder with --out") from error
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            self.study.tell(trial.number, state=TrialState.FAIL)
        pruner = SuccessiveHalvingPruner(min_resource=1, reduction_factor=eta) if early else NopPruner()
        self._halving = optuna.create_study(pruner=pruner)
        self._ghost = self._halving.ask()
        for trial in self.trials():
            for step, loss in sorted(trial.intermediate_values.items()):
                self._goes_on(step, loss)
            self._ghost = self._halving.ask()

    def trials(self) -> list[FrozenTrial]:
        """The trials that were finished, dropped ones among them."""
        return self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED])

    def ask(self) -> Trial:
        """A new trial."""
        self.study.sampler = self._sampler(int(key_of({"seed": self._seed, "trial": len(self.trials())})[:8], 16))
        return self.study.ask()

    def report(self, trial: Trial, stage: int, loss: float) -> bool:
        """Takes the loss of a trial at a stage; whether it is among those that go on."""
        trial.report(loss, self.eta**stage)
        return self._goes_on(self.eta**stage, loss)

    def finish(self, trial: Trial, loss: float | None = None) -> None:
        """Ends a trial: with its loss on everything, or without one that is dropped."""
        state = TrialState.PRUNED if loss is None else TrialState.COMPLETE
        self.study.tell(trial, loss, state=state)
        self._ghost = self._halving.ask()

    def _goes_on(self, step: int, loss: float) -> bool:
        self._ghost.report(loss, step)
        return not self._ghost.should_prune()


def _without_torn_line(path: Path) -> None:
    """Cuts what a killed process left half written at the end of a journal, and takes away its lock.

    Raises:
        ValueError: it is no journal, and stays as it is.
    """
    whole = path.read_bytes() if exists(path) else b""
    end = whole.rfind(b"\n") + 1
    lines = [json.loads(line) for line in whole[:end].splitlines()]
    if not all(isinstance(line, dict) and "op_code" in line for line in lines) or (whole and not whole.startswith(b"{")):
        raise ValueError("a line of it is none of Optuna's")
    if end < len(whole):
        with path.open("r+b") as file:
            file.truncate(end)
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
