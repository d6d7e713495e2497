"""Calibration and held-out samples of a search: always disjoint, always in a random order of its own seed, so that the first
few are like the rest.

Shapes: S images [S, C, H, W], labels [S] int64.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.eval.common.records import key_of, stamp
from vtok.eval.models.data import normalise
from vtok.eval.models.reference import load_reference_images, load_reference_pages, normalise_page
from vtok.eval.options import Options, Source
from vtok.eval.tasks.image_folder import CheckedImages, open_dataset
from vtok.eval.tasks.imagenet import folder_labels
from vtok.eval.tasks.timm_pipeline import create_loader

CALIBRATION = 400  # samples to search on, unless told otherwise

# (inputs of the model, labels or None)
Batch = tuple[Any, Tensor | None]


@dataclass(frozen=True)
class Samples:
    """A sequence of labelled or unlabelled inputs.

    Attributes:
        name: of the data, for people.
        identity: differs where the samples or their order do.
        count: how many.
        read: (start, stop, size) -> batches of at most `size` of the samples start..stop.
        labelled: whether batches come with labels.
        dataset: folder or name of the data set that they were taken from, and `task` that evaluates it.
        task: name of a task.
        notes: what a reader should know, such as files that were left out.
    """

    name: str
    identity: str
    count: int
    read: Callable[[int, int, int], Iterator[Batch]]
    labelled: bool = True
    dataset: str = ""
    task: str = "imagenet"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count


def shuffled(count: int, seed: int, what: str = "data") -> list[int]:
    """Numbers 0..count-1 in a random order."""
    generator = torch.Generator().manual_seed(int(key_of({"seed": seed, "of": what})[:8], 16))
    return torch.randperm(count, generator=generator).tolist()


def digest(images: Tensor) -> str:
    """Short hash of the values of images."""
    return hashlib.sha256(images.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def in_memory(name: str, images: Tensor, labels: Tensor | None, identity: Any, **about: Any) -> Samples:
    """Samples that are held as tensors."""

    def read(start: int, stop: int, size: int) -> Iterator[Batch]:
        for first in range(start, stop, size):
            rows = slice(first, min(first + size, stop))
            yield images[rows], None if labels is None else labels[rows]

    return Samples(name, key_of({"name": name, "of": identity}), len(images), read, labels is not None, **about)


def calibration_count(wanted: int | None, there: int, what: str) -> int:
    """How many calibration samples to take: `wanted` (errors as of `enough`), or `CALIBRATION` if there are so many."""
    return enough(min(CALIBRATION, there) if wanted is None else wanted, there, "--images", what)


def enough(wanted: int | None, there: int, option: str, what: str) -> int:
    """How many samples to take: `wanted`, or all; a `ConfigError` if there are fewer."""
    if wanted is not None and wanted > there:
        raise ConfigError(f"{option} {wanted} is more than there is: {there} {what}")
    return there if wanted is None else wanted


def reference_vit_samples(source: Source) -> tuple[Samples, Samples]:
    """For the reference ViT: of 1,000 training images that it was not trained on, and of 10,000 test images."""

    def chosen(split: str, count: Callable[[int, str], int]) -> Samples:
        pictures, labels = load_reference_images(split)
        rows = shuffled(len(labels), source.seed, split)[: count(len(labels), "images of Fashion-MNIST")]
        about = {"dataset": "fashion-mnist", "task": "imagenet"}
        return in_memory(f"fashion-mnist/{split}", normalise(pictures[rows]), labels[rows], [source.seed, len(rows)], **about)

    return _both(chosen, source)


def reference_clip_samples(source: Source) -> tuple[Samples, Samples]:
    """For the image tower of the reference CLIP: of 100 pages of training pictures, and of 1,000 of test pictures."""

    def chosen(split: str, count: Callable[[int, str], int]) -> Samples:
        pages = load_reference_pages(split).images
        rows = shuffled(len(pages), source.seed, split)[: count(len(pages), "pages of easy-VQA")]
        about = {"dataset": "reference-pages", "task": "retrieval"}
        return in_memory(f"easy-vqa pages/{split}", normalise_page(pages[rows]), None, [source.seed, len(rows)], **about)

    return _both(chosen, source)


def _both(chosen: Callable[[str, Callable[[int, str], int]], Samples], source: Source) -> tuple[Samples, Samples]:
    images, held_out = source.images, source.held_out_images
    return (
        chosen("calibration", lambda there, of: calibration_count(images, there, f"calibration {of} come with vtok")),
        chosen("test", lambda there, of: enough(held_out, there, "--held-out-images", f"test {of} come with vtok")),
    )


def folder_samples(model: nn.Module, config: dict[str, Any], source: Source, options: Options) -> tuple[Samples, Samples]:
    """For a timm model: images of one folder, parted at random, or of two, read as `vtok eval imagenet` reads them.

    Calibration images are kept in memory, preprocessed; held-out ones are read when they are needed. Labels are used if the
    folders are classes of the model. By default `CALIBRATION` images are taken, or half of a folder that has fewer than twice
    as many.

    Raises:
        ConfigError: there is nothing to read, too little of it, or both folders are one.
    """
    data, held_out, images, seed = source.data or "", source.held_out, source.images, source.seed
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
    rest = rest[: enough(source.held_out_images, len(rest), "--held-out-images", "images not used for calibration")]
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


def _subset(data: CheckedImages, rows: Sequence[int]) -> CheckedImages:
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
        part = _subset(data, range(start, stop))
        for batch in create_loader(part, config, replace(options, batch_size=size)):
            if batch.images is not None:
                yield batch.images, batch.labels if labelled else None

    identity = key_of({"files": _files(data), "config": {name: str(value) for name, value in config.items()}})
    return Samples(f"{root} (held out)", identity, len(data), read, labelled, dataset=root)
