"""Files that users name: read if they are files, refused with a sentence if they are anything else.

A pipe, a device or a folder in the place of a file would make reading wait forever or fail with the words of the system.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief

BIGGEST = 64 << 20  # bytes of a file of settings


def exists(path: str | os.PathLike) -> bool:
    """Whether there is anything under a name, whatever the name looks like."""
    try:
        return os.path.exists(path)
    except (OSError, ValueError):  # too long, a zero byte
        return False


def is_folder(path: str | os.PathLike) -> bool:
    """Whether it is a folder, whatever the name looks like."""
    return exists(path) and os.path.isdir(path)


def is_file(path: str | os.PathLike) -> bool:
    """Whether it is a regular file, whatever the name looks like."""
    return exists(path) and os.path.isfile(path)


def is_path(text: str) -> bool:
    """Whether a string that names no method is meant as the file of a saved patch."""
    return bool(text) and (text.endswith(".json") or os.sep in text or exists(text))


def regular(path: str | os.PathLike, what: str = "") -> Path:
    """The path, if it is that of a file.

    Args:
        path: as the user gave it.
        what: it is, before the name in messages: "class map".

    Raises:
        ConfigError: it does not exist, is no regular file, or cannot be reached.
    """
    name = f"{what} {brief(os.fspath(path))}".lstrip()
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise ConfigError(f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISREG(mode):
        return Path(path)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "no file"
    raise ConfigError(f"{name} is {kind}; name a file")


def read_text(path: str | os.PathLike, what: str = "", biggest: int = BIGGEST) -> str:
    """The text of a file, in UTF-8; a byte-order mark is taken off.

    Args:
        path: of the file.
        what: it is, before the name in messages.
        biggest: bytes that it may have.

    Raises:
        ConfigError: it cannot be read, is too big, or holds something else than text.
    """
    source = regular(path, what)
    name = f"{what} {brief(os.fspath(path))}".lstrip()
    try:
        size = source.stat().st_size
        if size > biggest:
            raise ConfigError(f"{name} has {size:,} bytes, more than the {biggest:,} that such a file may have")
        return source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no text in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from error


def from_json(text: str | bytes, wrong: str) -> Any:
    """The values that a JSON text stands for.

    Args:
        text: of a file, or of a line of one.
        wrong: what to say of a text that is none, with the file's name: "x.json is no JSON file".

    Raises:
        ConfigError: it is no JSON, nested beyond any use, or holds a number of endless digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of too many digits
        raise ConfigError(f"{wrong}: {brief(error)}") from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def from_pickle(data: bytes) -> Any:
    """Lists, mappings, texts and numbers of a pickle; one that holds anything else could run a program and is refused.

    Raises:
        pickle.UnpicklingError: it does.
        Exception: of many kinds, where it is no pickle.
    """
    return _Plain(io.BytesIO(data), encoding="utf-8").load()
