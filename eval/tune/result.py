"""How a search is to go, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from vtok.config import MethodConfig
from vtok.eval.common.checked import MOST, Count, Seed, Share, check_fields
from vtok.eval.tune.score import Values

SETTINGS = ("unpatched", "default", "tuned")  # that are compared on held-out samples


@dataclass(frozen=True)
class Plan:
    """How to search.

    Attributes:
        flops: share of the unpatched model's FLOPs to leave.
        search: "tpe" learns from earlier candidates, "halving" and "random" do not, and "random" drops none early.
        candidates: how many schedules, the default among them.
        eta: of successive halving: the best 1 / eta go on.
        objective: "kl", "agreement", "accuracy", "cross_entropy" or "distance"; "" = kl, of embeddings distance.
        seed: of the candidates.
        batch_size: samples in a forward pass.

    Raises:
        ConfigError: a value of another type, or beyond its limits.
    """

    flops: Share
    search: str = "tpe"
    candidates: Annotated[int, Field(ge=2, le=MOST)] = 48
    eta: Annotated[int, Field(ge=2, le=MOST)] = 3
    objective: str = ""
    seed: Seed = 0
    batch_size: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)


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
