"""Image folders with one sub-folder a class, and which class of a model each of them is.

timm numbers the folders that hold images in their natural order, whatever the model's classes are: a folder that is empty,
hidden or missing moves all labels behind it, and those of a subset of ImageNet are 0, 1, 2 instead of the model's numbers. Here
folders are matched with classes by their names (WordNet ids, class names), by number, or by order where there are as many;
labels that nothing vouches for are refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vtok.errors import ConfigError, brief
from vtok.eval.common.pictures import hidden
from vtok.reading import from_pickle

IMAGENET = "imagenet-1k"
_WORDNET = re.compile(r"n\d{8}")
_SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # names of one split, as timm has them


class ClassFolders:
    """The images of a folder with their classes, in the order in which timm lists them; a timm dataset and its reader in one.

    A class is the outermost folder that holds images; where all of these have the same name (`CLASS/images/`), it is the folder
    around it. Hidden folders and `__MACOSX` do not count, nor do images beside the classes. With `class_map` (class name ->
    label) folders that it does not name are left out; without one labels follow the natural order of the folders. `samples`
    holds (path, label) of every image, `empty` the names of folders beside the classes that hold none.
    """

    def __init__(self, root: str, class_map: Mapping[str, int] | None = None):
        from timm.utils.misc import natural_key

        self.root = root
        found = _scanned(root)
        names = [os.path.basename(place) for place in found.classes]
        for name, count in Counter(names).items():
            if count > 1:
                one, other, *_ = (place for place in found.classes if os.path.basename(place) == name)
                raise ConfigError(
                    f"{root} has two folders {name}, {one} and {other}: which images are of one class is not known; name the "
                    "folder that holds the folders of the classes"
                )
        if class_map is None:
            class_map = {name: i for i, name in enumerate(sorted(names, key=natural_key) or [""])}
        self.class_to_idx = dict(class_map)
        self.empty = sorted(found.empty, key=natural_key)
        labelled = {os.path.basename(place): files for place, files in found.classes.items()} or {"": found.loose}
        pairs = [(file, self.class_to_idx[name]) for name, own in labelled.items() if name in self.class_to_idx for file in own]
        self.samples = sorted(pairs, key=lambda pair: natural_key(pair[0]))

    @property
    def reader(self) -> ClassFolders:
        return self

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int) -> str:
        return os.path.relpath(self.samples[index][0], self.root)


class _Found(NamedTuple):
    """What a folder holds: class folder -> its images, names of folders beside them without any, images in no class."""

    classes: dict[str, list[str]]
    empty: list[str]
    loose: list[str]


def _scanned(root: str) -> _Found:
    from timm.data.readers.img_extensions import get_img_extensions

    extensions, held, folders = get_img_extensions(as_set=True), dict[str, list[str]](), list[str]()
    outer: dict[str, str] = {}  # folder -> the outermost one around it that holds images
    seen = set[str]()
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not hidden(name))
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(real)
        place = "" if folder == root else os.path.relpath(folder, root)
        images = [
            os.path.join(folder, name) for name in files if not hidden(name) and os.path.splitext(name)[1].lower() in extensions
        ]
        home = outer.get(os.path.dirname(place), "") if place else ""
        outer[place] = home or (place if images else "")
        folders.append(place)
        if images:
            held.setdefault(outer[place], []).extend(images)
    loose = held.pop("", [])
    while len(held) > 1 and len({os.path.basename(one) for one in held}) == 1 and all(os.path.dirname(one) for one in held):
        held = {os.path.dirname(one): files for one, files in held.items()}
    around = {os.path.dirname(one) for one in held}
    taken = {str(part) for one in held for part in (Path(one), *Path(one).parents)}  # the classes and all around them
    empty = [os.path.basename(one) for one in folders if one and os.path.dirname(one) in around and one not in taken]
    return _Found(held, empty, loose)


def open_folder(root: str, split: str, class_map: str) -> ClassFolders:
    """The images of a folder, or of the one in it that is named like the split; `class_map` is a file, see `read_class_map`."""
    wanted = split.partition("[")[0]
    names = [wanted, *next((group for group in _SPLITS if wanted in group), ())]
    inner = next((path for name in names if os.path.isdir(path := os.path.join(root, name))), root)
    home = inner if os.path.isfile(os.path.join(inner, class_map)) else root
    return ClassFolders(inner, read_class_map(class_map, home) if class_map else None)


def read_class_map(path: str, root: str) -> dict[str, int]:
    """Class name -> label, from a file of timm's kind: a name a line (.txt), or a pickled mapping (.pkl)."""
    from timm.data.readers.class_map import load_class_map

    file: Any = path  # timm's annotation forgets file names
    try:
        if path.endswith(".pkl"):  # older releases of timm would run what it holds
            found = from_pickle(Path(path if os.path.isfile(path) else os.path.join(root, path)).read_bytes())
        else:
            found = load_class_map(file, root)
    except Exception as error:  # whatever the formats raise
        raise ConfigError(f"class map {path} cannot be read: {type(error).__name__} {error}") from error
    return {name.removeprefix("\ufeff") if isinstance(name, str) else name: label for name, label in found.items()}


