"""Calibration and held-out samples of a search: always disjoint, always in a random order of its own seed, so that the first
few are like the rest.

Shapes: S images [S, C, H, W], labels [S] int64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.errors import ConfigError
from vtok.eval.common.records import key_of
from vtok.eval.models.data import normalise
from vtok.eval.models.reference import load_reference_images, load_reference_pages, normalise_page

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
    """How many calibration samples to take: `wanted`, or `CALIBRATION` if there are so many.

    Raises:
        ConfigError: there are fewer than wanted.
    """
    return enough(min(CALIBRATION, there) if wanted is None else wanted, there, "--images", what)


def enough(wanted: int | None, there: int, option: str, what: str) -> int:
    """How many samples to take: `wanted`, or all.

    Raises:
        ConfigError: there are fewer.
    """
    if wanted is not None and wanted > there:
        raise ConfigError(f"{option} {wanted} is more than there is: {there} {what}")
    return there if wanted is None else wanted


def reference_vit_samples(images: int | None, held_out: int | None, seed: int) -> tuple[Samples, Samples]:
    """For the reference ViT: calibration images are training images that it was not trained on, held-out ones test images.

    Args:
        images: calibration images, of 1,000; `None` = `CALIBRATION`.
        held_out: test images, of 10,000; `None` = all.
        seed: of the choice and the order of both.
    """

    def chosen(split: str, count: Callable[[int], int]) -> Samples:
        pictures, labels = load_reference_images(split)
        rows = shuffled(len(labels), seed, split)[: count(len(labels))]
        about = {"dataset": "fashion-mnist", "task": "imagenet"}
        return in_memory(f"fashion-mnist/{split}", normalise(pictures[rows]), labels[rows], [seed, len(rows)], **about)

    return _both(chosen, images, held_out, "images of Fashion-MNIST")


def reference_clip_samples(images: int | None, held_out: int | None, seed: int) -> tuple[Samples, Samples]:
    """For the image tower of the reference CLIP: 100 pages of training pictures, 1,000 of test pictures; arguments as above."""

    def chosen(split: str, count: Callable[[int], int]) -> Samples:
        pages = load_reference_pages(split).images
        rows = shuffled(len(pages), seed, split)[: count(len(pages))]
        about = {"dataset": "reference-pages", "task": "retrieval"}
        return in_memory(f"easy-vqa pages/{split}", normalise_page(pages[rows]), None, [seed, len(rows)], **about)

    return _both(chosen, images, held_out, "pages of easy-VQA")


def _both(
    chosen: Callable[[str, Callable[[int], int]], Samples], images: int | None, held_out: int | None, what: str
) -> tuple[Samples, Samples]:
    return (
        chosen("calibration", lambda there: calibration_count(images, there, f"calibration {what} come with vtok")),
        chosen("test", lambda there: enough(held_out, there, "--held-out-images", f"test {what} come with vtok")),
    )
