"""How a search is to go, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtok.config import MethodConfig
from vtok.eval.tune.score import Values

SETTINGS = ("unpatched", "default", "tuned")  # that are compared on held-out samples


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
