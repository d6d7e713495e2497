"""Images with captions: Karpathy's JSON for Flickr30k and COCO, and the pages that come with vtok.

Such a file is `{"images": [{"filename", "filepath" (COCO), "split", "sentences": [{"raw"}, ...]}, ...]}`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import find_files, leaves, open_picture, within
from vtok.eval.options import CAPTIONED
from vtok.reading import from_json, is_file, is_folder, read_text

_FORM = '{"images": [{"filename", "split", "sentences": [{"raw"}]}]}'
_BIGGEST = 1 << 30  # bytes; COCO's has 144 MB


@dataclass(frozen=True)
class CaptionedImages:
    """Images and the captions of each; indexing opens an image, as `CheckedImages` wants it: (PIL image, number)."""

    name: str
    files: Sequence[str]
    captions: Sequence[Sequence[str]]
    open: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.open(index), index

    def filename(self, index: int) -> str:
        return self.files[index]


def _open_one(paths: Sequence[Path], index: int) -> Any:  # no closure: worker processes may have to pickle it
    return open_picture(paths[index])


def reference_pages() -> CaptionedImages:
    """The bundled test pages."""
    from PIL import Image

    from vtok.eval.models.reference import load_reference_pages

    pages = load_reference_pages("test")
    arrays = pages.images.permute(0, 2, 3, 1).numpy()
    names = [f"page {i}" for i in range(len(arrays))]
    return CaptionedImages("easyvqa_pages", names, [[one] for one in pages.captions], lambda i: Image.fromarray(arrays[i]))


def open_captions(
    data: str | os.PathLike, split: str = "test", images: str = "", max_captions: int | None = None
) -> CaptionedImages:
    """Reads a caption file.

    Args:
        data: Karpathy's JSON file, or a folder with one `dataset*.json`; or `"reference-pages"`.
        split: the images to take: "test", "val" or "train".
        images: folder of the images, "" = that of the JSON file; they may lie in folders named by `filepath`, or in `images`.
        max_captions: of each image, the first ones; `None` = all (clip_benchmark takes five of COCO's).
    """
    if os.fspath(data) == CAPTIONED:
        return reference_pages()
    path = _caption_file(Path(data))
    content = from_json(read_text(path, "captions", _BIGGEST), f"{path} is no JSON file of Karpathy's form {_FORM}")
    try:
        entries = [entry for entry in content["images"] if entry["split"] == split]
        captions = [[_raw(sentence["raw"]) for sentence in entry["sentences"]][:max_captions] for entry in entries]
        files = [os.path.join(entry.get("filepath", ""), entry["filename"]) for entry in entries]
        splits = sorted({str(entry["split"]) for entry in content["images"]})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not of Karpathy's form {_FORM}: {type(error).__name__} {brief(error)}") from error
    if not entries:
        raise ConfigError(f"{path} has no images of split {shown(split)}; it has: {brief(', '.join(splits))}")
    for file, own in zip(files, captions):
        if not own:
            raise ConfigError(f"{path}: {brief(file)} has no captions (max_captions={max_captions})")
    root = _image_root(Path(images) if images else path.parent, files)
    outside = next((file for file in files if leaves(file) or not (images or within(root, root / file))), None)
    if outside is not None:
        raise ConfigError(
            f"{path}: the image {brief(outside)} lies outside {root}; pass the folder that holds all of them (--images)"
        )
    return CaptionedImages(path.stem, files, captions, partial(_open_one, [root / file for file in files]))


def _raw(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"'raw' must be a text, found {shown(value)}")
    return value


def _caption_file(path: Path) -> Path:
    if is_file(path):
        return path
    found = find_files(path, "dataset*.json", deep=False)
    if len(found) != 1:
        what = f"holds {len(found)} files dataset*.json" if is_folder(path) else "does not exist"
        raise ConfigError(f"{brief(path)} {what}; name Karpathy's JSON file (dataset_flickr30k.json, dataset_coco.json)")
    return found[0]


def _image_root(folder: Path, files: Sequence[str]) -> Path:
    """The folder under which at least one of the images lies; which of them are missing shows when they are read."""
    for root in (folder, folder / "images"):
        if any(is_file(root / file) for file in files):
            return root
    raise ConfigError(f"none of the {len(files)} images (the first: {brief(files[0])}) lies in {folder} or its folder images")
