"""Files that are written whole or not at all, and never over what they are made from.

What is written goes into a scratch file beside the target, is synchronised to disk and takes the target's place in one step: a
full disk, a kill or an error on the way leaves the old file as it was, and no half of a new one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vtok.errors import ConfigError, brief

_READ_BACK = 1 << 20  # bytes handed on at a time


def write(path: str | os.PathLike, content: str | bytes) -> Path:
    """Writes a file; its folder is made if it does not exist.

    Args:
        path: of the file; a link stays one, and what it points to is written.
        content: text is encoded as UTF-8.

    Returns:
        The path.

    Raises:
        ConfigError: it cannot be written there; what stood there before is still there.
    """
    with replacing(path) as scratch:
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    return Path(path)


def write_beside(path: str | os.PathLike, content: str) -> Path:
    """Writes a file of results; one that holds something else keeps its place, and the new one gets a number: `name-2.json`.

    Args:
        path: of the file.
        content: text.

    Returns:
        Where it stands.

    Raises:
        ConfigError: it cannot be written there.
    """
    first, number, wanted = Path(path), 1, content.encode("utf-8", "replace")
    target = first
    while target.is_file() and target.read_bytes() != wanted:
        number += 1
        target = first.with_name(f"{first.stem}-{number}{first.suffix}")
    return write(target, wanted)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A scratch file, with the ending of the target, that takes the target's place when the block ends without an error.

    Pipes and devices such as /dev/stdout cannot be replaced: they are given the bytes.

    Args:
        path: of the target.

    Raises:
        ConfigError: nothing can be written there.
    """
    target = _target(path)
    scratch = target.with_name(f".{target.stem[:100]}.{os.getpid()}.part{target.suffix[:20]}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        stream = target.exists() and not target.is_file()
        if stream:
            from tempfile import gettempdir

            scratch = Path(gettempdir()) / scratch.name
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
            if stream:
                _pour(scratch, target)
                return
            with open(scratch, "rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(scratch, stat.S_IMODE(target.stat().st_mode))
            os.replace(scratch, target)
            _settle(target.parent)
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be written: {reason(error)}") from error


def put(file: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Puts a finished file in the place of another, on the same disk.

    Raises:
        ConfigError: it cannot be put there.
    """
    with replacing(path) as scratch:
        os.replace(file, scratch)
    return Path(path)


def reason(error: BaseException) -> str:
    """What went wrong in a few words, without the number and the path that the system puts around them."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def writable(path: str | os.PathLike) -> Path:
    """Raises now, and not after hours of work, unless a file can be written there; nothing that is there is changed.

    Raises:
        ConfigError: it cannot.
    """
    target = _target(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it may not be changed")
        if not target.exists() or target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            probe = target.with_name(f".{target.stem[:100]}.{os.getpid()}.probe")
            with open(probe, "xb"):
                pass
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be written: {reason(error)}") from error
    return Path(path)


def apart(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """Raises if a file that will be written is one of those that are read, under whatever spelling or link.

    Args:
        outputs: files to be written; they need not exist.
        inputs: files that are read; words that name no file are passed over.

    Raises:
        ConfigError: an output is an input.
    """
    known = {identity: os.fspath(one) for one in inputs if (identity := _identity(one)) is not None}
    for output in outputs:
        identity = _identity(output)
        if identity is not None and identity in known:
            raise ConfigError(
                f"{os.fspath(output)} would be written over {known[identity]}, which is read; name another file for the output"
            )


def _target(path: str | os.PathLike) -> Path:
    """Where a file really lies, links followed."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # a zero byte, a link to itself
        raise ConfigError(f"{brief(path)!r} cannot be written: {reason(error)}") from error


def _identity(path: str | os.PathLike) -> tuple[object, ...] | None:
    """Equal for all names of one regular file; `None` for anything else."""
    try:
        found = os.stat(path)
        return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None
    except (OSError, ValueError):
        return None


def _pour(source: Path, target: Path) -> None:
    """Hands the bytes of a file to a pipe or a device; a pipe that nobody reads is an error and does not block."""
    handle = os.open(target, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    with open(source, "rb") as read, open(handle, "wb") as out:
        while part := read.read(_READ_BACK):
            out.write(part)


def _settle(folder: Path) -> None:
    """Makes a rename last; some file systems cannot be asked to."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
