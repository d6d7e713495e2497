"""Several models on the same batches: how long each takes, and what the unpatched one need not compute again.

Every patched batch that is timed has an unpatched partner from the same moment, so that a machine that slows down for a while
slows both. Settings that are measured one after the other share a `BaselineCache`: the unpatched model then runs on every few
batches for the clock alone, and what it made of the others is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vtok.errors import UnsupportedModelError
from vtok.eval.benchmarks.throughput import compare, synchronise
from vtok.eval.common.distributed import Processes
from vtok.eval.common.settings import PassCost, towers
from vtok.targets.kernels import attention_kernels

T = TypeVar("T")
TIMED_EVERY = 4  # batches, where what the unpatched model makes of them is known already
FEWEST_PAIRS = 6  # timed more often than that where there are few batches
_PROBED = 2  # images that show which attention kernels run


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


class BaselineCache(Generic[T]):
    """What the unpatched model made of every batch of one model, one data set and one batch size."""

    def __init__(self) -> None:
        self.outputs: dict[int, T] = {}  # number of the batch -> result


class PairedTimer(Generic[T]):
    """Shows batches to models and times them.

    Args:
        models: all of them.
        unpatched: which one is the unpatched model; `None` = none.
        batches: how many there will be in this process.
        memory: of the unpatched model; it is filled here.
        processes: of the run; each paces its own batches.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        unpatched: int | None,
        batches: int,
        memory: BaselineCache[T] | None = None,
        processes: Processes | None = None,
    ):
        self.models, self.unpatched, self.memory = models, unpatched, memory
        self.processes = processes or Processes()
        self.every = max(1, min(TIMED_EVERY, batches // FEWEST_PAIRS))
        self.steps: list[list[Step]] = [[] for _ in models]
        self.kernels: list[str | None] = [None for _ in models]

    def show(
        self, number: int, images: Tensor, forward: Callable[[Any, Tensor], Tensor], keep: Callable[[Tensor], T]
    ) -> list[T]:
        """Results of all models for one batch.

        Args:
            number: of the batch among those of all processes, from 0.
            images: [B, ...].
            forward: (model, images) -> output; this is timed.
            keep: output -> result; this is not.
        """
        found: list[T] = []
        for i, model in enumerate(self.models):
            known = self.memory.outputs.get(number) if self.memory is not None and i == self.unpatched else None
            if known is not None and len(self.models) > 1 and number // self.processes.world % self.every:
                found.append(known)
                continue
            if not self.steps[i]:
                self.kernels[i] = kernels(model, lambda: forward(model, images[:_PROBED].clone()))  # noqa: B023  # called at once
            synchronise(images.device)
            start = time.perf_counter()
            output = forward(model, images)
            synchronise(images.device)
            seconds = time.perf_counter() - start
            self.steps[i].append(Step(number, len(images), seconds, not self.steps[i], self.processes.rank))
            found.append(keep(output) if known is None else known)
            if self.memory is not None and i == self.unpatched:
                self.memory.outputs[number] = found[-1]
        return found

    def join(self) -> None:
        """Takes the times of all processes together; each must call it after its last batch."""
        parts = self.processes.all((self.steps, self.kernels))
        for i in range(len(self.models)):
            self.steps[i] = sorted(step for steps, _ in parts for step in steps[i])
            self.kernels[i] = next((kernels[i] for _, kernels in parts if kernels[i] is not None), None)

    def fields(self, i: int, cost: PassCost | None, seed: int = 0) -> dict[str, Any]:
        """Timing fields of a model's record: `kernel`, `samples_per_sec` and `step_time_ms` (medians, of one process),
        `throughput` (see there), and beside the unpatched model `speedup`, `achieved`, their intervals, `pairs`.

        The first batch of each and smaller last ones are left out if there are others.

        Args:
            i: which model.
            cost: of its passes; `None` = unknown, nothing can be achieved then.
            seed: of the bootstrap.
        """
        if self.unpatched is None or i == self.unpatched:
            own = _usable([(step, step) for step in self.steps[i]])
            if not own:
                return {}
            side = "base" if i == self.unpatched else "patched"
            median = float(np.median([step.seconds for step, _ in own]))
            return {
                "kernel": {side: self.kernels[i]},
                "samples_per_sec": {side: own[0][0].samples / median},
                "step_time_ms": {side: 1000 * median},
                "throughput": throughput(self.steps[i], self.processes.world),
            }
        base = {step.number: step for step in self.steps[self.unpatched]}
        pairs = _usable([(base[step.number], step) for step in self.steps[i] if step.number in base])
        if not pairs:
            return {}
        times = [step.seconds for step, _ in pairs], [step.seconds for _, step in pairs]
        found = compare(*times, 1.0 if cost is None else cost.implied_speedup, pairs[0][1].samples, seed)
        if cost is None:
            found = {name: value for name, value in found.items() if not name.startswith(("achieved", "verdict"))}
        kernels = {"base": self.kernels[self.unpatched], "patched": self.kernels[i]}
        rates = throughput(self.steps[i], self.processes.world)
        return found | {"kernel": kernels, "pairs": len(pairs), "throughput": rates}


def kernels(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Attention kernels of a model's towers with their number of blocks, "flash (cpu) x12"; `None` where vtok knows no tower.
    `forward` runs it once; random numbers that this takes are given back."""
    try:
        blocks = [block.module for _, tower in towers(model) for block in tower.blocks]
    except UnsupportedModelError:
        return None
    return named_kernels(blocks, forward)


def named_kernels(blocks: Sequence[nn.Module], forward: Callable[[], Any]) -> str:
    """The same for given blocks."""
    cuda = {p.device for block in blocks for p in block.parameters() if p.is_cuda}
    # in inference mode torch does not say which kernel an attention was made of
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.no_grad():
        names = attention_kernels(blocks, forward)
    return ", ".join(f"{name} x{names.count(name)}" for name in dict.fromkeys(names))


def _usable(pairs: Sequence[tuple[Step, Step]]) -> list[tuple[Step, Step]]:
    """Pairs of warm, full batches, as far as there are some."""
    largest = max((own.samples for _, own in pairs), default=0)
    full = [pair for pair in pairs if pair[1].samples == largest]
    return [pair for pair in full if not (pair[0].cold or pair[1].cold)] or full
