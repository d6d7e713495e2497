"""Throughput of the batches that a task ran, in each process and in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One timed batch of one model."""

    number: int  # of the batch
    samples: int  # in it
    seconds: float  # that it took
    cold: bool  # whether it was the model's first in its process
    rank: int = 0  # process that ran it


def throughput(batches: Sequence[Step], world: int) -> dict[str, Any]:
    """Samples a second of every process and of all together, of all batches of a setting.

    Returns:
        `processes`: how many; `per_process`: by rank, `None` for one that had nothing to do; `total`: all samples by the time
        of the process that was busy longest, which is what the machines deliver (less than the sum where the batches do not
        come out even). The first batch of a process is left out if it has others.
    """
    samples, busy = [0] * world, [0.0] * world
    for rank in range(world):
        own = [one for one in batches if one.rank == rank]
        for one in [one for one in own if not one.cold] or own:
            samples[rank] += one.samples
            busy[rank] += one.seconds
    each = [count / taken if taken else None for count, taken in zip(samples, busy)]
    return {"processes": world, "per_process": each, "total": sum(samples) / max(busy) if any(busy) else None}


def throughput_line(title: str, record: Mapping[str, Any]) -> str | None:
    """ "tome(r=8): 80.1 samples/s in 2 processes (41.0, 40.2)", or `None` for a record of one process."""
    found = record.get("throughput")
    if found is None or found["processes"] == 1 or found["total"] is None:
        return None
    each = ", ".join("-" if rate is None else f"{rate:.1f}" for rate in found["per_process"])
    return f"{title}: {found['total']:.1f} samples/s in {found['processes']} processes ({each})"
