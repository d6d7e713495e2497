"""What zero-shot classification and retrieval share: flags, batches, and every setting's image features on the same batches.

Shapes: n readable images, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.common.distributed import current
from vtok.eval.common.settings import (
    TYPES,
    PassCost,
    Setting,
    dtype_of,
    evaluating,
    mean_cost,
    method_name,
    pass_cost,
    resolved_params,
    to_device,
    versions,
    weight_sharing_copy,
)
from vtok.eval.common.timing import BaselineCache, PairedTimer
from vtok.eval.models.clip import DualEncoder, load_clip
from vtok.eval.options import ClipOptions
from vtok.eval.runs.again import run_file
from vtok.eval.tasks.image_folder import CheckedImages, Unreadable, check_same_work, collate
from vtok.targets.resolve import Size, run_of

Progress = Callable[[int, int], None]


class _Part(NamedTuple):
    """What became of one batch: its labels, features and costs of each setting, and what was left out."""

    labels: Tensor
    features: list[Tensor]
    costs: list[list[PassCost]]
    skipped: list[Unreadable]


class Embedded:
    """What one setting made of the images, and what its passes cost."""

    def __init__(self, model: nn.Module, setting: Setting):
        self.model, self.setting = model, setting
        self.parts: list[Tensor] = []
        self.costs: list[PassCost] = []
        self.times: dict[str, Any] = {}

    @property
    def features(self) -> Tensor:
        """[n, D] of unit length, on the CPU."""
        return torch.cat(self.parts)

    @property
    def cost(self) -> PassCost | None:
        """Of the image tower, mean over the images; `None` for an unpatched model that vtok knows no tower of."""
        return mean_cost(self.costs, [len(part) for part in self.parts]) if self.costs else None

    def fields(self) -> dict[str, Any]:
        """Method, parameters, costs and times of the image tower; no costs for a model that vtok knows no tower of."""
        what = {"method": method_name(self.model), "setting": self.setting.title, "params": resolved_params(self.model)}
        return what | ({} if self.cost is None else self.cost.fields()) | self.times


@dataclass(frozen=True)
class Features:
    """All settings on all images.

    Attributes:
        encoder: the unpatched model as it was run, for texts.
        settings: one entry a setting.
        unpatched: the entry of the unpatched setting, or `None`.
        labels: [n] int64.
        common: fields that all records share.
    """

    encoder: DualEncoder
    settings: list[Embedded]
    unpatched: Embedded | None
    labels: Tensor
    common: dict[str, Any]


def run(
    model: str | DualEncoder,
    data: CheckedImages,
    settings: Sequence[Any],
    options: ClipOptions,
    progress: Progress | None,
    texts: Callable[[DualEncoder], Tensor],
    memory: BaselineCache[Tensor] | None = None,
) -> tuple[Features, Tensor]:
    """Embeds every image under every setting, and the task's texts once: no method touches the text tower.

    Args:
        model: a name (see `load_clip`) or an unpatched model, which is left as it is.
        data: images with a number or class each.
        settings: each `None` (unpatched), a method, (method, parameters), or a `Setting`.
        options: see `ClipOptions`.
        progress: called with (images done, images).
        texts: encoder -> features of the texts.
        memory: what earlier calls with the same model, data and options left of the unpatched model, which then runs on some
            batches only, for the clock.

    Returns:
        (features of the images, features of the texts on the CPU).

    Raises:
        ConfigError: nothing to evaluate or to read, or a model that is patched already.
        UnsupportedModelError: a method does not work on the model.
    """
    chosen = Setting.several(settings)
    encoder = load_clip(model, options.pretrained, options.backend, options.seed) if isinstance(model, str) else model
    if run_of(encoder.net) is not None:
        raise ConfigError("evaluate patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")
    data.transform = encoder.preprocess
    processes = current()
    device = processes.device(options.device)
    with evaluating(encoder.net), torch.inference_mode():
        base = to_device(encoder.net, dtype_of(options.model_dtype), device)
        encoder = replace(encoder, net=base)
        first = next(base.parameters())
        with _autocast(first.device, options):
            found = texts(encoder).cpu()
        size = _size(data)
        embedded = [Embedded(setting.apply(weight_sharing_copy(base), size), setting) for setting in chosen]
        unpatched = next((i for i, setting in enumerate(chosen) if setting.method is None), None)
        models = [one.model for one in embedded]
        check_same_work(processes, data, models)
        batches = -(-len(processes.rows(len(data), options.batch_size)) // options.batch_size)
        timer = PairedTimer(models, unpatched, batches, memory, processes)
        labels, skipped = _embed(encoder, embedded, timer, data, size, options, progress)
    common = {
        "model": encoder.name,
        "pretrained": encoder.pretrained,
        "language": options.language,
        "backend": encoder.backend,
        "split": options.split,
        "n": len(labels),
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
    for i, one in enumerate(embedded):
        one.times = timer.fields(i, one.cost, options.seed)
    return Features(encoder, embedded, None if unpatched is None else embedded[unpatched], labels, common), found


def repeated(task: str, features: Features, one: Embedded, data: Any, options: ClipOptions) -> dict[str, Any]:
    """`config` of a record: the run file that repeats it, if names say it all.

    Args:
        task: name.
        features: of the evaluation.
        one: setting of the record.
        data: as it was named.
        options: of the task.
    """
    encoder = features.encoder
    dtype = str(next(encoder.net.parameters()).dtype).removeprefix("torch.")
    found = run_file(task, encoder.name, encoder.backend, data, one.setting, options, dtype)
    return {} if found is None else {"config": found}


def _embed(
    encoder: DualEncoder,
    embedded: Sequence[Embedded],
    timer: PairedTimer[Tensor],
    data: CheckedImages,
    size: Size,
    options: ClipOptions,
    progress: Progress | None,
) -> tuple[Tensor, list[Unreadable]]:
    """Shows every batch to every setting; returns the labels of what could be read, and what could not."""
    first = next(encoder.net.parameters())
    processes, own = timer.processes, dict[int, _Part]()
    mine = data.part(processes.rows(len(data), options.batch_size))
    loader = DataLoader(mine, options.batch_size, num_workers=options.workers, collate_fn=collate)
    with _autocast(first.device, options):
        for number, batch in zip(count(processes.rank, processes.world), loader):
            own[number] = _Part(batch.labels, [], [], batch.skipped)
            if batch.images is not None:
                images = batch.images.to(first.device, first.dtype)
                shown = timer.show(number, images, encoder.encode_image, Tensor.cpu)
                costs = [_cost(one.model, size) for one in embedded]
                own[number] = _Part(batch.labels, shown, costs, batch.skipped)
            if progress is not None:
                progress(min((number + 1) * options.batch_size, len(data)), len(data))
    timer.join()
    parts = processes.gather(own, range(-(-len(data) // options.batch_size))).values()
    for part in parts:
        for one, features, passes in zip(embedded, part.features, part.costs):
            one.parts.append(features)
            one.costs += passes
    return torch.cat([part.labels for part in parts]), [one for part in parts for one in part.skipped]


def _cost(model: nn.Module, size: Size) -> list[PassCost]:
    try:
        return [pass_cost(model, size)]
    except UnsupportedModelError:  # it could not have been patched either
        return []


def _size(data: CheckedImages) -> Size:
    """(channels, height, width) of the first image that can be read."""
    first: Any = None
    for row in range(len(data)):
        first = data[row]
        if not isinstance(first, Unreadable):
            channels, height, width = first.image.shape
            return channels, height, width
    raise ConfigError(f"none of the {len(data)} images could be read; the last: {first.file}: {first.reason}")


def _autocast(device: torch.device, options: ClipOptions) -> AbstractContextManager:
    return torch.autocast(device.type, TYPES[options.amp_dtype]) if options.amp else nullcontext()
