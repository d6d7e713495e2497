"""The bundled pictures of 224 x 224 pixels, as data sets: labelled clip art, and crops of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtok.eval.models.assets import assets, missing
from vtok.eval.tasks.image_folder import CheckedImages

CLIP_ART, PHOTOGRAPHS, BOTH, CALIBRATION = "clip-art", "photographs", "pictures", "clip-art/calibration"
HALVES = {"select": 0, "held-out": 1}  # of everything: what a choice may look at, and what it is judged on
_FOLDERS = {
    CALIBRATION: ("clip_art/calibration",),
    CLIP_ART: ("clip_art/test",),
    PHOTOGRAPHS: ("photographs",),
    BOTH: ("clip_art/test", "photographs"),
}
NAMES = (*_FOLDERS, *(f"{name}/{half}" for name in (CLIP_ART, PHOTOGRAPHS, BOTH) for half in HALVES))


def is_bundled(data: str) -> bool:
    """Whether a name stands for bundled pictures."""
    return data in NAMES


def open_pictures(data: str, num_samples: int | None = None) -> CheckedImages:
    """Pictures with the number of their class, or -1; "clip-art/select" is every second one, "clip-art/held-out" the rest."""
    return CheckedImages(_Files(_paths(data)), "RGB", num_samples)


def classes() -> list[str]:
    """Of the clip art, in the order of the labels."""
    return sorted(path.name for path in asset_folder("clip_art/test").iterdir() if path.is_dir())


def origin(filename: str) -> str:
    """What a picture was cut from: crops of one photograph go together."""
    folder, name = Path(filename).parts[-2:]
    return name.rpartition("-")[0] if folder == PHOTOGRAPHS else f"{folder}/{name}"


def asset_folder(name: str) -> Path:
    """A folder of bundled files."""
    return assets() / name


def _paths(data: str) -> list[Path]:
    name, _, half = data.rpartition("/") if data.rpartition("/")[2] in HALVES else (data, "", "")
    found = [path for folder in _FOLDERS[name] for path in sorted(asset_folder(folder).rglob("*.jpg"))]
    if not found:
        raise missing(_FOLDERS[name][0])
    if not half:
        return found
    whole = list(dict.fromkeys(origin(str(path)) for path in found))
    place = {one: i % 2 for i, one in enumerate(whole)}
    return [path for path in found if place[origin(str(path))] == HALVES[half]]


class _Files:
    """JPEG files as (PIL image, label), read when they are asked for."""

    def __init__(self, paths: list[Path]):
        self.paths, self.label = paths, {name: i for i, name in enumerate(classes())}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        from PIL import Image

        path = self.paths[row]
        with Image.open(path) as image:
            return image.convert("RGB"), self.label.get(path.parent.name, -1)

    def filename(self, row: int) -> str:
        return str(Path(*self.paths[row].parts[-2:]))
