"""The one way in which videos are read: PyAV decodes them, a fixed number of frames is taken at equal distances.

Frames are counted as they come out of the decoder, what a file says of their number is only where the search begins: some files
say nothing, and some that were cut say too much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtok.errors import ConfigError, MissingExtraError, brief
from vtok.eval.common.pictures import find_pictures, open_picture

EXTENSIONS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
FOLDER_FPS = 3.0  # of a folder with a picture a frame, as TVQA's are distributed


class Clip(NamedTuple):
    """Frames of a video."""

    frames: Sequence[Any]  # PIL images in RGB, in their order
    numbers: Sequence[int]  # of these frames in the video, from 0 on
    fps: float  # frames a second of the video
    total: int  # frames of the video


def read_clip(path: str, count: int, start: float | None = None, end: float | None = None) -> Clip:
    """Frames at equal distances, the first and the last of them included; fewer where the video has fewer.

    Args:
        path: of a file that FFmpeg can decode, or of a folder with a picture a frame, `FOLDER_FPS` a second.
        count: frames at most.
        start, end: seconds between which they are taken; `None` = the beginning, the end.

    Raises:
        ConfigError: there is no such file, or no frame in it that can be decoded; the message has the path.
        MissingExtraError: PyAV is not installed.
    """
    if Path(path).is_dir():
        files = list(find_pictures(Path(path)))
        numbers = _numbers(len(files), count, FOLDER_FPS, start, end, path)
        return Clip([open_picture(str(files[i])) for i in numbers], numbers, FOLDER_FPS, len(files))
    fps, total = _said(path)
    while True:
        numbers = _numbers(total, count, fps, start, end, path)
        frames, seen = _decoded(path, numbers)
        if len(frames) == len(numbers):
            return Clip(frames, numbers, fps, total)
        total = seen  # fewer than the file says


def check_video(path: str) -> None:
    """Raises for what `read_clip` cannot read, as far as the beginning shows it; errors are those of `read_clip`."""
    if not Path(path).is_dir():
        _decoded(path, [0])
    elif next(find_pictures(Path(path)), None) is None:
        raise ConfigError(f"{brief(path)} holds no frames (.jpg, .png)")


def _numbers(total: int, count: int, fps: float, start: float | None, end: float | None, path: str) -> list[int]:
    """Which frames are taken."""
    first = 0 if start is None else int(start * fps)
    last = total - 1 if end is None else min(int(end * fps), total - 1)
    if last < first:
        between = "" if start is None and end is None else f" between {start} and {end} seconds"
        raise ConfigError(f"{brief(path)} has {total} frames, none{between}; is it the whole video?")
    return np.linspace(first, last, min(count, last - first + 1), dtype=int).tolist()


def _said(path: str) -> tuple[float, int]:
    """(Frames a second, frames) of a file; where it does not say how many, its packets are counted."""
    with _opened(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 1)
        total = int(stream.frames) or sum(packet.size > 0 for packet in container.demux(stream))
    return fps, total


def _decoded(path: str, numbers: Sequence[int]) -> tuple[list[Any], int]:
    """(The frames of these rising numbers, as far as they are there; frames that were decoded.)"""
    found, wanted, seen = list[Any](), set(numbers), 0
    with _opened(path) as (container, stream):
        for frame in _frames(container, stream, path):
            if seen in wanted:
                found.append(frame.to_image())
            seen += 1
            if seen > numbers[-1]:
                break
    if not seen:
        raise ConfigError(f"{brief(path)} holds no frame that can be decoded")
    return found, seen


def _frames(container: Any, stream: Any, path: str) -> Iterator[Any]:
    """Decoded frames; a file that breaks off ends where it breaks off."""
    any_yet = False
    try:
        for frame in container.decode(stream):
            any_yet = True
            yield frame
    except _library().FFmpegError as error:
        if not any_yet:
            raise ConfigError(f"{brief(path)} cannot be read as a video: {error}") from error


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """A file and its first video stream."""
    av = _library()
    if not Path(path).is_file():
        raise ConfigError(f"{brief(path)} does not exist; name a video file")
    try:
        container = av.open(path)
    except av.FFmpegError as error:
        raise ConfigError(f"{brief(path)} cannot be read as a video: {error}") from error
    with container:
        if not container.streams.video:
            raise ConfigError(f"{brief(path)} holds no video, only {len(container.streams)} other streams")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video") from error
    return av