@cache
def wordnet_ids(classes: int) -> tuple[str, ...]:
    """WordNet ids of the classes that a model with so many outputs has, in their order; none if it is no ImageNet of timm's."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def are_ids(names: Sequence[str]) -> bool:
    """Whether all names are WordNet ids."""
    return bool(names) and all(_WORDNET.fullmatch(name) for name in names)


def labels_for(
    class_to_idx: Mapping[str, int],
    empty: Sequence[str],
    count: int,
    known: Sequence[Sequence[str]],
    what: str,
    remedy: str,
    ordered: bool = False,
) -> tuple[dict[int, int], str]:
    """(label in the data -> label in a numbering of `count` classes, a note on how they were found or "").

    Args:
        class_to_idx: name of a class -> its label in the data.
        empty: names of further classes that have no images.
        count: classes of the numbering.
        known: names of all of these classes in their order, as far as they are known; several kinds of names.
        what, remedy: for messages: what has these classes ("the model has 1000 outputs"), what to do where nothing vouches.
        ordered: whether the caller has put the classes of the numbering into the order of those of the data.

    Raises:
        ConfigError: nothing says which is which.
    """
    from timm.utils.misc import natural_key

    names, own = list(class_to_idx), len(set(class_to_idx.values()))
    for numbering in known:
        place = {name: i for i, name in enumerate(numbering)}
        if len(place) == len(numbering) and all(name in place for name in names):
            note = f"its {own} classes are {'those' if own == count else 'some'} of {what}, found by name"
            return {label: place[name] for name, label in class_to_idx.items()}, "" if own == count else note
    if own == count:
        if not ordered:
            _refuse_some(names, known, what, remedy)
        numbered = all(name == str(i) for i, name in enumerate(sorted(names, key=natural_key)))
        note = f"nothing names its {own} classes among {what}: they are taken in their natural order"
        return {label: label for label in class_to_idx.values()}, "" if numbered or ordered else note
    if own + len(empty) == count:
        order = {name: i for i, name in enumerate(sorted([*names, *empty], key=natural_key))}
        moved = {label: order[name] for name, label in class_to_idx.items()}
        return moved, f"{len(empty)} folders hold no image: {', '.join(empty[:3])}; they count as classes"
    numbers = [int(name) for name in names if name.isascii() and name.isdecimal()]
    if len(numbers) == len(names) == len(set(numbers)) and 0 in numbers and max(numbers) < count:
        moved = {label: int(name) for name, label in class_to_idx.items()}
        return moved, f"its {own} classes are some of {what}, by the numbers that its folders are named"
    shown = ", ".join(names[:3]) + (", ..." if own > 3 else "")
    raise ConfigError(f"the data has {own} classes ({shown}), which of {what} they are is not known; {remedy}")


def _refuse_some(names: Sequence[str], known: Sequence[Sequence[str]], what: str, remedy: str) -> None:
    """Raises ConfigError where some names of the data, but not all, are found: by order, one slip would move all labels."""
    for numbering in known:
        found = [name for name in names if name in numbering]
        if not found:
            continue
        if twice := [name for name, n in Counter(numbering).items() if n > 1]:
            raise ConfigError(f"{what} hold {brief(twice[0])} twice, so classes are not found by name; no two may be the same")
        strange = next(name for name in names if name not in numbering)
        raise ConfigError(
            f"{len(found)} of the data's {len(names)} classes are found among {what} by name, but {brief(strange)} is not; "
            f"mend its name, or {remedy}"
        )
