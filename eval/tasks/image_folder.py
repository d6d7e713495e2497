"""Images with labels through timm's data pipeline, where files that cannot be read are left out and named.

timm's own dataset puts the next image in the place of an unreadable one, so that it is counted twice under a wrong index. Here
an unreadable file becomes a marker, which travels with its batch (from a worker process too) and never reaches the model.

Shapes: b readable images of a batch, C channels.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtok.errors import ConfigError, VtokError, brief, shown
from vtok.eval.common.distributed import Processes
from vtok.eval.common.pictures import open_picture, visible
from vtok.eval.common.records import key_of
from vtok.eval.common.settings import fingerprint, method_name, resolved_params
from vtok.eval.tasks.class_folders import open_folder, read_class_map
from vtok.reading import exists, regular

_INDEXED = ("hfds", "torch")  # timm's prefixes of datasets with one
_STREAMS = ("hfids", "tfds", "wds")  # timm's prefixes of datasets without an index


class Unreadable(NamedTuple):
    """A file that was left out, and why."""

    file: str
    reason: str


class Sample(NamedTuple):
    """An image [C, H, W], its label, its number in the dataset."""

    image: Tensor
    label: int
    row: int


class Batch(NamedTuple):
    """What the loader yields: images [b, C, H, W] (`None`: no file could be read), labels [b], numbers, files left out."""

    images: Tensor | None
    labels: Tensor
    rows: list[int]
    skipped: list[Unreadable]


class CheckedImages(Dataset):
    """A timm `ImageDataset` or torchvision dataset whose unreadable files become `Unreadable`.

    `inner` has a `reader` (timm) or returns (PIL image, label); `mode` is a PIL mode; `num_samples` evenly spaced images are
    taken (`None` = all).
    """

    def __init__(self, inner: Any, mode: str, num_samples: int | None = None):
        self.inner, self.mode = inner, mode
        self.transform: Any = None  # timm's create_loader sets it
        count = len(inner)
        taken = count if num_samples is None else min(num_samples, count)
        self.indices = [i * count // taken for i in range(taken)]
        self.rows: Sequence[int] = range(taken)
        self.relabel: dict[int, int] = {}  # label of the data -> that of whoever is asked, where they differ

    def part(self, rows: Sequence[int]) -> CheckedImages:
        """Some of the images, which keep their numbers."""
        found = copy.copy(self)
        found.rows = rows
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Sample | Unreadable:
        row = self.rows[place]
        index = self.indices[row]
        try:
            image, label = self._decode(index)
        except ConfigError as error:
            return Unreadable(self.filename(row), str(error))
        except Exception as error:  # data sets of other packages raise whatever they like
            return Unreadable(self.filename(row), f"{type(error).__name__}: {error}")
        label = -1 if label is None else int(label)
        return Sample(self.transform(image), self.relabel.get(label, label), row)

    def _decode(self, index: int) -> tuple[Any, Any]:
        if not hasattr(self.inner, "reader"):
            image, label = self.inner[index]
            return open_picture(image, self.mode), label
        file, label, *_ = self.inner.reader[index]
        with file:
            return open_picture(file, self.mode), label

    def filename(self, row: int) -> str:
        index = self.indices[row]
        return str(self.inner.filename(index)) if hasattr(self.inner, "filename") else f"image {index}"

    @property
    def class_to_idx(self) -> dict[str, int] | None:
        """Class name -> label, `None` if the dataset does not say."""
        inner = getattr(self.inner, "reader", self.inner)
        return getattr(inner, "class_to_idx", None) or getattr(inner, "class_name_to_idx", None)  # of timm's for .tar files

    @property
    def empty(self) -> Sequence[str]:
        """Names of classes without images, as far as the data has them."""
        return getattr(self.inner, "empty", ())


def collate(items: Sequence[Sample | Unreadable]) -> Batch:
    """Makes a batch of what could be read."""
    good = [item for item in items if isinstance(item, Sample)]
    return Batch(
        torch.stack([item.image for item in good]) if good else None,
        torch.tensor([item.label for item in good], dtype=torch.int64),
        [item.row for item in good],
        [item for item in items if isinstance(item, Unreadable)],
    )


def check_same_work(processes: Processes, data: CheckedImages, models: Sequence[nn.Module]) -> None:
    """Raises `ConfigError` unless all processes have the same images, weights and settings."""
    if processes.world > 1:
        rows = range(len(data))
        processes.check_same("list of images", key_of({"files": [os.path.basename(data.filename(row)) for row in rows]}))
        processes.check_same("model", fingerprint(models[0]))
        processes.check_same("setting", key_of({"settings": [[method_name(m), resolved_params(m)] for m in models]}))


def other_files(data: CheckedImages, class_map: str = "") -> list[Unreadable]:
    """Visible files of an image folder that are no samples: other extensions, or folders that the class map leaves out."""
    reader = getattr(data.inner, "reader", None)
    samples, root = getattr(reader, "samples", None), getattr(reader, "root", None)
    if samples is None or not root or not os.path.isdir(root):
        return []
    from timm.data.readers.img_extensions import get_img_extensions

    known = {os.path.abspath(path) for path, *_ in samples}
    ours = {os.path.abspath(p) for p in (class_map, os.path.join(root, class_map)) if class_map}
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        for name in sorted(names):
            path = os.path.abspath(os.path.join(folder, name))
            if not visible(Path(path), Path(os.path.abspath(root))) or path in known or path in ours:
                continue
            extension = os.path.splitext(name)[1].lower()
            is_image = extension in get_img_extensions(as_set=True)
            left_out = "its folder is not in the class map" if class_map else "it lies beside the folders of the classes"
            reason = left_out if is_image else f"not an image extension: {extension or 'none'}"
            found.append(Unreadable(os.path.relpath(path, root), reason))
    return sorted(found)


def open_dataset(root: str, name: str, split: str, class_map: str, mode: str, num_samples: int | None) -> CheckedImages:
    """timm's `create_dataset`, checked.

    Args:
        root: image folder (or its parent, which holds the split's folder), .tar file, or root of a named dataset.
        name: timm's name of the dataset, "" = image folder.
        split, class_map: see `Options`.
        mode, num_samples: see `CheckedImages`.

    Raises:
        ConfigError: there is nothing there, or it is a stream.
    """
    from timm.data import create_dataset

    if not name and not exists(root):
        raise ConfigError(f"{brief(root)} does not exist; name a folder with one sub-folder of images a class")
    if not name and not os.path.isdir(root):
        regular(root)
    if class_map and not any(os.path.isfile(path) for path in (class_map, os.path.join(root, class_map))):
        raise ConfigError(f"class map {class_map} is neither a file nor a file in {root}")
    if name.partition("/")[0].lower() in _STREAMS:
        raise ConfigError(f"{name} is a stream; paired evaluation needs an index: a folder, a .tar file, hfds/... or torch/...")
    if name and ("/" not in name or name.partition("/")[0].lower() not in _INDEXED):  # timm would take the folder all the same
        raise ConfigError(
            f"unknown data set {shown(name)}; write TYPE/NAME with a TYPE of {', '.join(_INDEXED)}, or leave it out for an "
            "image folder or a .tar file"
        )
    if not name and os.path.isdir(root):
        return _some(open_folder(root, split, class_map), root, mode, num_samples)
    try:
        labelled: Any = read_class_map(class_map, root) if class_map else ""  # text, which timm's annotation forgets
        data = create_dataset(name, root=root, split=split, class_map=labelled, input_img_mode=mode)
    except VtokError:
        raise
    except Exception as error:  # readers of archives, of pickles and of data sets raise whatever they like
        raise ConfigError(f"timm cannot open {name or root}: {brief(error)}") from error
    return _some(data, root, mode, num_samples)


def _some(data: Any, root: str, mode: str, num_samples: int | None) -> CheckedImages:
    checked = CheckedImages(data, mode, num_samples)
    if not len(checked):
        raise ConfigError(f"{root} holds no images")
    return checked
