"""Random search and successive halving (Jamieson and Talwalkar, AISTATS 2016): which candidates see how many images, and who
is left. Nothing here knows of models; a candidate is a number, and number 0 is the default, which is never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vtok.errors import ConfigError, unknown

SEARCHES = ("random", "halving")
LEAST_SAMPLES = 32  # a first impression on fewer is noise

# (candidate, start, stop) -> its loss on the samples start..stop of the calibration set and on all before; the smaller the
# better. Tuples: what comes later breaks ties.
Evaluate = Callable[[int, int, int], tuple[float, ...]]


class Rung(NamedTuple):
    """What one round of a search is to do.

    Attributes:
        samples: of the calibration set that every candidate has seen at its end.
        candidates: how many take part, without the default where it is carried along.
    """

    samples: int
    candidates: int


class Standing(NamedTuple):
    """A candidate after a round.

    Attributes:
        candidate: its number.
        samples: that it has seen.
        loss: on these.
    """

    candidate: int
    samples: int
    loss: tuple[float, ...]


def rungs(search: str, candidates: int, samples: int, eta: int = 3) -> list[Rung]:
    """The rounds of a search.

    Args:
        search: `"random"`: every candidate sees every sample; `"halving"`: after every round the best 1 / eta go on and see eta
            times as many.
        candidates: how many, the default among them.
        samples: in the calibration set.
        eta: of halving.

    Returns:
        Rounds with rising sample counts; the last has all of them.

    Raises:
        UnknownNameError: no such search.
        ConfigError: a number is too small.
    """
    for name, value, least in (("candidates", candidates, 2), ("images", samples, 1), ("eta", eta, 2)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if search == "random":
        return [Rung(samples, candidates)]
    if search != "halving":
        raise unknown("search", search, SEARCHES)
    rounds = 0
    while eta ** (rounds + 1) <= candidates and samples // eta ** (rounds + 1) >= LEAST_SAMPLES:
        rounds += 1
    return [Rung(samples // eta ** (rounds - k), math.ceil(candidates / eta**k)) for k in range(rounds + 1)]


def work(plan: Sequence[Rung]) -> int:
    """Samples that a search shows to candidates in all, at most: what a progress bar counts."""
    done, seen = 0, 0
    for rung in plan:
        extra = 0 if rung is plan[0] else 1  # the default, where it is not among the best
        done += (rung.candidates + extra) * (rung.samples - seen)
        seen = rung.samples
    return done


def search(plan: Sequence[Rung], evaluate: Evaluate) -> list[list[Standing]]:
    """Runs the rounds.

    Args:
        plan: see `rungs`.
        evaluate: see `Evaluate`; it is asked for every candidate in turn, lowest number first.

    Returns:
        The standings after every round, best first (of equals the lower number). The first of the last round is the result.
    """
    alive, seen, rounds = list(range(plan[0].candidates)), 0, []
    for rung in plan:
        alive = sorted({0, *alive[: rung.candidates]})
        standing = [Standing(i, rung.samples, evaluate(i, seen, rung.samples)) for i in alive]
        standing.sort(key=lambda one: (one.loss, one.candidate))
        rounds.append(standing)
        alive, seen = [one.candidate for one in standing], rung.samples
    return rounds
