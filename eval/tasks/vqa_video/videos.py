"""Videos that a task asks about: files in a folder, of which the model is shown frames at equal distances."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vtok.errors import ConfigError
from vtok.eval.common.pictures import digest, find_files
from vtok.eval.common.videos import EXTENSIONS, Clip, check_video, read_clip
from vtok.eval.tasks.vqa.sources import Sources
from vtok.eval.tasks.vqa.sources.pictures import Pictures

_ENDS = 1 << 20  # bytes at either end of a file that tell it from others


class Span(NamedTuple):
    """A part of a video file, in seconds."""

    path: str
    start: float
    end: float


class Videos(Pictures):
    """Videos of a folder by name; reading one gives a `Clip` of `count` frames."""

    kind = "video"

    def __init__(self, folder: Path, named: bool = False, count: int = 16):
        super().__init__(folder, named)
        self.count = count

    @classmethod
    def of(cls, sources: Sources) -> Videos:
        return cls(sources.image_folder, bool(sources.images), sources.frames)

    def title(self, name: str) -> str:
        """Name of questions about them, which says how many frames are shown."""
        return f"{name}, {self.count} frames"

    def _files(self) -> Iterable[Path]:
        return (path for path in find_files(self.folder) if path.suffix.lower() in EXTENSIONS)

    def read(self, key: Any) -> Clip:
        """Frames of a file or of a `Span`."""
        return read_clip(key.path, self.count, key.start, key.end) if isinstance(key, Span) else read_clip(key, self.count)

    def probe(self, key: Any) -> None:
        """Raises unless the beginning of the video can be decoded: decoding all of a long one takes minutes."""
        check_video(key.path if isinstance(key, Span) else key)

    def identify(self, key: Any) -> str:
        """Hash of the size and of both ends of the file, with the part and the frames that are shown."""
        path, part = (key.path, key[1:]) if isinstance(key, Span) else (key, None)
        return digest(repr((self.count, part)).encode() + _ends(path))


def _ends(path: str) -> bytes:
    """Size, beginning and end of a file; of a folder the names in it."""
    if os.path.isdir(path):
        return repr([file.name for file in find_files(Path(path))]).encode()
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            first = file.read(_ENDS)
            file.seek(max(size - _ENDS, 0))
            return repr(size).encode() + first + file.read()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
