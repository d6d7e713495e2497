"""Images that questions are about: files of a folder by their names, or by the number at the end of these."""

from __future__ import annotations

import filecmp
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief
from vtok.eval.common.pictures import digest, find_files, find_pictures, leaves, open_picture, within
from vtok.eval.tasks.vqa.sources import Sources
from vtok.reading import is_file

_LAST_NUMBER = re.compile(r"(\d+)$")
_COCO_DIGITS = 12  # of the number in the name of COCO's files


class Pictures:
    """Images of a folder by name, at any depth; reading one gives a PIL image.

    Where somebody `named` the folder as that of the images, links in it may lead elsewhere, and of a name that leads out of it
    the file's own name counts.
    """

    kind = "image"  # what they are called in messages

    def __init__(self, folder: Path, named: bool = False):
        self.folder, self.named = folder, named
        self._index: dict[str, list[Path]] | None = None
        self._known: dict[str, Path] = {}

    @classmethod
    def of(cls, sources: Sources) -> Pictures:
        return cls(sources.image_folder, bool(sources.images))

    def find(self, name: str, place: str, deep: bool = True) -> Path:
        """The file of an image that is named with folders or without, with its ending or without; `deep`: at any depth.

        Raises:
            ConfigError: it is missing, several have that name, or it lies outside the folder; `place` is what asks for it.
        """
        if name not in self._known:
            found = self._find(name, place, deep)
            if not self.named and not within(self.folder, found):
                what = f"is a link to {found.resolve()}, outside {self.folder}"
                raise self._refused(name, place, f"{what}; if that is meant, pass the folder of the {self.kind}s")
            self._known[name] = found
        return self._known[name]

    def _find(self, name: str, place: str, deep: bool) -> Path:
        out = leaves(name) and not _below(self.folder, name)
        if out and not self.named:
            what = f"lies outside {self.folder}; if that is meant, pass the folder of the {self.kind}s"
            raise self._refused(name, place, what)
        direct = self.folder / name
        if not out and is_file(direct):
            return direct
        found = self._by_name(Path(name).name) if deep or out else []
        nearer = [path for path in found if path.with_suffix("").as_posix().endswith(Path(name).with_suffix("").as_posix())]
        found = nearer or found
        if not found:
            raise self._refused(name, place, f"is missing from {self.folder}; pass the folder of the {self.kind}s")
        if len(found) > 1:
            raise self._refused(name, place, f"may be {found[0]} or {found[1]}; pass the folder of one")
        return found[0]

    def _refused(self, name: str, place: str, what: str) -> ConfigError:
        return ConfigError(f"{place}: the {self.kind} {brief(name)} {what} (--images)")

    def _by_name(self, name: str) -> list[Path]:
        if self._index is None:
            self._index = {}
            for path in self._files():
                for key in {path.name, path.stem}:
                    self._index.setdefault(key, []).append(path)
        return self._index.get(name, [])

    def _files(self) -> Iterable[Path]:
        return find_pictures(self.folder)

    def read(self, key: Any) -> Any:
        return open_picture(key)

    def identify(self, key: Any) -> str:
        return digest(key)


class WithoutEndings(Pictures):
    """Images whose files have no ending."""

    def _files(self) -> Iterable[Path]:
        return (path for path in find_files(self.folder) if path.is_file())


class Numbered:
    """Images by the number at the end of their names, at any depth.

    COCO writes it with twelve digits: such a file goes before others with the same number, which are other data sets' pictures,
    previews or masks. Files that are the same byte for byte are one picture.
    """

    def __init__(self, folder: Path, named: bool):
        self._pictures = Pictures(folder, named)
        self._files: dict[int, list[tuple[int, Path]]] = defaultdict(list)  # number -> (its digits, file)
        for path in find_pictures(folder):
            if number := _LAST_NUMBER.search(path.stem):
                self._files[int(number.group(1))].append((len(number.group(1)), path))

    def find(self, image: Any, place: str) -> Path:
        """The file of an image by its number; `ConfigError` if it is missing, one of several, or outside the folder."""
        found, folder = self._files.get(image, []), self._pictures.folder
        if not found:
            raise ConfigError(
                f"{place}: its image is missing: no file in {folder} has a name that ends with {brief(image)} (.jpg, .png)"
            )
        of_coco = [path for digits, path in found if digits == _COCO_DIGITS]
        first, *others = of_coco or [path for _, path in found]
        other = next((path for path in others if not filecmp.cmp(first, path, shallow=False)), None)
        if other is not None:
            raise ConfigError(f"{place}: the image {brief(image)} may be {first} or {other}; pass the folder of one (--images)")
        return self._pictures.find(str(first.relative_to(folder)), place)

    def read(self, image: Any) -> Any:
        return open_picture(self.find(image, "reading"))

    def identify(self, image: Any) -> str:
        return digest(self.find(image, "reading"))


def _below(folder: Path, name: str) -> bool:
    return Path(name).is_absolute() and ".." not in Path(name).parts and Path(name).is_relative_to(folder.absolute())
