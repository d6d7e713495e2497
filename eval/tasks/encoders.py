"""What tasks about image encoders share: every setting on the same batches beside the unpatched model, its costs and times.

Shapes: b readable images of a batch, n of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.common.distributed import current
from vtok.eval.common.settings import (
    TYPES,
    PassCost,
    Setting,
    mean_cost,
    method_name,
    pass_cost,
    resolved_params,
    versions,
    weight_sharing_copy,
)
from vtok.eval.common.statistics import mean_stderr, paired_difference
from vtok.eval.common.timing import BaselineCache, PairedTimer
from vtok.eval.tasks.image_folder import Batch, CheckedImages, Unreadable, check_same_work
from vtok.targets.resolve import Size, run_of

T = TypeVar("T")
Progress = Callable[[int, int], None]


class Passes(Generic[T]):
    """What one setting made of the images, a result for each batch of which something could be read, and what that cost."""

    def __init__(self, model: nn.Module, setting: Setting):
        self.model, self.setting = model, setting
        run = run_of(model)
        self._adapts = run is not None and any(not reducer.exact for _, reducer in run.patch.steps.values())
        self._known = False
        self.results: list[T] = []
        self._costs: list[PassCost] = []
        self._images: list[int] = []
        self.times: dict[str, Any] = {}

    def passed(self, size: Size) -> PassCost | None:
        """What the pass cost that the model has just made; `None` where that is known already, or for an unknown tower."""
        if self._known and not self._adapts:
            return None
        self._known = True
        try:
            return pass_cost(self.model, size)
        except UnsupportedModelError:  # it could not have been patched either
            return None

    def add(self, result: T, cost: PassCost | None, images: int) -> None:
        self.results.append(result)
        if cost is not None and (self._adapts or not self._costs):
            self._costs.append(cost)
            self._images.append(images)

    @property
    def cost(self) -> PassCost | None:
        """Mean over the images; `None` for an unpatched model that vtok knows no tower of."""
        return mean_cost(self._costs, self._images) if self._costs else None

    def fields(self) -> dict[str, Any]:
        """Method, parameters, costs and times of a record; no costs for a model that vtok knows no tower of."""
        what = {"method": method_name(self.model), "setting": self.setting.title, "params": resolved_params(self.model)}
        return what | ({} if self.cost is None else self.cost.fields()) | self.times


@dataclass(frozen=True)
class Shown(Generic[T]):
    """What all settings made of the images: an entry each, that of the unpatched one, `labels` [n], files left out."""

    settings: list[Passes[T]]
    unpatched: Passes[T] | None
    labels: Tensor
    skipped: list[Unreadable]


class _Part(NamedTuple):
    """What became of one batch: its labels, results and costs of each setting (none if nothing could be read), the rest."""

    labels: Tensor
    results: list[Any]
    costs: list[PassCost | None]
    skipped: list[Unreadable]


def show(
    base: nn.Module,
    settings: Sequence[Setting],
    data: CheckedImages,
    loader: Callable[[CheckedImages], DataLoader],
    size: Size,
    options: Any,
    forward: Callable[[Any, Tensor], Tensor],
    keep: Callable[[Tensor, Batch], T],
    progress: Progress | None = None,
    memory: BaselineCache[T] | None = None,
) -> Shown[T]:
    """Shows every batch to the model under every setting, and times it. Several processes share the batches.

    Args:
        base: the unpatched model, of which each setting gets a copy that shares its weights.
        settings: what is patched.
        data: images with labels.
        loader: some of these images -> their batches.
        size: (channels, height, width) of an image.
        options: with `batch_size`, `seed`, `amp`, `amp_dtype` and maybe `channels_last`.
        forward: (model, images [b, C, H, W]) -> output; this is timed.
        keep: (output, batch) -> result.
        progress: called with (images done, images).
        memory: what earlier calls with the same model, data and options left of the unpatched model, which then runs on some
            batches only, for the clock.
    """
    found = [Passes[T](setting.apply(weight_sharing_copy(base), size), setting) for setting in settings]
    unpatched = next((i for i, setting in enumerate(settings) if setting.method is None), None)
    models, processes, own = [one.model for one in found], current(), dict[int, _Part]()
    check_same_work(processes, data, models)
    batches = loader(data.part(processes.rows(len(data), options.batch_size)))
    timer = PairedTimer(models, unpatched, len(batches), memory, processes)
    first = next(base.parameters())
    layout = torch.channels_last if getattr(options, "channels_last", False) else torch.contiguous_format
    with torch.inference_mode(), autocast(first.device, options):
        for number, batch in zip(count(processes.rank, processes.world), batches):
            own[number] = _Part(batch.labels, [], [], batch.skipped)
            if batch.images is not None:
                images = batch.images.to(first.device, first.dtype, memory_format=layout)
                results = timer.show(number, images, forward, lambda output: keep(output, batch))  # noqa: B023  # called at once
                own[number] = own[number]._replace(results=results, costs=[one.passed(size) for one in found])
            if progress is not None:
                progress(min((number + 1) * options.batch_size, len(data)), len(data))
    timer.join()
    parts = list(processes.gather(own, range(-(-len(data) // options.batch_size))).values())
    for part in parts:
        for one, result, cost in zip(found, part.results, part.costs):
            one.add(result, cost, len(part.labels))
    for i, one in enumerate(found):
        one.times = timer.fields(i, one.cost, options.seed)
    labels, skipped = torch.cat([part.labels for part in parts]), [one for part in parts for one in part.skipped]
    return Shown(found, None if unpatched is None else found[unpatched], labels, skipped)


def unpatched_only(net: nn.Module) -> None:
    """Raises `ConfigError` for a model that is patched already."""
    if run_of(net) is not None:
        raise ConfigError("evaluate patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")


def autocast(device: torch.device, options: Any) -> AbstractContextManager:
    """As the options ask for it."""
    return torch.autocast(device.type, TYPES[options.amp_dtype]) if options.amp else nullcontext()


def described(base: nn.Module, size: Size, n: int, skipped: Sequence[Unreadable], options: Any) -> dict[str, Any]:
    """Fields that all records of a run share, of the model as it was run and of `n` scored images."""
    first = next(base.parameters())
    return {
        "split": options.split,
        "n": n,
        "img_size": size[-1],
        "param_count": round(sum(p.numel() for p in base.parameters()) / 1e6, 2),
        "batch_size": options.batch_size,
        "dtype": options.amp_dtype + " autocast" if options.amp else str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "seed": options.seed,
        "versions": versions(),
        "num_skipped": len(skipped),
        "skipped": [one._asdict() for one in skipped],
    }


def compared(hits: np.ndarray, before: np.ndarray, same: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """Metrics of hits [n] against the unpatched model: paired `difference` with error and interval, `agreement`."""
    difference, error = mean_stderr(hits - before)
    return {
        "difference": scale * difference,
        "difference_stderr": scale * error,
        "difference_ci": paired_difference(hits - before).scaled(scale).ends,
        "agreement": scale * float(same.double().mean()),
    }
