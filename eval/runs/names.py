"""Names of methods and runs as users write them, checked before anything is imported that takes seconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from vtok.errors import ConfigError, brief, unknown
from vtok.reading import exists, is_path, regular
from vtok.registry import METHODS

SUITES = "suites"  # a folder beside the runs: what vtok bench-suite reads

_PLUS = re.compile(r"\+(?=[A-Za-z_]\w*(?:[:+]|$))")  # between methods; not the plus sign of a number


def split_methods(text: str) -> list[str]:
    """`pitome:ratio=0.9+todre` -> its methods."""
    return [part.strip() for part in _PLUS.split(text)]


def check_methods(texts: Iterable[str] | None) -> None:
    """Raises `UnknownNameError` unless all methods exist: `tome:r=8`, `pitome+todre:keep=0.1`, or the path of a saved patch."""
    for text in texts or ():
        for part in split_methods(text):
            name = part.partition(":")[0]
            if name not in METHODS and not is_path(part):
                raise unknown("method", name, METHODS.names())


def bundled() -> list[str]:
    """Names of the runs that come with vtok."""
    return sorted(_bundled())


@cache
def _bundled() -> dict[str, str]:
    """Name of a bundled run -> its folder in `vtok.configs`."""
    folders = [folder for folder in files("vtok.configs").iterdir() if folder.is_dir() and folder.name != SUITES]
    return {p.name.removesuffix(".yaml"): f.name for f in folders for p in f.iterdir() if p.name.endswith(".yaml")}


def find(name: str) -> Path:
    """The file of a bundled run, or the path itself. Raises `UnknownNameError`: neither a file nor a bundled run."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if not exists(name):
            raise ConfigError(f"{brief(name)} does not exist; `vtok configs` lists the runs that come with vtok")
        return regular(name)
    if name not in _bundled():
        raise unknown("run", name, bundled())
    return Path(str(files("vtok.configs") / _bundled()[name] / f"{name}.yaml"))
