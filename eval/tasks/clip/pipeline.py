"""What zero-shot classification and retrieval share: every setting embeds the same batches of images, and is scored.

Shapes: n readable images, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vtok.errors import ConfigError
from vtok.eval.common.distributed import current
from vtok.eval.common.records import bits, finite
from vtok.eval.common.settings import Setting, dtype_of, evaluating, to_device
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.clip import DualEncoder, load_clip
from vtok.eval.options import ClipOptions
from vtok.eval.runs.again import run_file
from vtok.eval.tasks import RECORDED
from vtok.eval.tasks.encoders import Progress, autocast, described, show, unpatched_only
from vtok.eval.tasks.image_folder import CheckedImages, Unreadable, collate
from vtok.targets.resolve import Size


class Scored(Protocol):
    """What one setting scored: one hit or miss a sample, metrics alone or against the unpatched model."""

    correct: np.ndarray

    def metrics(self, base: Any) -> dict[str, Any]: ...


def run(
    model: str | DualEncoder,
    images: CheckedImages,
    data: Any,
    settings: Sequence[Any],
    options: ClipOptions,
    progress: Progress | None,
    memory: BaselineCache[Tensor] | None,
    about: dict[str, Any],
    texts: Callable[[DualEncoder], Tensor],
    score: Callable[[Tensor, Tensor], Callable[[Tensor], Scored]],
) -> list[dict[str, Any]]:
    """Embeds every image under every setting, and the task's texts once: no method touches the text tower.

    Args:
        model: a name (see `load_clip`) or an unpatched model, which is left as it is.
        images: with a number or class each.
        data: as it was named.
        settings, options, progress, memory: of the task.
        about: fields of every record, `task` among them; `score` may add some.
        texts: encoder -> features of the texts.
        score: (features of the texts, labels of the images [n]) -> (features of the images [n, D] -> scores).

    Returns:
        One record a setting.
    """
    chosen = Setting.several(settings)
    encoder = load_clip(model, options.pretrained, options.backend, options.seed) if isinstance(model, str) else model
    unpatched_only(encoder.net)
    images.transform = encoder.preprocess
    with evaluating(encoder.net):
        base = to_device(encoder.net, dtype_of(options.model_dtype), current().device(options.device))
        encoder = replace(encoder, net=base)
        with torch.inference_mode(), autocast(next(base.parameters()).device, options):
            embedded = texts(encoder).cpu()
        size = _size(images)
        shown = show(
            base,
            chosen,
            images,
            lambda part: DataLoader(part, options.batch_size, num_workers=options.workers, collate_fn=collate),
            size,
            options,
            encoder.encode_image,
            lambda made, batch: made.cpu(),
            progress,
            memory,
        )
    scored = score(embedded, shown.labels)
    common = {
        **about,
        "model": encoder.name,
        "pretrained": encoder.pretrained,
        "language": options.language,
        "backend": encoder.backend,
        **described(base, size, len(shown.labels), shown.skipped, options),
    }
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    found = {id(one): scored(torch.cat(one.results)) for one in shown.settings}
    records = []
    for one in shown.settings:
        own, unpatched = found[id(one)], shown.unpatched
        metrics = own.metrics(None if unpatched is None or one is unpatched else found[id(unpatched)])
        again = run_file(RECORDED[about["task"]], encoder.name, encoder.backend, data, one.setting, options, dtype)
        measured = {"metrics": finite(metrics), "correct": bits(own.correct), **one.fields()}
        records.append({**common, **measured, **({} if again is None else {"config": again})})
    return records


def _size(data: CheckedImages) -> Size:
    """(channels, height, width) of the first image that can be read."""
    first: Any = None
    for row in range(len(data)):
        first = data[row]
        if not isinstance(first, Unreadable):
            channels, height, width = first.image.shape
            return channels, height, width
    raise ConfigError(f"none of the {len(data)} images could be read; the last: {first.file}: {first.reason}")
