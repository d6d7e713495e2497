"""Calibration and held-out samples from image folders, read as `vtok eval imagenet` reads them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.eval.common.records import key_of, stamp
from vtok.eval.tasks.image_folder import CheckedImages, open_dataset
from vtok.eval.tasks.imagenet import folder_labels
from vtok.eval.tasks.timm_pipeline import Options, create_loader
from vtok.eval.tune.samples import CALIBRATION, Batch, Samples, calibration_count, enough, in_memory, shuffled


def folder_samples(
    model: nn.Module,
    config: dict[str, Any],
    data: str,
    held_out: str | None,
    images: int | None,
    held_out_images: int | None,
    options: Options,
    seed: int,
) -> tuple[Samples, Samples]:
    """For a timm model: images of one folder, parted at random, or of two.

    Calibration images are kept in memory, preprocessed; held-out ones are read when they are needed.

    Args:
        model: with `num_classes`; labels are used if the folders are classes of the model.
        config: preprocessing, from `data_config`.
        data: folder to take calibration images from.
        held_out: another folder; `None` = take the held-out images from `data`, too.
        images: calibration images; `None` = `CALIBRATION`, or half of a folder that has fewer than twice as many and is parted.
        held_out_images: `None` = all that are left.
        options: of timm's pipeline.
        seed: of the choice and the order of both.

    Raises:
        ConfigError: there is nothing to read, too little of it, or both folders are one.
    """
    if held_out is not None and os.path.realpath(held_out) == os.path.realpath(data):
        raise ConfigError(
            f"{held_out} is the calibration folder; leave --held-out out, and its images are parted into both, or name another"
        )
    mode = "RGB" if config["input_size"][0] == 3 else "L"

    def opened(root: str) -> CheckedImages:
        return open_dataset(root, options.dataset, options.split, options.class_map, mode, None)

    first = opened(data)
    order = shuffled(len(first), seed)
    few = images is None and held_out is None and len(first) < 2 * CALIBRATION
    count = calibration_count(len(first) // 2 if few else images, len(first), f"images in {data}")
    left, rest = (first, order[count:]) if held_out is None else (opened(held_out), None)
    if rest is None:
        rest = shuffled(len(left), seed, "held out")
    if not rest:
        raise ConfigError(
            f"{data} has {len(first)} images and --images takes {count} of them for calibration: none is left to compare on; "
            "take fewer, or name other images with --held-out"
        )
    rest = rest[: enough(held_out_images, len(rest), "--held-out-images", "images not used for calibration")]
    labelled = folder_labels(first, model) and folder_labels(left, model)
    chosen = _subset(first, order[:count])
    pictures, labels, skipped = _loaded(chosen, config, options)
    notes = [f"{skipped} calibration images could not be read"] if skipped else []
    if not labelled:
        notes.append("the folders of the images are not the model's classes: no accuracy is reported")
    about = {"dataset": data, "notes": tuple(notes)}
    identity = [_files(chosen), seed, {name: str(value) for name, value in config.items()}]
    calibration = in_memory(f"{data} (calibration)", pictures, labels if labelled else None, identity, **about)
    compared = _streamed(_subset(left, rest), config, options, labelled, held_out or data)
    return calibration, compared


def _subset(data: CheckedImages, rows: list[int]) -> CheckedImages:
    """The images of these numbers, in this order."""
    part = copy.copy(data)
    part.indices = [data.indices[row] for row in rows]
    part.rows = range(len(rows))
    return part


def _files(data: CheckedImages) -> str:
    root = getattr(getattr(data.inner, "reader", None), "root", None)
    return key_of({"files": [data.filename(row) for row in range(len(data))], "there": None if root is None else stamp(root)})


def _loaded(data: CheckedImages, config: dict[str, Any], options: Options) -> tuple[Tensor, Tensor, int]:
    """(images, labels, how many could not be read)."""
    images, labels, skipped = [], [], 0
    for batch in create_loader(data, config, options):
        skipped += len(batch.skipped)
        if batch.images is not None:
            images.append(batch.images)
            labels.append(batch.labels)
    if not images:
        raise ConfigError(f"none of the {len(data)} calibration images could be read")
    return torch.cat(images), torch.cat(labels), skipped


def _streamed(data: CheckedImages, config: dict[str, Any], options: Options, labelled: bool, root: str) -> Samples:
    """Samples that are read anew for every setting; files that cannot be read are left out each time."""

    def read(start: int, stop: int, size: int) -> Iterator[Batch]:
        part = _subset(data, list(range(start, stop)))
        for batch in create_loader(part, config, replace(options, batch_size=size)):
            if batch.images is not None:
                yield batch.images, batch.labels if labelled else None

    identity = key_of({"files": _files(data), "config": {name: str(value) for name, value in config.items()}})
    return Samples(f"{root} (held out)", identity, len(data), read, labelled, dataset=root)
