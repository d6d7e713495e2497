"""How a search is to go, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtok.config import MethodConfig
from vtok.eval.tune.score import Values
from vtok.eval.tune.search import Standing

SETTINGS = ("unpatched", "default", "tuned")  # that are compared on held-out samples


@dataclass(frozen=True)
class Plan:
    """How to search.

    Attributes:
        flops: share of the unpatched model's FLOPs to leave, in (0, 1].
        search: "halving" or "random"; see `vtok.eval.tune.search.rungs`.
        candidates: how many schedules, the default among them.
        eta: of halving: the best 1 / eta go on.
        objective: key of `vtok.eval.tune.score.OBJECTIVES`.
        seed: of the candidates.
        batch_size: samples in a forward pass.
    """

    flops: float
    search: str = "halving"
    candidates: int = 48
    eta: int = 3
    objective: str = "kl"
    seed: int = 0
    batch_size: int = 100


@dataclass(frozen=True)
class Candidate:
    """A schedule.

    Attributes:
        config: of the method.
        fraction: of the unpatched model's FLOPs that it needs, on the calibration set where it depends on the image.
        point: of the search space; `None` = the default.
    """

    config: MethodConfig
    fraction: float
    point: dict[str, Any] | None = None


@dataclass(frozen=True)
class Held:
    """A setting on held-out samples.

    Attributes:
        values: measure -> [samples].
        cost: `tokens`, `gmacs`, `implied_speedup`.
    """

    values: Values
    cost: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        candidates: all, the default first.
        rounds: standings after every round, best first.
        held_out: "unpatched", "default" and "tuned" -> what they do on held-out samples; empty without any.
    """

    candidates: list[Candidate]
    rounds: list[list[Standing]]
    held_out: dict[str, Held]

    @property
    def best(self) -> int:
        """Number of the candidate that won; 0 = the default."""
        return self.rounds[-1][0].candidate

    @property
    def winner(self) -> MethodConfig:
        """The setting that won."""
        return self.candidates[self.best].config
